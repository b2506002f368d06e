"""What is registered is what was measured: the version's ONNX file, run without torch, gives the table's figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from automerge.preservation import Evaluation
from automerge.registry.registry import load_registry
from automerge.stages.documents import Registration
from tests.e2e.tiny import TASKS, TinyPair, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Arguments: the downloaded version, and the folder with the tasks' data. Prints the share of test samples whose class
# is the highest logit, by task.
CONSUMER = """
import json, sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

version, data = Path(sys.argv[1]), Path(sys.argv[2])
files = json.loads((version / "documents" / "evaluation.json").read_text())["onnx"]["files"]
top1 = {}
for task in sys.argv[3:]:
    session = onnxruntime.InferenceSession(
        version / "onnx" / files.get(task, files.get("merged")), providers=["CPUExecutionProvider"]
    )
    test = load_file(data / f"{task}-test.safetensors")
    (name,) = [each.name for each in session.get_inputs()]
    batches = np.array_split(test["inputs"], 7)  # not the batches of the evaluation
    logits = np.concatenate([session.run(["logits"], {name: batch})[0] for batch in batches])
    hits = int((logits.argmax(axis=1) == test["labels"]).sum())
    top1[task] = [hits, len(test["labels"])]
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "automerge", "mlflow", "transformers"})
assert not loaded, loaded
print(json.dumps(top1))
"""


@pytest.mark.parametrize("private", [[], ["head.*"]], ids=["one head", "a head for each task"])
def test_the_registered_onnx_file_gives_the_figures_of_the_table(
    pair: TinyPair, tmp_path: Path, private: list[str]
) -> None:
    registry = f"sqlite:///{tmp_path / 'registry' / 'mlflow.db'}"
    (tmp_path / "registry").mkdir()
    spec = tiny_spec(str(pair.folder), registry, private=private)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [str(Path(sys.executable).with_name("automerge")), "run", str(tmp_path / "spec.json")]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    registered = Registration.read(tmp_path / "run" / "register" / "registration.json").registered
    assert f"registered: {registered.model} version {registered.version}" in ended.stdout

    version = load_registry(spec).download(registered.model, registered.version, tmp_path / "version")
    names = sorted(path.name for path in (version / "onnx").iterdir())
    assert names == (["model-left.onnx", "model-right.onnx"] if private else ["model.onnx"])
    consumer = subprocess.run(
        [sys.executable, "-I", "-c", CONSUMER, str(version), str(pair.folder), *TASKS],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "version",
    )
    assert consumer.returncode == 0, consumer.stderr
    counted: dict[str, Any] = json.loads(consumer.stdout)

    table = Evaluation.read(tmp_path / "run" / "evaluate" / "evaluation.json")
    assert Evaluation.read(version / "documents" / "evaluation.json") == table
    rows = {row.name: row for row in table.models}
    rates = []
    for task, (hits, samples) in counted.items():
        merged, specialist = rows["merged"].tasks[task], rows[task].tasks[task]
        assert merged.metrics["top1"].value == hits / samples
        assert merged.pr is not None
        rates.append(100 * (hits / samples) / specialist.metrics["top1"].value)
        assert merged.pr.value == pytest.approx(rates[-1], rel=1e-12)
        assert 50 < rates[-1] < 150, "a model that works"
    assert rows["merged"].mean_pr == pytest.approx(sum(rates) / len(rates), rel=1e-12)
    assert rows["merged"].worst_pr == pytest.approx(min(rates), rel=1e-12)
    assert rows["merged"].pd == pytest.approx(max(rates) - min(rates), abs=1e-9)

"""What a user gets wrong, through the real command line: one clear sentence, exit code 2, and no partial result."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from automerge.testing.s3_server import S3Server
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.faults.command_line import automerge

FETCHED = ["fetch/manifest.json"]
SEGMENTED = [*FETCHED, "segment/segmentation.json"]


@dataclass
class Project:
    """A spec of the tiny pair that a test spoils, and the folder in which the command runs."""

    pair: Path
    folder: Path
    spec: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def spoil(self, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
        """A changed copy of one of the pair's files; returns its path."""
        source = self.pair / name
        path = self.folder / f"spoilt-{name}"
        save_file({key: tensor.contiguous() for key, tensor in change(load_file(source)).items()}, path)
        return str(path)

    def run(self, command: str = "run", *options: str) -> "subprocess.CompletedProcess[str]":
        path = self.folder / "spec.json"
        path.write_text(json.dumps(self.spec))
        return self.call(command, "spec.json", "--output", "out", *options)

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        return automerge("--log-level", "ERROR", *arguments, folder=self.folder, environment=environment)

    def left(self) -> list[str]:
        """What the run's folder holds, beside fetched files and metrics."""
        files = [path.relative_to(self.output).as_posix() for path in self.output.rglob("*") if path.is_file()]
        return sorted(name for name in files if not name.endswith(".prom") and not name.startswith(INPUTS))

    def downloaded(self) -> list[str]:
        return [path.name for path in self.output.rglob("*") if path.is_file() and path.suffix != ".prom"]


INPUTS = ("fetch/checkpoints/", "fetch/data/")


@pytest.fixture
def project(pair: TinyPair, tmp_path: Path) -> Project:
    changes: dict[str, Any] = {
        "search": {"trials": 2, "initial": 1, "split": None, "refine": None},
        "evaluation": {"resamples": 100, "baselines": False, "onnx": False},
    }
    spec = tiny_spec(str(pair.folder), f"sqlite:///{tmp_path / 'mlflow.db'}", **changes)
    return Project(pair.folder, tmp_path, spec.model_dump(mode="json"))


@pytest.fixture
def in_s3(project: Project, pair: TinyPair, s3_env: S3Server) -> Project:
    """The same job with everything in a real S3 server."""
    from automerge.storage import upload

    upload(pair.folder, f"s3://{s3_env.bucket}/faults")
    uri = f"s3://{s3_env.bucket}/faults"
    project.spec = json.loads(json.dumps(project.spec).replace(str(pair.folder), uri))
    return project


def refused(ended: "subprocess.CompletedProcess[str]") -> str:
    """The one sentence on stderr, after the checks that hold for every refusal."""
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    # Nothing of Python's own: no traceback, no class, no object's address.
    assert not any(word in lines[0] for word in ("Traceback", "<class", "object at 0x", "None", "torch.Size"))
    return lines[0].removeprefix("error: ")


# --- the spec


def test_a_missing_key(project: Project) -> None:
    del project.spec["sources"][1]["uri"]
    assert refused(project.run()) == "spec.json: sources.1.uri: this key is missing; add it"
    assert not project.output.exists()


def test_an_unknown_technique(project: Project) -> None:
    project.spec["search"]["techniques"] = ["linear", "tiess"]
    sentence = "search.techniques.1: unknown technique 'tiess'; did you mean 'ties'?"
    assert refused(project.run()) == sentence
    assert project.downloaded() == []
    assert refused(project.call("validate", "spec.json")) == sentence


def test_an_unknown_metric(project: Project) -> None:
    project.spec["tasks"][0]["metrics"] = ["top1", "topp5"]
    assert refused(project.run()) == "tasks.left.metrics: classification has no metric 'topp5'; did you mean 'top5'?"
    assert project.downloaded() == []


def test_an_unknown_registry_is_found_before_hours_of_search(project: Project) -> None:
    project.spec["registry"]["kind"] = "mlfow"
    assert refused(project.run()) == "registry.kind: unknown registry kind 'mlfow'; did you mean 'mlflow'?"
    assert project.downloaded() == []


def test_a_device_that_is_not_there_is_found_before_the_download(project: Project) -> None:
    project.environment = {"CUDA_VISIBLE_DEVICES": ""}
    project.spec["compute"]["device"] = "cuda"
    sentence = "compute.device: 'cuda' was asked for and no CUDA device is available; use 'auto' or 'cpu'"
    assert refused(project.run()) == sentence
    assert project.downloaded() == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "no.yaml"), "no.yaml: cannot be read (No such file or directory); pass the path of a spec; "),
        (("run", "."), ".: cannot be read (Is a directory); pass the path of a spec; "),
        (("run",), "missing argument 'SPEC'; see `automerge run --help`"),
        (("rnu", "spec.json"), "no such command 'rnu'. Did you mean 'run'?"),
        (("run", "spec.json", "--resum"), "no such option '--resum'. Did you mean '--resume'?"),
        (("init", "."), "invalid value for '[PATH]': File '.' is a directory; see `automerge init --help`"),
    ],
)
def test_a_slip_on_the_command_line(project: Project, arguments: tuple[str, ...], sentence: str) -> None:
    assert refused(project.call(*arguments)).startswith(sentence)


def test_a_weight_file_instead_of_a_spec(project: Project) -> None:
    sentence = refused(project.call("run", project.spec["base"]["uri"]))
    assert "base.safetensors: cannot be read (not a text file); pass the path of a spec" in sentence


# --- the run's folder


@pytest.mark.parametrize("output", ["spec.json", "spec.json/below", "/proc/runs"])
def test_an_output_folder_that_cannot_be_written(project: Project, output: str) -> None:
    project.run("validate")  # writes spec.json
    sentence = refused(project.call("run", "spec.json", "--output", output))
    assert output in sentence
    assert "cannot be written" in sentence or "is a file" in sentence


@pytest.mark.parametrize(
    ("command", "document", "writer"),
    [
        ("segment", "fetch/manifest.json", "fetch"),
        ("search", "fetch/manifest.json", "fetch"),
        ("merge", "search/recipe.json", "search"),
        ("register", "evaluate/evaluation.json", "evaluate"),
    ],
)
def test_a_stage_before_its_turn(project: Project, command: str, document: str, writer: str) -> None:
    assert refused(project.run(command)) == f"out/{document}: no such file; `automerge {writer}` writes it"
    assert project.left() == []


def test_resume_without_a_run_needs_the_stages_before(project: Project) -> None:
    sentence = refused(project.run("search", "--resume"))
    assert sentence == "out/fetch/manifest.json: no such file; `automerge fetch` writes it"


@pytest.mark.slow
def test_a_second_run_into_the_same_folder(project: Project) -> None:
    first = project.run()
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in project.output.rglob("*") if path.is_file()}
    assert refused(project.run()) == "out: a run was begun here; pass --resume to go on, or another folder"
    assert {path: path.read_bytes() for path in project.output.rglob("*") if path.is_file()} == before
    assert project.run("run", "--resume").returncode == 0


def test_a_recipe_that_is_none(project: Project) -> None:
    assert project.run("fetch").returncode == 0
    cases = {
        "no.json": "no.json: no such file; `automerge search` writes it",
        "out/fetch/manifest.json": "out/fetch/manifest.json: not of the format automerge/recipe, its format is "
        "automerge/manifest; pass what `automerge search` wrote",
    }
    for recipe, sentence in cases.items():
        assert refused(project.run("merge", "--recipe", recipe)) == sentence
    assert project.left() == FETCHED


# --- the model


def test_a_python_path_that_does_not_exist(project: Project) -> None:
    project.spec["model"]["python_path"] = ["nowhere"]
    sentence = refused(project.run())
    assert sentence == (
        f"model.python_path: {project.folder / 'nowhere'} is not a folder; name the folder that holds the "
        "factory's module"
    )
    assert project.downloaded() == []


def test_a_factory_that_is_none(project: Project) -> None:
    project.spec["model"]["target"] = "tiny:biuld"
    sentence = "model.target: the module 'tiny' has no 'biuld'; did you mean 'build'?"
    assert refused(project.run()) == sentence
    assert project.downloaded() == []


# --- checkpoints


def test_sources_of_different_architectures_are_refused_before_the_download(
    in_s3: Project, pair: TinyPair, s3_env: S3Server
) -> None:
    state = load_file(pair.folder / "right.safetensors")
    narrow = {
        "conv.weight": state["conv.weight"][:4].contiguous(),
        "conv.bias": state["conv.bias"],
        "extra": torch.ones(1),
    }
    save_file(narrow, in_s3.folder / "narrow.safetensors")
    s3_env.client().upload_file(str(in_s3.folder / "narrow.safetensors"), s3_env.bucket, "faults/narrow.safetensors")
    in_s3.spec["sources"][1]["uri"] = f"s3://{s3_env.bucket}/faults/narrow.safetensors"
    sentence = refused(in_s3.run())
    assert sentence == (
        "checkpoint 'right' does not fit 'left': 4 tensors: head.bias is missing; head.weight is missing; "
        "extra is not in 'left'; conv.weight has shape [4, 1, 3, 3], expected [6, 1, 3, 3]; merge checkpoints of one "
        "architecture, and declare what only one of them has in this form as private parameters"
    )
    assert in_s3.downloaded() == []


def test_a_base_of_another_shape(project: Project) -> None:
    project.spec["base"]["uri"] = project.spoil(
        "base.safetensors", lambda state: {**state, "head.bias": state["head.bias"][:3]}
    )
    sentence = refused(project.run())
    assert sentence.startswith(
        "checkpoint 'base' does not fit 'left': 1 tensor: head.bias has shape [3], expected [4];"
    )
    assert project.downloaded() == []


def test_weights_that_are_not_of_the_spec_s_model(project: Project) -> None:
    for part in (project.spec["base"], *project.spec["sources"]):
        part["uri"] = project.spoil(
            Path(part["uri"]).name, lambda state: {**state, "head.bias": state["head.bias"][:3]}
        )
    assert "has 1 tensor in another shape than the model: head.bias [3] for [4]" in refused(project.run())
    assert project.left() == SEGMENTED


def test_a_truncated_safetensors_file(project: Project) -> None:
    whole = Path(project.spec["sources"][0]["uri"]).read_bytes()
    torn = project.folder / "torn.safetensors"
    project.spec["sources"][0]["uri"] = str(torn)
    for length in (5, len(whole) - 1):
        torn.write_bytes(whole[:length])
        sentence = refused(project.run("fetch"))
        assert "torn.safetensors" in sentence
        assert sentence.endswith("; get the file again from where it came")
        assert project.downloaded() == []


def test_a_truncated_object(in_s3: Project, pair: TinyPair, s3_env: S3Server) -> None:
    body = (pair.folder / "left.safetensors").read_bytes()[:-40]
    s3_env.client().put_object(Bucket=s3_env.bucket, Key="faults/torn.safetensors", Body=body)
    in_s3.spec["sources"][0]["uri"] = f"s3://{s3_env.bucket}/faults/torn.safetensors"
    assert refused(in_s3.run()).startswith("checkpoint 'left'/torn.safetensors: ")
    assert in_s3.downloaded() == []


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_in_it(project: Project, legacy: bool) -> None:
    mark, file = project.folder / "the-code-ran", project.folder / "left.pt"
    state = load_file(project.spec["sources"][0]["uri"])
    torch.save({**state, "code": Code(mark)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FileExistsError):  # the attack works where a pickle is simply loaded
        mark.mkdir()
        torch.load(file, weights_only=False)
    mark.rmdir()

    project.spec["sources"][0]["uri"] = str(file)
    sentence = refused(project.run())
    assert (
        "left.pt: refused: its pickle asks for posix.mkdir, which is more than tensors and could run code" in sentence
    )
    assert not mark.exists()
    assert project.left() == []


def test_nan_in_a_source(project: Project) -> None:
    def diverge(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["head.weight"][1, 5] = torch.nan
        return state

    project.spec["sources"][1]["uri"] = project.spoil("right.safetensors", diverge)
    sentence = refused(project.run())
    assert sentence == (
        "source 'right', tensor 'head.weight': 1 NaN and 0 infinite values; merge a checkpoint whose training did not "
        "diverge"
    )
    assert project.left() == []


def test_a_folder_without_weights(project: Project) -> None:
    (project.folder / "empty").mkdir()
    project.spec["sources"][0]["uri"] = "empty"
    assert refused(project.run()).startswith("checkpoint 'left': no weights in this folder; pass a folder with ")
    assert project.downloaded() == []


# --- storage


def test_an_s3_key_that_does_not_exist(in_s3: Project, s3_env: S3Server) -> None:
    in_s3.spec["sources"][0]["uri"] = f"s3://{s3_env.bucket}/faults/lefft.safetensors"
    uri = f"s3://{s3_env.bucket}/faults"
    sentence = refused(in_s3.run())
    assert sentence.startswith(f"{uri}/lefft.safetensors: no such object; did you mean {uri}/left.safetensors")
    assert in_s3.downloaded() == []


def test_a_bucket_that_does_not_exist(in_s3: Project, s3_env: S3Server) -> None:
    in_s3.spec["tasks"][1]["test"] = "s3://no-such-bucket/test.safetensors"
    sentence = refused(in_s3.run())
    assert sentence == (
        f"s3://no-such-bucket/test.safetensors: no such bucket 'no-such-bucket' at {s3_env.endpoint}; check the name "
        "and AWS_ENDPOINT_URL_S3"
    )
    assert in_s3.downloaded() == []


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_s3_credentials(in_s3: Project, s3_env: S3Server, name: str) -> None:
    in_s3.environment = {name: "WRONGWRONGWRONGWRONG"}
    sentence = refused(in_s3.run())
    assert f"access denied by {s3_env.endpoint}" in sentence
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in sentence
    assert "WRONGWRONG" not in sentence
    assert s3_env.secret_key not in sentence
    assert in_s3.downloaded() == []


def test_no_s3_credentials(in_s3: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refused(in_s3.run())
    assert in_s3.downloaded() == []


def test_an_unknown_scheme(project: Project) -> None:
    project.spec["base"]["uri"] = "s4://models/base"
    assert refused(project.run()) == "s4://models/base: unknown scheme 's4://'; choose one of: file, s3"


# --- tasks


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_task_with_empty_data(project: Project, split: str) -> None:
    empty = project.spoil(f"left-{split}.safetensors", lambda data: {key: value[:0] for key, value in data.items()})
    project.spec["tasks"][0][split] = empty
    sentence = refused(project.run())
    assert sentence.startswith(f"tasks.left.{split}: ")
    assert sentence.endswith(f"spoilt-left-{split}.safetensors: the data are empty; give at least one sample")
    assert project.left() == []


def test_validation_data_of_a_shape_that_the_model_does_not_take(project: Project) -> None:
    project.spec["tasks"][1]["validation"] = project.spoil(
        "right-validation.safetensors", lambda data: {**data, "inputs": data["inputs"][:, :, :4]}
    )
    sentence = refused(project.run())
    assert sentence.startswith("task 'right': the model fails on the inputs inputs [100, 1, 4, 6]: ")
    assert sentence.endswith("; check the names, shapes and dtypes of the data's inputs, and tasks.batch_size")
    assert project.left() == SEGMENTED


def test_labels_outside_the_classes(project: Project) -> None:
    project.spec["tasks"][0]["validation"] = project.spoil(
        "left-validation.safetensors", lambda data: {**data, "labels": data["labels"] + 5}
    )
    sentence = refused(project.run())
    assert sentence == (
        "task 'left': the data have the label 6 and the model only 4 outputs; check the labels, or the model's number "
        "of classes"
    )
    assert project.left() == SEGMENTED


@pytest.mark.slow
def test_bad_test_data_cost_no_second_search(project: Project) -> None:
    good = project.spec["tasks"][0]["test"]
    project.spec["tasks"][0]["test"] = project.spoil(
        "left-test.safetensors", lambda data: {**data, "labels": data["labels"] + 5}
    )
    assert "task 'left': the data have the label 6 and the model only 4 outputs" in refused(project.run())
    found = ["search/recipe.json", "search/trials.jsonl"]
    assert project.left() == sorted([*SEGMENTED, *found, "merge/merged.json", "merge/model.safetensors"])
    trials = (project.output / "search" / "trials.jsonl").read_bytes()

    project.spec["tasks"][0]["test"] = good
    mended = project.run("run", "--resume")
    assert mended.returncode == 0, mended.stderr
    assert (project.output / "search" / "trials.jsonl").read_bytes() == trials

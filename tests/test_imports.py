"""What an import costs, and what works when only the core is installed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

EXTRAS = ["smac", "ConfigSpace", "transformers", "onnx", "onnxruntime", "boto3", "mlflow", "matplotlib", "kfp", "hera"]

BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "kfp", "smac", "numpy")
    assert python(f"import automerge, automerge.cli, sys; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_merging_in_the_processor_loads_no_torch(tmp_path: Path) -> None:
    """Most of the time of a small merge would be that import."""
    values = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)
    for name, each in zip(("base", "a", "b"), values, strict=True):
        save_file({"w": each, "head": each[0]}, tmp_path / f"{name}.safetensors")
    code = f"""
import sys
from pathlib import Path
from automerge.checkpoint.open import open_checkpoint
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique
folder = Path({str(tmp_path)!r})
opened = {{name: open_checkpoint(folder / f"{{name}}.safetensors") for name in ("base", "a", "b")}}
inputs = {{name: InputDigest(name=name, digest=each.digest()) for name, each in opened.items()}}
base = opened.pop("base")
for technique in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
    block = RecipeBlock(
        name="trunk", technique=technique, weights={{"a": 0.3, "b": 0.6}}, parameters=["w"], buffers=[],
        hyperparameters=load_technique(technique).declaration.defaults(),
    )
    recipe = Recipe(
        base=inputs["base"], sources=[inputs["a"], inputs["b"]], blocks=[block], dtype="bfloat16",
        private={{"a": ["head"], "b": ["head"], "base": ["head"]}},
    )
    assert len(merge_checkpoints(recipe, base, opened, folder / technique, max_shard_bytes=1 << 40)) == 4
print([name for name in sys.modules if name.partition(".")[0] == "torch"])
"""
    assert python(code) == "[]\n"


@pytest.mark.parametrize("stage", ["fetch", "segment", "search", "merge", "evaluate", "register", "run"])
def test_stages_import_with_the_core_alone(stage: str) -> None:
    """Only what a stage really needs is asked for, and then by the name of its extra."""
    assert "function" in python(f"{BLOCK}\nimport automerge; print(automerge.{stage})")


def test_what_needs_an_extra_says_which() -> None:
    code = f"""{BLOCK}
from automerge.errors import AutoMergeError
from automerge.spec import RegistrySpec
from automerge.storage import list_objects
from automerge.registry.mlflow import MlflowRegistry
for attempt in (lambda: list_objects("s3://bucket/key"), lambda: MlflowRegistry(RegistrySpec()).find("a", "b")):
    try:
        attempt()
    except AutoMergeError as error:
        print(error)
"""
    lines = python(code).splitlines()
    assert "automerge-models[s3]" in lines[0]
    assert "automerge-models[registry]" in lines[1]

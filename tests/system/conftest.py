"""What the system tests share: a real run to look at, and a Docker Engine with the images in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from automerge.spec import Spec
from automerge.stages.run import run
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.system.docker_engine import running_engine
from tests.system.images import Images, built_images

LONG_NAME = "right-again-under-a-rather-long-name"


@dataclass(frozen=True)
class Run:
    """A finished run: its spec, and the folder with a folder for each stage."""

    spec: Spec
    folder: Path


@pytest.fixture(scope="session")
def finished_run(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All six stages, on four tasks, one with a long name, and on sources that keep their heads."""
    folder = tmp_path_factory.mktemp("run")
    plain = tiny_spec(str(pair.folder), f"sqlite:///{folder / 'mlflow.db'}")
    left, right = (task.model_dump() for task in plain.tasks)
    guards = [{**left, "name": "guard", "specialist": None, "guard": True}, {**right, "name": LONG_NAME}]
    changes = {"tasks": [left, right, *guards], "private": ["head.*"], "search": {"trials": 12, "initial": 4}}
    spec = tiny_spec(str(pair.folder), f"sqlite:///{folder / 'mlflow.db'}", **changes)
    outcome = run(spec, folder)
    assert outcome.registration is not None
    return Run(spec, folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """Both CPU images, just built, in a running engine of the tests' own."""
    with running_engine() as engine, built_images(engine, tmp_path_factory.mktemp("wheels")) as images:
        yield images

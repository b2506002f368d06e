"""A finished run, and a fetched one, for the tests of single stages."""

import shutil
from pathlib import Path

import pytest

from automerge.spec import Spec
from automerge.stages.run import run
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.trigger.registry import copy_database

SEARCH = {"trials": 5, "initial": 2, "split": None, "refine": None}
SHORT = {"search": SEARCH, "evaluation": {"resamples": 100, "onnx": False}}


@pytest.fixture
def spec(pair: TinyPair, empty_database: Path, tmp_path: Path) -> Spec:
    """A short job on the tiny pair, with a registry of its own; it searches by Bayesian optimisation alone."""
    return tiny_spec(str(pair.folder), f"sqlite:///{copy_database(empty_database, tmp_path)}", **SHORT)


@pytest.fixture(scope="session")
def finished_once(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `spec`; read only."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_spec(str(pair.folder), f"sqlite:///{folder / 'mlflow.db'}", **SHORT), folder / "run")
    return folder / "run"


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of `spec`, to be changed at will."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))

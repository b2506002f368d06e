"""mergekit, in the environment that `make test-mergekit` makes, and its merge of every case."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.mergekit.cases import CASES, FIXTURES
from tests.conformance.mergekit.comparison import Mergekit, Model, as_job

INTERPRETER = Path(__file__).parents[3] / ".venv-mergekit" / "bin" / "python"


@pytest.fixture(scope="session")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mergekit]:
    """mergekit, with the fixtures saved."""
    if not INTERPRETER.exists():
        pytest.fail("mergekit has no environment: run these tests by `make test-mergekit`, which makes it")
    runner = Mergekit(INTERPRETER, tmp_path_factory.mktemp("mergekit"))
    for name, models in FIXTURES.items():
        runner.save(name, models)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def theirs(mergekit: Mergekit) -> dict[str, Model]:
    """mergekit's merge of every case, with our random bits."""
    return {
        name: mergekit.merge(as_job(merge, name, fixture, bits=f"{fixture}.bits"))
        for name, (fixture, merge) in CASES.items()
    }

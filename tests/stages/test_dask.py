"""A search on a Dask cluster whose workers do not see the folders of the search."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from distributed import Client

from automerge import storage
from automerge.errors import SearchError, StorageError
from automerge.merging.recipe import Recipe
from automerge.spec import Spec
from automerge.stages.fetch import fetch
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.testing.s3_server import S3Server
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.searching.test_workers import PATIENCE, dask_scheduler, dask_worker
from tests.stages.conftest import SEARCH, SHORT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# The folder of the process that looks: each process has another one under this name, and the workers' has no run in it.
HERE = Path("/proc/self/cwd")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AUTOMERGE_CACHE", str(folder))
    return folder


@pytest.fixture
def address(s3_env: S3Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A scheduler with two workers; then this process moves to a folder of its own."""
    with ExitStack() as stack:
        host, _ = stack.enter_context(dask_scheduler(tmp_path))
        stack.enter_context(dask_worker(host, tmp_path, "--nworkers", "2", "--nthreads", "1"))
        with Client(f"tcp://{host}", set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE)
        (tmp_path / "driver").mkdir()
        monkeypatch.chdir(tmp_path / "driver")
        yield f"dask://{host}"


@pytest.fixture
def root(pair: TinyPair, s3_env: S3Server, tmp_path: Path) -> str:
    """Where the inputs are."""
    uri = f"s3://{s3_env.bucket}/{tmp_path.name}"
    storage.upload(pair.folder, uri)
    return uri


def remove(s3: S3Server, root: str) -> None:
    for entry in storage.list_objects(root):
        s3.client().delete_object(Bucket=s3.bucket, Key=entry.uri.removeprefix(f"s3://{s3.bucket}/"))


def spec_of(root: str, address: str, **search: object) -> Spec:
    compute = {"device": "cpu", "threads": 1, "scheduler": address}
    return tiny_spec(root, "sqlite:///x.db", **{**SHORT, "search": {**SEARCH, **search}, "compute": compute})


def begun(spec: Spec) -> Path:
    run = HERE / "run"
    fetch(spec, run / "fetch")
    segment(spec, run / "fetch", run / "segment")
    return run


def test_workers_fetch_by_digest_and_once(
    address: str, root: str, cache: Path, pair: TinyPair, s3_env: S3Server
) -> None:
    spec = spec_of(root, address)
    run = begun(spec)
    first = search(spec, run / "fetch", run / "segment", run / "search")
    assert [trial.status for trial in first.trials] == ["ok"] * 5
    fetched = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert len(fetched) == 3 + 2 + 2, "checkpoints, validation data, manifest and segmentation"

    alone = spec.model_copy(update={"compute": spec.compute.model_copy(update={"scheduler": None, "workers": 2})})
    here = search(alone, run / "fetch", run / "segment", run / "here")
    by_recipe = {str(trial.config): trial.objective for trial in here.trials}
    for trial in first.trials[:2]:  # those that do not depend on when the others ended
        assert by_recipe[str(trial.config)] == trial.objective

    # Neither the inputs' store nor the search's folders are needed again.
    remove(s3_env, root)
    second = search(spec, run / "fetch", run / "segment", run / "again")
    assert [trial.status for trial in second.trials] == ["ok"] * 5

    # What comes in the inputs' place is not taken for them.
    shutil.rmtree(cache)
    changed = {"left.safetensors": "right.safetensors"}
    for key in pair.keys:
        storage.upload(pair.folder / changed.get(key, key), f"{root}/{key}")
    with pytest.raises(StorageError, match=r"left\.safetensors: the content has sha256 [0-9a-f]{64}, expected"):
        search(spec, run / "fetch", run / "segment", run / "third")


def test_statistics_come_from_the_mirror(
    address: str, root: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(root, address, techniques=["fisher"], weights="simplex")
    run = begun(spec)
    with pytest.raises(SearchError, match=r"a worker does not see /proc/self/cwd/run/search/statistics\.safetensors"):
        search(spec, run / "fetch", run / "segment", run / "search")
    monkeypatch.setenv("AUTOMERGE_MIRROR", f"{root}/mirror")
    result = search(spec, run / "fetch", run / "segment", run / "search", resume=True)
    assert [trial.status for trial in result.trials] == ["ok"] * 5
    recipe = Recipe.read(run / "search" / "recipe.json")
    assert recipe.statistics is not None
    assert {block.technique for block in recipe.blocks} == {"fisher"}


def test_the_number_of_trials_at_a_time_can_be_fixed(address: str, root: str) -> None:
    """Then a search goes on on a cluster of another size."""
    spec = spec_of(root, address)
    spec = spec.model_copy(update={"compute": spec.compute.model_copy(update={"workers": 3})})
    run = begun(spec)
    result = search(spec, run / "fetch", run / "segment", run / "search")
    assert len(result.trials) == 5

"""What a worker elsewhere has of a search: fetched once, by digest, and whole or not at all."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge import storage
from automerge.errors import SearchError, StorageError
from automerge.merging.statistics import Statistics, write_statistics
from automerge.spec import Spec
from automerge.stages.cache import SearchFiles, StatisticsFile
from automerge.stages.documents import Manifest
from automerge.stages.fetch import fetch
from automerge.stages.segment import segment
from automerge.stages.trials import TrialRun
from automerge.testing.s3_server import S3Server
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.stages.conftest import SHORT
from tests.storage.test_s3 import Proxy

NOWHERE = Path("/nowhere")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AUTOMERGE_CACHE", str(folder))
    return folder


@pytest.fixture
def stored(pair: TinyPair, tmp_path: Path) -> Path:
    """A place of the test's own where the inputs are."""
    return Path(shutil.copytree(pair.folder, tmp_path / "stored"))


@pytest.fixture
def spec(stored: Path, tmp_path: Path) -> Spec:
    return tiny_spec(str(stored), f"sqlite:///{tmp_path / 'mlflow.db'}", **SHORT)


@pytest.fixture
def files(spec: Spec, tmp_path: Path) -> SearchFiles:
    """As they arrive on a machine that sees none of the search's folders."""
    fetch(spec, tmp_path / "run" / "fetch")
    segment(spec, tmp_path / "run" / "fetch", tmp_path / "run" / "segment")
    return elsewhere(
        SearchFiles.of(tmp_path / "run" / "fetch", tmp_path / "run" / "segment", tmp_path / "run" / "search")
    )


def elsewhere(files: SearchFiles, statistics: StatisticsFile | None = None) -> SearchFiles:
    return SearchFiles(NOWHERE, NOWHERE, NOWHERE, files.manifest, files.blocks, statistics)


def test_a_worker_elsewhere_has_the_same(files: SearchFiles, spec: Spec, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    inputs, segmentation, folder = pickle.loads(pickle.dumps(files)).here()
    assert inputs.is_relative_to(cache)
    assert segmentation.is_relative_to(cache)
    assert folder == NOWHERE
    assert (segmentation / "segmentation.json").read_bytes() == (run / "segment" / "segmentation.json").read_bytes()
    here, there = Manifest.read(inputs / "manifest.json"), Manifest.read(run / "fetch" / "manifest.json")
    assert here.digests() == there.digests()
    for item in there.inputs:
        if item.role == "test":
            assert not here.path(inputs, item.name).exists(), "test data are not for trials"
        else:
            assert here.path(inputs, item.name).read_bytes() == there.path(run / "fetch", item.name).read_bytes()
    evaluators = [
        TrialRun.load(spec, inputs, segmentation, NOWHERE).evaluator,
        TrialRun.load(spec, run / "fetch", run / "segment", run / "search").evaluator,
    ]
    losses = [each(each.recipe.blocks).scores["left"].losses.numerator.tolist() for each in evaluators]
    assert losses[0] == losses[1]


def test_what_is_there_is_not_fetched_again(files: SearchFiles, stored: Path) -> None:
    first = files.here()
    shutil.rmtree(stored)
    assert files.here() == first


def test_folders_that_a_worker_sees_are_used(files: SearchFiles, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    places = (run / "fetch", run / "segment", run / "search")
    seen = SearchFiles.of(*places)
    assert seen.here() == places
    assert not cache.exists()
    (run / "fetch" / "manifest.json").write_text("{}")  # of another search that has the same folder there
    assert seen.here() == (files.here()[0], *places[1:])


def test_an_input_that_has_changed_is_one_sentence(files: SearchFiles, stored: Path, cache: Path) -> None:
    left = stored / "left.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(left).items()}, left)
    with pytest.raises(StorageError, match=r"stored/left\.safetensors: the content has sha256 [0-9a-f]{64}, expected"):
        files.here()
    assert not any(path.name.startswith("inputs-") for path in cache.iterdir())
    left.unlink()
    with pytest.raises(StorageError, match=r"stored/left\.safetensors: no such file"):
        files.here()


def test_what_was_cleaned_away_is_fetched_again(files: SearchFiles) -> None:
    inputs, _, _ = files.here()
    manifest = Manifest.read(inputs / "manifest.json")
    victim = manifest.path(inputs, "left")
    content = victim.read_bytes()
    victim.unlink()
    assert files.here()[0] == inputs
    assert victim.read_bytes() == content
    victim.write_bytes(content[:10])
    files.here()
    assert victim.read_bytes() == content


def test_folders_of_several_files(tmp_path: Path, stored: Path) -> None:
    """A checkpoint of shards with its configuration: every file is fetched by its digest."""
    folder = stored / "left"
    folder.mkdir()
    tensors = load_file(stored / "left.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weights = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "config.json").write_text("{}")
    spec = tiny_spec(str(stored), "sqlite:///x.db", **SHORT)
    sources = [{"name": "left", "uri": f"{folder}/"}, {"name": "right", "uri": f"{stored}/right.safetensors"}]
    spec = Spec.model_validate({**spec.model_dump(), "sources": sources})
    run = tmp_path / "run"
    fetch(spec, run / "fetch")
    segment(spec, run / "fetch", run / "segment")
    inputs, segmentation, _ = elsewhere(SearchFiles.of(run / "fetch", run / "segment", run / "search")).here()
    left = Manifest.read(inputs / "manifest.json").path(inputs, "left")
    assert {path.name for path in left.iterdir()} == {*shards, "model.safetensors.index.json", "config.json"}
    TrialRun.load(spec, inputs, segmentation, NOWHERE)


class TestStatistics:
    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Statistics, Path]:
        path = tmp_path / "made" / "statistics.safetensors"
        tensors = {"fisher/left/w": torch.ones(3)}
        of = Statistics.of_tensors(tensors)
        digest = write_statistics(path, of.infos, tensors.items(), {"gathered": "from this"})
        return Statistics(of.infos, tensors.__getitem__, digest=digest, metadata={"gathered": "from this"}), path

    def test_they_come_from_the_mirror(
        self, files: SearchFiles, made: tuple[Statistics, Path], tmp_path: Path, cache: Path
    ) -> None:
        statistics, path = made
        uri = str(tmp_path / "mirror" / "statistics.safetensors")
        storage.upload(path, uri)
        needed = StatisticsFile.of(statistics, path, uri)
        _, _, folder = elsewhere(files, needed).here()
        assert folder.parent == cache
        assert (folder / "statistics.safetensors").read_bytes() == path.read_bytes()

    def test_without_a_mirror_it_is_one_sentence(self, files: SearchFiles, made: tuple[Statistics, Path]) -> None:
        needed = StatisticsFile.of(*made, None)
        with pytest.raises(SearchError) as caught:
            elsewhere(files, needed).here()
        assert str(caught.value) == (
            "a worker does not see /nowhere/statistics.safetensors, which the techniques of this search need; "
            "set AUTOMERGE_MIRROR to a place that the search and its workers reach, or share the folder"
        )

    def test_where_the_folder_is_seen_it_is_used(self, files: SearchFiles, made: tuple[Statistics, Path]) -> None:
        statistics, path = made
        needed = StatisticsFile.of(statistics, path, None)
        seen = SearchFiles(NOWHERE, NOWHERE, path.parent, files.manifest, files.blocks, needed)
        assert seen.here()[2] == path.parent


def test_processes_on_one_machine_fetch_once(
    pair: TinyPair, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four start at once; what the server sends is counted on its way."""
    root = f"s3://{s3_env.bucket}/{tmp_path.name}"
    folder = Path(shutil.copytree(pair.folder, tmp_path / "padded"))
    size = 4 * 2**20
    for name in ("base", "left", "right"):
        path = folder / f"{name}.safetensors"
        save_file(load_file(path), path, metadata={"padding": os.urandom(size // 2).hex()})
    storage.upload(folder, root)
    spec = tiny_spec(root, "sqlite:///x.db", **SHORT)
    run = tmp_path / "run"
    fetch(spec, run / "fetch")
    segment(spec, run / "fetch", run / "segment")
    files = elsewhere(SearchFiles.of(run / "fetch", run / "segment", run / "search"))
    (tmp_path / "files.pickle").write_bytes(pickle.dumps(files))

    sent: list[int] = []

    def counted(data: bytes) -> bytes:
        sent.append(len(data))
        return data

    proxy = Proxy(s3_env, counted)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).here()[0])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "files.pickle")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    outputs = {process.communicate(timeout=100)[0] for process in processes}
    proxy.close()
    assert [process.returncode for process in processes] == [0] * 4
    assert len(outputs) == 1
    assert 3 * size < sum(sent) < 3.5 * size


def test_a_cache_that_cannot_be_written_is_one_sentence(
    files: SearchFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOMERGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"the cache cannot be used \(Not a directory\); set AUTOMERGE_CACHE to a"):
        files.here()
    monkeypatch.delenv("AUTOMERGE_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StorageError, match=r"automerge-cache-12345: the cache cannot be used \(it belongs to another"):
        files.here()

"""The copy of a search elsewhere: what it takes, what it leaves alone, and that it never stands in the search's way."""

import fcntl
import io
import json
import logging
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from automerge import storage
from automerge.errors import SearchError, SpecError, StorageError
from automerge.searching.search import SearchProgress
from automerge.spec import Spec
from automerge.stages.mirror import Mirror
from automerge.stages.search import search
from automerge.telemetry.metrics import StageMetrics
from automerge.testing.s3_server import S3Server
from tests.stages.conftest import SEARCH

IDENTITY = "this-search"


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "automerge")


@pytest.fixture(params=["path", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty place of each kind, which the environment names as the mirror."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_env")
        uri = f"s3://{server.bucket}/{tmp_path.name}"
    else:
        uri = f"{tmp_path}/mirror"
    monkeypatch.setenv("AUTOMERGE_MIRROR", uri)
    monkeypatch.setenv("AUTOMERGE_MIRROR_SECONDS", "600")
    yield uri


def lines(folder: Path) -> list[bytes]:
    return (folder / "trials.jsonl").read_bytes().splitlines()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    mirrors = [record for record in caplog.records if record.name == "automerge.stages.mirror"]
    return [record.getMessage() for record in mirrors if record.levelname == "WARNING"]


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


# The stage


class Run:
    """Searches of one fetched run, each in a folder of its own; what happened in the last one."""

    def __init__(self, finished: Path, root: Path) -> None:
        self.finished = finished
        self.root = root
        self.replayed: list[bool] = []

    def search(self, spec: Spec, name: str, *, resume: bool = True, until: int | None = None) -> Path:
        """Search in the folder ``name``, and be interrupted after so many trials."""
        self.replayed = []

        def progress(event: SearchProgress) -> None:
            self.replayed.append(event.replayed)
            if event.done == until and not event.replayed:
                raise KeyboardInterrupt

        folder = self.root / name
        search(spec, self.finished / "fetch", self.finished / "segment", folder, resume=resume, progress=progress)
        return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    return Run(finished, tmp_path)


def test_a_process_elsewhere_goes_on(run: Run, spec: Spec, place: str, caplog: pytest.LogCaptureFixture) -> None:
    first = run.search(spec, "first", until=3)
    paid = lines(first)
    shutil.rmtree(first)
    second = run.search(spec, "second")
    assert run.replayed == [True, True, True, False, False]
    assert lines(second)[: len(paid)] == paid
    assert (second / "recipe.json").read_bytes() == (run.finished / "search" / "recipe.json").read_bytes()
    third = run.search(spec, "third")
    assert run.replayed == [True] * 5
    assert lines(third) == lines(second)
    assert (third / "recipe.json").read_bytes() == (second / "recipe.json").read_bytes()
    assert warnings(caplog) == []
    metrics = (third / "metrics" / "search.prom").read_text()
    assert "automerge_search_mirror_last_success_timestamp_seconds{" in metrics
    assert any(
        line.startswith("automerge_search_mirror_failures_total{") and line.endswith(" 0.0")
        for line in metrics.splitlines()
    )


def test_without_resume_it_is_not_begun_a_second_time(run: Run, spec: Spec, place: str) -> None:
    run.search(spec, "first", resume=False, until=3)
    with pytest.raises(SearchError, match=r"search\.zip: this search was begun already; pass --resume to go on, or"):
        run.search(spec, "second", resume=False)
    assert not (run.root / "second" / "trials.jsonl").exists()


def test_another_search_has_another_copy(run: Run, spec: Spec, place: str) -> None:
    run.search(spec, "first")
    run.search(changed(spec, search={**SEARCH, "seed": 1}), "other-seed")
    assert run.replayed == [False] * 5
    run.search(changed(spec, merge={"dtype": "bfloat16"}), "other-dtype")
    assert run.replayed == [False] * 5
    manifest = run.finished / "fetch" / "manifest.json"
    fetched = json.loads(manifest.read_bytes())
    fetched["inputs"][1]["digest"] = "0" * 64
    manifest.write_text(json.dumps(fetched))
    run.search(spec, "other-checkpoint")
    assert run.replayed == [False] * 5
    assert sum(entry.key.endswith("search.zip") for entry in storage.list_objects(place)) == 4


def test_more_trials_go_on_from_the_copy(run: Run, spec: Spec, place: str) -> None:
    run.search(spec, "first")
    run.search(changed(spec, search={**SEARCH, "trials": 7}), "second")
    assert run.replayed == [True] * 5 + [False] * 2


def test_a_damaged_copy_is_not_used_and_replaced(
    run: Run, spec: Spec, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    run.search(spec, "first")
    (copy,) = [entry for entry in storage.list_objects(place) if entry.key.endswith("search.zip")]
    there = storage.read_object(copy.uri)
    assert there is not None
    half = there.content[: len(there.content) // 2]
    assert storage.write_object(copy.uri, half, replacing=there.etag) is not None
    run.search(spec, "second")
    assert run.replayed == [False] * 5
    assert warnings(caplog) == [f"{copy.uri}: the copy is damaged, and is not used"]
    run.search(spec, "third")
    assert run.replayed == [True] * 5


def test_statistics_are_not_gathered_again(
    run: Run, spec: Spec, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fisher = changed(spec, search={**SEARCH, "weights": "simplex", "techniques": ["fisher", "linear"]})
    first = run.search(fisher, "first", until=3)

    def gathered(*arguments: object) -> None:
        raise AssertionError("gathered again")

    with monkeypatch.context() as patch:
        patch.setattr("automerge.stages.trials.gather", gathered)
        second = run.search(fisher, "second")
    assert run.replayed == [True, True, True, False, False]
    assert lines(second)[: len(lines(first))] == lines(first)

    # Damaged, they are gathered anew, and the copy is mended.
    (copy,) = [entry for entry in storage.list_objects(place) if "statistics/" in entry.key]
    damaged = run.root / "damaged"
    damaged.write_bytes(b"\0" * 100)
    storage.upload(damaged, copy.uri)
    third = run.search(fisher, "third")
    assert run.replayed == [True] * 5
    assert lines(third) == lines(second)


def test_a_mirror_out_of_reach_is_one_warning(
    run: Run, spec: Spec, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AUTOMERGE_MIRROR", f"s3://{s3_env.bucket}/mirror")
    monkeypatch.setenv("AUTOMERGE_MIRROR_SECONDS", "0.05")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    folder = run.search(spec, "first")
    assert (folder / "recipe.json").read_bytes() == (run.finished / "search" / "recipe.json").read_bytes()
    (warning,) = warnings(caplog)
    assert warning.startswith("the search goes on without a copy elsewhere: s3://models/mirror/")
    assert "access denied" in warning
    assert "wrong-and-secret" not in caplog.text
    assert s3_env.secret_key not in caplog.text
    metrics = (folder / "metrics" / "search.prom").read_text()
    (failures,) = [line for line in metrics.splitlines() if line.startswith("automerge_search_mirror_failures_total{")]
    assert float(failures.split()[-1]) >= 3
    assert "automerge_search_mirror_last_success_timestamp_seconds" not in metrics


@pytest.mark.slow
def test_an_endpoint_that_is_not_there_is_one_warning(
    run: Run, spec: Spec, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AUTOMERGE_MIRROR", f"s3://{s3_env.bucket}/mirror")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    run.search(spec, "first")
    (warning,) = warnings(caplog)
    assert "the S3 endpoint http://127.0.0.1:9 cannot be reached" in warning


def test_after_an_outage_the_whole_search_is_copied(
    run: Run, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = tmp_path / "mirror"
    mirror.touch()  # no folder
    monkeypatch.setenv("AUTOMERGE_MIRROR", str(mirror))
    monkeypatch.setenv("AUTOMERGE_MIRROR_SECONDS", "600")
    began = Mirror.kept

    def mended(self: Mirror, folder: Path) -> object:
        mirror.unlink()
        return began(self, folder)

    monkeypatch.setattr(Mirror, "kept", mended)
    run.search(spec, "first")
    assert len(warnings(caplog)) == 1
    assert sum("has the search again" in record.getMessage() for record in caplog.records) == 1
    monkeypatch.setattr(Mirror, "kept", began)
    run.search(spec, "second")
    assert run.replayed == [True] * 5


@pytest.mark.parametrize(
    ("place", "seconds", "refusal"),
    [
        ("gs://bucket/mirror", "60", r"gs://bucket/mirror: unknown scheme 'gs://'"),
        ("mirror", "often", r"AUTOMERGE_MIRROR_SECONDS: 'often' is no number of seconds; write for instance 60"),
        ("mirror", "0", r"AUTOMERGE_MIRROR_SECONDS: '0' is no number of seconds"),
        ("mirror", "nan", r"AUTOMERGE_MIRROR_SECONDS: 'nan' is no number of seconds"),
    ],
)
def test_a_mirror_that_cannot_be_is_refused(
    run: Run, spec: Spec, monkeypatch: pytest.MonkeyPatch, place: str, seconds: str, refusal: str
) -> None:
    monkeypatch.setenv("AUTOMERGE_MIRROR", place)
    monkeypatch.setenv("AUTOMERGE_MIRROR_SECONDS", seconds)
    with pytest.raises((SpecError, StorageError), match=refusal):
        run.search(spec, "first")


# The copy itself, of logs whose lines are numbers


def written(folder: Path, count: int, *, torn: str = "", steps: dict[int, int] | None = None) -> Path:
    """A folder whose log has ``count`` lines, the header among them."""
    folder.mkdir(exist_ok=True)
    header = json.dumps({"event": "header", "identity": IDENTITY})
    (folder / "trials.jsonl").write_text("\n".join([header, *map(str, range(1, count))]) + "\n" + torn)
    for number, step in (steps or {}).items():
        (folder / f"refinement-{number}.json").write_text(json.dumps({"step": step}))
    return folder


def mirror_of(place: str, folder: Path, *, seconds: float = 600) -> Mirror:
    """A mirror of a process that has started in the folder."""
    mirror = Mirror(place, seconds, StageMetrics("search", "tiny", "net", None))
    mirror.restore(IDENTITY, folder, resume=True)
    return mirror


def copied(mirror: Mirror, folder: Path) -> None:
    with mirror.kept(folder):
        pass


def copy_at(place: str) -> dict[str, bytes]:
    there = storage.read_object(f"{place}/{IDENTITY}/search.zip")
    assert there is not None
    with zipfile.ZipFile(io.BytesIO(there.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_torn_line_is_not_copied(place: str, tmp_path: Path) -> None:
    here = written(tmp_path / "here", 4, torn='{"event":"te', steps={2: 5})
    copied(mirror_of(place, here), here)
    assert copy_at(place)["trials.jsonl"].splitlines()[1:] == [b"1", b"2", b"3"]
    mirror_of(place, tmp_path / "elsewhere")
    assert lines(tmp_path / "elsewhere") == lines(here)[:-1]
    assert (tmp_path / "elsewhere" / "refinement-2.json").read_text() == '{"step": 5}'


def test_a_shorter_log_never_replaces_a_longer_one(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pod that was taken for dead, and its successor."""
    successor = mirror_of(place, tmp_path / "successor")
    old = written(tmp_path / "old", 6)
    copied(mirror_of(place, old), old)
    new = written(tmp_path / "successor", 4)
    for _ in range(2):
        copied(successor, new)
    assert len(copy_at(place)["trials.jsonl"].splitlines()) == 6
    (warning,) = warnings(caplog)
    assert warning.endswith(
        "another process has got further in the same search: its copy stays until this one overtakes it"
    )
    copied(successor, written(new, 6, steps={3: 5}))
    assert copy_at(place)["refinement-3.json"] == b'{"step": 5}', "as long, but further refined"
    copied(successor, written(new, 7))
    assert len(copy_at(place)["trials.jsonl"].splitlines()) == 7


def test_the_folder_that_has_got_further_stays(place: str, tmp_path: Path) -> None:
    other = written(tmp_path / "other", 5, steps={1: 10})
    copied(mirror_of(place, other), other)
    for here, expected in (
        (written(tmp_path / "longer", 6), 6),
        (written(tmp_path / "equal", 5, steps={1: 10}), 5),
        (written(tmp_path / "shorter", 3, steps={7: 1}), 5),
    ):
        mirror_of(place, here)
        assert len(lines(here)) == expected
    assert sorted(path.name for path in (tmp_path / "shorter").iterdir()) == ["refinement-1.json", "trials.jsonl"]


def test_a_log_in_use_is_not_replaced(place: str, tmp_path: Path) -> None:
    other = written(tmp_path / "other", 5)
    copied(mirror_of(place, other), other)
    here = written(tmp_path / "here", 3)
    with (here / "trials.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SearchError, match="another process is searching here"):
            mirror_of(place, here)
    assert len(lines(here)) == 3


def test_a_log_of_another_search_stays(place: str, tmp_path: Path) -> None:
    other = written(tmp_path / "other", 5)
    copied(mirror_of(place, other), other)
    here = tmp_path / "here"
    here.mkdir()
    (here / "trials.jsonl").write_text('{"identity": "another"}\n')
    mirror_of(place, here)
    assert (here / "trials.jsonl").read_text() == '{"identity": "another"}\n'


def test_copies_are_made_from_time_to_time_and_on_request(place: str, tmp_path: Path) -> None:
    here = written(tmp_path / "here", 2)

    def becomes(count: int, happens: Callable[[], None]) -> None:
        written(here, count)
        happens()
        deadline = time.monotonic() + 30
        while len(copy_at(place)["trials.jsonl"].splitlines()) != count:
            assert time.monotonic() < deadline, "it was not copied"
            time.sleep(0.01)

    copied(mirror_of(place, here), here)
    often = mirror_of(place, here, seconds=0.02)
    with often.kept(here):
        becomes(3, lambda: None)
        becomes(4, lambda: None)
    seldom = mirror_of(place, here)
    with seldom.kept(here):
        becomes(5, seldom.copy_soon)


def test_large_statistics_do_not_hold_up_the_end(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = written(tmp_path / "here", 2)
    (here / "statistics.safetensors").touch()
    mirror = mirror_of(place, here)
    mirror.hold_statistics("key", here / "statistics.safetensors")
    under_way, enough = threading.Event(), threading.Event()

    def slowly(*_: object) -> None:
        under_way.set()
        enough.wait(60)

    monkeypatch.setattr(storage, "upload", slowly)
    monkeypatch.setattr("automerge.stages.mirror.FLUSH_SECONDS", 3)
    with mirror.kept(here):
        assert under_way.wait(60)
        written(here, 3)
    assert len(copy_at(place)["trials.jsonl"].splitlines()) == 3
    enough.set()


def test_the_end_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = written(tmp_path / "here", 2)
    mirror = mirror_of(str(tmp_path / "mirror"), here)
    monkeypatch.setattr("automerge.stages.mirror.FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(storage, "write_object", lambda *_, **__: time.sleep(2))
    start = time.monotonic()
    copied(mirror, here)
    assert time.monotonic() - start < 1
    (warning,) = warnings(caplog)
    assert warning.endswith("did not take the end of the search within 0.1 s")

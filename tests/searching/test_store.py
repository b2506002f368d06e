"""The trial store: every event is on disk before the search goes on, and a log is read back exactly or refused."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.errors import SearchError
from automerge.searching.store import Ask, Header, Tell, TrialStore, read_log, read_trials
from automerge.searching.trial import Trial
from tests.searching.synthetic import losses_objective

HEADER = Header(
    identity="this search", hardware="this machine", objective=losses_objective({"low": 0.1, "high": 1 / 3})
)


def ask(number: int, **config: Any) -> Ask:
    return Ask(number=number, origin="sobol", config=config or {"b0/weight/low": number / 7})


def tell(number: int, **changes: Any) -> Tell:
    fields: dict[str, Any] = {
        "number": number,
        "origin": "sobol",
        "config": {"b0/weight/low": number / 7},
        "status": "ok",
        "cost": 1 / 3,
        "objective": 3.0,
        "losses": {"low": 0.1},
        "cp": {"low": 1.0},
        "seconds": 0.5,
        "optimiser_seconds": 0.06,
    }
    return Tell(trial=Trial(**{**fields, **changes}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log with three asks and two tells."""
    path = tmp_path / "search" / "trials.jsonl"
    store = TrialStore.create(path, HEADER)
    for event in (ask(0), tell(0), ask(1), tell(1), ask(2)):
        store.append(event)
    store.close()
    return path


def test_a_log_is_read_back_as_it_was_written(path: Path) -> None:
    header, events, length = read_log(path)
    assert header == HEADER
    assert events == [ask(0), tell(0), ask(1), tell(1), ask(2)]
    assert length == path.stat().st_size
    assert [trial.number for trial in read_trials(path)] == [0, 1]


def test_trials_are_sorted_by_number_whatever_the_order_of_their_ends(path: Path) -> None:
    store = TrialStore.resume(path, HEADER.identity)
    for event in (ask(3), tell(3), tell(2)):
        store.append(event)
    store.close()
    assert [trial.number for trial in read_trials(path)] == [0, 1, 2, 3]


JSON_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.one_of(JSON_FLOATS, st.integers(-(2**53), 2**53), st.booleans(), st.text(max_size=20))
CONFIGS = st.dictionaries(st.text(max_size=30), VALUES, max_size=5)


@given(
    configs=st.lists(CONFIGS, max_size=4),
    losses=st.dictionaries(st.text(max_size=10), JSON_FLOATS, max_size=3),
    error=st.none() | st.text(max_size=60),
    cost=st.floats(allow_nan=False),
)
def test_any_events_survive_the_round_trip(
    configs: list[dict[str, Any]], losses: dict[str, float], error: str | None, cost: float
) -> None:
    """Floats to the last bit, and any text: line ends and separators in it must not end a line."""
    written: list[Ask | Tell] = []
    for number, config in enumerate(configs):
        written.append(Ask(number=number, origin="surrogate", config=config))
        written.append(tell(number, config=config, losses=losses, cost=cost, error=error))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.jsonl"
        store = TrialStore.create(path, HEADER)
        for event in written:
            store.append(event)
        store.close()
        resumed = TrialStore.resume(path, HEADER.identity)
        resumed.close()
    assert resumed.events == written
    assert resumed.header == HEADER
    for event, original in zip(resumed.events, written, strict=True):
        assert event.model_dump_json() == original.model_dump_json()


def test_each_event_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each fsync the file already holds the whole line, and nothing is written after it."""
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def recorded(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", status.st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    path = tmp_path / "trials.jsonl"
    store = TrialStore.create(path, HEADER)
    first = path.stat().st_size
    assert [kind for kind, _ in synced] == ["file", "folder"], "content first, then the name"
    assert synced[0] == ("file", first)
    for event in (ask(0), tell(0), ask(1)):
        synced.clear()
        store.append(event)
        assert synced == [("file", path.stat().st_size)]
        assert path.read_bytes().splitlines()[-1] == event.model_dump_json().encode()
    store.close()
    assert path.read_bytes().count(b"\n") == 4


def test_what_was_appended_survives_sigkill(tmp_path: Path) -> None:
    """Nothing waits in the process's own buffers."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from automerge.searching.store import Ask, Header, TrialStore\n"
        "header = Header.model_validate_json(sys.argv[2])\n"
        "store = TrialStore.create(Path(sys.argv[1]), header)\n"
        "store.append(Ask(number=0, origin='sobol', config={'w': 0.1}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "trials.jsonl"
    killed = subprocess.run([sys.executable, "-c", script, str(path), HEADER.model_dump_json()], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_log(path)[1] == [Ask(number=0, origin="sobol", config={"w": 0.1})]


def test_a_log_cut_anywhere_in_its_last_line_goes_on_at_the_line_before(path: Path) -> None:
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        store = TrialStore.resume(path, HEADER.identity)
        assert store.events == [ask(0), tell(0), ask(1), tell(1)]
        store.append(ask(2))
        store.close()
        assert path.read_bytes() == whole


def test_reading_alone_changes_nothing(path: Path) -> None:
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    assert len(read_trials(path)) == 2
    assert path.read_bytes() == torn


@pytest.mark.parametrize(
    ("line", "content"),
    [
        (1, b"{}"),
        (1, b'{"event":"ask","number":0,"origin":"sobol","config":{}}'),
        (2, b"\x00" * 40),
        (2, b'{"event":"ask","number":0'),
        (3, b""),
        (3, b"[]"),
        (3, b"7"),
        (3, b'{"event":"tell"}'),
        (4, b'{"event":"ask","number":"x","origin":"sobol","config":{}}'),
        (4, b'{"event":"ask","number":1,"origin":"sobol","config":{},"more":1}'),
        (5, b'{"number":1}'),
        (5, b'{"event":"sing","number":1}'),
        (6, b"\xff\xfe"),
        (6, b'{"event":"ask",\r"number":'),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_changed(path: Path, line: int, content: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = content
    damaged = b"\n".join(lines)
    path.write_bytes(damaged)
    for read in (read_log, read_trials, lambda path: TrialStore.resume(path, HEADER.identity)):
        with pytest.raises(SearchError, match=f"line {line} is damaged"):
            read(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"", HEADER.model_dump_json().encode()])
def test_a_log_without_a_whole_header_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SearchError, match="has no header"):
        TrialStore.resume(path, HEADER.identity)


def test_a_log_of_a_later_format_is_refused(path: Path) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[0] = json.dumps({**json.loads(lines[0]), "version": 3}).encode()
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(SearchError, match="is of version 3, and this release reads version 2"):
        read_log(path)


def test_a_foreign_log_is_refused_and_untouched(path: Path) -> None:
    before = path.read_bytes() + b'{"torn'
    path.write_bytes(before)
    with pytest.raises(SearchError, match=r"belongs to another search .*; start in another folder"):
        TrialStore.resume(path, "that search")
    assert path.read_bytes() == before


def test_a_log_is_never_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(SearchError, match=r"a search was begun here; pass --resume"):
        TrialStore.create(path, HEADER)
    assert path.read_bytes() == before


def test_without_a_log_there_is_nothing_to_resume(tmp_path: Path) -> None:
    for read in (read_trials, lambda path: TrialStore.resume(path, "x")):
        with pytest.raises(SearchError, match="no search was begun here"):
            read(tmp_path / "trials.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_log_is_left_in_the_folder(path: Path) -> None:
    assert [child.name for child in path.parent.iterdir()] == ["trials.jsonl"]


def test_two_processes_cannot_search_in_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    header = Header(identity="same", hardware="", objective=losses_objective())
    first = TrialStore.create(path, header)
    with pytest.raises(SearchError, match="another process is searching here"):
        TrialStore.resume(path, "same")
    first.close()
    TrialStore.resume(path, "same").close()

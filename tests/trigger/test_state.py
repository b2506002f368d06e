"""The state file."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from automerge.errors import TriggerError
from automerge.trigger.candidate import Candidate
from automerge.trigger.rules import Decision, Verb
from automerge.trigger.state import Delivery, State


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.sqlite")


def delivery(identity: str, received: float = 1.0, door: str = "mlflow") -> Delivery:
    return Delivery(door, identity, received, "alias.created", "digits-low", "1", "accepted")


def decision(verb: Verb = "start", version: str = "1", reason: str = "why") -> Decision:
    candidates = (Candidate("m", "x", version, "s3://x", 1, {"base": "b"}), Candidate("m", "y", "1", "s3://y", 1))
    return Decision("rule", (("base", "b"),), candidates, verb, reason)


def test_a_delivery_is_new_once_at_each_door(state: State) -> None:
    assert state.record_delivery(delivery("a"))
    assert not state.record_delivery(delivery("a", 2.0))
    assert state.record_delivery(delivery("a", door="cloudevents"))
    assert len(state.deliveries(10)) == 2


def test_of_many_threads_one_is_first(state: State) -> None:
    new: list[bool] = []
    threads = [threading.Thread(target=lambda: new.append(state.record_delivery(delivery("a")))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(new) == 1
    assert len(new) == 20


def test_a_run_is_intended_once_for_a_set(state: State) -> None:
    assert state.intend(decision(), "{}", 5.0)
    assert not state.intend(decision(), "{}", 6.0)
    [run] = state.active_runs()
    assert (run.name, run.state, run.created) == (decision().run, "intended", 5.0)
    assert run.candidates == decision().candidates
    assert [each.verb for each in state.decisions(10)] == ["start"]


def test_a_decision_is_recorded_when_it_changes(state: State) -> None:
    assert state.record_decision(decision("too_few"), 1)
    assert not state.record_decision(decision("too_few"), 2)
    assert state.intend(decision(), "{}", 3)
    assert not state.record_decision(decision("known"), 4)  # what follows from the start is no news
    assert state.record_decision(decision("too_few", "2"), 5)
    assert [each.decided for each in state.decisions(10)] == [5, 3, 1]


def test_a_run_and_its_verdict(state: State) -> None:
    state.intend(decision(), "{}", 1)
    [run] = state.active_runs()
    state.mark_started(run, "id-1", "http://kfp/1", 2)
    [run] = state.active_runs()
    assert (run.state, run.id, run.started) == ("started", "id-1", 2)
    state.mark_ended(run, "failed", "no disk", "", 3)
    assert state.active_runs() == []
    assert not state.past_runs()[0].active


def test_a_retry_is_another_attempt_and_only_of_what_ended_badly(state: State) -> None:
    state.intend(decision(), "{}", 1)
    [run] = state.active_runs()
    assert not state.retry(run, "{}", 2)
    state.mark_ended(run, "failed", "no disk", "", 3)
    assert state.retry(run, '{"new": 1}', 4)
    assert not state.retry(run, "{}", 5)  # the attempt that it was about is over
    [again] = state.active_runs()
    assert (again.attempt_name, again.spec, again.message) == (f"{run.name}-2", '{"new": 1}', "")
    state.mark_ended(run, "passed", "", "", 6)  # a late word on the first attempt changes nothing
    assert state.active_runs() == [again]


def test_everything_is_there_again_after_it_was_closed(state: State) -> None:
    state.record_delivery(delivery("a"))
    state.intend(decision(), "{}", 1)
    state.mark_reconciled("m", 7)
    before = (state.deliveries(9), state.decisions(9), state.runs(9), state.reconciles())
    state.close()
    again = State(state.path)
    assert (again.deliveries(9), again.decisions(9), again.runs(9), again.reconciles()) == before


def test_a_second_service_is_refused(state: State) -> None:
    with pytest.raises(TriggerError, match="another trigger service has it open; stop that one"):
        State(state.path)


def test_a_file_of_a_newer_release_is_refused(state: State) -> None:
    state.close()
    with sqlite3.connect(state.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(TriggerError, match=r"written by a newer release \(version 99; this one writes 1\)"):
        State(state.path)


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no database " * 1000)
    with pytest.raises(TriggerError, match="no state file of this service"):
        State(path)
    assert path.read_text().startswith("no database")


def test_what_may_be_repeated_is_never_forgotten(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("automerge.trigger.state._KEPT_DELIVERIES", 3)
    for number in range(10):
        state.record_delivery(delivery(f"{number}", received=float(number)))
    state.prune(before=4.0)
    assert sorted(each.received for each in state.deliveries(99)) == [4, 5, 6, 7, 8, 9]
    state.prune(before=100.0)
    assert sorted(each.received for each in state.deliveries(99)) == [6, 7, 8, 9]


_WRITER = """
import sys
from pathlib import Path
from automerge.trigger.state import Delivery, State
state = State(Path(sys.argv[1]))
for number in range(100_000):
    state.record_delivery(Delivery("mlflow", str(number), 1.0, "k", "m", "1", "accepted"))
    print(number, flush=True)
"""


def test_a_kill_loses_nothing_that_was_promised(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    promised = [writer.stdout.readline() for _ in range(50)][-1]
    os.kill(writer.pid, signal.SIGKILL)
    rest = writer.stdout.read().splitlines()
    last = int((rest or [promised])[-1])
    writer.wait()
    kept = {int(each.id) for each in State(path).deliveries(1_000_000)}
    assert kept >= set(range(last + 1))
    assert len(kept) <= last + 2

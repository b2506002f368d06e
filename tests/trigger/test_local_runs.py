"""Runs on this machine: real ones, of the smallest real job."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from automerge.trigger.config import LocalRunner
from automerge.trigger.runners import LocalRuns, _is_held
from automerge.trigger.state import Run
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.trigger.service import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run_of(name: str, spec: dict[str, Any]) -> Run:
    text = json.dumps(spec)
    return Run(name, "rule", (), "d" * 64, (), text, "intended", 1, "", "", "", "", 0.0, None, None)


@pytest.fixture
def spec(pair: TinyPair, tmp_path: Path) -> dict[str, Any]:
    made = tiny_spec(
        str(pair.folder), f"sqlite:///{tmp_path / 'mlflow.db'}", evaluation={"resamples": 100, "onnx": False}
    )
    return made.model_dump(mode="json")


def end(runs: LocalRuns, run: Run) -> Callable[[], Any]:
    def look() -> Any:
        found = runs.look(run)
        return found if found.state != "started" else None

    return look


def test_a_run_passes_and_is_started_once_by_whichever_service(spec: dict[str, Any], tmp_path: Path) -> None:
    settings, run = LocalRunner(kind="local", folder=tmp_path / "runs"), run_of("tiny", spec)
    assert LocalRuns(settings).start(run) is not None
    runs = LocalRuns(settings)  # the first one is forgotten, as by a kill
    assert runs.start(run) is not None  # it lives
    assert runs.start(run_of("second", spec)) is None  # there is one place
    assert runs.look(run).state == "started"
    look = wait_for(end(runs, run))
    folder = tmp_path / "runs" / "tiny"
    assert look.state == "passed", (folder / "log.txt").read_text()
    assert str(tmp_path / "mlflow.db") in look.registered
    written = (folder / "log.txt").read_bytes()
    assert runs.start(run) is not None  # it has ended
    assert runs.look(run) == look
    assert (folder / "log.txt").read_bytes() == written


def test_a_mistake_in_the_spec_is_the_runs_last_word(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["base"]["uri"] = str(tmp_path / "nowhere.safetensors")
    runs, run = LocalRuns(LocalRunner(kind="local", folder=tmp_path / "runs")), run_of("wrong", spec)
    runs.start(run)
    look = wait_for(end(runs, run))
    assert look.state == "failed"
    assert "nowhere.safetensors" in look.message


def test_a_model_that_the_gate_refuses(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["gate"] = {"min_worst_pr": 300, "max_pd": None}
    runs, run = LocalRuns(LocalRunner(kind="local", folder=tmp_path / "runs")), run_of("refused", spec)
    runs.start(run)
    look = wait_for(end(runs, run))
    assert look.state == "refused", (tmp_path / "runs" / "refused" / "log.txt").read_text()


@pytest.mark.parametrize("how", ["close", "kill"])
def test_an_interrupted_run_goes_on(spec: dict[str, Any], tmp_path: Path, how: str) -> None:
    spec["search"]["trials"] = 16
    settings, run = LocalRunner(kind="local", folder=tmp_path / "runs"), run_of("tiny", spec)
    runs = LocalRuns(settings)
    runs.start(run)
    folder = tmp_path / "runs" / "tiny"
    trials = folder / "run" / "search" / "trials.jsonl"
    wait_for(lambda: trials.exists() and trials.read_text().count("\n") > 3)
    if how == "close":
        runs.close()  # SIGTERM of the service
    else:
        os.killpg(runs._children["tiny"].pid, signal.SIGKILL)  # the machine goes down
        wait_for(lambda: not _is_held(folder / "lock"))
    assert not _is_held(folder / "lock")
    assert not (folder / "exit_code").exists()
    paid = trials.read_text().splitlines()[:3]
    second = LocalRuns(settings)
    assert second.look(run).state == "started"
    assert wait_for(end(second, run)).state == "passed", (folder / "log.txt").read_text()
    assert trials.read_text().splitlines()[:3] == paid


def test_the_services_secrets_are_not_the_runs(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AUTOMERGE_WEBHOOK_SECRET", "AUTOMERGE_ADMIN_TOKEN", "AUTOMERGE_KFP_TOKEN"):
        monkeypatch.setenv(name, "a-secret-of-the-service")
    runs, run = LocalRuns(LocalRunner(kind="local", folder=tmp_path / "runs")), run_of("tiny", spec)
    runs.start(run)
    process = runs._children["tiny"].pid
    environment = b""
    deadline = time.monotonic() + 30
    while b"OMP_NUM_THREADS" not in environment and time.monotonic() < deadline:
        environment = Path(f"/proc/{process}/environ").read_bytes()
    assert b"OMP_NUM_THREADS" in environment
    assert b"a-secret-of-the-service" not in environment
    runs.close()

"""Searches that end before their time, and are resumed: nothing that was paid for is lost, and the recipe is the same.

The whole stage runs in a process of its own, by the command line, on a model of two layers.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from automerge.searching.evaluator import Outcome, RecipeEvaluator
from automerge.searching.refinement import CHECK_EVERY
from automerge.searching.store import Ask, Cut, Tell, read_log
from automerge.searching.trial import Trial
from automerge.spec import Spec
from automerge.stages.fetch import fetch
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.storage import list_objects, read_object
from automerge.testing.s3_server import S3Server
from tests.e2e.tiny import prepare, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEARCH = {
    "trials": 30,
    "initial": 6,
    "seed": 1,
    "split": {"trials": 8, "blocks": 1},
    "refine": {"steps": 60, "starts": 2, "patience": 20, "batch_size": 20},
}
TOTAL = 30 + 8 + 2

# Runs the command line with the search's parts wrapped from outside. Arguments: where to die, '<what>:<phase>' ('ask',
# 'cut': it was just logged; 'evaluation': one of two tasks is measured; 'tell': it was just logged, and the optimiser
# does not know; 'step': of the refinement, its gradient is not there; 'checkpoint': it was just written; 'never'), at
# the how manieth, the file that the number of evaluations is written to, and those of the command line. PAUSE in the
# environment is how many seconds before it dies.
DRIVER = """
import atexit, os, signal, sys, time
from collections import Counter
from pathlib import Path
from automerge.searching import evaluator, refinement
from automerge.searching.store import TrialStore

place, at, counter = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
sys.argv = ["automerge", *sys.argv[4:]]
counts = Counter()
state = {"phase": "search", "tasks": None}
append, call, evaluate_task = TrialStore.append, evaluator.RecipeEvaluator.__call__, evaluator.evaluate_task
step, write = refinement.WeightGradients.__call__, refinement._write

def reached(what):
    here = f"{what}:{state['phase']}"
    counts[here] += 1
    if here == place and counts[here] == at:
        time.sleep(float(os.environ.get("PAUSE", "0")))
        os.kill(os.getpid(), signal.SIGKILL)

def appending(self, event):
    append(self, event)
    state["phase"] = event.trial.phase if event.event == "tell" else event.phase
    reached(event.event)

def calling(self, blocks, race=None):
    counts["evaluations"] += 1
    state["tasks"] = 0
    outcome = call(self, blocks, race)
    state["tasks"] = None
    return outcome

def measuring(*arguments, **options):
    if state["tasks"] is not None:
        state["tasks"] += 1
        if state["tasks"] == 2:
            reached("evaluation")
    return evaluate_task(*arguments, **options)

def stepping(self, *arguments):
    reached("step")
    return step(self, *arguments)

def writing(*arguments):
    write(*arguments)
    reached("checkpoint")

TrialStore.append, evaluator.RecipeEvaluator.__call__, evaluator.evaluate_task = appending, calling, measuring
refinement.WeightGradients.__call__, refinement._write = stepping, writing
atexit.register(lambda: counter.write_text(str(counts["evaluations"])))
from automerge.cli import main
main()
"""


@dataclass(frozen=True)
class Begun:
    """A run up to its segmentation, and how its search ends when nothing comes between."""

    spec: Path
    folder: Path
    recipe: bytes
    trials: list[Trial]

    def copy(self, folder: Path) -> Path:
        """A run of the same spec that has not searched yet."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("search"))
        return folder

    def arguments(self, run: Path, *options: str) -> list[str]:
        return ["search", str(self.spec), "--output", str(run), *options]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    root = tmp_path_factory.mktemp("begun")
    prepare(root / "tiny")
    changes = {"segmentation": {"granularity": "whole"}, "search": SEARCH}
    spec: Spec = tiny_spec(str(root / "tiny"), f"sqlite:///{root / 'mlflow.db'}", **changes)
    (root / "spec.json").write_text(spec.model_dump_json())
    run = root / "run"
    fetch(spec, run / "fetch")
    segment(spec, run / "fetch", run / "segment")
    result = search(spec, run / "fetch", run / "segment", run / "search")
    assert result.stopped == "budget"
    assert {trial.phase for trial in result.trials} == {"search", "split-1", "refine"}
    return Begun(root / "spec.json", run, (run / "search" / "recipe.json").read_bytes(), result.trials)


def drive(place: str, at: int, counter: Path, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", DRIVER, place, str(at), str(counter), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def resumed_here(begun: Begun, run: Path) -> int:
    """Resume in this process; returns the number of evaluations."""
    calls: list[None] = []
    call = RecipeEvaluator.__call__

    def calling(self: RecipeEvaluator, *arguments: Any) -> Outcome:
        calls.append(None)
        return call(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeEvaluator, "__call__", calling)
        spec = Spec.model_validate_json(begun.spec.read_bytes())
        search(spec, run / "fetch", run / "segment", run / "search", resume=True)
    return len(calls)


def resumed_there(begun: Begun, run: Path) -> int:
    """Resume by the command line; returns the number of evaluations."""
    counter = run / "evaluations"
    resumed = drive("never", 0, counter, begun.arguments(run, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert f"of {TOTAL}" in resumed.stdout
    return int(counter.read_text())


def resume(begun: Begun, run: Path, resumed: Callable[[Begun, Path], int], log: Path | None = None) -> None:
    """Resume, from ``log`` if it is not the run's, and hold the outcome against the search that nothing happened to."""
    log = log or run / "search" / "trials.jsonl"
    before = log.read_bytes()
    _, events, sound = read_log(log)
    paid = sum(isinstance(event, Tell) for event in events)
    evaluations = resumed(begun, run)

    after = (run / "search" / "trials.jsonl").read_bytes()
    assert after.startswith(before[:sound]), "what was logged stays as it was"
    _, events, length = read_log(run / "search" / "trials.jsonl")
    assert length == len(after)
    asked = [event.number for event in events if isinstance(event, Ask)]
    told = [event.trial for event in events if isinstance(event, Tell)]
    assert asked == [trial.number for trial in told] == list(range(TOTAL)), "each point is asked for and told once"
    assert sum(isinstance(event, Cut) for event in events) == 1
    assert evaluations == sum(trial.status != "cached" for trial in told[paid:])

    unlike = {"seconds", "optimiser_seconds"}
    assert [trial.model_dump(exclude=unlike) for trial in told] == [
        trial.model_dump(exclude=unlike) for trial in begun.trials
    ]
    assert (run / "search" / "recipe.json").read_bytes() == begun.recipe


@pytest.mark.parametrize(
    ("place", "at", "last"),
    [
        ("evaluation:search", 13, "ask"),
        ("tell:search", 13, "tell"),
        ("evaluation:split-1", 2, "ask"),
        ("step:refine", 33, "ask"),
        ("checkpoint:refine", 5, "ask"),
    ],
)
def test_sigkill_then_resume(begun: Begun, tmp_path: Path, place: str, at: int, last: str) -> None:
    run = begun.copy(tmp_path / "run")
    killed = drive(place, at, tmp_path / "counter", begun.arguments(run))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "counter").exists()
    assert not (run / "search" / "recipe.json").exists()
    _, events, _ = read_log(run / "search" / "trials.jsonl")
    assert events[-1].event == last
    what, phase = place.split(":")
    finished = [event.trial for event in events if isinstance(event, Tell)]
    if what == "evaluation":  # the evaluation that was killed is the only one that is not in the log
        assert sum(trial.status != "cached" and trial.phase == phase for trial in finished) == at - 1
    elif what == "tell":
        assert len(finished) == at
    else:  # what the refinement had reached is in its checkpoint
        (path,) = (run / "search").glob("refinement-*.json")
        step = json.loads(path.read_bytes())["step"]
        assert step == (at - 1 if what == "checkpoint" else (at - 1) // CHECK_EVERY) * CHECK_EVERY
    resume(begun, run, resumed_here)


def signalled(begun: Begun, run: Path, number: signal.Signals) -> "subprocess.CompletedProcess[str]":
    """Begin a search by the command line, and send it a signal when it has finished some trials."""
    log = run / "search" / "trials.jsonl"
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("automerge")), *begun.arguments(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Whoever runs the tests in the background ignores SIGINT, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b'"event":"tell"') >= 5):
            time.sleep(0.005)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(begun: Begun, tmp_path: Path) -> None:
    run = begun.copy(tmp_path / "run")
    ended = signalled(begun, run, signal.SIGINT)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == "interrupted: nothing is lost; go on with --resume"
    _, events, _ = read_log(run / "search" / "trials.jsonl")
    assert 5 <= sum(isinstance(event, Tell) for event in events) < TOTAL
    recipe = json.loads((run / "search" / "recipe.json").read_bytes())
    assert recipe["format"] == "automerge/recipe", "the best so far can be merged"
    resume(begun, run, resumed_there)


def test_sigterm_then_resume(begun: Begun, tmp_path: Path) -> None:
    """How a scheduler ends a process that it moves elsewhere."""
    run = begun.copy(tmp_path / "run")
    ended = signalled(begun, run, signal.SIGTERM)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == "interrupted: nothing is lost; go on with --resume"
    assert (run / "search" / "recipe.json").exists()
    resume(begun, run, resumed_there)


@pytest.fixture
def mirror(s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place on a real S3 server that has nothing yet; searches are copied there ten times a second."""
    place = f"s3://{s3_env.bucket}/{tmp_path.name}"
    monkeypatch.setenv("AUTOMERGE_MIRROR", place)
    monkeypatch.setenv("AUTOMERGE_MIRROR_SECONDS", "0.1")
    return place


def unpacked(mirror: str, folder: Path) -> Path:
    """What a mirror has of the one search that is in it."""
    (copy,) = list_objects(mirror)
    there = read_object(copy.uri)
    assert there is not None
    with zipfile.ZipFile(io.BytesIO(there.content)) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("place", "at", "pause"), [("evaluation:search", 25, 0.0), ("evaluation:split-1", 2, 1.0), ("step:refine", 33, 1.0)]
)
def test_sigkill_then_resume_elsewhere(
    begun: Begun, tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch, place: str, at: int, pause: float
) -> None:
    """The node is lost with its disk: what the mirror has is gone on from, and costs nothing again."""
    run = begun.copy(tmp_path / "run")
    monkeypatch.setenv("PAUSE", str(pause))
    killed = drive(place, at, tmp_path / "counter", begun.arguments(run))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    log = (run / "search" / "trials.jsonl").read_bytes()
    copy = unpacked(mirror, tmp_path / "copy")
    copied = (copy / "trials.jsonl").read_bytes()
    assert log.startswith(copied)
    assert copied.count(b"\n") > 1
    if pause:  # there was time for all
        assert copied == log
    for state in copy.glob("refinement-*.json"):
        assert state.read_bytes() == (run / "search" / state.name).read_bytes()
    assert any(copy.glob("refinement-*.json")) == (place == "step:refine")
    shutil.rmtree(run)

    elsewhere = begun.copy(tmp_path / "elsewhere")
    resume(begun, elsewhere, resumed_there, copy / "trials.jsonl")


def test_sigterm_then_resume_elsewhere(
    begun: Begun, tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done since the last copy is copied in the time that is left."""
    monkeypatch.setenv("AUTOMERGE_MIRROR_SECONDS", "3600")
    run = begun.copy(tmp_path / "run")
    start = time.monotonic()
    ended = signalled(begun, run, signal.SIGTERM)
    assert ended.returncode == 130, ended.stderr
    print(f"\nended {time.monotonic() - start:.1f} s after its start")
    copy = unpacked(mirror, tmp_path / "copy")
    assert (copy / "trials.jsonl").read_bytes() == (run / "search" / "trials.jsonl").read_bytes()
    shutil.rmtree(run)
    resume(begun, begun.copy(tmp_path / "elsewhere"), resumed_there, copy / "trials.jsonl")


def test_without_resume_a_begun_search_is_left_alone(begun: Begun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun.folder, run)
    before = (run / "search" / "trials.jsonl").read_bytes()
    refused = drive("never", 0, tmp_path / "counter", begun.arguments(run))
    assert refused.returncode == 2
    assert "a search was begun here; pass --resume to go on" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (tmp_path / "counter").read_text() == "0"
    assert (run / "search" / "trials.jsonl").read_bytes() == before

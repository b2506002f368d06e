"""The loop: it finds good points, loses nothing, resumes exactly, and ends as it was told."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from automerge.errors import MergeError, SearchError
from automerge.merging.recipe import RecipeBlock
from automerge.searching.search import SearchProgress, SearchResult, search
from automerge.searching.space import SearchSpace
from automerge.searching.store import read_trials
from automerge.searching.workers import InProcess
from automerge.spec import EarlyStopSpec, SearchSpec
from tests.searching.synthetic import evaluator, landscape, losses_objective, make_space, simplex

ROOT = Path(__file__).parents[2]


@pytest.fixture
def references() -> dict[str, float]:
    return {"low": 0.1, "high": 0.1}


def run(
    folder: Path,
    spec: SearchSpec,
    references: Mapping[str, float],
    *,
    evaluate: Callable[[Sequence[RecipeBlock]], Mapping[str, float]] = landscape,
    space: SearchSpace | None = None,
    resume: bool = False,
    seen: list[SearchProgress] | None = None,
) -> SearchResult:
    return search(
        space or make_space(spec),
        InProcess(evaluator(evaluate)),
        losses_objective(references),
        store_path=folder / "trials.jsonl",
        identity="test",
        resume=resume,
        progress=seen.append if seen is not None else None,
    )


def outcomes(result: SearchResult) -> list[tuple[object, ...]]:
    """What must be equal in two runs: all but the wall times."""
    return [(trial.number, trial.origin, trial.config, trial.status, trial.cost) for trial in result.trials]


def test_beats_its_initial_design_and_reports_each_trial(tmp_path: Path, references: dict[str, float]) -> None:
    seen: list[SearchProgress] = []
    result = run(tmp_path, simplex(trials=45, initial=15, seed=1), references, seen=seen)
    assert [trial.number for trial in result.trials] == list(range(45))
    assert result.stopped == "budget"
    origins = [trial.origin for trial in result.trials]
    assert origins[:3] == ["average", "source:low", "source:high"]
    assert origins[3:18] == ["sobol"] * 15
    assert set(origins[18:]) == {"surrogate", "random"}
    initial = max(trial.objective or 0 for trial in result.trials[:18])
    assert result.best.objective is not None and result.best.objective > initial
    assert [event.done for event in seen] == list(range(1, 46))
    assert read_trials(tmp_path / "trials.jsonl") == result.trials


def test_strict_paper_has_no_extra_initial_points(tmp_path: Path, references: dict[str, float]) -> None:
    result = run(tmp_path, SearchSpec(preset="paper", trials=22, initial=20), references)
    assert [trial.origin for trial in result.trials[:20]] == ["sobol"] * 20
    assert result.trials[20].origin in ("surrogate", "random")


def test_the_same_seed_gives_the_same_search_whatever_the_hash_seed(
    tmp_path: Path, references: dict[str, float]
) -> None:
    """A set in the optimiser's local search made the same seed diverge between processes."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.searching.synthetic import evaluator, landscape, losses_objective, make_space, simplex\n"
        "from automerge.searching.search import search\n"
        "from automerge.searching.workers import InProcess\n"
        "space = make_space(simplex(trials=32, initial=10, seed=7))\n"
        "trials = InProcess(evaluator(landscape))\n"
        "search(space, trials, losses_objective(), store_path=Path(sys.argv[2]), identity='x')\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4242"}
    there = tmp_path / "there" / "trials.jsonl"
    subprocess.run([sys.executable, "-c", script, str(ROOT), str(there)], check=True, env=environment)
    here = run(tmp_path / "here", simplex(trials=32, initial=10, seed=7), references)
    assert [(trial.config, trial.cost) for trial in read_trials(there)] == [
        (trial.config, trial.cost) for trial in here.trials
    ]


@pytest.mark.parametrize("events", [1, 12, 41, 58])
def test_resume_at_any_event_equals_the_uninterrupted_search(
    tmp_path: Path, references: dict[str, float], events: int
) -> None:
    """A log cut after any event (an ask in flight, a told trial, in mid-line) leads to the same trials."""
    spec = simplex(trials=32, initial=8, seed=3)
    whole = run(tmp_path / "whole", spec, references)
    lines = (tmp_path / "whole" / "trials.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    torn = lines[1 + events][:20] if events % 2 else b""
    (cut / "trials.jsonl").write_bytes(b"".join(lines[: 1 + events]) + torn)
    evaluated: list[object] = []

    def counting(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        evaluated.append(blocks)
        return landscape(blocks)

    resumed = run(cut, spec, references, evaluate=counting, resume=True)
    assert outcomes(resumed) == outcomes(whole)
    assert resumed.blocks == whole.blocks
    told = sum(json.loads(line)["event"] == "tell" for line in lines[1 : 1 + events])
    not_cached = sum(trial.status == "ok" for trial in whole.trials[told:])
    assert len(evaluated) == not_cached, "a trial that was paid for is never evaluated again"


def test_sigkill_and_resume(tmp_path: Path, references: dict[str, float]) -> None:
    """A process killed in the middle of a trial loses that trial only."""
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.searching.synthetic import evaluator, landscape, losses_objective, make_space, simplex\n"
        "from automerge.searching.search import search\n"
        "from automerge.searching.workers import InProcess\n"
        "count = 0\n"
        "def evaluate(blocks):\n"
        "    global count; count += 1\n"
        "    if count == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return landscape(blocks)\n"
        "space = make_space(simplex(trials=26, initial=8, seed=5))\n"
        "trials = InProcess(evaluator(evaluate))\n"
        "search(space, trials, losses_objective(), store_path=Path(sys.argv[2]), identity='test')\n"
    )
    path = tmp_path / "killed" / "trials.jsonl"
    killed = subprocess.run([sys.executable, "-c", script, str(ROOT), str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    before = len(read_trials(path))
    spec = simplex(trials=26, initial=8, seed=5)
    resumed = run(tmp_path / "killed", spec, references, resume=True)
    assert before >= 19
    assert outcomes(resumed) == outcomes(run(tmp_path / "whole", spec, references))


def test_more_trials_extend_a_finished_search(tmp_path: Path, references: dict[str, float]) -> None:
    short = run(tmp_path, simplex(trials=14, initial=6, seed=2), references)
    longer = run(tmp_path, simplex(trials=18, initial=6, seed=2), references, resume=True)
    assert outcomes(longer)[:14] == outcomes(short)
    assert len(longer.trials) == 18


def test_a_finished_search_is_not_replayed(tmp_path: Path, references: dict[str, float]) -> None:
    spec = simplex(trials=10, initial=5, seed=2)
    first = run(tmp_path, spec, references)

    def never(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        raise AssertionError("nothing is left to evaluate")

    assert outcomes(run(tmp_path, spec, references, evaluate=never, resume=True)) == outcomes(first)


def test_refuses_the_log_of_another_search(tmp_path: Path, references: dict[str, float]) -> None:
    run(tmp_path, simplex(trials=6, initial=4, seed=2), references)
    with pytest.raises(SearchError, match="belongs to another search"):
        run(tmp_path, simplex(trials=6, initial=4, seed=3), references, resume=True)
    with pytest.raises(SearchError, match="--resume"):
        run(tmp_path, simplex(trials=6, initial=4, seed=2), references)


def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path: Path, references: dict[str, float]) -> None:
    def fails_for_dare(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        if any(block.technique.startswith("dare") for block in blocks):
            raise MergeError("tensor 'w': overflow")
        if blocks[0].weights["low"] > 0.9:
            return {"low": float("nan"), "high": 1.0}
        if blocks[0].weights["low"] < 0.05:
            raise MemoryError
        return landscape(blocks)

    result = run(tmp_path, simplex(trials=30, initial=12, seed=0), references, evaluate=fails_for_dare)
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert len(result.trials) == 30
    assert failed and all(trial.error and trial.objective is None for trial in failed)
    assert any("overflow" in (trial.error or "") for trial in failed)
    assert not any(block.technique.startswith("dare") for block in result.blocks)


def test_a_search_in_which_everything_fails_stops_early_and_says_why(
    tmp_path: Path, references: dict[str, float]
) -> None:
    def fails(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        raise MergeError("tensor 'w': overflow")

    with pytest.raises(SearchError, match=r"all 6 trials failed.*overflow"):
        run(tmp_path, simplex(trials=100, initial=6), references, evaluate=fails)


def test_early_stop(tmp_path: Path, references: dict[str, float]) -> None:
    spec = simplex(trials=60, initial=6, early_stop=EarlyStopSpec(patience=5))
    result = run(tmp_path, spec, references, evaluate=lambda blocks: {"low": 1.0, "high": 1.0})
    assert result.stopped == "plateau"
    assert len(result.trials) == 6


def test_equal_recipes_are_evaluated_once(tmp_path: Path, references: dict[str, float]) -> None:
    """With weights that sum to 1, task arithmetic is linear: the canonical recipe decides, not the spelling."""
    counted: list[object] = []

    def counting(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        counted.append(blocks)
        return landscape([block.model_copy(update={"technique": "linear"}) for block in blocks])

    spec = simplex(trials=20, initial=10, techniques=["linear", "task_arithmetic"], weight_range=[0.0, 1.0])
    result = run(tmp_path, spec, references, evaluate=counting, space=make_space(spec, blocks=1))
    assert len(counted) == sum(trial.status == "ok" for trial in result.trials)


def test_an_interrupt_before_any_trial_succeeded_is_one(tmp_path: Path, references: dict[str, float]) -> None:
    def interrupted(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        raise KeyboardInterrupt

    spec = simplex(trials=8, initial=6, seed=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", spec, references, evaluate=interrupted)
    resumed = run(tmp_path / "a", spec, references, resume=True)
    assert outcomes(resumed) == outcomes(run(tmp_path / "b", spec, references))


def test_interrupt_keeps_everything(tmp_path: Path, references: dict[str, float]) -> None:
    calls = 0

    def interrupted(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return landscape(blocks)

    spec = simplex(trials=14, initial=6, seed=4)
    stopped = run(tmp_path / "a", spec, references, evaluate=interrupted)
    assert stopped.stopped == "interrupted"
    assert len(stopped.trials) == 8
    resumed = run(tmp_path / "a", spec, references, resume=True)
    assert outcomes(resumed) == outcomes(run(tmp_path / "b", spec, references))

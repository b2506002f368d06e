"""The phases of a search on a tiny model: what is logged, how it is resumed, how it ends, and what may go wrong."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.errors import AutoMergeError, SearchError, StorageError
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock, block_key
from automerge.searching import refinement
from automerge.searching.evaluator import RecipeEvaluator, mean_losses
from automerge.searching.search import SearchProgress, SearchResult
from automerge.searching.store import Ask, Cut, Tell, TrialStore, read_log
from automerge.searching.trial import Trial
from automerge.spec import PRESETS, Spec
from automerge.stages.documents import Front
from automerge.stages.fetch import fetch
from automerge.stages.front import choose_point
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded
from automerge.stages.merge import merge
from automerge.stages.search import search
from automerge.stages.segment import segment
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.stages import batchnorm
from tests.stages.variants import PAIR, TRAPS, TRIPLE, spec_of, write

SHORT: Mapping[str, Any] = {
    "trials": 9,
    "initial": 3,
    "seed": 1,
    "split": {"trials": 5, "blocks": 1},
    "refine": {"steps": 14, "starts": 2, "batch_size": 20},
}
PLAIN: Mapping[str, Any] = {**SHORT, "split": None, "refine": None}


@dataclass(frozen=True)
class Job:
    """A spec whose inputs are fetched and segmented in a folder."""

    spec: Spec
    folder: Path

    def searching(self, **changes: Any) -> "Job":
        """The same with another search; it is laid over `SHORT`."""
        values = {**SHORT, **changes}
        return Job(Spec.model_validate({**self.spec.model_dump(), "search": values}), self.folder)

    def with_(self, **changes: Any) -> "Job":
        return Job(Spec.model_validate({**self.spec.model_dump(), **changes}), self.folder)

    def search(
        self, folder: Path, *, resume: bool = False, progress: Callable[[SearchProgress], None] | None = None
    ) -> SearchResult:
        return search(
            self.spec, self.folder / "fetch", self.folder / "segment", folder, resume=resume, progress=progress
        )


def prepared(spec: Spec, folder: Path) -> Job:
    fetch(spec, folder / "fetch")
    segment(spec, folder / "fetch", folder / "segment")
    return Job(spec, folder)


@pytest.fixture(scope="module")
def whole(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The tiny pair as one block of two layers: there is something to cut."""
    folder = tmp_path_factory.mktemp("whole")
    registry = f"sqlite:///{folder / 'mlflow.db'}"
    return prepared(tiny_spec(str(pair.folder), registry, segmentation={"granularity": "whole"}), folder).searching()


@pytest.fixture(scope="module")
def blocks(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The tiny pair in its two blocks, by Bayesian optimisation alone."""
    folder = tmp_path_factory.mktemp("blocks")
    return prepared(tiny_spec(str(pair.folder), f"sqlite:///{folder / 'mlflow.db'}"), folder).searching(**PLAIN)


def outcomes(trials: list[Trial]) -> list[dict[str, Any]]:
    """All of the trials but wall times."""
    return [trial.model_dump(exclude={"seconds", "optimiser_seconds"}) for trial in trials]


def events_of(folder: Path) -> list[Ask | Tell | Cut]:
    return read_log(folder / "trials.jsonl")[1]


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[None]]:
    """A list that is as long as there were calls."""
    calls: list[None] = []
    original = getattr(owner, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield calls


# A whole search, and every moment at which it might have been killed


@dataclass(frozen=True)
class Killed:
    """What was on disk at one moment of a search.

    Attributes:
        folder: a copy of the search's folder.
        phase: that went on.
        moment: what had just been written.
    """

    folder: Path
    phase: str
    moment: str


@dataclass
class Watched:
    """A search, and copies of its folder after everything that it wrote."""

    job: Job
    folder: Path
    moments: list[Killed] = field(default_factory=list)
    result: SearchResult | None = None

    def at(self, phase: str, moment: str) -> list[Path]:
        return [each.folder for each in self.moments if (each.phase, each.moment) == (phase, moment)]


def watch(job: Job, folder: Path) -> Watched:
    """Search, with a copy of the folder after each event and each checkpoint of a refinement."""
    watched = Watched(job, folder / "search")
    append, write_state = TrialStore.append, refinement._write

    def keep(phase: str, moment: str) -> None:
        copy = folder / "killed" / str(len(watched.moments))
        shutil.copytree(watched.folder, copy, ignore=shutil.ignore_patterns("metrics"))
        watched.moments.append(Killed(copy, phase, moment))

    def appending(store: TrialStore, event: Ask | Tell | Cut) -> None:
        append(store, event)
        keep(event.trial.phase if isinstance(event, Tell) else event.phase, event.event)

    def writing(*arguments: Any) -> None:
        write_state(*arguments)
        keep("refine", "checkpoint")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialStore, "append", appending)
        patch.setattr(refinement, "_write", writing)
        watched.result = job.search(watched.folder)
    return watched


@pytest.fixture(scope="module")
def watched(whole: Job, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch(whole, tmp_path_factory.mktemp("watched"))


def test_the_log_has_every_phase_in_its_order(watched: Watched) -> None:
    events = events_of(watched.folder)
    phases = [event.trial.phase if isinstance(event, Tell) else event.phase for event in events]
    assert phases == ["search"] * 18 + ["split-1"] * 11 + ["refine"] * 4
    cuts = [event for event in events if isinstance(event, Cut)]
    assert [(cut.blocks, cut.importance) for cut in cuts] == [(["whole"], {"whole": 1.0})]
    assert events.index(cuts[0]) == 18
    assert [event.number for event in events if isinstance(event, Ask)] == list(range(16))
    open_asks: set[int] = set()
    for event in events:
        if isinstance(event, Ask):
            open_asks.add(event.number)
        elif isinstance(event, Tell):
            open_asks.remove(event.trial.number)
    assert not open_asks


def test_each_phase_goes_on_from_the_one_before(watched: Watched) -> None:
    assert watched.result is not None
    trials = watched.result.trials
    by_phase = {name: [t for t in trials if t.phase == name] for name in ("search", "split-1", "refine")}
    origins = [trial.origin for trial in by_phase["search"]]
    assert origins[:7] == ["average", "source:left", "source:right", "base", "sobol", "sobol", "sobol"]
    # The points that the wider space begins with are the best ones of the first: nothing is evaluated for them.
    best = sorted(by_phase["search"], key=lambda trial: -(trial.objective or 0.0))
    parents = [trial for trial in by_phase["split-1"] if trial.origin.startswith("parent:")]
    assert [trial.origin for trial in parents] == [f"parent:{trial.number}" for trial in best[:4]]
    assert all(trial.status == "cached" and trial.samples == 0 for trial in parents)
    assert [trial.objective for trial in parents] == [trial.objective for trial in best[:4]]
    rest = by_phase["split-1"][len(parents) :]
    assert rest and all(len(trial.config) > len(parents[0].config) / 2 for trial in rest)
    # The best recipe is refined, and the average; each of them is measured as a recipe of its own.
    ranked = sorted((t for t in trials if t.status == "ok" and t.phase != "refine"), key=lambda t: -(t.objective or 0))
    average = next(trial for trial in trials if trial.origin == "average")
    second = average if ranked[0] != average else ranked[1]
    assert [t.origin for t in by_phase["refine"]] == [f"refined:{ranked[0].number}", f"refined:{second.number}"]
    assert all(trial.blocks and not trial.config for trial in by_phase["refine"])
    assert watched.result.best.objective == max(trial.objective or 0.0 for trial in trials)
    recipe = Recipe.read(watched.folder / "recipe.json")
    assert recipe.blocks == watched.result.blocks


def test_all_its_passes_are_counted(watched: Watched) -> None:
    """Of 100 samples of each task, halves are held back; a step takes 20 of each forward and, counted twice, back."""
    assert watched.result is not None
    for trial in watched.result.trials:
        own = 200 if trial.status == "ok" else 0
        if trial.phase == "refine":
            states = json.loads((watched.folder / f"refinement-{trial.origin.split(':')[1]}.json").read_bytes())
            looks, steps = 1 + -(-states["step"] // refinement.CHECK_EVERY), states["step"]
            sizes = [16, 17, 17]
            own += looks * 100 + sum(3 * 2 * sizes[step % 3] for step in range(steps))
        assert trial.samples == own


MOMENTS = [
    *[("search", moment, which) for moment, which in (("ask", 0), ("tell", 0), ("ask", 5), ("tell", 8))],
    *[("split-1", moment, which) for moment, which in (("cut", 0), ("ask", 0), ("tell", 2), ("ask", 4), ("tell", 4))],
    *[("refine", moment, which) for moment, which in (("ask", 0), ("checkpoint", 0), ("checkpoint", 1))],
    *[("refine", moment, which) for moment, which in (("checkpoint", 3), ("tell", 0), ("ask", 1), ("checkpoint", -1))],
    ("refine", "tell", 1),
]


@pytest.mark.parametrize(("phase", "moment", "which"), MOMENTS)
def test_killed_at_any_moment_it_ends_the_same(
    watched: Watched, tmp_path: Path, phase: str, moment: str, which: int
) -> None:
    assert watched.result is not None
    folder = tmp_path / "search"
    shutil.copytree(watched.at(phase, moment)[which], folder)
    log = folder / "trials.jsonl"
    before = log.read_bytes()
    if which % 2:  # a line that the kill has torn
        with log.open("ab") as file:
            file.write((watched.folder / "trials.jsonl").read_bytes()[len(before) :][:30])
    told = {event.trial.number for event in events_of(folder) if isinstance(event, Tell)}
    with counted(RecipeEvaluator, "__call__") as evaluated:
        resumed = watched.job.search(folder, resume=True)
    assert log.read_bytes().startswith(before)
    assert outcomes(resumed.trials) == outcomes(watched.result.trials)
    assert (resumed.blocks, resumed.stopped) == (watched.result.blocks, watched.result.stopped)
    assert (folder / "recipe.json").read_bytes() == (watched.folder / "recipe.json").read_bytes()
    assert len(evaluated) == sum(trial.status == "ok" and trial.number not in told for trial in resumed.trials)
    for path in watched.folder.glob("refinement-*.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_refinement_that_was_paid_for_is_not_repeated(watched: Watched, tmp_path: Path) -> None:
    """Killed at its second checkpoint, only the steps after it are taken again."""
    folder = tmp_path / "search"
    shutil.copytree(watched.at("refine", "checkpoint")[1], folder)
    with counted(refinement.WeightGradients, "__call__") as passes:
        watched.job.search(folder, resume=True)
    steps = [json.loads(path.read_bytes())["step"] for path in watched.folder.glob("refinement-*.json")]
    assert len(passes) == sum(steps) - refinement.CHECK_EVERY


def test_a_finished_search_is_read_and_not_repeated(watched: Watched, tmp_path: Path) -> None:
    assert watched.result is not None
    folder = tmp_path / "search"
    shutil.copytree(watched.folder, folder)
    seen: list[SearchProgress] = []
    with counted(RecipeEvaluator, "__call__") as evaluated, counted(TrialStore, "append") as appended:
        resumed = watched.job.search(folder, resume=True, progress=seen.append)
    assert not evaluated and not appended
    assert outcomes(resumed.trials) == outcomes(watched.result.trials)
    assert [event.done for event in seen] == list(range(1, 17))
    assert all(event.replayed and event.total == 16 for event in seen)


def test_a_search_that_begins_anew_takes_nothing_of_an_old_one(watched: Watched, tmp_path: Path) -> None:
    """Its log is gone, and the checkpoints of its refinements are still there, of another start."""
    folder = tmp_path / "search"
    folder.mkdir()
    for path in watched.folder.glob("refinement-*.json"):
        state = json.loads(path.read_bytes())
        strange = {"best_values": [0.0] * len(state["values"]), "best_step": 5, "done": True}
        (folder / path.name).write_text(json.dumps({**state, **strange}))
    result = watched.job.search(folder)
    assert watched.result is not None
    assert outcomes(result.trials) == outcomes(watched.result.trials)


def test_other_phases_are_another_search(watched: Watched, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    shutil.copytree(watched.folder, folder)
    for changes in ({"refine": {"steps": 15}}, {"split": None}, {"objective": "gap"}, {"trials": 10}):
        with pytest.raises(SearchError, match="belongs to another search"):
            watched.job.searching(**changes).search(folder, resume=True)


@pytest.mark.parametrize("trials", [4, 6, 9])
def test_more_trials_go_on_from_the_ended_ones(blocks: Job, tmp_path: Path, trials: int) -> None:
    """However few there were at first: fewer than the points to start with as well."""
    blocks.searching(**{**PLAIN, "trials": trials}).search(tmp_path / "search")
    longer = blocks.searching(**{**PLAIN, "trials": 11})
    resumed = longer.search(tmp_path / "search", resume=True)
    assert outcomes(resumed.trials) == outcomes(longer.search(tmp_path / "at once").trials)


# Trials that go wrong


def trapped(folder: Path) -> tuple[Job, list[str]]:
    """A pair with traps, and the recipes that lead into them: two of each, equal but in how they are written."""
    write(folder, PAIR)
    for name in ("base", *PAIR):
        path = folder / f"{name}.safetensors"
        save_file({**load_file(path), "trap": torch.tensor([1.0 if name == "left" else 0.0])}, path)
    spec = spec_of(folder, PAIR, segmentation={"granularity": "whole"})
    arguments = {"classes": 5, "said": str(folder / "said")}
    model = spec.model.model_copy(update={"target": "variants:build_trap", "arguments": arguments})
    job = prepared(spec.model_copy(update={"model": model}), folder / "run")
    names = list(load_file(folder / "base.safetensors"))
    uris = []
    for technique, values in (("task_arithmetic", {"lambda": 1.0}), ("dare_linear", {"density": 1.0, "lambda": 1.0})):
        for trap, weight in TRAPS.items():
            block = RecipeBlock(
                name="all",
                technique=technique,
                weights={"left": weight, "right": 0.5},
                hyperparameters={**values, **({"rescale": "inverse_density"} if technique == "dare_linear" else {})},
                parameters=names,
            )
            recipe = Recipe(base=InputDigest(name="base"), sources=[InputDigest(name=n) for n in PAIR], blocks=[block])
            path = folder / "recipes" / f"{technique}-{trap}.json"
            recipe.write(path)
            uris.append(str(path))
    return job, uris


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[str]]:
    return trapped(tmp_path_factory.mktemp("traps"))


ERRORS = {
    "raise": "trapped",
    "nan": "is not finite",
    "memory": "emory",
    "hang": "took longer than search.trial_seconds",
}


@pytest.mark.parametrize("seconds", [None, pytest.param(6.0, marks=pytest.mark.slow)], ids=["here", "in a process"])
def test_trials_that_go_wrong_are_recorded_and_never_tried_again(
    traps: tuple[Job, list[str]], tmp_path: Path, seconds: float | None
) -> None:
    """One raises, one gives NaN, one has no memory left, and (in a process of its own) one hangs."""
    job, recipes = traps
    kinds = [trap for trap in TRAPS if seconds is not None or trap != "hang"]
    chosen = [uri for uri in recipes if Path(uri).stem.split("-")[1] in kinds]
    said = Path(job.spec.model.arguments["said"])
    said.unlink(missing_ok=True)
    count = 4 + len(chosen) + 3 + 3
    job = job.searching(trials=count, split=None, start_from=chosen, trial_seconds=seconds)
    result = job.search(tmp_path / "search")

    assert result.stopped == "budget"
    assert len(result.trials) == count + 2, "two of them refined"
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert [trial.origin for trial in failed] == [f"recipe:{index}" for index in range(len(chosen))]
    for trial, uri in zip(failed, chosen, strict=True):
        assert trial.objective is None
        assert ERRORS[Path(uri).stem.split("-")[1]] in (trial.error or "")
        assert "\n" not in (trial.error or "")
    assert sorted(said.read_text().split()) == sorted(kinds), "each recipe once, though each was asked for twice"
    worst = max(trial.cost for trial in result.trials if trial.status != "failed" and trial.number < 4)
    assert failed[0].cost == pytest.approx(2 * worst)
    assert result.best.status == "ok" and result.best.objective is not None
    assert (tmp_path / "search" / "recipe.json").exists()

    said.unlink()
    resumed = job.search(tmp_path / "search", resume=True)
    assert outcomes(resumed.trials) == outcomes(result.trials)
    assert not said.exists()


@pytest.fixture(scope="module")
def detached(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("detached")
    write(folder, PAIR)
    spec = spec_of(folder, PAIR, segmentation={"granularity": "whole"})
    model = spec.model.model_copy(update={"target": "variants:build_detached"})
    return prepared(spec.model_copy(update={"model": model}), folder / "run")


def test_without_a_gradient_the_search_ends_by_what_it_has(
    detached: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing that was paid for is lost: blocks are cut by what the trials say, and the refinement fails as a trial."""
    result = detached.searching().search(tmp_path / "search")
    assert result.stopped == "budget"
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert [trial.phase for trial in failed] == ["refine"] * 2
    assert all("the model cannot be differentiated" in (trial.error or "") for trial in failed)
    assert sum(trial.phase == "split-1" for trial in result.trials) == 5
    assert "cannot be differentiated" in caplog.text and "surrogate" in caplog.text
    assert result.best.phase != "refine" and (tmp_path / "search" / "recipe.json").exists()
    resumed = detached.searching().search(tmp_path / "search", resume=True)
    assert outcomes(resumed.trials) == outcomes(result.trials)


# Budgets


def test_a_budget_of_samples_is_kept(whole: Job, tmp_path: Path) -> None:
    """The phases before the refinement have their share; a trial is begun as long as something is left."""
    budget = 3000
    result = whole.searching(max_samples=budget).search(tmp_path / "search")
    before = [trial for trial in result.trials if trial.phase != "refine"]
    spent = sum(trial.samples for trial in before)
    assert 0.6 * budget <= spent < 0.6 * budget + 200
    refined = [trial for trial in result.trials if trial.phase == "refine"]
    assert refined and spent + sum(trial.samples for trial in refined[:-1]) < budget
    resumed = whole.searching(max_samples=budget).search(tmp_path / "search", resume=True)
    assert outcomes(resumed.trials) == outcomes(result.trials)
    plain = whole.searching(**{**PLAIN, "max_samples": 900}).search(tmp_path / "plain")
    assert (len(plain.trials), plain.stopped) == (5, "budget")


class Clock:
    """Time that goes on by a second with every trial."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def tick(self, _: SearchProgress) -> None:
        self.now += 1.0


def test_a_budget_of_time_is_kept_and_what_it_cut_short_can_be_resumed(
    whole: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from automerge.searching import search as module

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    job = whole.searching(max_seconds=12.0)
    folder = tmp_path / "search"

    def until(phase: str) -> Callable[[SearchProgress], None]:
        def progress(event: SearchProgress) -> None:
            clock.tick(event)
            if event.trial.phase == phase:
                raise KeyboardInterrupt

        return progress

    stopped = job.search(folder, progress=until("refine"))
    assert stopped.stopped == "interrupted"
    # 0.6 of 12 seconds: eight trials, where there is room for nine, and nothing is cut.
    assert [trial.phase for trial in stopped.trials] == ["search"] * 8 + ["refine"]
    # The clock begins anew; phases that have ended have ended.
    resumed = job.search(folder, resume=True, progress=clock.tick)
    assert [trial.phase for trial in resumed.trials] == ["search"] * 8 + ["refine"] * 2
    assert outcomes(resumed.trials)[:9] == outcomes(stopped.trials)
    again = job.search(folder, resume=True)
    assert outcomes(again.trials) == outcomes(resumed.trials)


def test_a_phase_that_time_cut_short_can_be_resumed_in_the_next(
    whole: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the split, after the budget had ended the search before its last trial: it does not go on with that."""
    from automerge.searching import search as module

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    folder = tmp_path / "search"

    def progress(event: SearchProgress) -> None:
        if event.trial.phase == "split-1" and event.done == 7:
            raise KeyboardInterrupt
        if event.done == 5:
            clock.now = 1000.0 if event.total else 0.0  # the budget of the search is spent ...

    job = whole.searching(max_seconds=100.0)
    original = module._Loop._split

    def split(loop: Any, *arguments: Any) -> bool:
        clock.now = 0.0  # ... and what comes after it has its own
        return original(loop, *arguments)

    monkeypatch.setattr(module._Loop, "_split", split)
    stopped = job.search(folder, progress=progress)
    assert [trial.phase for trial in stopped.trials] == ["search"] * 5 + ["split-1"] * 2
    clock.now = 0.0
    resumed = job.search(folder, resume=True)
    assert [t.phase for t in resumed.trials] == ["search"] * 5 + ["split-1"] * 5 + ["refine"] * 2
    assert outcomes(resumed.trials)[:7] == outcomes(stopped.trials)
    assert [trial.number for trial in resumed.trials] == list(range(12))


def test_a_budget_without_room_for_one_trial_is_refused(whole: Job, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"max_seconds"):
        whole.searching(max_seconds=1e-9).search(tmp_path / "search")


def test_a_plateau_ends_a_phase_and_not_the_search(whole: Job, tmp_path: Path) -> None:
    changes = {"trials": 60, "early_stop": {"patience": 4, "min_improvement": 0.5}, "split": {"trials": 20}}
    result = whole.searching(**changes).search(tmp_path / "search")
    assert result.stopped == "plateau"
    counts = {phase: sum(t.phase == phase for t in result.trials) for phase in ("search", "split-1", "refine")}
    assert counts == {"search": 5, "split-1": 4, "refine": 2}
    resumed = whole.searching(**changes).search(tmp_path / "search", resume=True)
    assert resumed.stopped == "plateau"
    assert outcomes(resumed.trials) == outcomes(result.trials)


# Objectives and tasks


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "loss_ratio", "epsilon": 0.1},
        {"objective": "gap"},
        {"objective": "gap", "gap_reference": "base"},
        {"objective": "gap", "gap_reference": "other"},
        {"objective": "metric"},
        {"objective": "soft_metric", "aggregate": "worst"},
        {"objective": "metric", "aggregate": "worst", "weights": "simplex"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_objective_is_searched_and_refined(whole: Job, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = whole.searching(**changes, trials=8).search(tmp_path / "search")
    assert not [trial.error for trial in result.trials if trial.status == "failed"]
    assert sum(trial.phase == "refine" for trial in result.trials) == 2
    for trial in result.trials:
        assert trial.objective is not None and trial.cost == pytest.approx(1 / trial.objective)
        expected = min(trial.cp.values()) if changes.get("aggregate") == "worst" else 2 / sum(
            1 / cp for cp in trial.cp.values()
        )  # fmt: skip
        assert trial.objective == pytest.approx(expected)
    by_origin = {trial.origin: trial for trial in result.trials}
    for name in ("left", "right"):  # an unmerged source keeps its own task whole, and loses the other's
        other = {"left": "right", "right": "left"}[name]
        own = by_origin[f"source:{name}"]
        assert own.cp[name] == pytest.approx(1.0, rel=0.01) and own.cp[other] < 0.6
        assert own.rates[name] == pytest.approx(100.0) and own.rates[other] < 60


def test_an_objective_that_is_undefined_is_refused_before_any_trial(whole: Job, tmp_path: Path) -> None:
    """Each task's specialist is the other's here, and the base is better than that: there is no gap."""
    job = whole.searching(objective="gap", gap_reference="base")
    turned = [
        {**task.model_dump(), "specialist": other}
        for task, other in zip(job.spec.tasks, ("right", "left"), strict=True)
    ]
    with pytest.raises(SearchError, match=r"task 'left': the specialist's validation loss .* 'gap' is undefined"):
        job.with_(tasks=turned).search(tmp_path / "search")
    assert not (tmp_path / "search" / "trials.jsonl").exists()


def test_a_pareto_front_is_written_and_any_point_of_it_can_be_chosen(blocks: Job, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    job = blocks.searching(aggregate="pareto", trials=18, split=None, seed=0)
    result = job.search(folder)
    candidates = [trial for trial in result.trials if trial.status in ("ok", "cached")]

    def beaten(trial: Trial) -> bool:
        return any(
            all(other.cp[task] >= cp for task, cp in trial.cp.items()) and other.cp != trial.cp for other in candidates
        )

    front = Front.read(folder / "front.json")
    assert front.tasks == ["left", "right"]
    numbers = [point.number for point in front.points]
    assert len(numbers) >= 3
    assert {tuple(result.trials[number].cp.values()) for number in numbers} == {
        tuple(trial.cp.values()) for trial in candidates if not beaten(trial)
    }
    firsts = [point.cp["left"] for point in front.points]
    assert firsts == sorted(firsts, reverse=True)
    for point in front.points:
        assert point.cp == result.trials[point.number].cp and point.rates == result.trials[point.number].rates
    written = {number: Recipe.read(folder / "front" / str(number) / "recipe.json") for number in numbers}
    assert sorted(path.name for path in (folder / "front").iterdir()) == sorted(map(str, numbers))
    assert {number: recipe.blocks for number, recipe in written.items()} == {
        trial.number: found for trial, found in result.front
    }
    assert len({recipe.digest() for recipe in written.values()}) == len(numbers)
    best = Recipe.read(folder / "recipe.json")
    assert best.blocks == result.blocks
    assert result.best.objective == max(trial.objective or 0.0 for trial in candidates)
    other = next(number for number in numbers if written[number].digest() != best.digest())
    assert Recipe.read(choose_point(folder, other)) == written[other]
    with pytest.raises(AutoMergeError, match=r"is no point of the front; choose one of"):
        choose_point(folder, max(numbers) + 1)


def test_three_sources_and_a_guard(tmp_path: Path) -> None:
    write(tmp_path, TRIPLE)
    spec = spec_of(tmp_path, TRIPLE, guard=True, segmentation={"granularity": "whole"})
    job = prepared(spec, tmp_path / "run").searching(trials=10)
    result = job.search(tmp_path / "search")
    assert not [trial.error for trial in result.trials if trial.status == "failed"]
    origins = [trial.origin for trial in result.trials]
    assert origins[:5] == ["average", "source:red", "source:green", "source:blue", "base"]
    assert set(result.best.cp) == {"red", "green", "blue", "all"}
    base = result.trials[4]
    assert base.cp["all"] == pytest.approx(1.0, rel=0.01), "the guard is measured against the base"
    refined = [trial for trial in result.trials if trial.phase == "refine"]
    assert len(refined) == 2 and all(set(block.weights) == set(TRIPLE) for t in refined for block in t.blocks or [])


def test_heads_of_their_own_are_not_refined(tmp_path: Path) -> None:
    write(tmp_path, PAIR, own_heads=True)
    job = prepared(spec_of(tmp_path, PAIR, own_heads=True), tmp_path / "run").searching(refine={"steps": 20})
    result = job.search(tmp_path / "search")
    assert not [trial.error for trial in result.trials if trial.status == "failed"]
    for trial in result.trials:
        if trial.phase == "refine":
            assert sorted(n for b in trial.blocks or [] for n in b.parameters) == ["conv.bias", "conv.weight"]


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two specialists whose BatchNorm statistics lie far apart: an average of these ruins any merge."""
    folder = tmp_path_factory.mktemp("norms")
    batchnorm.write(folder)
    return prepared(batchnorm.spec_of(folder), folder / "run").searching(objective="loss_ratio", epsilon=0.1)


@pytest.fixture(scope="module")
def normed(norms: Job, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch(norms, tmp_path_factory.mktemp("normed"))


def test_batch_norm_is_recalibrated_in_every_phase(norms: Job, normed: Watched, tmp_path: Path) -> None:
    """What is written is what was measured: the merged checkpoint has the losses of the best trial, refined or not."""
    assert normed.result is not None
    trials = normed.result.trials
    assert not [trial.error for trial in trials if trial.status == "failed"]
    assert [sum(t.phase == phase for t in trials) for phase in ("search", "split-1", "refine")] == [9, 5, 2]
    assert Recipe.read(normed.folder / "recipe.json").recalibrated
    merge(norms.spec, norms.folder / "fetch", normed.folder / "recipe.json", tmp_path / "merge")
    module = batchnorm.build()
    module.load_state_dict(load_file(tmp_path / "merge" / "model.safetensors"))
    opened = Inputs.open(norms.spec, norms.folder / "fetch")
    tasks = Loaded.load(opened, torch.device("cpu")).measured("validation")
    found = mean_losses(tasks, lambda _: module.eval(), opened.architecture, torch.device("cpu"))
    assert found == normed.result.best.losses


@pytest.mark.parametrize(("phase", "moment"), [("split-1", "tell"), ("refine", "checkpoint")])
def test_recalibrated_it_is_resumed_all_the_same(normed: Watched, tmp_path: Path, phase: str, moment: str) -> None:
    assert normed.result is not None
    folder = tmp_path / "search"
    shutil.copytree(normed.at(phase, moment)[1], folder)
    resumed = normed.job.search(folder, resume=True)
    assert outcomes(resumed.trials) == outcomes(normed.result.trials)
    for name in ("recipe.json", "statistics.safetensors"):
        assert (folder / name).read_bytes() == (normed.folder / name).read_bytes()


def test_interrupted_the_best_so_far_is_written_as_it_was_measured(norms: Job, tmp_path: Path) -> None:
    def progress(event: SearchProgress) -> None:
        if event.done == 5:
            raise KeyboardInterrupt

    result = norms.search(tmp_path / "search", progress=progress)
    assert result.stopped == "interrupted"
    assert Recipe.read(tmp_path / "search" / "recipe.json").recalibrated
    assert (tmp_path / "search" / "statistics.safetensors").exists()


def test_an_average_that_fails_does_not_end_a_search(
    norms: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is only asked whether recalibration pays; another recipe may be fine."""

    def fails(*_: Any) -> None:
        raise SearchError("the activations at 'norm.running_mean' are not finite")

    monkeypatch.setattr("automerge.stages.trials.recalibrate_live", fails)
    result = norms.searching(**{**PLAIN, "trials": 6}).search(tmp_path / "search")
    assert len(result.trials) == 6 and result.best.status == "ok"
    assert "trials are measured with averaged BatchNorm statistics: the average failed: the activations" in caplog.text


# What a search starts from, and what it must keep


def recipe_of(folder: Path, name: str, blocks: list[RecipeBlock]) -> str:
    recipe = Recipe(
        base=InputDigest(name="base"), sources=[InputDigest(name=n) for n in ("left", "right")], blocks=blocks
    )
    recipe.write(folder / f"{name}.json")
    return str(folder / f"{name}.json")


def block(technique: str, parameters: list[str], left: float = 0.4, **values: Any) -> RecipeBlock:
    return RecipeBlock(
        name=parameters[0],
        technique=technique,
        weights={"left": left, "right": 0.7},
        hyperparameters=values,
        parameters=parameters,
    )


CONV, HEAD = ["conv.weight", "conv.bias"], ["head.weight", "head.bias"]
TIES = {"density": 0.75, "lambda": 1.0, "normalize": False}


def test_recipes_of_a_user_are_tried_as_they_are(blocks: Job, tmp_path: Path) -> None:
    made = [block("ties", CONV, **TIES), block("task_arithmetic", HEAD, 0.9, **{"lambda": 1.0})]
    other = [block("task_arithmetic", [*CONV, *HEAD], 1.2, **{"lambda": 1.0})]
    uris = [recipe_of(tmp_path, "two", made), f"file://{recipe_of(tmp_path, 'one', other)}"]
    result = blocks.searching(**{**PLAIN, "start_from": uris}).search(tmp_path / "search")
    (first,) = [trial for trial in result.trials if trial.origin == "recipe:0"]
    (second,) = [trial for trial in result.trials if trial.origin == "recipe:1"]
    keys = ("technique", "weight/left", "weight/right", "density")
    assert {key: first.config[f"0-convolutional/{key}"] for key in keys} == dict(
        zip(keys, ("ties", 0.4, 0.7, 0.75), strict=True)
    )
    assert first.config["1-vector/technique"] == "task_arithmetic"
    assert [second.config[f"{name}/weight/left"] for name in ("0-convolutional", "1-vector")] == [1.2, 1.2]
    assert [trial.number for trial in (first, second)] == [4, 5]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", r"nowhere\.json"),
        ("text", r"search\.start_from\.0: not valid JSON"),
        ("strangers", r"search\.start_from\.0: block '0-convolutional': the recipe has none of its parameters; give"),
        ("slerp", r"search\.start_from\.0: block '0-convolutional': the recipe merges it by 'slerp', which"),
        ("nan", r"search\.start_from\.0: .*density"),
    ],
)
def test_a_recipe_that_cannot_be_started_from_is_named(blocks: Job, tmp_path: Path, name: str, sentence: str) -> None:
    if name == "text":
        (tmp_path / "text.json").write_text("no recipe")
    elif name == "strangers":
        recipe_of(tmp_path, name, [block("ties", ["body.weight"], **TIES)])
    elif name == "slerp":
        recipe_of(tmp_path, name, [block("slerp", [*CONV, *HEAD])])
    elif name == "nan":
        recipe_of(tmp_path, name, [block("ties", [*CONV, *HEAD], **TIES)])
        path = tmp_path / "nan.json"
        path.write_text(path.read_text().replace("0.75", "NaN"))
    job = blocks.searching(**{**PLAIN, "start_from": [str(tmp_path / f"{name}.json")]})
    with pytest.raises((SearchError, StorageError, AutoMergeError), match=sentence) as raised:
        job.search(tmp_path / "search")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "search" / "trials.jsonl").exists()


def blocks_of(result: SearchResult, job: Job) -> Iterator[tuple[Trial, list[RecipeBlock]]]:
    for trial in result.trials:
        if trial.blocks is not None:
            yield trial, trial.blocks
    yield result.best, result.blocks


def test_constraints_hold_in_every_phase(blocks: Job, tmp_path: Path) -> None:
    """The convolution is merged by TIES at one density; of the head the weights are fixed, and DARE is forbidden."""
    constraints = [
        {"blocks": "0-*", "techniques": ["ties"], "hyperparameters": {"density": 0.7}},
        {"blocks": "1-*", "forbid": ["dare_linear", "dare_ties"], "weights": {"left": 0.45, "right": 0.6}},
    ]
    job = blocks.searching(constraints=constraints, split=None, refine={"steps": 20, "starts": 3})
    result = job.search(tmp_path / "search")
    assert not any(key.startswith(("0-convolutional/technique", "1-vector/weight")) for key in result.trials[0].config)
    assert all(trial.config.get("1-vector/technique") in (None, "task_arithmetic", "ties") for trial in result.trials)
    refined = [trial for trial in result.trials if trial.phase == "refine" and trial.status == "ok"]
    assert refined, "something is left to refine"
    for _, found in blocks_of(result, job):
        for each in found:
            if each.name.startswith("0-"):
                assert each.technique == "ties" and each.hyperparameters["density"] == 0.7
            else:
                assert each.weights == {"left": 0.45, "right": 0.6} and each.technique in ("task_arithmetic", "ties")


def test_what_is_said_of_a_block_holds_for_its_parts(whole: Job, tmp_path: Path) -> None:
    job = whole.searching(constraints=[{"blocks": "whole", "techniques": ["task_arithmetic"]}])
    result = job.search(tmp_path / "search")
    parts = [trial for trial in result.trials if trial.phase == "split-1"]
    assert len(parts) == 5 and not any("technique" in key for trial in parts for key in trial.config)
    assert {key.rpartition("/weight")[0] for key in parts[0].config} == {
        f"whole/{name}" for name in ("0-convolutional/conv", "1-vector/head")
    }
    assert not [trial.error for trial in result.trials if trial.status == "failed"]
    assert sum(trial.blocks is not None for trial in result.trials) == 2, "two are refined"
    for _, found in blocks_of(result, job):
        assert all(each.technique == "task_arithmetic" for each in found)


def test_blocks_that_share_one_choice_are_not_taken_apart(blocks: Job, tmp_path: Path) -> None:
    job = blocks.searching(**{**SHORT, "constraints": [{"blocks": "*", "share": True}]})
    result = job.search(tmp_path / "search")
    assert {trial.phase for trial in result.trials} <= {"search", "refine"}
    for _, found in blocks_of(result, job):
        assert len({each.settings.technique for each in found}) == 1
        assert len({tuple(each.weights.values()) for each in found}) == 1


def test_a_fixed_lambda_stays(blocks: Job, tmp_path: Path) -> None:
    """Normalised TIES has lambda as a scalar of its own, which a refinement would move."""
    job = blocks.searching(
        weights="simplex",
        techniques=["ties"],
        constraints=[{"blocks": "*", "hyperparameters": {"lambda": 0.8}}],
        split=None,
        refine={"steps": 20},
    )
    result = job.search(tmp_path / "search")
    assert any(trial.phase == "refine" for trial in result.trials)
    for trial, found in blocks_of(result, job):
        assert all(each.hyperparameters["lambda"] == 0.8 for each in found), trial.origin


def test_a_constraint_on_no_block_is_refused(blocks: Job, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"search\.constraints\.0\.blocks: the pattern '9-\*' matches no block"):
        blocks.searching(constraints=[{"blocks": "9-*", "forbid": ["ties"]}]).search(tmp_path / "search")


# Multi-fidelity


@pytest.fixture(scope="module")
def fast(blocks: Job, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    job = Job(
        Spec.model_validate(
            {
                **blocks.spec.model_dump(),
                "search": {"preset": "fast", "trials": 24, "initial": 10, "seed": 3, "refine": None},
            }
        ),
        blocks.folder,
    )
    return watch(job, tmp_path_factory.mktemp("fast"))


def test_what_the_race_left_is_refined_and_measured_whole(blocks: Job, tmp_path: Path) -> None:
    # So few trials that the refinement betters them on every machine: else there is nothing new to measure.
    search = {"preset": "fast", "trials": 4, "initial": 3, "seed": 2}
    search["refine"] = {**PRESETS["fast"]["refine"], "steps": 20, "starts": 1}
    result = Job(Spec.model_validate({**blocks.spec.model_dump(), "search": search}), blocks.folder).search(tmp_path)
    (refined,) = [trial for trial in result.trials if trial.phase == "refine"]
    assert (refined.status, refined.fidelity) == ("ok", 1)
    raced = max(trial.objective or 0.0 for trial in result.trials if trial.is_candidate and trial.phase == "search")
    assert result.best.objective == max(raced, refined.objective or 0.0)


def test_hopeless_trials_are_stopped_early(fast: Watched) -> None:
    assert fast.result is not None
    trials = fast.result.trials
    stopped = [trial for trial in trials if trial.status == "stopped"]
    measured = [trial for trial in trials if trial.status == "ok"]
    assert len(stopped) >= 5 and measured
    assert all(0 < trial.fidelity < 1 and trial.samples < 200 for trial in stopped)
    assert all(trial.fidelity == 1 and trial.samples == 200 for trial in measured)
    best = fast.result.best
    assert best.status == "ok" and best.objective == max(trial.objective or 0.0 for trial in measured)
    incumbent = 0.0
    for trial in trials:  # none is told as better than what it was stopped against
        if trial.status == "stopped":
            assert trial.objective is not None and trial.objective <= incumbent
        elif trial.status == "ok":
            incumbent = max(incumbent, trial.objective or 0.0)


@pytest.mark.parametrize("at", [0, 11, 30, 45])
def test_a_fast_search_is_resumed_with_its_race(fast: Watched, tmp_path: Path, at: int) -> None:
    assert fast.result is not None
    folder = tmp_path / "search"
    shutil.copytree(fast.moments[at].folder, folder)
    told = {event.trial.number for event in events_of(folder) if isinstance(event, Tell)}
    with counted(RecipeEvaluator, "__call__") as evaluated:
        resumed = fast.job.search(folder, resume=True)
    assert outcomes(resumed.trials) == outcomes(fast.result.trials)
    assert (folder / "recipe.json").read_bytes() == (fast.folder / "recipe.json").read_bytes()
    fresh = [trial for trial in resumed.trials if trial.number not in told and trial.samples]
    assert len(evaluated) == len(fresh)


# Several workers


def worker_pids() -> list[int]:
    """The processes of this one that run trials."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and b"automerge.searching.workers" in command:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_two_workers_lose_no_trial(blocks: Job, tmp_path: Path) -> None:
    """One is killed on the way: its trial is run again, all are logged once, and the log is resumed exactly."""
    job = blocks.with_(compute={"device": "cpu", "threads": 1, "workers": 2}).searching(trials=10, split=None)
    folder = tmp_path / "search"
    killed: list[int] = []

    def progress(event: SearchProgress) -> None:
        if event.done == 2:
            (first, _) = sorted(worker_pids())
            os.kill(first, signal.SIGKILL)
            killed.append(first)

    result = job.search(folder, progress=progress)
    assert killed and not worker_pids()
    assert not [trial.error for trial in result.trials if trial.status == "failed"]
    assert sorted(trial.number for trial in result.trials) == list(range(12))
    events = events_of(folder)
    asked = [event.number for event in events if isinstance(event, Ask)]
    told = [event.trial.number for event in events if isinstance(event, Tell)]
    assert asked == sorted(told) == list(range(12)), "each is asked for and told once"
    steps = [1 if isinstance(event, Ask) else -1 for event in events]
    ahead = [sum(steps[:at]) for at in range(len(steps))]
    assert max(ahead) == 3, "two run, and one waits"
    # One after the other the first trials are the same: they do not depend on what was told.
    alone = blocks.searching(trials=10, split=None).search(tmp_path / "alone")
    by_number = sorted(result.trials, key=lambda trial: trial.number)
    assert outcomes(by_number[:7]) == outcomes(alone.trials[:7])

    resumed = job.search(folder, resume=True)
    assert outcomes(resumed.trials) == outcomes(result.trials)
    cut = tmp_path / "cut"
    cut.mkdir()
    lines = (folder / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "trials.jsonl").write_bytes(b"".join(lines[:13]))
    kept = [event.trial.number for event in events_of(cut) if isinstance(event, Tell)]
    went_on = job.search(cut, resume=True)
    assert [trial.number for trial in went_on.trials[: len(kept)]] == kept
    assert outcomes(went_on.trials[: len(kept)]) == outcomes(result.trials[: len(kept)])
    assert sorted(trial.number for trial in went_on.trials) == list(range(12))


def test_the_same_recipe_has_one_key_however_it_is_written() -> None:
    """What the traps rely on: these two are one merge."""
    plain = block("task_arithmetic", CONV, **{"lambda": 1.0})
    dropped = block("dare_linear", CONV, **{"density": 1.0, "lambda": 1.0, "rescale": "inverse_density"})
    assert block_key(plain) == block_key(dropped)

"""The search loop: ask, log, evaluate, log, tell.

We own the loop so that progress, early stopping, budgets, resume and parallel trials are ours and the optimiser stays
exchangeable. Each event is durable before the next step (see :mod:`automerge.searching.store`), so a search killed
anywhere goes on from its log without repeating a trial, and ends with the same recipe as one that was never killed.

A search has phases, each with trials of its own in the one log: ``search`` (Bayesian optimisation over the blocks),
``split-1`` and so on (the blocks that matter most cut into layers, a wider space that starts from the best points), and
``refine`` (gradients on the sources' weights, from the best recipes).
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from automerge.documents import digest_of
from automerge.errors import AutoMergeError, SearchError
from automerge.merging.recipe import RecipeBlock, canonical, settings_key
from automerge.searching.evaluator import Outcome
from automerge.searching.fidelity import Race, Slices, make_race
from automerge.searching.front import pareto_front
from automerge.searching.objective import Measure, Objective
from automerge.searching.splitting import gradient_importance, most_important, split_blocks, surrogate_importance
from automerge.searching.store import Ask, Cut, Header, StoredScores, Tell, TrialStore
from automerge.searching.trial import Trial
from automerge.searching.workers import LostWorkersError, Workers
from automerge.segmenting.segmentation import Segmentation
from automerge.tasks.task import Scores

if TYPE_CHECKING:
    from automerge.searching.optimiser import Optimiser
    from automerge.searching.refinement import Refined
    from automerge.searching.space import SearchSpace

log = logging.getLogger(__name__)

FAILURE_FACTOR = 2.0
"""A failed trial is told as so many times the worst cost so far: bad enough to be avoided, finite for the surrogate."""

PARENTS = 5
"""Best points that a wider space starts from."""

BAYESIAN_SHARE = 0.6
"""Of a budget of time or samples, what the phases before the refinement may spend."""

Gradients = Callable[[Sequence[RecipeBlock]], Mapping[str, Mapping[str, float]]]
"""The blocks of a recipe -> by tensor and source, the gradient of the cost in a weight of the tensor's own."""

Refine = Callable[[int, Sequence[RecipeBlock]], "Refined"]
"""The number of a trial and its blocks -> the refined ones; goes on where it was interrupted."""


@dataclass(frozen=True)
class SearchProgress:
    """What a progress display needs after each trial."""

    trial: Trial
    best: Trial | None
    done: int
    total: int
    replayed: bool


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        best: the trial with the highest objective; the earliest of equals.
        blocks: the recipe's blocks of ``best``.
        trials: all finished trials, in order.
        front: of a search for the Pareto front, its trials with their blocks, by the first task's CP.
        stopped: 'budget', 'plateau' or 'interrupted'.
    """

    best: Trial
    blocks: list[RecipeBlock]
    trials: list[Trial]
    front: list[tuple[Trial, list[RecipeBlock]]]
    stopped: str


@dataclass(frozen=True)
class Plan:
    """What the phases beyond plain Bayesian optimisation need; what is None is left out.

    Attributes:
        slices: of the validation data, for multi-fidelity.
        layers: the segmentation by layers, along which blocks are cut.
        gradients: at a recipe, for the importance of blocks.
        refine: refines one recipe.
    """

    slices: Slices | None = None
    layers: Segmentation | None = None
    gradients: Gradients | None = None
    refine: Refine | None = None


def search(
    space: "SearchSpace",
    workers: Workers,
    objective: Objective,
    *,
    store_path: Path,
    identity: str,
    hardware: str = "",
    resume: bool = False,
    progress: Callable[[SearchProgress], None] | None = None,
    plan: Plan = Plan(),
) -> SearchResult:
    """Search a space for the recipe with the highest objective.

    Args:
        space: blocks, sources, techniques and the search part of the spec.
        workers: merge and measure recipes.
        objective: what is maximised, with the specialists' figures.
        store_path: the log, ``trials.jsonl``.
        identity: digest of the inputs that shape the search besides ``space``: checkpoints and data.
        hardware: device and threads, for the log; a resumed search may run on others, and says so.
        resume: go on from the log at ``store_path``.
        progress: called after each trial, the replayed ones of a resumed search included.
        plan: what the further phases need.

    Raises:
        SearchError: the objective is undefined, the log cannot be used, or all trials failed.
        KeyboardInterrupt: the search was interrupted before any trial succeeded.
    """
    objective.check()
    whole_identity = search_identity(space, workers, identity)
    header = Header(identity=whole_identity, hardware=hardware, objective=objective)
    store = TrialStore.resume(store_path, whole_identity) if resume else TrialStore.create(store_path, header)
    if store.header.hardware != hardware:
        log.warning(
            "the search was begun on %s and goes on on %s: its trials may differ in the last digits from those of a "
            "search that stayed there",
            store.header.hardware,
            hardware,
        )
    loop = _Loop(space, workers, store, progress, plan)
    try:
        stopped = loop.run(_warm(space))
    finally:
        store.close()
    return loop.result(stopped)


def search_identity(space: "SearchSpace", workers: Workers, inputs: str) -> str:
    """Digest of all that shapes a search: its log carries it, and only a search of the same identity goes on from it.

    Args:
        space, workers: as of `search`.
        inputs: its ``identity``.
    """
    spec = space.spec
    further = {"split", "refine"} - {name for name in ("split", "refine") if getattr(spec, name) is None}
    # More trials may be added to a search that ended, but not before phases that began from its end.
    free = {"max_seconds", "max_samples", "trial_seconds"} | (set() if further else {"trials", "early_stop"})
    shape = spec.model_dump(mode="json", exclude={"preset", "initial", "warm_start", "start_from", *free})
    return digest_of(
        {
            "inputs": inputs,
            "search": {**shape, "warm": _warm(space)},
            "initial": spec.initial,
            "workers": workers.capacity,
            "blocks": [block.model_dump(mode="json") for block in space.blocks],
            "techniques": list(space.techniques),
        }
    )


def _warm(space: "SearchSpace") -> list[tuple[str, Mapping[str, object]]]:
    """The points that are tried first."""
    return [*(space.warm_starts() if space.spec.warm_start else []), *space.start_points]


class _Loop:
    """The state of one running search."""

    def __init__(
        self,
        space: "SearchSpace",
        workers: Workers,
        store: TrialStore,
        progress: Callable[[SearchProgress], None] | None,
        plan: Plan,
    ) -> None:
        self.spec = space.spec
        self.space = space
        self.workers = workers
        self.store = store
        self.objective = store.header.objective
        self.progress = progress
        self.plan = plan
        self.spaces = {"search": space}
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.race: Race | None = None
        self.by_recipe: dict[str, Trial] = {}
        self.since_improvement = 0
        self.began = time.monotonic()
        self.asked = 0
        split, refine = self.spec.split, self.spec.refine
        self.total = self.spec.trials
        if split is not None and plan.layers is not None:
            self.total += split.rounds * split.trials
        if refine is not None and plan.refine is not None:
            self.total += refine.starts

    def run(self, warm: Sequence[tuple[str, Mapping[str, object]]]) -> str:
        """All phases; returns why the last one ended."""
        if self.store.events:
            told = sum(isinstance(event, Tell) for event in self.store.events)
            asked = sum(isinstance(event, Ask) for event in self.store.events)
            log.info("resumed: %d trials from the log, %d in flight", told, asked - told)
        try:
            stopped = self._bayesian("search", self.space, self.spec.trials, warm, self.spec.initial)
            if self.best is None:
                self.result(stopped)
            if self.spec.split is not None and self.plan.layers is not None:
                for number in range(1, self.spec.split.rounds + 1):
                    if not self._split(f"split-{number}", self.plan.layers):
                        break
            if self.spec.refine is not None and self.plan.refine is not None:
                self._refine(self.plan.refine, self.spec.refine.starts)
        except KeyboardInterrupt:
            if self.best is None:
                log.warning("interrupted before any trial succeeded; what was done is kept for --resume")
                raise
            return "interrupted"
        return stopped

    def result(self, stopped: str) -> SearchResult:
        """The outcome; raises SearchError if no trial succeeded."""
        if not self.trials:
            raise SearchError("search.max_seconds leaves no time for a single trial", "raise it")
        if self.best is None:
            raise SearchError(
                f"all {len(self.trials)} trials failed, the last with: {self.trials[-1].error}", "mend that"
            )
        front: list[tuple[Trial, list[RecipeBlock]]] = []
        if self.spec.aggregate == "pareto":
            candidates = [trial for trial in self.trials if trial.is_candidate]
            front = [(candidates[at], self._blocks(candidates[at])) for at in pareto_front([t.cp for t in candidates])]
        return SearchResult(self.best, self._blocks(self.best), list(self.trials), front, stopped)

    # Bayesian optimisation

    def _bayesian(
        self,
        phase: str,
        space: "SearchSpace",
        trials: int,
        warm: Sequence[tuple[str, Mapping[str, object]]],
        initial: int,
    ) -> str:
        """Ask and evaluate until the phase's trials or the budget are spent, or the objective stands still."""
        self.spaces[phase] = space
        first = self.asked
        self.since_improvement = 0
        pending = self._recall(phase)
        stopped = self._finished(phase, trials) if not pending else None
        if stopped is not None or self._is_over(phase):
            return stopped or "budget"
        from automerge.searching.optimiser import Optimiser  # SMAC takes seconds to import

        optimiser = Optimiser(
            space.configuration_space(self.spec.seed),
            trials=max(trials, initial),  # its first points are the same, however few of them are asked for
            initial=initial,
            warm_starts=warm,
            seed=self.spec.seed,
            **({"objectives": list(self.objective.tasks)} if self.spec.aggregate == "pareto" else {}),
        )
        try:
            self._replay(phase, optimiser, first)
            return self._evaluate_all(phase, optimiser, first, trials, pending)
        finally:
            optimiser.close()

    def _recall(self, phase: str) -> list[Ask]:
        """Take over what the log holds of a phase; returns the asks that were in flight when the search ended."""
        pending: dict[int, Ask] = {}
        for event in self.store.events:
            if isinstance(event, Ask) and event.phase == phase:
                pending[event.number] = event
                self.asked = max(self.asked, event.number + 1)
            elif isinstance(event, Tell) and event.trial.phase == phase:
                pending.pop(event.trial.number)
                scores = {task: stored.scores for task, stored in event.scores.items()} if event.scores else None
                self._record(event.trial, scores, replayed=True)
        return list(pending.values())

    def _replay(self, phase: str, optimiser: "Optimiser", first: int) -> None:
        """Bring the optimiser to where the log ends, by the logged asks and tells in their order."""
        for event in list(self.store.events):
            if isinstance(event, Tell) and event.trial.phase == phase:
                self._tell(optimiser, event.trial, first)
            elif isinstance(event, Ask) and event.phase == phase:
                number, _, config = optimiser.ask()
                if number + first != event.number or config != event.config:
                    raise SearchError(
                        f"{self.store.path}: trial {event.number} cannot be replayed: the optimiser now proposes "
                        "another point (another release of it, or another kind of processor)",
                        "resume where the search was begun, or start in another folder",
                    )

    def _evaluate_all(self, phase: str, optimiser: "Optimiser", first: int, trials: int, pending: list[Ask]) -> str:
        in_flight: dict[Future[Outcome], tuple[Ask, float, float, Race | None]] = {}
        # With several workers one more trial waits, so that the optimiser thinks while they work.
        wanted = self.workers.capacity + (1 if self.workers.capacity > 1 else 0)
        queue = [(ask, 0.0) for ask in pending]
        while True:
            stopped = self._finished(phase, trials)
            while queue or (stopped is None and len(in_flight) < wanted and self.asked - first < trials):
                if queue:
                    ask, optimiser_seconds = queue.pop(0)
                else:
                    start = time.perf_counter()
                    number, origin, config = optimiser.ask()
                    optimiser_seconds = time.perf_counter() - start
                    ask = Ask(number=number + first, phase=phase, origin=origin, config=config)
                    self.store.append(ask)
                    self.asked = ask.number + 1
                known = self._known(ask, optimiser_seconds)
                if known is not None:
                    self._conclude(known, None, optimiser, first)
                    stopped = self._finished(phase, trials)
                    continue
                start = time.perf_counter()
                future = self.workers.submit(self.spaces[phase].recipe_blocks(ask.config), self.race)
                in_flight[future] = (ask, optimiser_seconds, start, self.race)
                if future.done():
                    break
            if not in_flight:
                if stopped is not None:
                    return stopped
                continue
            done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda each: in_flight[each][0].number):
                ask, optimiser_seconds, start, race = in_flight.pop(future)
                trial, outcome = self._trial(ask, future, race, time.perf_counter() - start, optimiser_seconds)
                self._conclude(trial, outcome, optimiser, first)
            self._refuse_all_failed()

    def _conclude(self, trial: Trial, outcome: Outcome | None, optimiser: "Optimiser", first: int) -> None:
        scores = outcome.scores if outcome is not None and self._races(trial) else None
        stored = None if scores is None else {task: StoredScores.of(each) for task, each in scores.items()}
        self.store.append(Tell(trial=trial, scores=stored))
        self._tell(optimiser, trial, first)
        self._record(trial, scores, replayed=False)

    def _races(self, trial: Trial) -> bool:
        """Whether the next trials race against this one."""
        return self.plan.slices is not None and trial.status == "ok" and self._is_best(trial)

    def _is_best(self, trial: Trial) -> bool:
        best = self.best.objective if self.best is not None else None
        return trial.is_candidate and trial.objective is not None and (best is None or trial.objective > best)

    def _tell(self, optimiser: "Optimiser", trial: Trial, first: int) -> None:
        failed = trial.status == "failed"
        if self.spec.aggregate != "pareto":
            optimiser.tell(trial.number - first, trial.cost, failed=failed)
            return
        costs = [trial.cost] * len(self.objective.tasks) if failed else [1.0 / cp for cp in trial.cp.values()]
        optimiser.tell(trial.number - first, costs, failed=failed)

    def _finished(self, phase: str, trials: int) -> str | None:
        """Why no further trial of the phase is due; None if one is."""
        if sum(trial.phase == phase for trial in self.trials) >= trials or self._exhausted(phase):
            return "budget"
        if self.spec.early_stop is not None and self.since_improvement >= self.spec.early_stop.patience:
            return "plateau"
        return None

    def _is_over(self, phase: str) -> bool:
        """Whether the log has a later phase: then this one has ended, whatever a budget of time says now."""
        if not self.store.events:
            return False
        last = self.store.events[-1]
        return _place(last.trial.phase if isinstance(last, Tell) else last.phase) > _place(phase)

    def _exhausted(self, phase: str) -> bool:
        """Whether the budget of time or samples is spent, as far as the phase may spend it."""
        refines = self.spec.refine is not None and self.plan.refine is not None
        share = BAYESIAN_SHARE if refines and phase != "refine" else 1.0
        seconds, samples = self.spec.max_seconds, self.spec.max_samples
        if seconds is not None and time.monotonic() - self.began >= share * seconds:
            return True
        return samples is not None and sum(trial.samples for trial in self.trials) >= share * samples

    # Coarse to fine

    def _split(self, phase: str, layers: Segmentation) -> bool:
        """Cut the most important blocks, and search on from the best points; False where nothing can be cut."""
        assert self.spec.split is not None  # noqa: S101 - the caller has checked it
        assert self.best is not None  # noqa: S101 - a phase that found nothing has raised
        previous = self.space
        cut = next((e for e in self.store.events if isinstance(e, Cut) and e.phase == phase), None)
        if cut is None:
            if self._is_over(phase) or self._exhausted(phase):
                return False
            measure, importance = self._importance(layers)
            chosen = most_important(importance, previous.separable(), layers, self.spec.split.blocks)
            cut = Cut(phase=phase, blocks=chosen, importance=importance, measure=measure)
            self.store.append(cut)
        if not cut.blocks:
            log.info("no block can be cut further")
            return False
        log.info("cutting the blocks %s", ", ".join(cut.blocks))
        self.space = replace(previous, blocks=split_blocks(previous.blocks, cut.blocks, layers), start_points=[])
        candidates = sorted((t for t in self.trials if t.is_candidate), key=lambda t: -(t.objective or 0.0))
        warm: list[tuple[str, Mapping[str, object]]] = []
        for trial in candidates:
            point = self.space.from_recipe(self._blocks(trial))
            if point not in [known for _, known in warm]:
                warm.append((f"parent:{trial.number}", point))
            if len(warm) == min(PARENTS, self.spec.split.trials - 1):
                break
        self._bayesian(phase, self.space, self.spec.split.trials, warm, initial=1)
        return True

    def _importance(self, layers: Segmentation) -> tuple[Literal["surrogate", "gradient"], dict[str, float]]:
        """What measured it, and each block's."""
        assert self.spec.split is not None and self.best is not None  # noqa: S101 - the caller has checked it
        if self.spec.split.importance == "gradient" and self.plan.gradients is not None:
            try:
                gradients = self.plan.gradients(self._blocks(self.best))
                simplex = self.space.mode == "simplex"
                return "gradient", gradient_importance(gradients, self.space.blocks, layers, simplex=simplex)
            except AutoMergeError as error:
                log.warning("the importance of blocks is measured by the surrogate instead: %s", error.problem)
        known = [trial for trial in self.trials if trial.status != "failed" and self.spaces[trial.phase] is self.space]
        configs, costs = [trial.config for trial in known], [trial.cost for trial in known]
        return "surrogate", surrogate_importance(configs, costs, self.space)

    # Refinement

    def _refine(self, refine: Refine, starts: int) -> None:
        phase = "refine"
        # Chosen before the log's own refined trials are recalled: as in the search that was interrupted.
        chosen = self._starts(starts)
        pending = {ask.origin: ask for ask in self._recall(phase)}
        told = {trial.origin for trial in self.trials if trial.phase == phase}
        for start in chosen:
            origin = f"refined:{start.number}"
            if origin in told:
                continue
            ask = pending.get(origin)
            if ask is None:
                if self._exhausted(phase):
                    return
                ask = Ask(number=self.asked, phase=phase, origin=origin)
                self.store.append(ask)
                self.asked += 1
            self._refine_one(refine, start, ask)

    def _refine_one(self, refine: Refine, start: Trial, ask: Ask) -> None:
        began = time.perf_counter()
        try:
            found = refine(start.number, self._blocks(start))
        except LostWorkersError:
            raise
        except (AutoMergeError, MemoryError, torch.OutOfMemoryError) as error:
            log.warning("the refinement of trial %d failed: %s", start.number, _reason(error))
            trial = self._failed(ask, _reason(error), time.perf_counter() - began, 0.0)
            self.store.append(Tell(trial=trial))
            self._record(trial, None, replayed=False)
            return
        same = self.by_recipe.get(_recipe_key(found.blocks))
        if same is not None:
            trial = self._copied(same, ask, 0.0)
        else:
            trial, _ = self._trial(ask, self.workers.submit(found.blocks, None), None, 0.0, 0.0)
        trial = trial.model_copy(
            update={
                "blocks": found.blocks,
                "samples": trial.samples + found.samples,
                "tuned": found.scalars,
                "seconds": time.perf_counter() - began,
            }
        )
        log.info(
            "refined trial %d: %d scalars of the recipe were tuned in %d steps (the best at %d), and no parameter of "
            "the model; on the data held back the objective went from %.4f to %.4f",
            start.number,
            found.scalars,
            found.steps,
            found.best_step,
            found.before,
            found.after,
        )
        self.store.append(Tell(trial=trial))
        self._record(trial, None, replayed=False)

    def _starts(self, count: int) -> list[Trial]:
        """The best trials, of different recipes; the average takes the second place where it is not among them."""
        ranked = sorted((t for t in self.trials if t.status == "ok"), key=lambda t: (-(t.objective or 0.0), t.number))
        average = next((trial for trial in ranked if trial.origin == "average"), None)
        chosen = ranked[:1]
        if average is not None and average not in chosen:
            chosen.append(average)
        chosen += [trial for trial in ranked if trial not in chosen]
        return chosen[:count]

    # Trials

    def _known(self, ask: Ask, optimiser_seconds: float) -> Trial | None:
        """The trial's outcome, where an equal recipe has one already."""
        same = self.by_recipe.get(_recipe_key(self.spaces[ask.phase].recipe_blocks(ask.config)))
        return None if same is None else self._copied(same, ask, optimiser_seconds)

    def _copied(self, same: Trial, ask: Ask, optimiser_seconds: float) -> Trial:
        return same.model_copy(
            update={
                "number": ask.number,
                "phase": ask.phase,
                "origin": ask.origin,
                "config": ask.config,
                "blocks": None,
                "tuned": 0,
                "status": "cached" if same.is_candidate else same.status,
                "samples": 0,
                "seconds": 0.0,
                "optimiser_seconds": optimiser_seconds,
            }
        )

    def _trial(
        self, ask: Ask, future: Future[Outcome], race: Race | None, seconds: float, optimiser_seconds: float
    ) -> tuple[Trial, Outcome | None]:
        try:
            outcome = future.result()
            measures = {task: Measure.of(scores) for task, scores in outcome.scores.items()}
            whole = outcome.fidelity == 1
            if not whole:
                assert race is not None  # noqa: S101 - nothing else stops a trial
                cp, cost = race.estimated_cp(outcome.scores), race.estimate(outcome.scores)
            else:
                cp = self.objective.preservation(measures)
                cost = 1.0 / self.objective.value(cp)
        except LostWorkersError:
            raise
        except (AutoMergeError, MemoryError, torch.OutOfMemoryError) as error:
            return self._failed(ask, _reason(error), seconds, optimiser_seconds), None
        return (
            Trial(
                number=ask.number,
                phase=ask.phase,
                origin=ask.origin,
                config=ask.config,
                status="ok" if whole else "stopped",
                cost=cost,
                objective=1.0 / cost,
                # Of a slice they would mislead: it has more of the rows on which the best is worst than the data have.
                losses={task: measure.loss for task, measure in measures.items()} if whole else {},
                cp=cp,
                rates=self.objective.validation_rates(measures) if whole else {},
                samples=outcome.samples,
                fidelity=outcome.fidelity,
                seconds=seconds,
                optimiser_seconds=optimiser_seconds,
            ),
            outcome,
        )

    def _failed(self, ask: Ask, reason: str, seconds: float, optimiser_seconds: float) -> Trial:
        worst = max((trial.cost for trial in self.trials if trial.status != "failed"), default=10.0)
        return Trial(
            number=ask.number,
            phase=ask.phase,
            origin=ask.origin,
            config=ask.config,
            status="failed",
            cost=FAILURE_FACTOR * worst,
            seconds=seconds,
            optimiser_seconds=optimiser_seconds,
            error=reason,
        )

    def _record(self, trial: Trial, scores: Mapping[str, Scores] | None, *, replayed: bool) -> None:
        self.trials.append(trial)
        self.since_improvement += 1
        if trial.phase != "refine" or trial.blocks is not None:
            self.by_recipe.setdefault(_recipe_key(self._blocks(trial)), trial)
        if self._is_best(trial):
            early_stop = self.spec.early_stop
            margin = early_stop.min_improvement if early_stop is not None else 0.0
            before = self.best.objective if self.best is not None else None
            if before is None or (trial.objective or 0.0) > before + margin:
                self.since_improvement = 0
            self.best = trial
            if scores is not None and self.plan.slices is not None and self.spec.fidelity is not None:
                self.race = make_race(self.plan.slices, self.objective, scores, self.spec.fidelity.confidence)
        if self.progress is not None:
            total = max(self.total, len(self.trials))
            self.progress(SearchProgress(trial, self.best, len(self.trials), total, replayed))

    def _blocks(self, trial: Trial) -> list[RecipeBlock]:
        if trial.blocks is not None:
            return trial.blocks
        return self.spaces[trial.phase].recipe_blocks(trial.config)

    def _refuse_all_failed(self) -> None:
        """A search whose first trials all fail has a broken set-up: say so instead of spending the budget."""
        if self.best is None and len(self.trials) >= min(self.spec.initial, self.spec.trials):
            self.result("failed")


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, AutoMergeError) else "out of memory"


def _recipe_key(blocks: Sequence[RecipeBlock]) -> str:
    """What is merged and how, tensor by tensor: blocks that are cut, and merged as before, are the same recipe."""
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    for block in blocks:
        key = settings_key(canonical(block).settings)
        parameters |= dict.fromkeys(block.parameters, key)
        buffers |= dict.fromkeys(block.buffers, key)
    return digest_of({"parameters": parameters, "buffers": buffers})


def _place(phase: str) -> float:
    """The place of a phase in the order in which they come."""
    if phase == "search":
        return 0
    return math.inf if phase == "refine" else int(phase.removeprefix("split-"))

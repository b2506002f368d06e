"""The search loop: ask, log, evaluate, log, tell.

We own the loop so that progress, early stopping, budgets and resume are ours and the optimiser stays exchangeable. Each
event is durable before the next step (see :mod:`automerge.searching.store`), so a search killed anywhere goes on from
its log without repeating a trial, and ends with the same recipe as one that was never killed.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from automerge.documents import digest_of
from automerge.errors import AutoMergeError, SearchError
from automerge.merging.recipe import RecipeBlock, block_key
from automerge.searching.store import Ask, Header, Tell, TrialStore
from automerge.searching.trial import Trial, capability_preservation, harmonic_mean

if TYPE_CHECKING:
    from automerge.searching.optimiser import Optimiser
    from automerge.searching.space import SearchSpace

log = logging.getLogger(__name__)

Evaluate = Callable[[Sequence[RecipeBlock]], Mapping[str, float]]
"""Merges by the given blocks and returns the mean validation loss by task; raises AutoMergeError if it cannot."""

FAILURE_FACTOR = 2.0
"""A failed trial is told as so many times the worst cost so far: bad enough to be avoided, finite for the surrogate."""


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
        stopped: 'budget', 'plateau' or 'interrupted'.
    """

    best: Trial
    blocks: list[RecipeBlock]
    trials: list[Trial]
    stopped: str


def search(
    space: "SearchSpace",
    evaluate: Evaluate,
    reference_losses: Mapping[str, float],
    *,
    store_path: Path,
    identity: str,
    hardware: str = "",
    resume: bool = False,
    progress: Callable[[SearchProgress], None] | None = None,
) -> SearchResult:
    """Search a space for the recipe with the highest objective.

    Args:
        space: blocks, sources, techniques and the search part of the spec.
        evaluate: merges and measures one recipe.
        reference_losses: the specialist's mean validation loss by task.
        store_path: the log, ``trials.jsonl``.
        identity: digest of the inputs that shape the search besides ``space``: checkpoints and data.
        hardware: device and threads, for the log; a resumed search may run on others, and says so.
        resume: go on from the log at ``store_path``.
        progress: called after each trial, the replayed ones of a resumed search included.

    Raises:
        SearchError: the log cannot be used, or all trials failed.
        KeyboardInterrupt: the search was interrupted before any trial succeeded.
    """
    from automerge.searching.optimiser import Optimiser  # SMAC takes seconds to import

    spec = space.spec
    warm = space.warm_starts() if spec.effective_warm_start else []
    warm = warm[: max(0, spec.trials - 1)]
    initial = max(1, min(spec.initial, spec.trials - len(warm)))
    shape = spec.model_dump(mode="json", exclude={"trials", "early_stop", "preset", "initial"})
    whole_identity = digest_of(
        {
            "inputs": identity,
            "search": {**shape, "epsilon": spec.effective_epsilon, "warm_start": [origin for origin, _ in warm]},
            "initial": initial,
            "blocks": [block.model_dump(mode="json") for block in space.blocks],
            "techniques": list(space.techniques),
        }
    )
    header = Header(
        identity=whole_identity,
        hardware=hardware,
        reference_losses=dict(reference_losses),
        epsilon=spec.effective_epsilon,
    )
    store = TrialStore.resume(store_path, whole_identity) if resume else TrialStore.create(store_path, header)
    if store.header.hardware != hardware:
        log.warning(
            "the search was begun on %s and goes on on %s: its trials may differ in the last digits from those of a "
            "search that stayed there",
            store.header.hardware,
            hardware,
        )
    loop = _Loop(space, evaluate, store, progress)
    try:
        loop.recall()
        stopped = loop.finished()
        if stopped is None:
            optimiser = Optimiser(
                space.configuration_space(spec.seed),
                trials=spec.trials,
                initial=initial,
                warm_starts=warm,
                seed=spec.seed,
            )
            try:
                loop.replay(optimiser)
                stopped = loop.run(optimiser)
            finally:
                optimiser.close()
    finally:
        store.close()
    return loop.result(stopped)


class _Loop:
    """The state of one running search."""

    def __init__(
        self,
        space: "SearchSpace",
        evaluate: Evaluate,
        store: TrialStore,
        progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self.space = space
        self.evaluate = evaluate
        self.store = store
        self.progress = progress
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.pending: list[tuple[Ask, float]] = []
        self.by_recipe: dict[str, Trial] = {}
        self.since_improvement = 0

    def recall(self) -> None:
        """Take over what the log holds: finished trials, and those that were in flight when the search ended."""
        for event in self.store.events:
            if isinstance(event, Ask):
                self.pending.append((event, 0.0))
            else:
                self.pending = [(ask, seconds) for ask, seconds in self.pending if ask.number != event.trial.number]
                self._record(event.trial, replayed=True)
        if self.store.events:
            log.info("resumed: %d trials from the log, %d in flight", len(self.trials), len(self.pending))

    def finished(self) -> str | None:
        """Why no further trial is due; None if one is."""
        spec = self.space.spec
        if self.pending:
            return None
        if len(self.trials) >= spec.trials:
            return "budget"
        if spec.early_stop is not None and self.since_improvement >= spec.early_stop.patience:
            return "plateau"
        return None

    def replay(self, optimiser: "Optimiser") -> None:
        """Bring the optimiser to where the log ends, by the logged asks and tells in their order."""
        for event in list(self.store.events):
            if isinstance(event, Tell):
                optimiser.tell(event.trial.number, event.trial.cost, failed=event.trial.status == "failed")
                continue
            number, _, config = optimiser.ask()
            if number != event.number or config != event.config:
                raise SearchError(
                    f"{self.store.path}: trial {event.number} cannot be replayed: the optimiser now proposes another "
                    "point (another release of it, or another kind of processor)",
                    "resume where the search was begun, or start in another folder",
                )

    def run(self, optimiser: "Optimiser") -> str:
        """Ask and evaluate until the budget is spent, the objective stands still, or the user interrupts."""
        try:
            while (stopped := self.finished()) is None:
                if self.pending:
                    ask, optimiser_seconds = self.pending.pop(0)
                else:
                    start = time.perf_counter()
                    number, origin, config = optimiser.ask()
                    optimiser_seconds = time.perf_counter() - start
                    ask = Ask(number=number, origin=origin, config=config)
                    self.store.append(ask)
                trial = self._evaluate(ask, optimiser_seconds)
                self.store.append(Tell(trial=trial))
                optimiser.tell(trial.number, trial.cost, failed=trial.status == "failed")
                self._record(trial, replayed=False)
                self._refuse_all_failed()
            return stopped
        except KeyboardInterrupt:
            if self.best is None:
                log.warning("interrupted before any trial succeeded; what was done is kept for --resume")
                raise
            return "interrupted"

    def result(self, stopped: str) -> SearchResult:
        """The outcome; raises SearchError if no trial succeeded."""
        if self.best is None:
            raise SearchError(
                f"all {len(self.trials)} trials failed, the last with: {self.trials[-1].error}", "mend that"
            )
        return SearchResult(self.best, self.space.recipe_blocks(self.best.config), list(self.trials), stopped)

    def _evaluate(self, ask: Ask, optimiser_seconds: float) -> Trial:
        blocks = self.space.recipe_blocks(ask.config)
        start = time.perf_counter()
        same = self.by_recipe.get(_recipe_key(blocks))
        if same is not None:
            return same.model_copy(
                update={
                    "number": ask.number,
                    "origin": ask.origin,
                    "config": ask.config,
                    "status": "cached",
                    "seconds": time.perf_counter() - start,
                    "optimiser_seconds": optimiser_seconds,
                }
            )
        try:
            losses = dict(self.evaluate(blocks))
            cp = {
                task: capability_preservation(loss, losses[task], self.store.header.epsilon, task)
                for task, loss in self.store.header.reference_losses.items()
            }
        except (AutoMergeError, MemoryError, torch.OutOfMemoryError) as error:
            worst = max((trial.cost for trial in self.trials if trial.status != "failed"), default=10.0)
            return Trial(
                number=ask.number,
                origin=ask.origin,
                config=ask.config,
                status="failed",
                cost=FAILURE_FACTOR * worst,
                seconds=time.perf_counter() - start,
                optimiser_seconds=optimiser_seconds,
                error=str(error) if isinstance(error, AutoMergeError) else "out of memory",
            )
        objective = harmonic_mean(cp)
        return Trial(
            number=ask.number,
            origin=ask.origin,
            config=ask.config,
            status="ok",
            cost=1.0 / objective,
            objective=objective,
            losses=losses,
            cp=cp,
            seconds=time.perf_counter() - start,
            optimiser_seconds=optimiser_seconds,
        )

    def _record(self, trial: Trial, *, replayed: bool) -> None:
        self.trials.append(trial)
        self.since_improvement += 1
        if trial.objective is not None:
            self.by_recipe.setdefault(_recipe_key(self.space.recipe_blocks(trial.config)), trial)
            early_stop = self.space.spec.early_stop
            margin = early_stop.min_improvement if early_stop is not None else 0.0
            best = self.best.objective if self.best is not None else None
            if best is None or trial.objective > best + margin:
                self.since_improvement = 0
            if best is None or trial.objective > best:
                self.best = trial
        if self.progress is not None:
            self.progress(SearchProgress(trial, self.best, len(self.trials), self.space.spec.trials, replayed))

    def _refuse_all_failed(self) -> None:
        """A search whose first trials all fail has a broken set-up: say so instead of spending the budget."""
        if self.best is None and len(self.trials) >= min(self.space.spec.initial, self.space.spec.trials):
            self.result("failed")


def _recipe_key(blocks: Sequence[RecipeBlock]) -> str:
    return digest_of([block_key(block) for block in blocks])

"""How well a search's objective ranked its recipes by what they keep: a check that is made for every run."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

LEAST_TRIALS = 10
"""Below so many different trials a rank correlation says nothing."""

GOOD = 0.8
"""A rank correlation below is worth a warning."""


class RankedTrial(Protocol):
    """What is needed of a trial; :class:`automerge.searching.trial.Trial` has it."""

    @property
    def status(self) -> str:
        """'ok' if it was measured, on all validation data."""
        ...

    @property
    def objective(self) -> float | None:
        """What the search maximises."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """Preservation rate on validation data by task, percent."""
        ...


@dataclass(frozen=True)
class Alignment:
    """Spearman's rank correlation of the objective with the preservation rate on validation data.

    Attributes:
        mean: with the mean rate of the tasks.
        worst: with the rate of the worst task.
        trials: over how many trials.
    """

    mean: float
    worst: float
    trials: int

    @property
    def warning(self) -> str | None:
        """A sentence where the objective was a poor guide."""
        if min(self.mean, self.worst) >= GOOD:
            return None
        return (
            f"the objective ranked the {self.trials} recipes of the search poorly by what they keep (rank correlation "
            f"{self.mean:.2f} with the mean and {self.worst:.2f} with the worst preservation rate on validation data), "
            "so another search.objective may find a better one"
        )


def alignment(trials: Sequence[RankedTrial]) -> Alignment | None:
    """The alignment over the trials measured on all validation data; None where they are too few or all alike.

    Source: Spearman, 'The proof and measurement of association between two things', 1904.
    """
    from scipy.stats import spearmanr

    measured = [trial for trial in trials if trial.status == "ok" and trial.rates and trial.objective is not None]
    if len(measured) < LEAST_TRIALS:
        return None
    objectives = [trial.objective for trial in measured]
    means = [sum(trial.rates.values()) / len(trial.rates) for trial in measured]
    worst = [min(trial.rates.values()) for trial in measured]
    if any(len(set(values)) == 1 for values in (objectives, means, worst)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Alignment(
            float(spearmanr(objectives, means).statistic), float(spearmanr(objectives, worst).statistic), len(measured)
        )

"""Trials: one evaluated recipe each, and the objective that ranks them.

Capability preservation (CP) is the search-time approximation of a task's preservation rate, (L_s + e) / (L_m + e) with
the specialist's loss L_s and the merged model's loss L_m on the task's validation data. The objective ``loss_ratio`` is
the harmonic mean H of CP over the tasks (arXiv 2601.22748, section 3); an optimiser minimises 1/H, which is the mean
relative loss.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from automerge.documents import Model
from automerge.errors import SearchError


class Trial(Model):
    """One evaluated point of the search space."""

    number: int = Field(description="From 0, in the order of asking.")
    origin: str = Field(description="'average', 'source:<name>', 'sobol', 'surrogate' or 'random'.")
    config: dict[str, Any] = Field(description="The point, by hyperparameter.")
    status: Literal["ok", "cached", "failed"]
    cost: float = Field(description="What the optimiser was told: 1/H, or the penalty of a failed trial.")
    objective: float | None = Field(default=None, description="H; null if the trial failed.")
    losses: dict[str, float] = Field(default_factory=dict, description="Mean validation loss by task.")
    cp: dict[str, float] = Field(default_factory=dict, description="Capability preservation by task.")
    seconds: float = Field(description="Wall time of merging and evaluating.")
    optimiser_seconds: float = Field(description="Wall time the optimiser took to propose the point.")
    error: str | None = Field(default=None, description="Why the trial failed.")


def capability_preservation(specialist_loss: float, merged_loss: float, epsilon: float, task: str) -> float:
    """CP of one task: (specialist_loss + epsilon) / (merged_loss + epsilon); bigger is better.

    Raises:
        SearchError: the ratio is undefined: a loss is negative or not finite, or one of them is 0 without an epsilon.
    """
    for who, loss in (("specialist's", specialist_loss), ("merged model's", merged_loss)):
        if not math.isfinite(loss) or loss < 0:
            raise SearchError(f"task {task!r}: the {who} validation loss is {loss}", "check the data and the loss")
        if loss + epsilon == 0:
            raise SearchError(
                f"task {task!r}: the {who} validation loss is 0, so the loss ratio is undefined",
                "set search.epsilon, e.g. 0.001",
            )
    return (specialist_loss + epsilon) / (merged_loss + epsilon)


def harmonic_mean(cp: Mapping[str, float]) -> float:
    """H: the harmonic mean of CP over the tasks."""
    return len(cp) / sum(1.0 / value for value in cp.values())

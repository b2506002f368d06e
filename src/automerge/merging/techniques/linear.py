"""Linear: the weighted average of the sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from automerge.merging.consensus import sum_of_weights, weighted_sum
from automerge.merging.fused import Fused
from automerge.merging.technique import Settings, TensorInputs, scaled_to_sum_one, technique

if TYPE_CHECKING:
    import torch


def shares(settings: Settings) -> dict[str, float]:
    """w / sum(w): the factor of each source."""
    total = math.fsum(settings.weights.values())
    return {name: weight / total for name, weight in settings.weights.items()}


def _canonical(settings: Settings) -> Settings:
    return Settings("linear", scaled_to_sum_one(settings.weights))


def _fused(settings: Settings) -> Fused:
    return Fused(task_vectors=False, divisor=math.fsum(settings.weights.values()))


@technique(
    name="linear",
    normalised=True,
    nonzero_weight_sum=True,
    effective_weights=shares,
    canonical=_canonical,
    fused=_fused,
    differentiable=True,
    source="Wortsman et al., 'Model soups', https://arxiv.org/abs/2203.05482",
)
def linear(inputs: TensorInputs, weights: Sequence[float]) -> torch.Tensor:
    """sum(w_i * t_i) / sum(w_i)."""
    return weighted_sum(inputs.sources, weights).div_(sum_of_weights(weights))

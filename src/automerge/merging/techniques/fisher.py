"""Fisher-weighted averaging: each element by how much its source's output depends on it.

The average maximises the product of the sources' posteriors, each approximated by a Gaussian around its own weights
with the diagonal of its Fisher information as precision. What the paper leaves open, and what is done here:

- Scale. As in the authors' code, each diagonal is divided by its L2 norm over the whole model, when it is gathered.
- Floor. Where no source's output depends on an element it would be 0 / 0. No diagonal counts as less than ``_FLOOR``
  times the mean of all sources' diagonals of the tensor; so such elements become the weighted average, at any scale of
  the diagonals. (The authors raise the first model's to 1e-6.)
- A tensor without statistics, or whose diagonals are all zero, becomes the weighted average.

Elementwise but for that mean, whose sum is in a fixed order: exact on any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from automerge.errors import MergeError
from automerge.merging.consensus import weighted_sum
from automerge.merging.sparsify import l1_norm
from automerge.merging.technique import Settings, TensorInputs, scaled_to_sum_one, technique
from automerge.merging.techniques.linear import shares

if TYPE_CHECKING:
    import torch

_FLOOR = 1e-6
"""The least Fisher information of an element, times the mean of the tensor's."""

_NOTHING = 1e-30
"""A mean below is zero: float32 could not divide by it."""


def one_source_is_linear(settings: Settings) -> Settings:
    """The weights scaled as for linear; linear itself where one source has all the weight."""
    weights = scaled_to_sum_one(settings.weights)
    if sum(weight != 0 for weight in weights.values()) == 1:
        return Settings("linear", weights)
    return Settings(settings.technique, weights, dict(settings.hyperparameters))


def refuse_negative(technique: str, inputs: TensorInputs, weights: Sequence[float]) -> None:
    """Raise where a weight is negative: the denominator of a precision-weighted average could vanish.

    Raises:
        MergeError: one is.
    """
    for source, weight in zip(inputs.source_names, weights, strict=True):
        if weight < 0:
            raise MergeError(
                f"tensor {inputs.tensor!r}: technique {technique!r} takes no negative weight, and that of source "
                f"{source!r} is {weight:g}",
                "give weights of 0 or more",
            )


@technique(
    name="fisher",
    normalised=True,
    nonzero_weight_sum=True,
    statistics=("fisher",),
    effective_weights=shares,
    effective_note="before each element's own Fisher information; the factor of an element is its share of sum(w F)",
    canonical=one_source_is_linear,
    source="Matena and Raffel, 'Merging models with Fisher-weighted averaging', https://arxiv.org/abs/2111.09832",
)
def fisher(inputs: TensorInputs, weights: Sequence[float]) -> torch.Tensor:
    """sum(w_i F_i t_i) / sum(w_i F_i), F_i the floored diagonal of source i's Fisher information."""
    import torch

    refuse_negative("fisher", inputs, weights)
    diagonals = inputs.statistics.get("fisher", ())
    mean = math.fsum(l1_norm(diagonal) for diagonal in diagonals) / max(1, len(diagonals) * inputs.sources[0].numel())
    if mean < _NOTHING:
        return weighted_sum(inputs.sources, weights).div_(math.fsum(weights))
    # Divided by the mean: of the order of 1, so that no product leaves the range of float32. The products are not fused
    # with the sums, see `automerge.merging.consensus`.
    above, below = torch.zeros_like(inputs.sources[0]), torch.zeros_like(inputs.sources[0])
    for source, diagonal, weight in zip(inputs.sources, diagonals, weights, strict=True):
        factor = (diagonal / mean).clamp_(min=_FLOOR).mul_(weight)
        below += factor
        above += factor.mul_(source)
    return above.div_(below)

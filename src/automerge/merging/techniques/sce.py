"""SCE: select the elements in which the sources differ most, weigh each source by its energy, erase minority signs."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch

from automerge.merging.consensus import sum_of_agreeing
from automerge.merging.sparsify import inner_product, largest
from automerge.merging.technique import Hyperparameter, Settings, TensorInputs, scaled_to_sum_one, technique
from automerge.merging.techniques.linear import shares

SELECT_TOPK = Hyperparameter(
    "select_topk",
    "float",
    default=1.0,
    low=0.001,
    high=1.0,
    searched=True,
    doc="share of each tensor's elements that is kept, those of the largest variance between the sources first; of the "
    "elements that vary at all, unless it is 1",
)


def _shares(settings: Settings) -> dict[str, float]:
    return shares(settings) if math.fsum(settings.weights.values()) else dict(settings.weights)


def _canonical(settings: Settings) -> Settings:
    return Settings("sce", scaled_to_sum_one(settings.weights), settings.hyperparameters)


@technique(
    name="sce",
    requires_base=True,
    minimum_sources=2,
    hyperparameters=(SELECT_TOPK,),
    normalised=True,
    effective_weights=_shares,
    effective_note="before each tensor multiplies them by the sources' shares of the squared task vectors; an element "
    "that was not selected or lost the election has weight 0, and the others of that element share the whole",
    canonical=_canonical,
    source="Wan et al., 'FuseChat', https://arxiv.org/abs/2408.07990; per tensor as in mergekit",
)
def sce(inputs: TensorInputs, weights: Sequence[float], *, select_topk: float) -> torch.Tensor:
    """b + the weighted average of the selected d_i that agree with the elected sign.

    The technique's own factor of source i is q_i, the squared norm of its selected task vector as a share of all
    sources'. The recipe's weights multiply: source i counts w_i * q_i in the average and casts w_i * d_i in the
    election, so that equal weights are SCE as published.
    """
    deltas = _selected(list(inputs.deltas), select_topk)
    energies = [inner_product(delta, delta) for delta in deltas]
    total = math.fsum(energies)
    if total == 0:  # no source differs from the base in any selected element
        return inputs.base_plus(deltas[0])
    factors = [weight * (energy / total) for weight, energy in zip(weights, energies, strict=True)]
    return inputs.base_plus(sum_of_agreeing(deltas, factors, normalize=True, votes=weights))


def _selected(deltas: list[torch.Tensor], select_topk: float) -> list[torch.Tensor]:
    """Keep the max(1, int(select_topk * v)) of the v elements that vary between the sources, largest variance first."""
    if select_topk == 1:
        return deltas
    spread = torch.zeros(deltas[0].numel(), dtype=torch.float64, device=deltas[0].device)
    # The sum of squared differences of all pairs is the variance but for a factor, and exactly 0 where all are equal.
    for one, other in combinations(deltas, 2):
        spread += (one.to(torch.float64) - other.to(torch.float64)).square().reshape(-1)
    varying = int((spread > 0).sum())
    mask = largest(spread, max(1, int(select_topk * varying)) if varying else 0).view(deltas[0].shape)
    return [torch.where(mask, delta, 0) for delta in deltas]

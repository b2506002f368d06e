"""SLERP: two sources, interpolated along the great circle between them."""

import math
from collections.abc import Sequence

import torch

from automerge.merging.consensus import weighted_sum
from automerge.merging.sparsify import inner_product
from automerge.merging.technique import Settings, TensorInputs, scaled_to_sum_one, technique
from automerge.merging.techniques.linear import shares

_PARALLEL = 0.9995
"""Magnitude of the cosine above which the interpolation is linear: sin(angle) would be a small divisor. mergekit's."""


def _canonical(settings: Settings) -> Settings:
    weights = scaled_to_sum_one(settings.weights)
    # At either end of the arc there is one source alone.
    return Settings("linear" if 0 in weights.values() else "slerp", weights)


@technique(
    name="slerp",
    minimum_sources=2,
    maximum_sources=2,
    normalised=True,
    nonzero_weight_sum=True,
    effective_weights=shares,
    effective_note="the position on the arc; the factors of a tensor depend on the angle between its two sources, and "
    "are these where the angle is small",
    canonical=_canonical,
    source="Shoemake, 'Animating rotation with quaternion curves', https://doi.org/10.1145/325334.325242; "
    "per tensor as in mergekit",
)
def slerp(inputs: TensorInputs, weights: Sequence[float]) -> torch.Tensor:
    """sin((1 - t) a) / sin(a) * t_1 + sin(t a) / sin(a) * t_2 with t = w_2 / (w_1 + w_2), a the angle of t_1 and t_2.

    The angle is that of the whole tensors as vectors. Linear in t where they are (anti)parallel, or one is zero.
    """
    one, other = inputs.sources
    t = weights[1] / math.fsum(weights)
    factors = [1 - t, t]
    norms = math.sqrt(inner_product(one, one)) * math.sqrt(inner_product(other, other))
    cosine = inner_product(one, other) / norms if norms > 0 else 1.0
    if abs(cosine) <= _PARALLEL:
        angle = math.acos(cosine)
        factors = [math.sin(factor * angle) / math.sin(angle) for factor in factors]
    return weighted_sum(inputs.sources, factors)

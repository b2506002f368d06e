"""Sums over sources, plain or with an elected sign. Written once, here.

All of it is elementwise, source after source in the recipe's order. Products and sums are separate operations on
purpose: a fused multiply-add (``add`` with ``alpha``) rounds differently in the vectorised part of a loop and in its
tail, and where the tail lies depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weighted_sum(tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum(w_i * x_i), in order; one or more tensors of one shape and dtype, which the result keeps."""
    total: torch.Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        term = tensor * weight
        total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("a weighted sum of nothing")
    return total


def sum_of_weights(weights: Sequence[float]) -> float:
    """sum(w_i); exact for floats, differentiable for scalar tensors."""
    return math.fsum(weights) if all(isinstance(weight, int | float) for weight in weights) else sum(weights)


def sum_of_agreeing(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    normalize: bool,
    votes: Sequence[float] | None = None,
) -> torch.Tensor:
    """Elect a sign per element, and sum only what agrees with it.

    The elected sign is that of sum(v_i * d_i), positive where the sum is zero; the votes v are the weights w unless
    given. An element of a source agrees if w_i * d_i is not zero and has the elected sign. With ``normalize`` the sum
    is divided by the sum of the weights of what agreed (by 1 where that is zero).
    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, in mergekit's weighted form.

    Args:
        deltas: the task vectors of the sources, of one shape and floating dtype, already sparsified.
        weights: one per source, any sign.
        normalize: divide by the weights of what agreed.
        votes: one per source, of its weight's sign, where the election has factors of its own.

    Returns:
        the merged task vector: same shape and dtype.
    """
    import torch

    positive = weighted_sum(deltas, weights if votes is None else votes) >= 0
    merged = torch.zeros_like(deltas[0])
    agreed = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        weighted = delta * weight
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        merged += torch.where(agrees, weighted, 0)
        if normalize:
            agreed += agrees.to(agreed.dtype) * weight
    if normalize:
        merged /= torch.where(agreed == 0, 1, agreed)
    return merged

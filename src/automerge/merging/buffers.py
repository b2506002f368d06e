"""The policy for what is not a trained parameter: counters, masks and index tables, running statistics.

Task-vector arithmetic on them gives negative variances or meaningless indices, so no technique ever sees them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from automerge.errors import MergeError
from automerge.merging.consensus import weighted_sum
from automerge.merging.recipe import IntegerBuffers

if TYPE_CHECKING:
    import torch

COUNTER = "num_batches_tracked"
"""How the names of BatchNorm's counters end, in torch and in what is exported from it."""


_RUNNING = ("running_mean", "running_var")


def is_buffer_name(name: str) -> bool:
    """Whether a tensor is BatchNorm's by its name, where there is no model to ask: the last part decides."""
    last = name.rpartition(".")[2]
    return last in _RUNNING or last.endswith(COUNTER)


def merge_buffer(
    name: str,
    base: torch.Tensor | None,
    sources: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    integer_buffers: IntegerBuffers,
) -> torch.Tensor:
    """Merge one buffer, or one integer or boolean tensor among the parameters.

    - integer scalars whose name ends with ``num_batches_tracked``: the sources' maximum;
    - other integer and boolean tensors: kept where all sources are equal; else the base's if ``integer_buffers`` is
      ``base``, else refused;
    - floating-point tensors: the average of the sources with the block's weights if these are all non-negative and
      not all zero, else the plain average. So what is never negative in the sources (a variance) stays so.

    Args:
        name: the tensor's name.
        base: the base's tensor, same shape; any dtype.
        sources: the sources' tensors by name, of one shape and dtype (floating-point ones: the accumulation dtype).
        weights: the block's weight per source.
        integer_buffers: the recipe's rule.

    Returns:
        a tensor of the sources' shape and dtype.

    Raises:
        MergeError: integer or boolean tensors differ and the rule does not say what to take.
    """
    import torch

    tensors = list(sources.values())
    first = tensors[0]
    if first.is_floating_point():
        return _average(tensors, [weights[source] for source in sources])
    if first.numel() == 1 and name.rpartition(".")[2].endswith(COUNTER) and first.dtype != torch.bool:
        return torch.stack(tensors).amax(0)
    if all(torch.equal(first, other) for other in tensors[1:]):
        return first
    kind = str(first.dtype).removeprefix("torch.")
    if integer_buffers == "error":
        raise MergeError(
            f"buffer {name!r} ({kind}) differs between the sources",
            "set merge.integer_buffers to 'base' to take the base's",
        )
    if base is None or base.dtype != first.dtype:
        found = "there is no base that has it" if base is None else f"the base's is {base.dtype}"
        raise MergeError(
            f"buffer {name!r} ({kind}) differs between the sources and {found}",
            "make it equal in all sources, or declare it as private",
        )
    return base


def average_weights(weights: Sequence[float]) -> list[float]:
    """The weights of a floating-point buffer's average: the block's, or equal ones if some is negative or all are 0."""
    return [1.0] * len(weights) if min(weights) < 0 or math.fsum(weights) == 0 else list(weights)


def _average(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    factors = average_weights(weights)
    return weighted_sum(tensors, factors).div_(math.fsum(factors))

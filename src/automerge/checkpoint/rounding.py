"""From the dtype in which one computes to the dtype in which one stores, and what is lost on the way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def round_to(wide: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to the nearest value of a dtype (ties to even).

    Args:
        wide: any shape, float32 or float64.
        dtype: a floating-point dtype.

    Returns:
        the rounded tensor; and a mask, bool of the same shape: what is not finite, or lies beyond the dtype's largest
        value by more than half a step. torch makes that infinite or NaN, but in float8_e4m3fn silently the largest.
    """
    import torch

    narrow = wide.to(dtype)
    if narrow.element_size() > 1:
        return narrow, ~torch.isfinite(narrow)
    limits = torch.finfo(dtype)
    step = limits.eps * 2.0 ** math.floor(math.log2(limits.max))
    # float8 has no isfinite of its own.
    return narrow, ~torch.isfinite(narrow.to(torch.float32)) | (wide.abs() > limits.max + step / 2)

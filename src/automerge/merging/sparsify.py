"""Sparsification of task vectors: keep the largest magnitudes, or keep at random and rescale. Written once, here."""

import math
from typing import Literal

import torch

from automerge.merging.random import keep_mask, mask_key
from automerge.merging.technique import Hyperparameter

Rescale = Literal["inverse_density", "l1"]

DENSITY = Hyperparameter(
    "density",
    "float",
    default=0.65,
    low=2**-16,  # one step of the 16 bits that decide on an element in a random mask
    high=1.0,
    searched=True,
    doc="share of each task vector's elements that is kept, per tensor",
)

_NORM_CHUNK = 1 << 20


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the k = max(1, int(density * n)) elements of largest magnitude, and set the others to zero.

    Among equal magnitudes at the cut the lowest (row-major) index is kept first, as a stable descending argsort would.
    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, with mergekit's rounding of k.

    Args:
        delta: any shape, floating point, finite.
        density: above 0, at most 1.

    Returns:
        a tensor of the same shape and dtype.
    """
    count = delta.numel()
    keep = max(1, int(density * count))
    if keep >= count:
        return delta
    magnitudes = delta.abs().reshape(-1)
    cut = torch.kthvalue(magnitudes, count - keep + 1).values
    mask = magnitudes > cut
    missing = keep - int(mask.sum())
    mask[(magnitudes == cut).nonzero().squeeze(1)[:missing]] = True
    return torch.where(mask.view(delta.shape), delta, 0)


def drop(delta: torch.Tensor, density: float, rescale: Rescale, *, seed: int, source: str, tensor: str) -> torch.Tensor:
    """Keep each element with probability ``density``, set the others to zero, and rescale what is left.

    Source: DARE, https://arxiv.org/abs/2311.03099 (drop and rescale). The mask: `automerge.merging.random`.

    Args:
        delta: any shape, floating point, finite.
        density: above 0, at most 1; 1 returns ``delta``.
        rescale: ``inverse_density`` divides by the density (the paper); ``l1`` restores the tensor's L1 norm
            (mergekit), and leaves a tensor alone of which nothing but zeros was kept.
        seed, source, tensor: what the mask is a function of, beside the element's index.

    Returns:
        a tensor of the same shape and dtype.
    """
    if density >= 1:
        return delta
    mask = keep_mask(mask_key(seed, source, tensor), delta.numel(), density, delta.device)
    kept = torch.where(mask.view(delta.shape), delta, 0)
    if rescale == "inverse_density":
        return kept / density
    norm = l1_norm(kept)
    return kept * (l1_norm(delta) / norm) if norm > 0 else kept


def l1_norm(tensor: torch.Tensor) -> float:
    """Sum of the magnitudes, in float64, in a fixed order.

    torch.sum splits its work by the number of threads, which changes the last bits; here halves are added to each
    other elementwise, so that the result is the same on any number of threads.
    """
    parts = []
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _NORM_CHUNK):
        part = flat[start : start + _NORM_CHUNK].abs().to(torch.float64)
        while part.numel() > 1:
            half = (part.numel() + 1) // 2
            folded = part[:half].clone()
            folded[: part.numel() - half] += part[half:]
            part = folded
        parts.extend(part.tolist())
    return math.fsum(parts)

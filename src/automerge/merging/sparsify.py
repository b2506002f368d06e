"""Sparsification of task vectors: keep by magnitude, or at random and rescale. Written once, here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from automerge.merging.random import CHUNK, keep_mask, lanes, mask_key
from automerge.merging.technique import Hyperparameter

if TYPE_CHECKING:
    import torch

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
    import torch

    count = delta.numel()
    keep = max(1, int(density * count))
    if keep >= count:
        return delta
    mask = largest(delta.abs().reshape(-1), keep)
    return torch.where(mask.view(delta.shape), delta, 0)


def trim_outliers(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Set the largest magnitudes to zero, keep the k = max(1, int(density * n)) next ones, and drop the others.

    int(gamma * n) elements are dropped at the top, or fewer where k would not be left; with gamma 0 it is `trim`. Equal
    magnitudes at either cut rank by their (row-major) index, the lowest first.
    Source: Model Breadcrumbs, https://arxiv.org/abs/2312.06795, with mergekit's parameters and rounding.

    Args:
        delta: any shape, floating point, finite.
        density: above 0, at most 1; 1 returns ``delta``.
        gamma: 0 to 1.

    Returns:
        a tensor of the same shape and dtype.
    """
    import torch

    count = delta.numel()
    keep = max(1, int(density * count))
    if keep >= count:
        return delta
    outliers = min(int(gamma * count), count - keep)
    magnitudes = delta.abs().reshape(-1)
    mask = largest(magnitudes, outliers + keep).logical_and_(~largest(magnitudes, outliers))
    return torch.where(mask.view(delta.shape), delta, 0)


def largest(values: torch.Tensor, keep: int) -> torch.Tensor:
    """Which elements are the ``keep`` largest; among equal ones at the cut the lowest index comes first.

    Args:
        values: shape ``(n,)``.
        keep: 0 to n.

    Returns:
        bool tensor of shape ``(n,)`` with exactly ``keep`` True.
    """
    import torch

    count = values.numel()
    if keep in (0, count):
        return torch.full((count,), keep > 0, dtype=torch.bool, device=values.device)
    cut = torch.kthvalue(values, count - keep + 1).values
    mask = values > cut
    missing = keep - int(mask.sum())
    mask[(values == cut).nonzero().squeeze(1)[:missing]] = True
    return mask


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
    import torch

    if density >= 1:
        return delta
    mask = keep_mask(mask_key(seed, source, tensor), delta.numel(), density, delta.device)
    kept = torch.where(mask.view(delta.shape), delta, 0)
    return kept / density if rescale == "inverse_density" else _with_norm_of(delta, kept)


def drop_by_rank(
    delta: torch.Tensor, density: float, epsilon: float, rescale: Rescale, *, seed: int, source: str, tensor: str
) -> torch.Tensor:
    """Keep large elements more likely than small ones, set the others to zero, and rescale what is left.

    Within a row the probability to be kept rises linearly with the rank of the magnitude, from density - epsilon for
    the smallest to density + epsilon for the largest. A row runs along the second axis (of a matrix: its rows; of a
    convolution: its input channels, for each output channel and place in the kernel); a tensor of one axis is one row.
    The one element of a row of length 1, or of a scalar, is kept with probability ``density``. Equal magnitudes rank by
    their index, the lowest first. Where density +- epsilon leaves 0..1, epsilon is cut to min(density, 1 - density).
    Source: DELLA, https://arxiv.org/abs/2406.11617 (MagPrune), with mergekit's rows and epsilon. The random bits:
    `automerge.merging.random`.

    Args:
        delta: any shape, floating point, finite.
        density: above 0, at most 1; 1 returns ``delta``.
        epsilon: 0 to 0.5; 0 is `drop`.
        rescale: ``inverse_density`` divides each element by its own probability (the paper); ``l1`` restores the
            tensor's L1 norm (mergekit).
        seed, source, tensor: what the random bits are a function of, beside the element's index.

    Returns:
        a tensor of the same shape and dtype.
    """
    import torch

    reach = min(epsilon, density, 1 - density)
    if reach <= 0:
        return drop(delta, density, rescale, seed=seed, source=source, tensor=tensor)
    if delta.numel() == 0:
        return delta
    rows = delta if delta.dim() >= 2 else delta.reshape(1, -1)
    length = rows.shape[1]
    inner = rows[0].numel()
    places = torch.arange(length, device=delta.device).view(1, length, *([1] * (rows.dim() - 2)))
    key = mask_key(seed, source, tensor)
    kept = torch.empty(rows.shape, dtype=delta.dtype, device=delta.device)
    step = max(1, CHUNK // inner)
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        order = block.abs().argsort(dim=1, stable=True)
        ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        share = ranks.to(torch.float64) / (length - 1) if length > 1 else ranks.to(torch.float64) + 0.5
        # Of 65536 values of the random bits, rounded as for a mask of one density.
        threshold = torch.floor((share * (2 * reach) + (density - reach)) * 65536 + 0.5)
        bits = lanes(key, start * inner, (start + block.shape[0]) * inner, delta.device).view(block.shape)
        # The probability as 16 bits resolve it, so that the expectation is exact; never zero where an element is kept.
        scaled = block / (threshold / 65536).to(block.dtype) if rescale == "inverse_density" else block
        kept[start : start + step] = torch.where(bits < threshold, scaled, 0)
    kept = kept.view(delta.shape)
    return kept if rescale == "inverse_density" else _with_norm_of(delta, kept)


def _with_norm_of(delta: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    norm = l1_norm(kept)
    return kept * (l1_norm(delta) / norm) if norm > 0 else kept


def l1_norm(tensor: torch.Tensor) -> float:
    """Sum of the magnitudes, in float64, in a fixed order: the same on any number of threads."""
    import torch

    return _ordered_sum(part.abs().to(torch.float64) for part in _chunks(tensor))


def inner_product(one: torch.Tensor, other: torch.Tensor) -> float:
    """Sum of the elementwise products of two tensors of one shape, in float64, in a fixed order."""
    import torch

    pairs = zip(_chunks(one), _chunks(other), strict=True)
    return _ordered_sum(part.to(torch.float64) * factor.to(torch.float64) for part, factor in pairs)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _NORM_CHUNK):
        yield flat[start : start + _NORM_CHUNK]


def _ordered_sum(chunks: Iterable[torch.Tensor]) -> float:
    """The sum of all elements of float64 tensors of shape ``(n,)``.

    torch.sum splits its work by the number of threads, which changes the last bits; here halves are added to each
    other elementwise, so that the result is the same on any number of threads.
    """
    parts = []
    for chunk in chunks:
        part = chunk
        while part.numel() > 1:
            half = (part.numel() + 1) // 2
            folded = part[:half].clone()
            folded[: part.numel() - half] += part[half:]
            part = folded
        parts.extend(part.tolist())
    return math.fsum(parts)

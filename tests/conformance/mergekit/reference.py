"""The techniques in float64, plainly: what both ours and mergekit's float32 results are measured against.

An independent third opinion: it shares no code with either, and mergekit's own float64 results agree with it (tested).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tests.conformance.mergekit.comparison import BASE, Merge, Model


@dataclass(frozen=True)
class Reference:
    """One tensor.

    Args:
        merged: the result.
        magnitude: per element the sum of the magnitudes of all terms of its sum (the base, each task vector times its
            factors): rounding errors are proportional to it, however much of it cancels.
        vote: the weighted sum that elects the sign, as a share of its terms' magnitudes; 1 where there is no election.
    """

    merged: torch.Tensor
    magnitude: torch.Tensor
    vote: torch.Tensor


def merge_exactly(
    merge: Merge, name: str, models: Mapping[str, Model], bits: Mapping[str, torch.Tensor] | None = None
) -> Reference:
    """Merge one tensor; ``bits`` are the 16 random bits of each element, by source.

    The task vectors are taken in the models' dtype, so that trimming sees the numbers that the float32 merge sees.
    """
    values = {"lambda": 1.0, "normalize": False} | merge.hyperparameters
    weights = list(merge.weights.values())
    tensors = [models[source][name] for source in merge.weights]
    if merge.technique == "linear":
        return _sum_of([tensor.double() for tensor in tensors], [weight / sum(weights) for weight in weights])
    if merge.technique == "slerp":
        return _slerp(*(tensor.double() for tensor in tensors), weights[1] / sum(weights))

    base = models[BASE][name]
    deltas = [(tensor - base).double() for tensor in tensors]
    if merge.technique == "sce":
        deltas, weights = _select(deltas, values["select_topk"])
        values["normalize"] = True
        # SCE elects with the plain task vectors and averages with the sources' energies.
        votes = [1.0] * len(deltas)
    else:
        deltas = [
            _sparsify(merge.technique, delta, values, None if bits is None else bits[source])
            for source, delta in zip(merge.weights, deltas, strict=True)
        ]
        votes = weights
    elects = merge.technique in ("ties", "dare_ties", "breadcrumbs_ties", "della", "sce")
    summed = _elected(deltas, weights, votes, values["normalize"]) if elects else _sum_of(deltas, weights)
    scale = values["lambda"]
    return Reference(base.double() + scale * summed.merged, base.double().abs() + scale * summed.magnitude, summed.vote)


def _sum_of(tensors: list[torch.Tensor], weights: list[float]) -> Reference:
    terms = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    merged = torch.stack(terms).sum(0)
    return Reference(merged, torch.stack(terms).abs().sum(0), torch.ones_like(merged))


def _elected(deltas: list[torch.Tensor], weights: list[float], votes: list[float], normalize: bool) -> Reference:
    ballots = torch.stack([delta * vote for delta, vote in zip(deltas, votes, strict=True)])
    total, cast = ballots.sum(0), ballots.abs().sum(0)
    agrees = ballots.sign() == torch.where(total >= 0, 1.0, -1.0)
    shape = (-1,) + (1,) * deltas[0].dim()
    factors = torch.tensor(weights, dtype=torch.float64).view(shape) * agrees
    terms = torch.stack(deltas) * factors
    merged, magnitude = terms.sum(0), terms.abs().sum(0)
    if normalize:
        divisor, divided = factors.sum(0), factors.abs().sum(0)
        divisor[divisor == 0] = 1
        merged, magnitude = merged / divisor, magnitude / divisor.abs() * (divided / divisor.abs()).clamp(min=1)
    return Reference(merged, magnitude, torch.where(cast > 0, total.abs() / cast, 1.0))


def _sparsify(
    technique: str, delta: torch.Tensor, values: Mapping[str, float | str], bits: torch.Tensor | None
) -> torch.Tensor:
    density, count = values.get("density", 1.0), delta.numel()
    if density == 1:
        return delta
    if technique == "ties" or technique.startswith("breadcrumbs"):
        keep = max(1, int(density * count))
        top = min(int(values.get("gamma", 0) * count), count - keep)
        falling = delta.abs().reshape(-1).argsort(descending=True, stable=True)
        mask = torch.zeros_like(delta)
        mask.view(-1)[falling[top : top + keep]] = 1
        return delta * mask
    probability = torch.full_like(delta, density)
    if technique.startswith("della"):
        probability = keep_probability(delta, density, values["epsilon"])
    mask = bits.view(delta.shape) < torch.floor(probability * 65536 + 0.5)
    kept = delta * mask
    return kept / density if values["rescale"] == "inverse_density" else kept * (delta.abs().sum() / kept.abs().sum())


def keep_probability(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """DELLA's, of each element: by the rank of its magnitude in its row, which runs along the second axis."""
    rows = delta if delta.dim() > 1 else delta.view(1, -1)
    rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1, stable=True).double()
    return (density - epsilon + 2 * epsilon * rank / (rows.shape[1] - 1)).view(delta.shape)


def _select(deltas: list[torch.Tensor], share: float) -> tuple[list[torch.Tensor], list[float]]:
    variance = torch.stack(deltas).var(0, unbiased=False).reshape(-1)
    if share < 1:
        mask = torch.zeros_like(variance)
        mask[variance.topk(int(int((variance > 0).sum()) * share)).indices] = 1
        deltas = [delta * mask.view(delta.shape) for delta in deltas]
    energies = [float(delta.square().sum()) for delta in deltas]
    return deltas, [energy / sum(energies) for energy in energies]


def _slerp(one: torch.Tensor, other: torch.Tensor, t: float) -> Reference:
    cosine = (one * other).sum() / (one.norm() * other.norm())
    angle = torch.acos(cosine)
    factors = [1 - t, t] if cosine.abs() > 0.9995 else [float((f * angle).sin() / angle.sin()) for f in (1 - t, t)]
    merged = one * factors[0] + other * factors[1]
    return Reference(merged, (one * factors[0]).abs() + (other * factors[1]).abs(), torch.ones_like(merged))

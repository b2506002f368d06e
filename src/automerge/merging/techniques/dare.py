"""DARE: drop elements of the task vectors at random and rescale, then merge linearly or with elected signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from automerge.merging.consensus import sum_of_agreeing, weighted_sum
from automerge.merging.fused import Fused, KeepRandom
from automerge.merging.sparsify import DENSITY, Rescale, drop
from automerge.merging.technique import Hyperparameter, Settings, TensorInputs, fold_lambda, technique
from automerge.merging.techniques.task_arithmetic import LAMBDA, scaled_weights

if TYPE_CHECKING:
    import torch

RESCALE = Hyperparameter(
    "rescale",
    "choice",
    default="inverse_density",
    choices=("inverse_density", "l1"),
    doc="inverse_density: divide what is kept by the density (the paper); l1: restore the L1 norm (mergekit)",
)

_SOURCE = "Yu et al., 'Language models are super Mario', https://arxiv.org/abs/2311.03099"


def _canonical_linear(settings: Settings) -> Settings:
    if settings.hyperparameters["density"] == 1:
        return Settings("task_arithmetic", settings.weights, {"lambda": settings.hyperparameters["lambda"]})
    return fold_lambda(settings)


def _canonical_ties(settings: Settings) -> Settings:
    if settings.hyperparameters["density"] == 1:
        kept = {"density": 1.0, "lambda": settings.hyperparameters["lambda"], "normalize": False}
        return Settings("ties", settings.weights, kept)
    return fold_lambda(settings)


def _dropped(inputs: TensorInputs, density: float, rescale: Rescale) -> list[torch.Tensor]:
    return [
        drop(delta, density, rescale, seed=inputs.seed, source=source, tensor=inputs.tensor)
        for source, delta in zip(inputs.source_names, inputs.deltas, strict=True)
    ]


def _fused(settings: Settings, combine: Literal["sum", "agreeing"]) -> Fused | None:
    values = settings.hyperparameters
    density = float(values["density"])
    if values["rescale"] != "inverse_density" and density < 1:
        return None  # the norm of a whole tensor is not elementwise
    return Fused(combine, keep=KeepRandom(density) if density < 1 else None, scale=float(values["lambda"]))


def _fused_linear(settings: Settings) -> Fused | None:
    return _fused(settings, "sum")


def _fused_ties(settings: Settings) -> Fused | None:
    return _fused(settings, "agreeing")


@technique(
    name="dare_linear",
    requires_base=True,
    hyperparameters=(DENSITY, LAMBDA, RESCALE),
    randomised=True,
    effective_weights=scaled_weights,
    effective_note="in expectation over the random mask",
    canonical=_canonical_linear,
    fused=_fused_linear,
    differentiable=True,
    source=_SOURCE,
)
def dare_linear(
    inputs: TensorInputs, weights: Sequence[float], *, density: float, lambda_: float, rescale: Rescale
) -> torch.Tensor:
    """b + lambda * sum(w_i * dropped(d_i)), not normalised."""
    merged = weighted_sum(_dropped(inputs, density, rescale), weights)
    return inputs.base_plus(merged * lambda_)


@technique(
    name="dare_ties",
    requires_base=True,
    hyperparameters=(DENSITY, LAMBDA, RESCALE),
    randomised=True,
    effective_weights=scaled_weights,
    effective_note="in expectation over the random mask, where all sources agree in sign",
    canonical=_canonical_ties,
    fused=_fused_ties,
    differentiable=True,
    source=f"{_SOURCE}; sign election of https://arxiv.org/abs/2306.01708",
)
def dare_ties(
    inputs: TensorInputs, weights: Sequence[float], *, density: float, lambda_: float, rescale: Rescale
) -> torch.Tensor:
    """b + lambda * the sum of the w_i * dropped(d_i) that agree with the elected sign: no trim, not normalised."""
    merged = sum_of_agreeing(_dropped(inputs, density, rescale), weights, normalize=False)
    return inputs.base_plus(merged * lambda_)

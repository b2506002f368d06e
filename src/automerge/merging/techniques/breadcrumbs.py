"""Model Breadcrumbs: drop the smallest and the largest elements of the task vectors, then merge linearly or elected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from automerge.merging.consensus import sum_of_agreeing, weighted_sum
from automerge.merging.fused import Fused, KeepLargest
from automerge.merging.sparsify import DENSITY, trim_outliers
from automerge.merging.technique import Hyperparameter, Settings, TensorInputs, fold_lambda, technique
from automerge.merging.techniques.task_arithmetic import LAMBDA, scaled_weights

if TYPE_CHECKING:
    import torch

GAMMA = Hyperparameter(
    "gamma",
    "float",
    default=0.01,
    low=0.0,
    high=1.0,
    doc="share of each task vector's elements that is dropped as outliers, the largest first; less where the density "
    "would not be left",
)

_SOURCE = "Davari and Belilovsky, 'Model Breadcrumbs', https://arxiv.org/abs/2312.06795; parameters as in mergekit"


def _canonical(settings: Settings) -> Settings:
    if settings.hyperparameters["density"] == 1:
        return Settings("task_arithmetic", settings.weights, {"lambda": settings.hyperparameters["lambda"]})
    return fold_lambda(settings)


def _canonical_ties(settings: Settings) -> Settings:
    values = settings.hyperparameters
    # Without outliers it is TIES' trim; at density 1 nothing is dropped at either end.
    if values["density"] == 1 or values["gamma"] == 0:
        kept = {"density": values["density"], "lambda": values["lambda"], "normalize": False}
        return Settings("ties", settings.weights, kept)
    return fold_lambda(settings)


def _fused(settings: Settings, combine: Literal["sum", "agreeing"]) -> Fused:
    values = settings.hyperparameters
    kept = KeepLargest(float(values["density"]), float(values["gamma"]))
    return Fused(combine, keep=kept, scale=float(values["lambda"]))


def _fused_linear(settings: Settings) -> Fused:
    return _fused(settings, "sum")


def _fused_ties(settings: Settings) -> Fused:
    return _fused(settings, "agreeing")


@technique(
    name="breadcrumbs",
    requires_base=True,
    hyperparameters=(DENSITY, GAMMA, LAMBDA),
    effective_weights=scaled_weights,
    effective_note="where the element was kept; elsewhere 0",
    canonical=_canonical,
    fused=_fused_linear,
    differentiable=True,
    source=_SOURCE,
)
def breadcrumbs(
    inputs: TensorInputs, weights: Sequence[float], *, density: float, gamma: float, lambda_: float
) -> torch.Tensor:
    """b + lambda * sum(w_i * d_i without its smallest and largest elements), not normalised."""
    merged = weighted_sum((trim_outliers(delta, density, gamma) for delta in inputs.deltas), weights)
    return inputs.base_plus(merged * lambda_)


@technique(
    name="breadcrumbs_ties",
    requires_base=True,
    hyperparameters=(DENSITY, GAMMA, LAMBDA),
    effective_weights=scaled_weights,
    effective_note="where the element was kept and has the elected sign; elsewhere 0",
    canonical=_canonical_ties,
    fused=_fused_ties,
    differentiable=True,
    source=f"{_SOURCE}; sign election of https://arxiv.org/abs/2306.01708",
)
def breadcrumbs_ties(
    inputs: TensorInputs, weights: Sequence[float], *, density: float, gamma: float, lambda_: float
) -> torch.Tensor:
    """b + lambda * the sum of the w_i * d_i that were kept and agree with the elected sign, not normalised."""
    kept = [trim_outliers(delta, density, gamma) for delta in inputs.deltas]
    merged = sum_of_agreeing(kept, weights, normalize=False)
    return inputs.base_plus(merged * lambda_)

"""TIES: trim each task vector, elect a sign per element, average what agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from automerge.merging.consensus import sum_of_agreeing
from automerge.merging.fused import Fused, KeepLargest
from automerge.merging.sparsify import DENSITY, trim
from automerge.merging.technique import (
    Hyperparameter,
    Settings,
    TensorInputs,
    fold_lambda,
    scaled_to_sum_one,
    technique,
)
from automerge.merging.techniques.task_arithmetic import LAMBDA, scaled_weights

if TYPE_CHECKING:
    import torch

NORMALIZE = Hyperparameter(
    "normalize", "bool", default=True, doc="divide each element by the sum of the weights of the sources that agree"
)


def normalised_shares(settings: Settings) -> dict[str, float]:
    """lambda * w, divided by the sum of the weights under ``normalize``."""
    scaled = scaled_weights(settings)
    total = math.fsum(settings.weights.values())
    if not settings.hyperparameters["normalize"] or total == 0:
        return scaled
    return {name: weight / total for name, weight in scaled.items()}


def _canonical(settings: Settings) -> Settings:
    if not settings.hyperparameters["normalize"]:
        return fold_lambda(settings)
    return Settings("ties", scaled_to_sum_one(settings.weights), settings.hyperparameters)


def _fused(settings: Settings) -> Fused:
    values = settings.hyperparameters
    return Fused(
        "agreeing_normalised" if values["normalize"] else "agreeing",
        keep=KeepLargest(float(values["density"])),
        scale=float(values["lambda"]),
    )


@technique(
    name="ties",
    requires_base=True,
    hyperparameters=(DENSITY, LAMBDA, NORMALIZE),
    normalised=True,
    effective_weights=normalised_shares,
    effective_note="where all sources agree; an element that was trimmed or lost the election has weight 0, "
    "and under 'normalize' the others of that element share the whole",
    canonical=_canonical,
    fused=_fused,
    differentiable=True,
    source="Yadav et al., 'TIES-Merging', https://arxiv.org/abs/2306.01708; weighted as in mergekit",
)
def ties(
    inputs: TensorInputs, weights: Sequence[float], *, density: float, lambda_: float, normalize: bool
) -> torch.Tensor:
    """b + lambda * the sum of the trimmed w_i * d_i that agree with the elected sign, normalised by their weights."""
    trimmed = [trim(delta, density) for delta in inputs.deltas]
    merged = sum_of_agreeing(trimmed, weights, normalize=normalize)
    return inputs.base_plus(merged * lambda_)

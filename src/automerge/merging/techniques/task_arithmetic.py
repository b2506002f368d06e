"""Task Arithmetic: the base plus a weighted sum of task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from automerge.merging.consensus import weighted_sum
from automerge.merging.fused import Fused
from automerge.merging.technique import Hyperparameter, Settings, TensorInputs, fold_lambda, technique

if TYPE_CHECKING:
    import torch

LAMBDA = Hyperparameter("lambda", "float", default=1.0, doc="scale of the merged task vector")


def scaled_weights(settings: Settings) -> dict[str, float]:
    """lambda * w: the factor of each task vector."""
    factor = float(settings.hyperparameters["lambda"])
    return {name: factor * weight for name, weight in settings.weights.items()}


def _canonical(settings: Settings) -> Settings:
    folded = fold_lambda(settings)
    # With weights that sum to 1 the base cancels: b + sum(w_i (t_i - b)) = sum(w_i t_i).
    if folded.hyperparameters["lambda"] == 1 and abs(math.fsum(folded.weights.values()) - 1) <= 1e-9:
        return Settings("linear", folded.weights)
    return folded


def _fused(settings: Settings) -> Fused:
    return Fused(scale=float(settings.hyperparameters["lambda"]))


@technique(
    name="task_arithmetic",
    requires_base=True,
    hyperparameters=(LAMBDA,),
    effective_weights=scaled_weights,
    canonical=_canonical,
    fused=_fused,
    differentiable=True,
    source="Ilharco et al., 'Editing models with task arithmetic', https://arxiv.org/abs/2212.04089",
)
def task_arithmetic(inputs: TensorInputs, weights: Sequence[float], *, lambda_: float) -> torch.Tensor:
    """b + lambda * sum(w_i * d_i), not normalised."""
    merged = weighted_sum(inputs.deltas, weights)
    return inputs.base_plus(merged * lambda_)

"""Consensus Task Arithmetic: task arithmetic on those elements only that several sources make use of.

A source uses an element (its TALL mask is 1) where |tau_i| >= mask_lambda * |tau - tau_i|, with tau the sum of the task
vectors: where its own change is not small against all that the others add. What fewer than ``agreement`` sources use is
set to zero: elements that one task alone needs ("selfish") or none ("catastrophic") disturb the others.

What the paper leaves open, and what is done here:

- Weights. The paper has none; here tau_i = w_i * d_i throughout, so that equal weights give the paper's masks whatever
  their sum, and a common positive factor is the paper's final scale (lambda here, alpha there).
- mask_lambda. The paper chooses one per task, from 0.2 to 0.6 in steps of 0.1, by each task's validation data; here it
  is one a block, for all sources, and the search varies it. 0 masks nothing.
- agreement. 2 in the paper's experiments. A source of weight 0 is unused and does not count; where fewer sources are
  used than ``agreement`` says, all of them must agree (in the paper, nothing would be left of the task vectors).
- The masks compare with >= as the paper's formula does. Element by element, so exact on any number of threads.
"""

from collections.abc import Sequence

import torch

from automerge.merging.consensus import weighted_sum
from automerge.merging.technique import Hyperparameter, Settings, TensorInputs, fold_lambda, technique
from automerge.merging.techniques.task_arithmetic import LAMBDA, scaled_weights

MASK_LAMBDA = Hyperparameter(
    "mask_lambda",
    "float",
    default=0.4,
    low=0.0,
    high=1.0,
    searched=True,
    doc="a source uses an element where its change is at least this many times the others' together",
)
AGREEMENT = Hyperparameter(
    "agreement", "int", default=2, low=1, doc="how many sources must use an element for it to be kept"
)


def _used(weights: Sequence[float]) -> int:
    return sum(weight != 0 for weight in weights)


def _canonical(settings: Settings) -> Settings:
    used = _used(list(settings.weights.values()))
    values = settings.hyperparameters
    if values["mask_lambda"] == 0 or used <= 1:
        return Settings("task_arithmetic", settings.weights, {"lambda": values["lambda"]})
    agreement = min(int(values["agreement"]), used)
    return fold_lambda(Settings(settings.technique, settings.weights, {**values, "agreement": agreement}))


@technique(
    name="consensus_ta",
    requires_base=True,
    minimum_sources=2,
    hyperparameters=(MASK_LAMBDA, AGREEMENT, LAMBDA),
    effective_weights=scaled_weights,
    effective_note="where enough sources use the element; elsewhere 0",
    canonical=_canonical,
    source="Wang et al., 'Localizing task information for improved model merging and compression', "
    "https://arxiv.org/abs/2405.07813",
)
def consensus_ta(
    inputs: TensorInputs, weights: Sequence[float], *, mask_lambda: float, agreement: int, lambda_: float
) -> torch.Tensor:
    """b + lambda * sum(w_i * d_i), where at least ``agreement`` sources use the element, else b."""
    merged = weighted_sum(inputs.deltas, weights)
    users = torch.zeros_like(merged, dtype=torch.int32)
    for delta, weight in zip(inputs.deltas, weights, strict=True):
        if weight != 0:
            own = delta * weight
            users += own.abs() >= (merged - own).abs() * mask_lambda
    merged = torch.where(users >= min(agreement, _used(weights)), merged, 0)
    return inputs.base_plus(merged * lambda_)

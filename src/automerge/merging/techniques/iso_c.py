"""Iso-C: task arithmetic, and then every singular value of the merged task vector becomes their mean.

The merged task vector of a matrix, U diag(s) V', becomes mean(s) * U V': no direction that the sources share drowns
those that only one of them has. The sum of the singular values stays.

What the paper leaves open, and what is done here:

- Weights. The paper sums the task vectors (weight 1 each) and scales by alpha (lambda here), chosen on validation data;
  weights are those of task arithmetic. With weights that sum to 1 the paper's alpha is lambda / N.
- Tensors without a matrix (biases, norms, scalars) are merged by task arithmetic; the authors' code averages them,
  the same where the weights are 1/N.
- A convolution's kernel is the matrix [out, in * k * k]; the authors' code averages kernels.
- Without full rank: a singular value of zero has no direction of its own, stays zero, and is not counted in the mean.
  Rounding can give such a direction a tiny value above the cut (adapters that were merged into a checkpoint of few
  bits); it is then raised to the mean as in the paper, which is a reason to prefer another technique there.

Cost: one decomposition a matrix, see `automerge.merging.spectrum`.
"""

from collections.abc import Sequence

import torch

from automerge.merging.consensus import weighted_sum
from automerge.merging.spectrum import SCALE, as_matrix, is_matrix, orthogonal_factor
from automerge.merging.technique import TensorInputs, fold_lambda, technique
from automerge.merging.techniques.task_arithmetic import scaled_weights


@technique(
    name="iso_c",
    requires_base=True,
    hyperparameters=(SCALE,),
    effective_weights=scaled_weights,
    effective_note="of a matrix, before the singular values of the sum are made equal",
    canonical=fold_lambda,
    source="Marczak et al., 'No task left behind: isotropic model merging', https://arxiv.org/abs/2502.04959",
)
def iso_c(inputs: TensorInputs, weights: Sequence[float], *, lambda_: float) -> torch.Tensor:
    """b + lambda * mean(s) * U V', where U diag(s) V' = sum(w_i * d_i)."""
    merged = weighted_sum(inputs.deltas, weights)
    if is_matrix(merged):
        factor, values = orthogonal_factor(as_matrix(merged))
        mean = float(values.mean()) if len(values) else 0.0
        merged = (factor * mean).reshape(merged.shape)
    return inputs.base_plus(merged * lambda_)

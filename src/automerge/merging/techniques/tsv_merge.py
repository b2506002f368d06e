"""TSV-Merge: give each source its share of every matrix's singular directions, and make the shares orthogonal.

Of each matrix's task vector, [out, in], the largest int(r / N) of its r = min(out, in) singular components are kept for
N sources. Their left vectors, side by side over all sources, are replaced by the nearest orthonormal ones (orthogonal
Procrustes, which is whitening), their right vectors likewise; the merged task vector is left * values * right'.

What the paper leaves open, and what is done here:

- Weights. The paper has none; here a source's singular values are multiplied by its weight, the same as merging
  w_i * d_i. The paper's merge of matrices is weight 1 for each and lambda 1; or equal weights that sum to 1, and
  lambda N.
- Tensors without a matrix (biases, norms, scalars) are merged by task arithmetic with the same weights. The paper
  averages them: the same where the weights are 1/N.
- A convolution's kernel is the matrix [out, in * k * k]; the authors' code averages kernels.
- A matrix with fewer than N rows or columns has no room for N orthogonal shares, and is merged as if it were none.
- A source of weight 0 is unused: it takes no share, and the others are not made orthogonal to it.
- A zero singular value has no direction of its own and takes no part; where the shares of several sources coincide
  (equal sources), the nearest partial isometry divides the direction between them. N equal sources of weight 1
  give their task vector, cut to its share.

Cost: one decomposition a source and two of all shares together, see `automerge.merging.spectrum`.
"""

from collections.abc import Sequence

import torch

from automerge.merging.consensus import weighted_sum
from automerge.merging.spectrum import SCALE, as_matrix, is_matrix, orthogonal_factor, top_components
from automerge.merging.technique import Settings, TensorInputs, fold_lambda, technique
from automerge.merging.techniques.task_arithmetic import scaled_weights


def _canonical(settings: Settings) -> Settings:
    # A source alone has all components, and they are orthogonal already.
    if sum(weight != 0 for weight in settings.weights.values()) <= 1:
        return Settings("task_arithmetic", settings.weights, settings.hyperparameters)
    return fold_lambda(settings)


@technique(
    name="tsv_merge",
    requires_base=True,
    hyperparameters=(SCALE,),
    effective_weights=scaled_weights,
    effective_note="of a matrix, only of the source's largest singular components, made orthogonal to the others'",
    canonical=_canonical,
    source="Gargiulo et al., 'Task singular vectors', https://arxiv.org/abs/2412.00081",
)
def tsv_merge(inputs: TensorInputs, weights: Sequence[float], *, lambda_: float) -> torch.Tensor:
    """b + lambda * (decorrelated left vectors) diag(w_i * values of d_i) (decorrelated right vectors)'."""
    like = inputs.sources[0]
    used = sum(weight != 0 for weight in weights)
    room = min(as_matrix(like).shape) if is_matrix(like) else 0
    if used == 0 or room < used:
        return inputs.base_plus(weighted_sum(inputs.deltas, weights) * lambda_)
    lefts, scaled, rights = [], [], []
    for delta, weight in zip(inputs.deltas, weights, strict=True):
        if weight != 0:
            left, values, right = top_components(as_matrix(delta), room // used)
            lefts.append(left)
            scaled.append(values * weight)
            rights.append(right)
    left, _ = orthogonal_factor(torch.cat(lefts, dim=1))
    right, _ = orthogonal_factor(torch.cat(rights, dim=1))
    merged = (left * torch.cat(scaled)) @ right.T
    return inputs.base_plus(merged.reshape(like.shape) * lambda_)

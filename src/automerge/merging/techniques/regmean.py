"""RegMean: the weights of each linear layer that give, on average, what the sources' layers give on their own data.

For a layer the merged weights minimise sum(w_i |X_i t' - X_i t_i'|^2), X_i the inputs that the layer of source i has
on the data of its tasks: a linear regression with a closed form in the Gram matrices of these inputs. What the paper
leaves open, and what is done here:

- alpha. As in the paper, off-diagonal elements of the Gram matrices are multiplied by it, which guards against inputs
  that go together in one source only. The paper sets 0.9 (T5: 0.1); here the search varies it, up to 0.99: 1 has no
  unique solution where there are fewer samples than inputs.
- Weights. The paper has none; Gram matrices are means over inputs here, so the weights alone say what a source counts.
- Inputs that are always zero have no data: each diagonal gets ``_RIDGE`` times the mean of all diagonals added, so that
  their columns become the weighted average, as every tensor without Gram matrices does (biases, norms, embeddings).
- Only ``nn.Linear``, and 2-D convolutions without groups and with explicit zero padding, which are linear layers on
  their patches, have Gram matrices; any other layer is averaged.

Cost: one product a source and one Cholesky decomposition a layer in float64; for [m, n] about 2 m n^2 operations a
source and n^3 / 3. Results agree to 1e-5 of the largest magnitude between devices and numbers of threads, and exactly
on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from automerge.errors import MergeError
from automerge.merging.consensus import weighted_sum
from automerge.merging.technique import Hyperparameter, TensorInputs, technique
from automerge.merging.techniques.fisher import one_source_is_linear, refuse_negative
from automerge.merging.techniques.linear import shares

if TYPE_CHECKING:
    import torch

ALPHA = Hyperparameter(
    "alpha",
    "float",
    default=0.9,
    low=0.0,
    high=0.99,
    searched=True,
    doc="factor of the Gram matrices' off-diagonal elements: how far inputs that go together count as such",
)

_RIDGE = 1e-6
"""Added to the diagonals, times the mean of all."""


@technique(
    name="regmean",
    normalised=True,
    nonzero_weight_sum=True,
    hyperparameters=(ALPHA,),
    statistics=("gram",),
    effective_weights=shares,
    effective_note="of tensors without Gram matrices; a linear layer's are matrices, each source's share of sum(w G)",
    canonical=one_source_is_linear,
    source="Jin et al., 'Dataless knowledge fusion by merging weights of language models', "
    "https://arxiv.org/abs/2212.09849",
)
def regmean(inputs: TensorInputs, weights: Sequence[float], *, alpha: float) -> torch.Tensor:
    """t' = (sum(w_i G_i))^-1 sum(w_i G_i t_i'), G_i source i's Gram matrix, its off-diagonal elements times alpha."""
    import torch

    refuse_negative("regmean", inputs, weights)
    grams = inputs.statistics.get("gram", ())
    like = inputs.sources[0]
    mean = math.fsum(float(gram.diagonal().double().mean()) for gram in grams if len(gram)) / max(1, len(grams))
    if mean == 0 or not like.numel():
        return weighted_sum(inputs.sources, weights).div_(math.fsum(weights))
    size = len(grams[0])
    left = torch.zeros(size, size, dtype=torch.float64, device=like.device)
    right = torch.zeros(size, len(like), dtype=torch.float64, device=like.device)
    for source, gram, weight in zip(inputs.sources, grams, weights, strict=True):
        # Divided by the mean: the ridge, and what is left of float64, do not depend on the scale of the inputs.
        shrunk = gram.to(torch.float64) * (alpha / mean)
        shrunk.diagonal().copy_(gram.diagonal().to(torch.float64) / mean + _RIDGE)
        left += shrunk.mul_(weight)
        right += shrunk @ source.reshape(len(like), -1).T.to(torch.float64)
    factor, failed = torch.linalg.cholesky_ex(left)
    if int(failed):
        raise MergeError(
            f"tensor {inputs.tensor!r}: the Gram matrices have no positive definite sum",
            "gather the statistics again, or choose a smaller alpha",
        )
    merged = torch.cholesky_solve(right, factor)
    return merged.T.reshape(like.shape).to(like.dtype)

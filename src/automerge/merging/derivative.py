"""The derivative of a cost in the few scalars that merge a tensor: its sources' weights, and lambda.

With the merged tensor T(w) and the gradient G of a cost with respect to T, the cost's derivative in a scalar is
sum(G * dT/dw): one pass over the tensor, which costs less than a layer's forward pass, and no parameter is changed.
Masks and elected signs are those at w, constant within the pass, so the derivative is exact almost everywhere.
"""

from collections.abc import Sequence

import torch

from automerge.errors import MergeError
from automerge.merging.recipe import RecipeBlock, canonical
from automerge.merging.technique import Technique, TensorInputs, load_technique

LAMBDA = "lambda"
"""The hyperparameter that is a scalar of its own where normalised weights leave the scale open."""


def refinable(block: RecipeBlock, *, has_base: bool) -> RecipeBlock | None:
    """The block in a form whose scalars are free: the same merge, and nothing of it fixed that a gradient could move.

    Where there is a base, a linear average becomes task arithmetic with the same weights, which need not sum to 1.

    Returns:
        the block; None where its technique has no derivative.
    """
    simple = canonical(block)
    if simple.technique == "linear" and has_base:
        total = sum(simple.weights.values())
        return simple.model_copy(
            update={
                "technique": "task_arithmetic",
                "weights": {source: weight / total for source, weight in simple.weights.items()},
                "hyperparameters": {LAMBDA: 1.0},
            }
        )
    return simple if load_technique(simple.technique).declaration.differentiable else None


def scalars_of(block: RecipeBlock) -> list[str]:
    """The names of a refinable block's scalars: its sources, then lambda if the weights are normalised."""
    return [*block.weights, *([LAMBDA] if _has_own_scale(block) else [])]


def with_scalars(block: RecipeBlock, values: Sequence[float]) -> RecipeBlock:
    """The block with other values of its scalars, in the order of `scalars_of`."""
    weights = dict(zip(block.weights, values, strict=False))
    changes: dict[str, object] = {"weights": weights}
    if _has_own_scale(block):
        changes["hyperparameters"] = {**block.hyperparameters, LAMBDA: values[-1]}
    return block.model_copy(update=changes)


def scalar_values(block: RecipeBlock) -> list[float]:
    """The values of a refinable block's scalars, in the order of `scalars_of`."""
    scale = [float(block.hyperparameters[LAMBDA])] if _has_own_scale(block) else []
    return [*block.weights.values(), *scale]


def scalar_gradient(
    technique: Technique, block: RecipeBlock, inputs: TensorInputs, gradient: torch.Tensor
) -> list[float]:
    """The derivative of a cost in a block's scalars, through one of its tensors.

    Args:
        technique: the block's.
        block: refinable.
        inputs: what its technique sees of the tensor, on any device.
        gradient: of the cost with respect to the merged tensor; its shape, on the same device.

    Returns:
        one value for each of `scalars_of`.

    Raises:
        MergeError: the technique declares itself differentiable, and its result does not depend on its weights.
    """
    wide = inputs.sources[0].dtype
    upstream = gradient.to(wide)
    if block.technique == "task_arithmetic":  # the most common, and linear: one task vector at a time is enough
        flat = upstream.reshape(-1)
        scale = float(block.hyperparameters[LAMBDA])
        return [scale * float(torch.dot(flat, delta.reshape(-1))) for delta in inputs.deltas]
    with torch.enable_grad():
        leaves = [torch.tensor(value, dtype=wide, requires_grad=True) for value in scalar_values(block)]
        weights = leaves[: len(block.weights)]
        arguments = {
            each.argument: leaves[-1]
            if each.name == LAMBDA and _has_own_scale(block)
            else block.hyperparameters[each.name]
            for each in technique.declaration.hyperparameters
        }
        moved = [leaf.to(upstream.device) for leaf in weights]
        merged = technique.function(inputs, moved, **arguments)
        if not merged.requires_grad:
            raise MergeError(
                f"technique {block.technique!r} declares itself differentiable, and its result does not depend on its "
                "weights",
                "correct its declaration",
            )
        found = torch.autograd.grad(merged, leaves, upstream, allow_unused=True)
    return [0.0 if each is None else float(each) for each in found]


def _has_own_scale(block: RecipeBlock) -> bool:
    normalises = bool(block.hyperparameters.get("normalize", False))
    return normalises and LAMBDA in block.hyperparameters

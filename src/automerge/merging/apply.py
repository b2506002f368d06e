"""Merging one tensor: the one function that both engines call, so that both give the same bytes."""

from collections.abc import Mapping

import torch

from automerge.errors import MergeError
from automerge.merging.buffers import merge_buffer
from automerge.merging.recipe import IntegerBuffers, OutputDtype, RecipeBlock, canonical, torch_dtype
from automerge.merging.technique import TensorInputs, load_technique


def merge_tensor(
    name: str,
    block: RecipeBlock,
    base: torch.Tensor | None,
    sources: Mapping[str, torch.Tensor],
    *,
    seed: int = 0,
    dtype: OutputDtype = "same",
    integer_buffers: IntegerBuffers = "error",
    inputs_are_finite: bool = False,
) -> torch.Tensor:
    """Merge one tensor as its block says, in the block's canonical form.

    Accumulation is in float32, and in float64 if the base or any source is float64. What the block names as a buffer,
    and every integer or boolean tensor, follows the buffer policy.

    Args:
        name: the tensor's name; one of the block's.
        block: a valid block (`automerge.merging.plan.plan_merge`).
        base: the base's tensor in the dtype of its checkpoint, or None.
        sources: source -> tensor in the dtype of its checkpoint, in the recipe's order; one shape, one device.
        seed: the recipe's seed.
        dtype: of the result, if it is floating-point; ``same``: as the sources.
        integer_buffers: the recipe's rule for integer and boolean tensors that differ.
        inputs_are_finite: the caller has called `refuse_non_finite` on the base and all sources.

    Returns:
        the merged tensor, of the sources' shape, in the output dtype. It may share memory with an input.

    Raises:
        MergeError: NaN or infinite inputs, a result that does not fit the output dtype, dtypes that differ between
            the sources under ``same``, integer tensors that differ.
    """
    output = output_dtype(name, {source: tensor.dtype for source, tensor in sources.items()}, dtype)
    if not inputs_are_finite:
        for source, tensor in sources.items():
            refuse_non_finite(f"source {source!r}", name, tensor)
    block = canonical(block)
    if not output.is_floating_point:
        return merge_buffer(name, base, sources, block.weights, integer_buffers)

    dtypes = [tensor.dtype for tensor in (*sources.values(), *([] if base is None else [base]))]
    accumulate = torch.float64 if torch.float64 in dtypes else torch.float32
    if name in block.buffers:
        wide = {source: tensor.to(accumulate) for source, tensor in sources.items()}
        return _narrow(name, merge_buffer(name, None, wide, block.weights, integer_buffers), output)
    if base is not None and not base.is_floating_point():
        raise MergeError(f"base, tensor {name!r} is {base.dtype}, that of the sources {output}", "pass a fitting base")
    if base is not None and not inputs_are_finite:
        refuse_non_finite("base", name, base)
    inputs = TensorInputs(
        tensor=name,
        source_names=list(sources),
        base=None if base is None else base.to(accumulate),
        sources=[tensor.to(accumulate) for tensor in sources.values()],
        seed=seed,
    )
    return _narrow(name, load_technique(block.technique).merge(inputs, block.settings), output)


def output_dtype(name: str, dtypes: Mapping[str, torch.dtype], dtype: OutputDtype) -> torch.dtype:
    """The dtype of a merged tensor.

    Args:
        name: the tensor's name.
        dtypes: its dtype in each source.
        dtype: what the recipe asks for.

    Returns:
        integer and boolean tensors keep their dtype; floating-point ones get ``dtype``, or keep theirs under ``same``.

    Raises:
        MergeError: complex tensors; integer and floating-point, or different integer dtypes; different
            floating-point dtypes under ``same``.
    """
    kinds = list(dtypes.values())
    if any(kind.is_complex for kind in kinds):
        raise MergeError(f"tensor {name!r} is complex, which no technique merges", "declare it as private")
    if dtype != "same" and all(kind.is_floating_point for kind in kinds):
        return torch_dtype(dtype)
    if len({str(kind) for kind in kinds}) > 1:
        listed = ", ".join(f"{str(kind).removeprefix('torch.')} in {source!r}" for source, kind in dtypes.items())
        floating = all(kind.is_floating_point for kind in kinds)
        remedy = "say which with the output dtype (merge.dtype)" if floating else "merge checkpoints of one form"
        raise MergeError(f"tensor {name!r} is {listed}", remedy)
    return kinds[0]


def convert(name: str, owner: str, tensor: torch.Tensor, dtype: OutputDtype) -> torch.Tensor:
    """A private tensor in the output dtype: not merged, but refused if it is not finite or does not fit.

    Raises:
        MergeError: NaN or infinite values, or values too large for the dtype.
    """
    refuse_non_finite(owner, name, tensor)
    if dtype == "same" or not tensor.is_floating_point():
        return tensor
    return _narrow(name, tensor, torch_dtype(dtype))


def refuse_non_finite(owner: str, name: str, tensor: torch.Tensor) -> None:
    """Raise for a floating-point or complex tensor with NaN or infinite values.

    Args:
        owner: whose tensor it is, for the error: ``"base"`` or ``"source 'high'"``.
        name: the tensor's name.
        tensor: any dtype; integer and boolean ones are always finite.

    Raises:
        MergeError: it has some; how many of each is said.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    wide = _checkable(tensor)
    if bool(torch.isfinite(wide).all()):
        return
    missing = int(torch.isnan(wide).sum())
    infinite = int((~torch.isfinite(wide)).sum()) - missing
    raise MergeError(
        f"{owner}, tensor {name!r}: {missing} NaN and {infinite} infinite values",
        "merge a checkpoint whose training did not diverge",
    )


def _narrow(name: str, merged: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to the output dtype, and refuse values that leave its range."""
    narrow = merged.to(dtype)
    lost = ~torch.isfinite(_checkable(narrow))
    if bool(lost.any()):
        largest = float(merged.abs().max())
        raise MergeError(
            f"tensor {name!r}: {int(lost.sum())} of {merged.numel()} values do not fit "
            f"{str(dtype).removeprefix('torch.')} (largest magnitude {largest:g})",
            "choose smaller weights or an output dtype of a wider range, such as bfloat16 or float32",
        )
    return narrow


def _checkable(tensor: torch.Tensor) -> torch.Tensor:
    """float8 has no isfinite of its own."""
    return tensor.to(torch.float32) if tensor.element_size() == 1 else tensor

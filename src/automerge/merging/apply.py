"""Merging one tensor: the one function that both engines call, so that both give the same bytes."""

from collections.abc import Mapping

import torch

from automerge.checkpoint.info import info_of
from automerge.checkpoint.rounding import round_to
from automerge.errors import MergeError
from automerge.merging.buffers import merge_buffer
from automerge.merging.plan import output_dtype
from automerge.merging.recipe import IntegerBuffers, OutputDtype, RecipeBlock, canonical, torch_dtype
from automerge.merging.statistics import Statistics, required
from automerge.merging.technique import Statistic, TensorInputs, load_technique


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
    statistics: Statistics | None = None,
    recalibrated: bool = False,
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
        statistics: what the block's technique needs, and the recalibrated values; None where nothing does.
        recalibrated: take the tensor's value from the statistics (`Recipe.recalibrated` names it).

    Returns:
        the merged tensor, of the sources' shape, in the output dtype. It may share memory with an input.

    Raises:
        MergeError: NaN or infinite inputs, a result that does not fit the output dtype, dtypes that differ between
            the sources under ``same``, integer tensors that differ, statistics that are needed and were not passed.
    """
    infos = {source: info_of(tensor) for source, tensor in sources.items()}
    output = torch_dtype(output_dtype(name, infos, dtype))
    if not inputs_are_finite:
        for source, tensor in sources.items():
            refuse_non_finite(f"source {source!r}", name, tensor)
    block = canonical(block)
    if recalibrated:
        value = required(statistics, block).recalibrated(name, tuple(next(iter(sources.values())).shape))
        return narrow(name, value.to(next(iter(sources.values())).device), output)
    if not output.is_floating_point:
        return merge_buffer(name, base, sources, block.weights, integer_buffers)

    fused = load_technique(block.technique).declaration.fused(block.settings)
    if name in block.buffers or (fused is not None and not fused.task_vectors):
        base = None  # it is not read, so neither its dtype nor its values may matter
    dtypes = [tensor.dtype for tensor in (*sources.values(), *([] if base is None else [base]))]
    accumulate = torch.float64 if torch.float64 in dtypes else torch.float32
    if name in block.buffers:
        wide = {source: tensor.to(accumulate) for source, tensor in sources.items()}
        return narrow(name, merge_buffer(name, None, wide, block.weights, integer_buffers), output)
    if base is not None and not base.is_floating_point():
        raise MergeError(f"base, tensor {name!r} is {base.dtype}, that of the sources {output}", "pass a fitting base")
    if base is not None and not inputs_are_finite:
        refuse_non_finite("base", name, base)
    technique = load_technique(block.technique)
    wide_sources = [tensor.to(accumulate) for tensor in sources.values()]
    found: dict[Statistic, list[torch.Tensor]] = {}
    if kinds := technique.declaration.statistics:
        found = required(statistics, block).of(name, list(sources), kinds, like=wide_sources[0])
    inputs = TensorInputs(
        tensor=name,
        source_names=list(sources),
        base=None if base is None else base.to(accumulate),
        sources=wide_sources,
        seed=seed,
        statistics=found,
    )
    return narrow(name, technique.merge(inputs, block.settings), output)


def convert(name: str, owner: str, tensor: torch.Tensor, dtype: OutputDtype) -> torch.Tensor:
    """A private tensor in the output dtype: not merged, but refused if it is not finite or does not fit.

    Raises:
        MergeError: NaN or infinite values, or values too large for the dtype.
    """
    refuse_non_finite(owner, name, tensor)
    if dtype == "same" or not tensor.is_floating_point():
        return tensor
    return narrow(name, tensor, torch_dtype(dtype))


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


def narrow(name: str, merged: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A merged tensor in its output dtype.

    Raises:
        MergeError: values that leave the range of the dtype.
    """
    rounded, lost = round_to(merged, dtype)
    if bool(lost.any()):
        largest = float(merged.abs().max())
        raise MergeError(
            f"tensor {name!r}: {int(lost.sum())} of {merged.numel()} values do not fit "
            f"{str(dtype).removeprefix('torch.')} (largest magnitude {largest:g})",
            "choose smaller weights or an output dtype of a wider range, such as bfloat16 or float32",
        )
    return rounded


def _checkable(tensor: torch.Tensor) -> torch.Tensor:
    """float8 has no isfinite of its own."""
    return tensor.to(torch.float32) if tensor.element_size() == 1 else tensor

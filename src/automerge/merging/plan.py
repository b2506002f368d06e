"""From a recipe to steps, one per merged tensor; whether the recipe fits its inputs is decided here, from names, shapes
and dtypes alone, before anything is computed or written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from automerge.checkpoint.info import TensorInfo
from automerge.errors import MergeError
from automerge.merging.recipe import BASE, OutputDtype, Recipe, RecipeBlock, merged_names, stored_names
from automerge.merging.technique import load_technique, validate_settings

if TYPE_CHECKING:
    import torch

_SHOWN = 10


@dataclass(frozen=True)
class Step:
    """One tensor to merge.

    Attributes:
        name: its name in the merged model.
        block: its block.
        sources: source -> the name under which that source holds it: its own, or that of a tied alias.
        base: the same for the base; None where there is no base, or the base lacks it or keeps it private.
        aliases: the names that are tied to it in the merged model.
        info: dtype and shape of the merged tensor.
    """

    name: str
    block: RecipeBlock
    sources: dict[str, str]
    base: str | None
    aliases: tuple[str, ...]
    info: TensorInfo


def plan_merge(
    recipe: Recipe,
    base: Mapping[str, TensorInfo] | None,
    sources: Mapping[str, Mapping[str, TensorInfo]],
) -> list[Step]:
    """Check a recipe against its inputs, and say what to do for each merged tensor.

    Where the recipe has a vocabulary, the inputs are those of `automerge.merging.vocabulary.fit_checkpoints`.

    Every tensor of every source is in exactly one block, is private to it, or is the alias of a tied one; every tensor
    of a block is in every source (and in the base, where a technique uses it) with one shape; every block satisfies
    its technique's declaration.

    Args:
        recipe: what to check.
        base: dtype and shape of the base's tensors, or None.
        sources: the same, by source; in any order.

    Returns:
        one step per merged tensor, sorted by name; within a step the sources have the recipe's order.

    Raises:
        PluginError: a technique is unknown.
        MergeError: anything else; the first ten names are given, and how many there are.
    """
    names = recipe.source_names
    _refuse("sources named twice", [name for name, count in Counter(names).items() if count > 1])
    if sorted(sources) != sorted(names):
        raise MergeError(
            f"the recipe's sources are {', '.join(names)}, got {', '.join(sources)}", "pass the recipe's sources"
        )
    if (base is None) != (recipe.base is None):
        found = "a base was passed" if recipe.base is None else "no base was passed"
        raise MergeError(
            f"the recipe has {'a' if recipe.base else 'no'} base and {found}", "pass the inputs that the recipe names"
        )
    if BASE in names:
        raise MergeError(f"no source can be called {BASE!r}, which is the name of the base", "rename the source")
    owners = [*names, BASE]
    _refuse("private tensors for unknown sources", [name for name in recipe.private if name not in owners])
    if base is None and recipe.private.get(BASE):
        raise MergeError("the recipe has private tensors of the base and no base", "remove them")

    _refuse("blocks named twice", [n for n, c in Counter(block.name for block in recipe.blocks).items() if c > 1])
    for block in recipe.blocks:
        validate_settings(block.settings, sources=names, has_base=base is not None, where=f"block {block.name!r}")
    merged = Counter(merged_names(recipe))
    _refuse("tensors in more than one block", [name for name, count in merged.items() if count > 1])
    _refuse("tied tensors that are also in a block", [alias for alias in recipe.tied if alias in merged])
    buffers = {name for block in recipe.blocks for name in block.buffers}
    _refuse("recalibrated tensors that are no buffer of a block", [n for n in recipe.recalibrated if n not in buffers])
    private = {name for tensors in recipe.private.values() for name in tensors}
    _refuse(
        "tied tensors whose counterpart is neither in a block nor private",
        [f"{alias} -> {target}" for alias, target in recipe.tied.items() if target not in {*merged, *private}],
    )

    rows = dict.fromkeys(recipe.vocabulary.tensors, recipe.vocabulary.rows) if recipe.vocabulary else {}
    _refuse("tensors of the vocabulary that are in no block", [name for name in rows if name not in merged])

    stored = {}
    for name in names:
        stored[name] = _validate_coverage(recipe, f"source {name!r}", name, merged, sources[name])
    base_stored: dict[str, str] = {}
    if base is not None:
        base_stored = _validate_coverage(recipe, "the base", BASE, {}, base)
    steps = []
    for block in recipe.blocks:
        requires_base = load_technique(block.technique).declaration.requires_base
        absent = [name for name in block.parameters if name not in base_stored] if requires_base else []
        _refuse(f"tensors of block {block.name!r} that the base lacks", absent)
        for name in (*block.parameters, *block.buffers):
            infos = {source: sources[source][stored[source][name]] for source in names}
            shapes = {f"source {source!r}": info.shape for source, info in infos.items()}
            if base is not None and name in base_stored:
                shapes["the base"] = base[base_stored[name]].shape
            if name in rows and any(shape[:1] != (rows[name],) for shape in shapes.values()):
                raise MergeError(
                    f"tensor {name!r} does not have the {rows[name]} rows of the recipe's vocabulary in all inputs",
                    "bring the inputs to it by automerge.merging.vocabulary.fit_checkpoints",
                )
            if len(set(shapes.values())) > 1:
                listed = ", ".join(f"{list(shape)} in {owner}" for owner, shape in shapes.items())
                remedy = "declare it as private"
                if len({shape[1:] for shape in shapes.values()}) == 1 and all(
                    len(each) == 2 for each in shapes.values()
                ):
                    remedy += ", or where tokens were added, say with merge.vocabulary how many rows to keep"
                raise MergeError(f"tensor {name!r} has the shapes {listed}", remedy)
            for source in names:
                _refuse_scaled(name, infos[source], sources[source])
            dtype = output_dtype(name, infos, recipe.dtype)
            steps.append(
                Step(
                    name=name,
                    block=block,
                    sources={source: stored[source][name] for source in names},
                    base=base_stored.get(name),
                    aliases=tuple(sorted(alias for alias, target in recipe.tied.items() if target == name)),
                    info=TensorInfo(dtype, infos[names[0]].shape),
                )
            )
    return sorted(steps, key=lambda step: step.name)


def replan(steps: Sequence[Step], before: Recipe, recipe: Recipe) -> list[Step] | None:
    """The steps of a recipe that differs from an earlier one of the same inputs in its blocks' settings only.

    Args:
        steps: what `plan_merge` returned for ``before``.
        before: the earlier recipe.
        recipe: the recipe.

    Returns:
        what `plan_merge` would return, in a fraction of its time; None where there is more to check.

    Raises:
        PluginError, MergeError: as `plan_merge`.
    """
    if _structure(before) != _structure(recipe):
        return None
    with_base = set()
    for block in recipe.blocks:
        where = f"block {block.name!r}"
        validate_settings(block.settings, sources=recipe.source_names, has_base=recipe.base is not None, where=where)
        if load_technique(block.technique).declaration.requires_base:
            with_base.add(block.name)
    if any(step.base is None and step.block.name in with_base for step in steps):
        return None
    blocks = {block.name: block for block in recipe.blocks}
    return [
        step if blocks[step.block.name] is step.block else replace(step, block=blocks[step.block.name])
        for step in steps
    ]


def _structure(recipe: Recipe) -> tuple[object, ...]:
    """All that a plan depends on, beside the inputs and the blocks' settings."""
    return (
        recipe.base is None,
        recipe.source_names,
        recipe.dtype,
        recipe.tied,
        recipe.private,
        recipe.vocabulary,
        recipe.recalibrated,
        [(block.name, block.parameters, block.buffers) for block in recipe.blocks],
    )


def output_dtype(name: str, infos: Mapping[str, TensorInfo], dtype: OutputDtype) -> str:
    """The dtype of a merged tensor, by torch's name.

    Args:
        name: the tensor's name.
        infos: its dtype (and shape) in each source.
        dtype: what the recipe asks for.

    Returns:
        integer and boolean tensors keep their dtype; floating-point ones get ``dtype``, or keep theirs under ``same``.

    Raises:
        MergeError: complex tensors; integer and floating-point, or different integer dtypes; different
            floating-point dtypes under ``same``.
    """
    kinds = [info.dtype for info in infos.values()]
    if any(kind.startswith("complex") for kind in kinds):
        raise MergeError(f"tensor {name!r} is complex, which no technique merges", "declare it as private")
    floating = all(info.is_floating_point for info in infos.values())
    if dtype != "same" and floating:
        return dtype
    if len(set(kinds)) > 1:
        listed = ", ".join(f"{info.dtype} in {source!r}" for source, info in infos.items())
        remedy = "say which with the output dtype (merge.dtype)" if floating else "merge checkpoints of one form"
        raise MergeError(f"tensor {name!r} is {listed}", remedy)
    return kinds[0]


def refuse_untied(
    step: Step, owner: str, stored: str, names: Container[str], read: Callable[[str], torch.Tensor]
) -> None:
    """Raise where a checkpoint holds a tied tensor and its alias with different values: merging would lose one.

    Args:
        step: the tensor.
        owner: whose checkpoint it is, for the error.
        stored: the name under which the checkpoint holds the tensor.
        names: all names in the checkpoint.
        read: how to read one.

    Raises:
        MergeError: the values differ.
    """
    for alias in step.aliases:
        if alias == stored or alias not in names:
            continue
        one, other = read(stored), read(alias)
        if one.shape != other.shape or not bool((one == other).all()):
            raise MergeError(
                f"{owner}: the tensors {stored!r} and {alias!r} are tied in the model, and their values differ",
                "untie them in the model's configuration, or pass a checkpoint in which they are equal",
            )


_SCALES = ("_scale", "_scale_inv", "_scale_2")
"""How the names of what a quantised tensor is multiplied with end, after its own."""


def _refuse_scaled(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
    """float8 numbers that mean nothing without their scales cannot be averaged, and neither can the scales."""
    prefix, _, leaf = name.rpartition(".")
    names = [name + end for end in _SCALES] + [f"{prefix}.scale_{leaf}".lstrip(".")]
    scale = next((each for each in names if each in tensors), None)
    if info.dtype.startswith("float8") and scale is not None:
        raise MergeError(
            f"tensor {name!r} is {info.dtype} with the scales {scale!r}, so its values cannot be merged by themselves",
            "convert the checkpoint to bfloat16 first",
        )


def _validate_coverage(
    recipe: Recipe, owner: str, key: str, needed: Mapping[str, int], infos: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Check one checkpoint's names; returns under which name it holds each merged tensor."""
    private = recipe.private.get(key, [])
    stored = {name: held for name, held in stored_names(recipe, infos).items() if name not in private}
    _refuse(f"private tensors that {owner} lacks", [name for name in private if name not in infos])
    if needed:
        _refuse(f"private tensors of {owner} that are also in a block", [name for name in private if name in needed])
        _refuse(f"tensors of the recipe that {owner} lacks", [name for name in needed if name not in stored])
    known = {*stored.values(), *stored, *private, *recipe.tied}
    _refuse(
        f"tensors of {owner} that are neither in a block nor private nor tied",
        [name for name in infos if name not in known],
    )
    return stored


def _refuse(what: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise MergeError(f"{len(names)} {what}: {shown}", "segment the model again and write a new recipe")

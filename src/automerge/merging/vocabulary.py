"""Vocabularies of different size: embeddings with one row per token, of which some inputs have more than others.

Before anything is merged, every input is brought to the recipe's number of rows, so that techniques see one shape.

- More rows than that are cut off at the end.
- A row that a source lacks becomes the plain mean of that row over the sources that have it. So the row is merged over
  those sources alone, and the weight of the source that lacks it goes to them. A row that one source alone has is that
  source's, unchanged but for rounding, under every technique that works element by element and all weights; one that
  works on whole matrices (SLERP, RegMean, the SVD family) sees it as part of the matrix.
- A row that no source has becomes the base's: nobody changed it.
- A row that the base lacks becomes that mean in the base too. A new token has no ancestor. Zeros in its place would
  make the whole row a task vector, which task arithmetic with the weights 0.5 and 0.5 would write at half its length,
  and TIES would compare with small changes; against the mean, a task vector is what a source has of its own.

The rule depends on the inputs alone, not on weights or techniques, so a search applies it once. It takes a row for the
same token in all inputs: tokens that two fine-tunings added under one number are averaged like any other row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from automerge.checkpoint.checkpoint import Checkpoint, Extent
from automerge.checkpoint.info import TensorInfo
from automerge.errors import MergeError
from automerge.merging.recipe import BASE, Recipe, Vocabulary

if TYPE_CHECKING:
    import torch

Read = Callable[[str, str], "torch.Tensor"]
"""Reads a tensor: of an input (a source's name, or ``base``), by name."""


def fit_rows(
    own: torch.Tensor, rows: int, sources: Sequence[torch.Tensor], base: torch.Tensor | None, *, is_base: bool = False
) -> torch.Tensor:
    """One input's tensor with the given number of rows; see the module.

    Args:
        own: [its rows, ...], floating-point.
        rows: how many the result has.
        sources: the tensor of every source, in the recipe's order, each with its own number of rows.
        base: the base's, or None.
        is_base: ``own`` is the base's.

    Returns:
        [rows, ...]: a view where rows are cut off; in the dtype of ``own``, but a base that is filled up is float32
        (float64 if any input is), so that the mean is not rounded.

    Raises:
        MergeError: no input has that many rows.
    """
    import torch

    if len(own) >= rows:
        return own[:rows]
    inputs = [*sources, *([] if base is None else [base])]
    accumulate = torch.float64 if any(each.dtype == torch.float64 for each in inputs) else torch.float32
    dtype = accumulate if is_base else own.dtype
    parts = [own.to(dtype)]
    for begin, end in itertools.pairwise(_bounds(len(own), rows, [len(each) for each in inputs])):
        held = [each[begin:end].to(accumulate) for each in sources if len(each) >= end]
        if not held and (base is None or len(base) < end):
            raise MergeError(f"no input has the {rows} rows of the recipe's vocabulary", "pass the recipe's inputs")
        fill = held[0].clone() if held else base[begin:end].to(accumulate)  # type: ignore[index]
        for other in held[1:]:
            fill += other
        parts.append((fill / len(held) if held else fill).to(dtype))
    return torch.cat(parts)


def fit_checkpoints(
    recipe: Recipe, base: Checkpoint | None, sources: Mapping[str, Checkpoint]
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """The inputs as a recipe's vocabulary wants them: views, which compute what they must when it is read.

    Without a vocabulary in the recipe, and for inputs that fit already, the inputs themselves; so too for others than
    the recipe's, which `automerge.merging.plan.plan_merge` refuses.

    Args:
        recipe: the merge.
        base: the base, or None.
        sources: the sources by name.

    Returns:
        the same with equal shapes; digests, paths and files are those of the inputs.

    Raises:
        MergeError: an input lacks a tensor of the vocabulary, or no input has that many rows.
    """
    vocabulary = recipe.vocabulary
    others = sorted(sources) != sorted(recipe.source_names) or (base is None) != (recipe.base is None)
    if vocabulary is None or others:
        return base, dict(sources)
    groups = spellings(vocabulary, recipe.tied)
    inputs = {**({} if base is None else {BASE: base}), **{name: sources[name] for name in recipe.source_names}}
    private = {owner: recipe.private.get(owner, []) for owner in inputs}
    infos = {
        owner: {name: info for name, info in each.tensors.items() if name not in private[owner]}
        for owner, each in inputs.items()
    }

    def read(owner: str, name: str) -> torch.Tensor:
        return inputs[owner].read(name)

    planned = fitted_infos(vocabulary, groups, infos)
    views: dict[str, Checkpoint] = {
        owner: _Fitted(each, planned[owner], partial(fit_tensor, vocabulary, groups, infos, read, owner))
        if planned[owner]
        else each
        for owner, each in inputs.items()
    }
    return views.pop(BASE, None), views


def spellings(vocabulary: Vocabulary, tied: Mapping[str, str]) -> dict[str, list[str]]:
    """The names under which an input may hold each tensor of the vocabulary: its own, then those tied to it."""
    return {
        name: [name, *sorted(alias for alias, target in tied.items() if target == name)] for name in vocabulary.tensors
    }


def origin_of(recipe: Recipe, base: Checkpoint | None, sources: Mapping[str, Checkpoint]) -> str:
    """The input (a source's name, or ``base``) whose configuration and tokenizer fit the merged weights.

    The first source; where vocabularies differ in size, the first checkpoint that has the merged one's.
    """
    if recipe.vocabulary is None:
        return recipe.source_names[0]
    names = [name for group in spellings(recipe.vocabulary, recipe.tied).values() for name in group]
    owners = {**({} if base is None else {BASE: base}), **sources}
    order = [*recipe.source_names, BASE] if recipe.vocabulary.rule == "largest" else [BASE, *recipe.source_names]
    fitting = (
        owner
        for owner in order
        if owner in owners
        and any(
            name in owners[owner].tensors and owners[owner].tensors[name].shape[:1] == (recipe.vocabulary.rows,)
            for name in names
        )
    )
    return next(fitting, recipe.source_names[0])


def fitted_infos(
    vocabulary: Vocabulary, groups: Mapping[str, Sequence[str]], infos: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, dict[str, TensorInfo]]:
    """What has to change: by input, dtype and shape to be of every tensor whose number of rows is another.

    Args:
        vocabulary: of the recipe.
        groups: `spellings`.
        infos: dtype and shape by input and name, private tensors left out.

    Raises:
        MergeError: a source lacks a tensor of the vocabulary, or holds it as a scalar or in integers; or no input has
            that many rows.
    """
    planned: dict[str, dict[str, TensorInfo]] = {owner: {} for owner in infos}
    for name, group in groups.items():
        held = {owner: [each for each in group if each in tensors] for owner, tensors in infos.items()}
        absent = [owner for owner, found in held.items() if owner != BASE and not found]
        if absent:
            raise MergeError(f"source {absent[0]!r} lacks {name!r}, a tensor of the vocabulary", "pass other inputs")
        wide = any(infos[owner][found[0]].dtype == "float64" for owner, found in held.items() if found)
        for owner, found in held.items():
            for spelling in found:
                info = infos[owner][spelling]
                if not info.shape or not info.is_floating_point:
                    raise MergeError(
                        f"{spelling!r} is {info.dtype} {list(info.shape)}, so it has no rows of floating-point numbers",
                        "name the embeddings in merge.vocabulary_tensors",
                    )
                if info.shape[0] == vocabulary.rows:
                    continue
                dtype = info.dtype
                if owner == BASE and info.shape[0] < vocabulary.rows:
                    dtype = "float64" if wide else "float32"
                planned[owner][spelling] = TensorInfo(dtype, (vocabulary.rows, *info.shape[1:]))
        lengths = [infos[owner][spelling].shape[0] for owner, found in held.items() for spelling in found]
        if max(lengths, default=0) < vocabulary.rows:
            raise MergeError(
                f"no input has the {vocabulary.rows} rows of the recipe's vocabulary in {name!r}",
                "pass the recipe's inputs",
            )
    return planned


def fit_tensor(
    vocabulary: Vocabulary,
    groups: Mapping[str, Sequence[str]],
    infos: Mapping[str, Mapping[str, TensorInfo]],
    read: Read,
    owner: str,
    name: str,
) -> torch.Tensor:
    """One input's tensor of the vocabulary, brought to the recipe's number of rows.

    Args:
        vocabulary, groups, infos: as of `fitted_infos`.
        read: reads the inputs' tensors; the others' only where rows are to be filled.
        owner: the input.
        name: the name under which it holds the tensor.
    """
    own = read(owner, name)
    if len(own) >= vocabulary.rows:
        return own[: vocabulary.rows]
    group = next(group for group in groups.values() if name in group)
    others = {
        each: read(each, next(spelling for spelling in group if spelling in tensors))
        for each, tensors in infos.items()
        if any(spelling in tensors for spelling in group)
    }
    base = others.pop(BASE, None)
    return fit_rows(own, vocabulary.rows, list(others.values()), base, is_base=owner == BASE)


class _Fitted(Checkpoint):
    """A view of a checkpoint, in which some tensors have another number of rows."""

    def __init__(
        self, inner: Checkpoint, changed: Mapping[str, TensorInfo], compute: Callable[[str], torch.Tensor]
    ) -> None:
        # Not the parent's: this has no files of its own.
        self.path, self.files, self.aliases = inner.path, inner.files, inner.aliases
        self.tensors = {name: changed.get(name, info) for name, info in inner.tensors.items()}
        self._inner, self._changed, self._compute = inner, changed, compute

    def _read(self, name: str) -> torch.Tensor:
        return self._compute(name) if name in self._changed else self._inner.read(name)

    def extent(self, name: str) -> Extent | None:
        """See ``Checkpoint.extent``: what was cut off lies at the end."""
        extent = self._inner.extent(name)
        if extent is None or name not in self._changed:
            return extent
        size = self._changed[name].nbytes
        return replace(extent, nbytes=size) if size <= extent.nbytes else None

    def digest(self) -> str:
        """That of the checkpoint itself."""
        return self._inner.digest()

    def close(self) -> None:
        """Close the checkpoint itself."""
        self._inner.close()


def _bounds(first: int, last: int, lengths: Sequence[int]) -> list[int]:
    """Where the set of inputs that have a row changes, from ``first`` to ``last``."""
    return sorted({first, last, *(length for length in lengths if first < length < last)})

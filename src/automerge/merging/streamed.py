"""The streamed engine: from checkpoints to a checkpoint, tensor by tensor.

Memory is a few times the largest tensor times the number of sources, whatever the size of the model: inputs are
memory-mapped, and the output's shards are written as the tensors come.
"""

import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.open import Checkpoint
from automerge.checkpoint.write import CheckpointWriter
from automerge.errors import MergeError, StorageError
from automerge.merging.apply import convert, merge_tensor
from automerge.merging.plan import Step, plan_merge, refuse_untied
from automerge.merging.recipe import BASE, Recipe

Progress = Callable[[str, int, int], None]
"""Called after each tensor: its name, how many are done, how many there are."""

HEADS = "heads"
"""Folder, beside the merged weights, of the private tensors: ``heads/<source>.safetensors``."""


def merge_checkpoints(
    recipe: Recipe,
    base: Checkpoint | None,
    sources: Mapping[str, Checkpoint],
    folder: Path,
    *,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> list[Path]:
    """Apply a recipe to checkpoints, and write the merged checkpoint.

    Args:
        recipe: the merge.
        base: the base, where the recipe has one.
        sources: the sources by name.
        folder: where the files go; made when it is not there. Nothing of ours is left in it on failure.
        max_shard_bytes: most bytes of tensor data in one file of the merged weights.
        progress: see `Progress`.

    Returns:
        the files written: the merged weights' (not their index), then ``heads/<source>.safetensors`` of every source
        (and ``heads/base.safetensors``) that has private tensors. An alias of a tied tensor is written nowhere.

    Raises:
        MergeError: an input is not the one that the recipe names (by digest), the recipe does not fit, or a tensor
            cannot be merged.
        CheckpointError, StorageError: an input cannot be read, or the output cannot be written.
    """
    steps = plan_merge(
        recipe, base.tensors if base else None, {name: source.tensors for name, source in sources.items()}
    )
    if recipe.base is not None and base is not None:
        _check_digest("base", recipe.base.digest, base)
    for source in recipe.sources:
        _check_digest(f"source {source.name!r}", source.digest, sources[source.name])

    try:
        return _merge(recipe, steps, base, sources, folder, max_shard_bytes, progress or _silent)
    except OSError as error:
        raise StorageError(
            f"{folder}: the merged checkpoint cannot be written ({error.strerror or error})",
            "pass a folder that can be written",
        ) from None


def _merge(
    recipe: Recipe,
    steps: Sequence[Step],
    base: Checkpoint | None,
    sources: Mapping[str, Checkpoint],
    folder: Path,
    max_shard_bytes: int,
    progress: Progress,
) -> list[Path]:
    owners = [owner for owner in (*recipe.source_names, BASE) if recipe.private.get(owner)]
    total = len(steps) + sum(len(recipe.private[owner]) for owner in owners)
    counter = itertools.count(1)
    with _removed_if_empty(folder), _removed_if_empty(folder / HEADS):
        with CheckpointWriter(folder, {step.name: step.info for step in steps}, max_shard_bytes) as writer:
            for step in steps:
                writer.write(step.name, _merged(recipe, step, base, sources))
                progress(step.name, next(counter), total)
            with _staging(folder) as staging:
                staged = []
                for owner in owners:
                    checkpoint = base if owner == BASE and base is not None else sources[owner]
                    infos = {name: _private_info(checkpoint.tensors[name], recipe) for name in recipe.private[owner]}
                    # One file each: whoever attaches a head loads all of it.
                    with CheckpointWriter(staging / owner, infos, sys.maxsize) as head:
                        for name in infos:
                            head.write(name, convert(name, _label(owner), checkpoint.read(name), recipe.dtype))
                            progress(name, next(counter), total)
                        staged += head.commit()
                heads = [folder / HEADS / f"{owner}.safetensors" for owner in owners]
                if heads:
                    (folder / HEADS).mkdir(exist_ok=True)
                files = writer.commit()
                for written, head_file in zip(staged, heads, strict=True):
                    written.replace(head_file)
        for stale in sorted((folder / HEADS).glob("*.safetensors")):
            if stale not in heads:
                stale.unlink()  # of an earlier merge into the same folder
        return files + heads


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folder on the way out, if it is there and nothing is in it."""
    try:
        yield
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the result; those of merges that were killed go as well."""
    for leftover in sorted(folder.glob(".heads.*.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".heads.", suffix=".tmp", dir=folder) as path:
        yield Path(path)


def _merged(recipe: Recipe, step: Step, base: Checkpoint | None, sources: Mapping[str, Checkpoint]) -> torch.Tensor:
    for source, stored in step.sources.items():
        _refuse_untied(step, _label(source), stored, sources[source])
    if base is not None and step.base is not None:
        _refuse_untied(step, _label(BASE), step.base, base)
    return merge_tensor(
        step.name,
        step.block,
        base.read(step.base) if base is not None and step.base is not None else None,
        {source: sources[source].read(stored) for source, stored in step.sources.items()},
        seed=recipe.seed,
        dtype=recipe.dtype,
        integer_buffers=recipe.integer_buffers,
    )


def _refuse_untied(step: Step, owner: str, stored: str, checkpoint: Checkpoint) -> None:
    # Names that the file itself stores as one tensor need no comparison.
    resolved = checkpoint.aliases.get(stored, stored)
    apart = [
        name for name in step.aliases if name in checkpoint.tensors and checkpoint.aliases.get(name, name) != resolved
    ]
    refuse_untied(step, owner, stored, apart, checkpoint.read)


def _private_info(info: TensorInfo, recipe: Recipe) -> TensorInfo:
    return replace(info, dtype=recipe.dtype) if recipe.dtype != "same" and info.is_floating_point else info


def _check_digest(owner: str, expected: str, checkpoint: Checkpoint) -> None:
    if checkpoint.digest() != expected:
        raise MergeError(
            f"{owner}: the checkpoint {checkpoint.path} is not the one of the recipe "
            f"(digest {checkpoint.digest()[:12]}..., expected {expected[:12]}...)",
            "pass the checkpoint that the recipe was made with",
        )


def _label(owner: str) -> str:
    return "base" if owner == BASE else f"source {owner!r}"


def _silent(name: str, done: int, total: int) -> None:
    pass

"""The streamed engine: from checkpoints to a checkpoint, tensor by tensor.

Memory does not grow with the model. What the compiled kernels merge (`automerge.merging.elementwise`) is read, merged
and written in tiles of fixed size, on all cores, without torch; each thread reads, computes or writes while the others
do something else. What they cannot merge goes through torch, in a few times the memory of the largest such tensor. On
another device than the CPU torch merges everything, what is elementwise in tiles as well (`automerge.merging.device`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from automerge.checkpoint.checkpoint import Checkpoint
from automerge.checkpoint.info import ITEM_BYTES, TensorInfo
from automerge.checkpoint.write import CheckpointWriter
from automerge.errors import CheckpointError, MergeError, StorageError
from automerge.merging.elementwise import ElementwiseMerge, fused_of
from automerge.merging.fused import Fused
from automerge.merging.kernels import DTYPES, load_kernels
from automerge.merging.plan import Step, plan_merge, refuse_untied
from automerge.merging.recipe import BASE, Recipe, canonical
from automerge.merging.statistics import Statistics, check_statistics
from automerge.merging.technique import Settings
from automerge.merging.workers import InFile, InMemory, Operand, Scratch, Workers

if TYPE_CHECKING:
    import torch

    from automerge.merging.device import Transfers

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
    threads: int | None = None,
    device: str = "cpu",
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Apply a recipe to checkpoints, and write the merged checkpoint.

    Args:
        recipe: the merge.
        base: the base, where the recipe has one.
        sources: the sources by name.
        folder: where the files go; made when it is not there. Nothing of ours is left in it on failure.
        max_shard_bytes: most bytes of tensor data in one file of the merged weights.
        threads: how many; by default one for each processor that this process may use. The bytes do not depend on it.
        device: where it is computed, by torch's name: ``cpu``, ``cuda`` or ``cuda:N``. For what the kernels can merge
            the bytes do not depend on it.
        statistics: the recipe's statistics file, where it names one.
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
    check_statistics(recipe, statistics)
    if recipe.base is not None and base is not None:
        _check_digest("base", recipe.base.digest, base)
    for source in recipe.sources:
        _check_digest(f"source {source.name!r}", source.digest, sources[source.name])

    try:
        with _Engine(threads, statistics, device) as engine:
            return _merge(recipe, steps, base, sources, folder, max_shard_bytes, engine, progress or _silent)
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
    engine: _Engine,
    progress: Progress,
) -> list[Path]:
    owners = [owner for owner in (*recipe.source_names, BASE) if recipe.private.get(owner)]
    total = len(steps) + sum(len(recipe.private[owner]) for owner in owners)
    counter = itertools.count(1)
    with _removed_if_empty(folder, ours=not folder.exists()), _removed_if_empty(folder / HEADS, ours=True):
        with CheckpointWriter(folder, {step.name: step.info for step in steps}, max_shard_bytes) as writer:
            for step in steps:
                engine.merge(recipe, step, base, sources, writer)
                progress(step.name, next(counter), total)
            with _staging(folder) as staging:
                staged = []
                for owner in owners:
                    checkpoint = base if owner == BASE and base is not None else sources[owner]
                    infos = {name: _private_info(checkpoint.tensors[name], recipe) for name in recipe.private[owner]}
                    # One file each: whoever attaches a head loads all of it.
                    with CheckpointWriter(staging / owner, infos, sys.maxsize) as head:
                        for name in infos:
                            engine.convert(recipe, name, owner, checkpoint, head)
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
def _removed_if_empty(folder: Path, *, ours: bool) -> Iterator[None]:
    """Remove a folder of ours on the way out, if it is there and nothing is in it."""
    try:
        yield
    finally:
        with suppress(OSError):  # must not hide why the merge failed
            if ours and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the result; those of merges that were killed go as well."""
    for leftover in sorted(folder.glob(".heads.*.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".heads.", suffix=".tmp", dir=folder) as path:
        yield Path(path)


class _Engine:
    """Threads, open files, and the choice between the kernels and torch. A context manager."""

    def __init__(self, threads: int | None, statistics: Statistics | None, device: str) -> None:
        self._statistics = statistics
        self._device = device
        self._transfers: Transfers | None = None
        self._kernels = load_kernels()
        self._stack = ExitStack()
        self._workers = self._stack.enter_context(Workers(threads))
        self._descriptors: dict[Path, int] = {}

    def merge(
        self,
        recipe: Recipe,
        step: Step,
        base: Checkpoint | None,
        sources: Mapping[str, Checkpoint],
        writer: CheckpointWriter,
    ) -> None:
        """Merge one tensor and write it."""
        held = {source: (sources[source], stored) for source, stored in step.sources.items()}
        base_held = (base, step.base) if base is not None and step.base is not None else None
        for source, (checkpoint, stored) in held.items():
            _refuse_untied(step, _label(source), stored, checkpoint)
        if base_held is not None:
            _refuse_untied(step, _label(BASE), base_held[1], base_held[0])

        block = canonical(step.block)
        infos = {source: checkpoint.tensors[stored] for source, (checkpoint, stored) in held.items()}
        base_info = base_held[0].tensors[base_held[1]] if base_held is not None else None
        recalibrated = step.name in recipe.recalibrated
        fused = None
        if step.info.is_floating_point and not recalibrated:
            fused = fused_of(step.name, block, base_info, infos, step.info)
        if fused is not None and (self._device != "cpu" or self._kernels is None):
            if self._merged_by_torch(recipe, step, fused, base_held, held, writer):
                return
        elif fused is not None:
            operands = {source: self._operand(*each) for source, each in held.items()}
            base_operand = self._operand(*base_held) if base_held is not None else None
            if self._merged(recipe, step.name, fused, base_operand, operands, step.info, writer):
                return

        from automerge.merging.apply import merge_tensor

        # What comes here though it is elementwise has values that are to be refused: that needs no device.
        device = self._device if fused is None and step.info.is_floating_point else "cpu"
        with self._memory_explained(step.name):
            merged = merge_tensor(
                step.name,
                block,
                base_held[0].read(base_held[1]).to(device) if base_held is not None else None,
                {source: checkpoint.read(stored).to(device) for source, (checkpoint, stored) in held.items()},
                seed=recipe.seed,
                dtype=recipe.dtype,
                integer_buffers=recipe.integer_buffers,
                statistics=self._statistics,
                recalibrated=recalibrated,
            )
        writer.write(step.name, merged)

    def convert(self, recipe: Recipe, name: str, owner: str, checkpoint: Checkpoint, writer: CheckpointWriter) -> None:
        """Write a private tensor in the output dtype: the "merge" of one source with weight 1."""
        info = checkpoint.tensors[name]
        output = _private_info(info, recipe)
        if info.dtype in DTYPES and output.dtype in DTYPES:
            operand = {owner: self._operand(checkpoint, name)}
            fused = (Settings("linear", {owner: 1.0}), Fused(task_vectors=False))
            if self._merged(recipe, name, fused, None, operand, output, writer):
                return

        from automerge.merging.apply import convert

        writer.write(name, convert(name, _label(owner), checkpoint.read(name), recipe.dtype))

    def _merged(
        self,
        recipe: Recipe,
        name: str,
        fused: tuple[Settings, Fused],
        base: Operand | None,
        sources: Mapping[str, Operand | None],
        info: TensorInfo,
        writer: CheckpointWriter,
    ) -> bool:
        """Merge by the kernels; False where they cannot, or where torch has to say what is wrong with the values."""
        operands = {source: operand for source, operand in sources.items() if operand is not None}
        settings, description = fused
        if self._kernels is None or len(operands) < len(sources) or (description.task_vectors and base is None):
            return False
        item = ITEM_BYTES[info.dtype]
        merge = ElementwiseMerge(
            self._kernels,
            name,
            settings,
            description,
            seed=recipe.seed,
            base=base,
            sources=operands,
            output_dtype=info.dtype,
            count=info.numel,
        )

        def write(first: int, count: int, scratch: Scratch) -> None:
            writer.write_part(name, first * item, scratch.output.view(count * item))

        if not info.numel:
            writer.write_part(name, 0, memoryview(b""))
            return True
        return merge.run(self._workers, lambda first, count, scratch: scratch.output.address, write)

    def _merged_by_torch(
        self,
        recipe: Recipe,
        step: Step,
        fused: tuple[Settings, Fused],
        base: tuple[Checkpoint, str] | None,
        sources: Mapping[str, tuple[Checkpoint, str]],
        writer: CheckpointWriter,
    ) -> bool:
        """Merge on the device; False where `merge_tensor` has to say what is wrong with the values."""
        import torch

        from automerge.merging.device import DeviceMerge, Outbox, Transfers

        if self._transfers is None:
            self._transfers = Transfers(torch.device(self._device), self._workers)
        read: list[torch.Tensor] = []

        def operand(checkpoint: Checkpoint, name: str) -> Operand:
            found = self._operand(checkpoint, name)
            if found is None:
                read.append(checkpoint.read(name))  # held until the end
                return InMemory(read[-1].data_ptr(), checkpoint.tensors[name].dtype)
            return found

        item = ITEM_BYTES[step.info.dtype]

        def write(first: int, content: memoryview) -> None:
            writer.write_part(step.name, first * item, content)

        if not step.info.numel:
            write(0, memoryview(b""))
            return True
        with self._memory_explained(step.name):
            outbox = Outbox(self._transfers, write)
            merge = DeviceMerge(
                self._transfers,
                step.name,
                *fused,
                seed=recipe.seed,
                base=operand(*base) if base is not None and fused[1].task_vectors else None,
                sources={source: operand(*each) for source, each in sources.items()},
                output_dtype=step.info.torch_dtype,
                count=step.info.numel,
            )
            if not merge.run(outbox.put):
                return False
            outbox.flush()
        return True

    @contextmanager
    def _memory_explained(self, tensor: str) -> Iterator[None]:
        import torch

        from automerge.merging.device import memory_explained

        with memory_explained(tensor, torch.device(self._device)):
            yield

    def _operand(self, checkpoint: Checkpoint, name: str) -> Operand | None:
        extent = checkpoint.extent(name)
        if extent is None:
            return None
        what = f"{extent.file}: tensor {name!r}"
        return InFile(self._open(extent.file), extent.begin, checkpoint.tensors[name].dtype, what)

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(
                    f"{file}: cannot be opened ({error.strerror or error})",
                    "check the file, and the limit of open files (ulimit -n)",
                ) from None
            self._stack.callback(os.close, descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the system then reads further ahead
            self._descriptors[file] = descriptor
        return self._descriptors[file]

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


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
    if expected and checkpoint.digest() != expected:
        raise MergeError(
            f"{owner}: the checkpoint {checkpoint.path} is not the one of the recipe "
            f"(digest {checkpoint.digest()[:12]}..., expected {expected[:12]}...)",
            "pass the checkpoint that the recipe was made with",
        )


def _label(owner: str) -> str:
    return "base" if owner == BASE else f"source {owner!r}"


def _silent(name: str, done: int, total: int) -> None:
    pass

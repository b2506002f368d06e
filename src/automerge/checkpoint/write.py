"""Writing a checkpoint tensor by tensor: bounded memory, any order of arrival, all or nothing.

Shards, headers and offsets follow from the names, dtypes and shapes alone, so every tensor has its place before the
first arrives, and the bytes do not depend on the order in which they do. Nothing has its final name before everything
is written and flushed to disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from automerge.checkpoint.info import ITEM_BYTES, TAG_OF_DTYPE, TensorInfo, info_of
from automerge.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from automerge.documents import write_atomically
from automerge.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    import torch

# As the transformers library shards by default since version 5: large enough to be few, small enough to move.
MAX_SHARD_BYTES = 50_000_000_000

_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_TEMPORARY = re.compile(r"\.model(-\d{5}-of-\d{5})?\.safetensors\.\w+\.tmp")


@dataclass(frozen=True)
class _Shard:
    """One file of the plan: its header's bytes and where each tensor begins."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


class CheckpointWriter:
    """Writes ``model.safetensors``, or shards with ``model.safetensors.index.json`` where one file is too large.

    Use as a context manager; leaving it without :meth:`commit` removes everything that was written::

        with CheckpointWriter(folder, infos) as writer:
            for name in infos:
                writer.write(name, tensor_of(name))
            writer.commit()

    Args:
        folder: where the files go; made when it is not there. A checkpoint that an earlier writer left there is
            replaced by the commit.
        infos: dtype and shape of every tensor, by name.
        max_shard_bytes: most bytes of tensor data in a file; a larger tensor has a file of its own.
        metadata: strings for the header of every file; ``format: pt`` is added.

    Raises:
        CheckpointError: there is nothing to write, or a dtype cannot be stored.
        StorageError: the folder cannot be written, or the disk has no room for the whole checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        infos: Mapping[str, TensorInfo],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._infos = {name: infos[name] for name in sorted(infos)}
        self._shards = _plan(folder, self._infos, max_shard_bytes, {**(metadata or {}), "format": "pt"})
        self._place = {
            name: (index, at) for index, shard in enumerate(self._shards) for name, at in shard.offsets.items()
        }
        self._arrived: dict[str, int] = {}
        self._lock = threading.Lock()
        # The system lets one thread at a time write to a file, and the others spin: here they sleep.
        self._turns = [threading.Lock() for _ in self._shards]
        self._descriptors: list[int] = []
        self._temporaries: list[Path] = []
        self._done = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            for shard in self._shards:
                descriptor, temporary = tempfile.mkstemp(prefix=f".{shard.name}.", suffix=".tmp", dir=folder)
                self._descriptors.append(descriptor)
                self._temporaries.append(Path(temporary))
                # The lock says that this writer lives: a later one removes the files of those that were killed.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _reserve(descriptor, shard.size)
                _write_at(descriptor, memoryview(shard.header), 0)
        except OSError as error:
            self.abort()
            raise self._storage_error(error) from None
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of any device and strides, into its place; safe to call from several threads.

        Raises:
            CheckpointError: the tensor was not announced, is not as announced, or was written already.
            StorageError: the disk is full or fails.
        """
        import torch

        if name not in self._infos:
            raise CheckpointError(f"{self._folder}: tensor {name!r} was not announced to the writer")
        expected, found = self._infos[name], info_of(tensor)
        if found != expected:
            raise CheckpointError(
                f"{self._folder}: tensor {name!r} is {found.dtype} {list(found.shape)}, "
                f"expected {expected.dtype} {list(expected.shape)}"
            )
        if not tensor.numel():
            self.write_part(name, 0, memoryview(b""))
            return
        flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
        self.write_part(name, 0, flat.view(torch.uint8).numpy().data)

    def write_part(self, name: str, start: int, content: memoryview) -> None:
        """Write some bytes of one tensor, from its byte ``start``; safe to call from several threads.

        Every byte of a tensor is to be written once; only their number is checked.

        Raises:
            CheckpointError: the tensor was not announced, or more of it than announced was written.
            StorageError: the disk is full or fails.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self._folder}: tensor {name!r} was not announced to the writer")
        size = self._infos[name].nbytes
        with self._lock:
            if self._done:
                raise CheckpointError(f"{self._folder}: the writer of tensor {name!r} is closed")
            before = self._arrived.get(name, -1)
            if before == size or start + content.nbytes > size or max(before, 0) + content.nbytes > size:
                raise CheckpointError(f"{self._folder}: tensor {name!r} was written twice")
            self._arrived[name] = max(before, 0) + content.nbytes
        index, at = self._place[name]
        try:
            with self._turns[index]:
                _write_at(self._descriptors[index], content, at + start)
        except OSError as error:
            # Not removed before the end of the context: other threads may still write.
            raise self._storage_error(error) from None

    def commit(self) -> list[Path]:
        """Flush everything to disk and give the files their names, the index last; returns the weight files.

        Raises:
            CheckpointError: a tensor has not arrived.
            StorageError: the disk is full or fails.
        """
        if self._done:
            raise CheckpointError(f"{self._folder}: the writer is closed")
        missing = [name for name, info in self._infos.items() if self._arrived.get(name, -1) != info.nbytes]
        if missing:
            self.abort()
            shown = ", ".join(missing[:10])
            raise CheckpointError(f"{self._folder}: {len(missing)} tensors were never written: {shown}")
        files = [self._folder / shard.name for shard in self._shards]
        try:
            for descriptor in self._descriptors:
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            # Without its index an old sharded checkpoint is no checkpoint, so no reader sees a mixture of two. An old
            # single file is what a reader takes first: it stays until the new shards are complete.
            if len(files) > 1:
                (self._folder / INDEX_FILE).unlink(missing_ok=True)
            for temporary, file in zip(self._temporaries, files, strict=True):
                temporary.replace(file)
            if len(files) > 1:
                write_atomically(self._folder / INDEX_FILE, self._index())
            else:
                (self._folder / INDEX_FILE).unlink(missing_ok=True)
            for entry in sorted(self._folder.iterdir()):
                if _OURS.fullmatch(entry.name) and entry not in files:
                    entry.unlink()
            _sync_folder(self._folder)
        except OSError as error:
            self.abort()
            raise self._storage_error(error) from None
        self._close()
        return files

    def abort(self) -> None:
        """Remove everything that was written and not committed."""
        self._close()
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.abort()

    def _close(self) -> None:
        with self._lock:
            self._done = True
            descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)

    def _index(self) -> bytes:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self._infos.values())},
            "weight_map": {name: self._shards[self._place[name][0]].name for name in self._infos},
        }
        return (json.dumps(index, indent=2) + "\n").encode()

    def _storage_error(self, error: OSError) -> StorageError:
        needed = sum(shard.size for shard in self._shards)
        if error.errno == errno.EMFILE:
            return StorageError(
                f"{self._folder}: {len(self._shards)} files cannot be open at once ({error.strerror})",
                "choose larger shards, or raise the limit of open files (ulimit -n)",
            )
        return StorageError(
            f"{self._folder}: the checkpoint cannot be written ({error.strerror or error})",
            f"it needs {needed} bytes in a folder that can be written",
        )


def _plan(
    folder: Path, infos: Mapping[str, TensorInfo], max_shard_bytes: int, metadata: dict[str, str]
) -> list[_Shard]:
    """Fill shards in the order of names."""
    if not infos:
        raise CheckpointError(f"{folder}: a checkpoint without tensors cannot be written")
    if max_shard_bytes <= 0:
        raise CheckpointError(f"{folder}: the largest shard must have some bytes, not {max_shard_bytes}")
    for name, info in infos.items():
        if info.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{folder}: tensor {name!r} has the dtype {info.dtype}, not one of safetensors")
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
    names = (
        [SINGLE_FILE]
        if len(groups) == 1
        else [f"model-{index:05d}-of-{len(groups):05d}.safetensors" for index in range(1, len(groups) + 1)]
    )
    return [
        _shard(name, {tensor: infos[tensor] for tensor in group}, metadata)
        for name, group in zip(names, groups, strict=True)
    ]


def _shard(name: str, infos: Mapping[str, TensorInfo], metadata: dict[str, str]) -> _Shard:
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begins: dict[str, int] = {}
    position = 0
    # Wide elements first, as the reference implementation does: then every tensor is aligned to its element.
    for tensor in sorted(infos, key=lambda tensor: (-ITEM_BYTES[infos[tensor].dtype], tensor)):
        info = infos[tensor]
        begins[tensor] = position
        header[tensor] = {
            "dtype": TAG_OF_DTYPE[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    offsets = {tensor: len(content) + begin for tensor, begin in begins.items()}
    return _Shard(name, content, offsets, len(content) + position)


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk now: a full disk shows before the work, not after it."""
    os.posix_fallocate(descriptor, 0, size)


def _write_at(descriptor: int, content: memoryview, at: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written


def _remove_leftovers(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        if not _TEMPORARY.fullmatch(entry.name):
            continue
        with suppress(OSError), entry.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

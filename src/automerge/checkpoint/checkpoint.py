"""What a checkpoint is, whatever its format: names, dtypes and shapes at once, each tensor's data when it is read."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from automerge.checkpoint.digest import checkpoint_digest, sha256_file
from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.layout import Layout
from automerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Extent:
    """Where the bytes of a tensor lie: row-major and little-endian, without gaps."""

    file: Path
    begin: int
    nbytes: int


class Checkpoint(ABC):
    """The weights of a model on disk, opened lazily. Also a context manager that closes itself.

    Attributes:
        path: the file or folder that was opened.
        files: the weight files, sorted by name.
        tensors: dtype and shape by name, in sorted name order, aliases included.
        aliases: names that are the same tensor (storage, offset, shape, strides) as another, by name, with the
            canonical name: the first in sorted order. Empty for safetensors, which stores such a tensor once.
    """

    def __init__(self, path: Path, folder: Path, layout: Layout) -> None:
        self.path = path
        self.files = [folder / file for file in layout.files]
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._names = layout.files
        self._stamps = [_stamp(file) for file in self.files]
        self._digest: str | None = None
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor: on the CPU, contiguous, of the dtype it is stored in; safe to call from several threads.

        The tensor may be a private view of the memory-mapped file: copy it before changing it in place.

        Raises:
            CheckpointError: there is no such tensor, or its data cannot be read.
            ValueError: the checkpoint is closed.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}", "use a name from its `tensors`")
        return self._read(name).contiguous()

    def extent(self, name: str) -> Extent | None:
        """Where a tensor's bytes lie on disk, for readers that need no tensor; None where only `read` gives them."""
        return None

    def digest(self) -> str:
        """sha256 (hex) of the file, or of the sorted lines ``<sha256>  <name>`` of several; computed once.

        Raises:
            CheckpointError: a file cannot be read or was changed since the checkpoint was opened.
        """
        if self._digest is None:
            with ThreadPoolExecutor(max_workers=min(4, len(self.files))) as pool:
                digests = dict(zip(self._names, pool.map(sha256_file, self.files), strict=True))
            for file, stamp in zip(self.files, self._stamps, strict=True):
                if _stamp(file) != stamp:
                    raise CheckpointError(f"{file}: changed while it was open", "run again when nothing writes to it")
            self._digest = checkpoint_digest(digests)
        return self._digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    @abstractmethod
    def close(self) -> None:
        """Forget the open files; tensors that were read stay valid."""


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})", "check the path") from None
    return status.st_ino, status.st_size, status.st_mtime_ns

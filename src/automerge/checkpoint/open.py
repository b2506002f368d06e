"""Checkpoints are opened lazily: names, dtypes and shapes at once, each tensor's data when it is read."""

from __future__ import annotations

import pickle
import re
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from automerge.checkpoint.digest import checkpoint_digest, sha256_file
from automerge.checkpoint.header import read_header
from automerge.checkpoint.info import ITEM_BYTES, TensorInfo, info_of
from automerge.checkpoint.layout import Layout, check_index, find_layout, kind_of
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


def open_checkpoint(path: Path, base: Checkpoint | None = None) -> Checkpoint:
    """Open a weight file or a folder of weights; see :func:`~automerge.checkpoint.layout.find_layout` for folders.

    PyTorch files hold a state dict, bare or under ``state_dict`` or ``model``, and are only ever read with
    ``weights_only=True``: code in a pickle is refused, never run.

    Args:
        path: the file or folder.
        base: what a LoRA adapter was trained on; not used for the weights of a model.

    Raises:
        CheckpointError: there are no weights, it is not clear which files they are, or a file is damaged, unsafe or
            of an unknown format; an adapter without a base.
    """
    if path.is_dir():
        folder = path
        names = {entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()}
        layout = find_layout(names, lambda name: (path / name).read_bytes(), str(path))
    elif path.is_file():
        folder = path.parent
        layout = Layout(kind_of(path.name, str(path)), (path.name,))
    else:
        raise CheckpointError(f"{path}: no such file or folder", "check the path")
    return open_layout(path, folder, layout, base)


def open_layout(path: Path, folder: Path, layout: Layout, base: Checkpoint | None = None) -> Checkpoint:
    """Open the files of a layout; see :func:`open_checkpoint`."""
    checkpoint: Checkpoint
    if layout.is_adapter:
        from automerge.checkpoint.adapter import Adapter  # which is a Checkpoint, and so imports this module

        if base is None:
            raise CheckpointError(f"{path}: a LoRA adapter, which means nothing without its base", "name the base")
        checkpoint = Adapter(path, folder, layout, base)
    else:
        checkpoint = (_Safetensors if layout.kind == "safetensors" else _Torch)(path, folder, layout)
    if not checkpoint.tensors:
        raise CheckpointError(f"{path}: holds no tensors", "pass the weights of a model")
    return checkpoint


class _Safetensors(Checkpoint):
    """One or several safetensors files."""

    def __init__(self, path: Path, folder: Path, layout: Layout) -> None:
        super().__init__(path, folder, layout)
        headers = {name: read_header(file) for name, file in zip(layout.files, self.files, strict=True)}
        check_index(layout, {name: header.tensors for name, header in headers.items()}, str(path))
        self._file_of = {tensor: name for name, header in headers.items() for tensor in header.tensors}
        self.tensors = {tensor: headers[self._file_of[tensor]].tensors[tensor] for tensor in sorted(self._file_of)}
        self._extents = {
            tensor: Extent(folder / name, begin, end - begin)
            for name, header in headers.items()
            for tensor, (begin, end) in header.offsets.items()
        }
        self._folder = folder
        self._handles: dict[str, Any] | None = {}

    def extent(self, name: str) -> Extent | None:
        return self._extents[name]

    def _read(self, name: str) -> torch.Tensor:
        import safetensors

        file = self._file_of[name]
        try:
            with self._lock:
                if self._handles is None:
                    raise ValueError(f"{self.path} is closed")
                if file not in self._handles:
                    self._handles[file] = safetensors.safe_open(self._folder / file, framework="pt", device="cpu")
                handle = self._handles[file]
            tensor: torch.Tensor = handle.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file}: tensor {name!r} cannot be read ({error})", _GET) from None
        return tensor

    def close(self) -> None:
        with self._lock:
            self._handles = None


class _Torch(Checkpoint):
    """One or several PyTorch files, memory-mapped where their format allows."""

    def __init__(self, path: Path, folder: Path, layout: Layout) -> None:
        super().__init__(path, folder, layout)
        states = {name: _load_state_dict(file) for name, file in zip(layout.files, self.files, strict=True)}
        check_index(layout, states, str(path))
        merged = {tensor: value for state in states.values() for tensor, value in state.items()}
        self._state: dict[str, torch.Tensor] | None = {tensor: merged[tensor] for tensor in sorted(merged)}
        canonical: dict[tuple[Any, ...], str] = {}
        for name, tensor in self._state.items():
            self.tensors[name] = info_of(tensor)
            if tensor.numel():
                key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                first = canonical.setdefault(key, name)
                if first != name:
                    self.aliases[name] = first

    def _read(self, name: str) -> torch.Tensor:
        if self._state is None:
            raise ValueError(f"{self.path} is closed")
        return self._state[name]

    def close(self) -> None:
        self._state = None


_GET = "get the checkpoint again from where it came"
_CONVERT = "save the plain state dict as safetensors where you trust it"


def _load_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of one PyTorch file, checked entry by entry."""

    def fail(problem: str, remedy: str = _CONVERT) -> NoReturn:
        raise CheckpointError(f"{file}: {problem}", remedy)

    import torch

    value = _load(file)
    if not isinstance(value, dict):
        fail(f"holds a {type(value).__name__}, not a state dict")
    wrapped = [key for key in ("state_dict", "model") if isinstance(value.get(key), dict)]
    if len(wrapped) > 1:
        fail("has both 'state_dict' and 'model', so it is not clear which are the weights")
    state: Mapping[Any, Any] = value[wrapped[0]] if wrapped else value

    others = [
        f"{_shown(key)} ({type(entry).__name__})"
        for key, entry in state.items()
        if not isinstance(key, str) or not key.isprintable() or not isinstance(entry, torch.Tensor)
    ]
    if others:
        shown = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
        fail(f"{len(others)} entries of the state dict are not named tensors: {shown}")
    size = file.stat().st_size
    for name, tensor in state.items():
        dtype = info_of(tensor).dtype
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            fail(f"tensor {name} is sparse, quantised or has no data")
        if dtype not in ITEM_BYTES:
            fail(f"tensor {name} has the dtype {dtype}", f"supported are {', '.join(ITEM_BYTES)}")
        # Strides of 0 can claim any size: such a tensor would fill the memory when it is read.
        if tensor.numel() * tensor.element_size() > size:
            fail(f"tensor {name} unpacks to {tensor.numel() * tensor.element_size()} bytes, the file has {size}")
    return {name: tensor.detach() for name, tensor in state.items()}


def _shown(key: Any) -> str:
    if isinstance(key, str):
        return key if key.isprintable() else repr(key)
    # Nothing else is printed: a nested tuple of a few bytes can have a text of any length.
    return str(key) if isinstance(key, int) and key.bit_length() < 64 else f"<{type(key).__name__}>"


def _load(file: Path) -> Any:
    """torch.load of an untrusted file: weights only, and every failure as one sentence."""
    import torch

    try:
        with file.open("rb") as opened:
            is_zip = opened.read(4) == b"PK\x03\x04"
        if is_zip:
            # PyTorch stores its records uncompressed; a compressed one could unpack to any size.
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"{file}: has compressed records, as torch.save never writes them", _CONVERT)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})", "check the path") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            problem = f"refused: its pickle asks for {found.group(1)}, which is more than tensors and could run code"
            raise CheckpointError(f"{file}: {problem}", _CONVERT) from None
        raise _damaged(file, error) from None
    except Exception as error:  # noqa: BLE001 - a damaged file can make the unpickler raise anything
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(f"{file}: not a readable PyTorch file ({lines[0][:200]})", _GET)


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})", "check the path") from None
    return status.st_ino, status.st_size, status.st_mtime_ns

"""Checkpoints in safetensors and in PyTorch files. No pickle is ever executed."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from automerge.checkpoint.checkpoint import Checkpoint, Extent
from automerge.checkpoint.header import read_header
from automerge.checkpoint.info import ITEM_BYTES, info_of
from automerge.checkpoint.layout import Layout, check_index
from automerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def open_files(path: Path, folder: Path, layout: Layout) -> Checkpoint:
    """Open the files of a layout that is no adapter's.

    Args:
        path: what the user named, for errors.
        folder: where the files are.
        layout: which they are.

    Raises:
        CheckpointError: a file is damaged, unsafe or of an unknown format, or there are no tensors.
    """
    checkpoint = (Safetensors if layout.kind == "safetensors" else TorchFiles)(path, folder, layout)
    if not checkpoint.tensors:
        raise CheckpointError(f"{path}: holds no tensors", "pass the weights of a model")
    return checkpoint


class Safetensors(Checkpoint):
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


class TorchFiles(Checkpoint):
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

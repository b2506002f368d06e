"""Which files of a folder, local or remote, are the weights of a checkpoint."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, NoReturn

from automerge.checkpoint.header import decode_object
from automerge.errors import CheckpointError

Kind = Literal["safetensors", "torch"]

#: The names that are written, and the first ones looked for.
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: The two files of a PEFT adapter; its weights may be a PyTorch file instead.
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_TORCH_SINGLE_FILE = "pytorch_model.bin"
_TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
_KINDS: dict[str, Kind] = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch"}


@dataclass(frozen=True)
class Layout:
    """The weight files of one checkpoint.

    Attributes:
        kind: the format of all the files.
        files: their names relative to the folder, sorted; those of an adapter begin with its configuration.
        weight_map: the index's file by tensor name; None without an index.
    """

    kind: Kind
    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether they are a LoRA adapter's, which means nothing without its base."""
        return ADAPTER_CONFIG in self.files


def is_adapter(names: Collection[str]) -> bool:
    """Whether a folder with these files holds a LoRA adapter in PEFT's format, and not the weights of a model."""
    return any(name in names for name in _ADAPTER_FILES)


def kind_of(name: str, where: str) -> Kind:
    """The format of a weight file by its suffix.

    Raises:
        CheckpointError: the suffix is not one of a weight file, or it is an adapter's, which is a folder.
    """
    if PurePosixPath(name).name in _ADAPTER_FILES:
        raise CheckpointError(
            f"{where}: the weights of an adapter, which mean nothing without {ADAPTER_CONFIG}", "pass its folder"
        )
    kind = _KINDS.get(PurePosixPath(name).suffix)
    if kind is None:
        raise CheckpointError(f"{where}: not a weight file", f"pass a file that ends in {', '.join(_KINDS)}")
    return kind


def find_layout(names: Collection[str], read: Callable[[str], bytes], where: str) -> Layout:
    """Find the weight files among the files of a folder.

    Those of a LoRA adapter, if there is one. Else in this order: ``model.safetensors``; the shards of
    ``model.safetensors.index.json``; ``pytorch_model.bin``; the shards of ``pytorch_model.bin.index.json``; the only
    ``.safetensors`` file; the only ``.pt``, ``.pth`` or ``.bin`` file.

    Args:
        names: names relative to the folder of all files in it.
        read: reads the whole of one of them; called for an index only.
        where: names the folder in errors.

    Raises:
        CheckpointError: there are no weights, it is not clear which files they are, or the index is invalid, names a
            file outside the folder or one that is not there; or an adapter is not whole.
    """
    if is_adapter(names):
        return _adapter(names, where)
    if SINGLE_FILE in names:
        return Layout("safetensors", (SINGLE_FILE,))
    if INDEX_FILE in names:
        return _sharded("safetensors", names, read(INDEX_FILE), f"{where}/{INDEX_FILE}")
    if _TORCH_SINGLE_FILE in names:
        return Layout("torch", (_TORCH_SINGLE_FILE,))
    if _TORCH_INDEX_FILE in names:
        return _sharded("torch", names, read(_TORCH_INDEX_FILE), f"{where}/{_TORCH_INDEX_FILE}")
    flat = sorted(name for name in names if "/" not in name and not name.startswith("."))
    for kind in ("safetensors", "torch"):
        found = [name for name in flat if _KINDS.get(PurePosixPath(name).suffix) == kind]
        if len(found) == 1:
            return Layout(kind, (found[0],))
        if found:
            raise CheckpointError(
                f"{where}: {len(found)} {kind} files and no index that says which belong together "
                f"({', '.join(found[:10])})",
                f"pass one file, or add {INDEX_FILE}",
            )
    raise CheckpointError(f"{where}: no weights in this folder", f"pass a folder with {SINGLE_FILE}, or a weight file")


def check_index(layout: Layout, tensors: Mapping[str, Collection[str]], where: str) -> None:
    """Check that every file has exactly the tensors that the index says, and none is in two files.

    Args:
        layout: the layout with the index.
        tensors: names of the tensors that are in each file.
        where: names the checkpoint in errors.

    Raises:
        CheckpointError: the index and the files contradict each other.
    """
    if layout.weight_map is None:
        return
    for name, file in layout.weight_map.items():
        if name not in tensors[file]:
            raise CheckpointError(f"{where}: the index promises tensor {name!r}, which is not in {file}", _GET)
    for file in layout.files:
        for name in tensors[file]:
            if layout.weight_map.get(name) != file:
                raise CheckpointError(f"{where}: {file} has tensor {name!r}, which the index does not list there", _GET)


_GET = "get the checkpoint again from where it came"


def _adapter(names: Collection[str], where: str) -> Layout:
    if ADAPTER_CONFIG not in names:
        raise CheckpointError(f"{where}: holds the weights of an adapter and no {ADAPTER_CONFIG}", _GET)
    full = [name for name in (SINGLE_FILE, INDEX_FILE, _TORCH_SINGLE_FILE, _TORCH_INDEX_FILE) if name in names]
    if full:
        raise CheckpointError(
            f"{where}: holds both the weights of a model ({full[0]}) and an adapter, so it is not clear which is meant",
            "pass a folder with one of them",
        )
    weights = next(name for name in _ADAPTER_FILES if name in names)
    return Layout(_KINDS[PurePosixPath(weights).suffix], (ADAPTER_CONFIG, weights))


def _sharded(kind: Kind, names: Collection[str], text: bytes, where: str) -> Layout:
    def fail(problem: str) -> NoReturn:
        raise CheckpointError(f"{where}: {problem}", _GET)

    try:
        index = decode_object(text)
    except ValueError as error:
        fail(f"the index cannot be decoded: {error}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail("the index has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file) or _KINDS.get(PurePosixPath(file).suffix) != kind:
            fail(f"tensor {name!r} is said to be in {file!r}, which is not the name of a {kind} file in the folder")
    files = tuple(sorted(set(weight_map.values())))
    absent = [file for file in files if file not in names]
    if absent:
        shown = ", ".join(absent[:10])
        fail(f"{len(absent)} of {len(files)} files of the index {'is' if len(absent) == 1 else 'are'} missing: {shown}")
    return Layout(kind, files, weight_map)


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in parts)

"""Statistics from validation data: what some techniques know of each source, and what recalibration found.

One safetensors file, ``statistics.safetensors``, beside the recipe that names its sha256; with it the recipe is applied
without any data. Its keys:

``fisher/<source>/<tensor>``
    float32, shape of the tensor: the diagonal of the source's Fisher information on the data of its own tasks, divided
    by the L2 norm of the whole diagonal over all merged tensors, so that the sources' have one scale.
``gram/<source>/<tensor>``
    float32 [n, n], for the weight [out, ...] of an ``nn.Linear``, or of an ungrouped 2-D convolution with explicit zero
    padding, with n inputs (a convolution's patch, flattened as its weight is): the mean of x x' over what the layer of
    the source was given on those data. No other layer has any.
``recalibrated/<tensor>``
    float64: the mean or the variance of a BatchNorm layer's input in the merged model.

A tensor has a kind for all sources or for none. `automerge.searching.gathering` and `automerge.searching.recalibration`
make them; here is the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from automerge.checkpoint.digest import sha256_file
from automerge.checkpoint.header import read_header
from automerge.checkpoint.info import TensorInfo, info_of
from automerge.checkpoint.open import open_checkpoint
from automerge.checkpoint.write import CheckpointWriter
from automerge.errors import CheckpointError, MergeError, StorageError
from automerge.merging.recipe import Recipe, RecipeBlock
from automerge.merging.technique import Statistic

if TYPE_CHECKING:
    import torch

_RECALIBRATED = "recalibrated/"


def statistic_key(kind: Statistic, source: str, tensor: str) -> str:
    """The key of one source's statistics of one tensor."""
    return f"{kind}/{source}/{tensor}"


def recalibrated_key(tensor: str) -> str:
    """The key of a recalibrated buffer."""
    return f"{_RECALIBRATED}{tensor}"


class Statistics:
    """Statistics by key, read when they are asked for. A context manager that closes the file; see `open`.

    Args:
        infos: dtype and shape by key.
        read: the tensor of a key; not to be changed.
        where: names them in errors.
        digest: sha256 (hex) of the file; empty for statistics that are in no file.
        metadata: the file's free strings.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        read: Callable[[str], torch.Tensor],
        *,
        where: str = "statistics",
        digest: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.infos = dict(infos)
        self.where = where
        self.digest = digest
        self.metadata = dict(metadata or {})
        # A source's name has no slash; a tensor's may.
        self._owners = {tuple(key.split("/", 2)[:2]) for key in self.infos}
        self._read = read
        self._close: Callable[[], None] = lambda: None

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Statistics in memory, by key."""
        return cls({key: info_of(tensor) for key, tensor in tensors.items()}, tensors.__getitem__)

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> Self:
        """Open a statistics file; its tensors are read one by one.

        Args:
            path: the file.
            digest: the sha256 that it must have.

        Raises:
            MergeError: the file is not there, or is another one than the digest says.
            CheckpointError: it is damaged.
        """
        if not path.is_file():
            raise MergeError(
                f"{path}: the recipe needs this statistics file, and it is not there",
                "put the file that the search wrote beside the recipe",
            )
        found = sha256_file(path)
        if digest is not None and found != digest:
            raise MergeError(
                f"{path}: is not the statistics file of the recipe (sha256 {found[:12]}..., expected {digest[:12]}...)",
                "put the file that the search wrote with this recipe beside it",
            )
        metadata = read_header(path).metadata
        checkpoint = open_checkpoint(path)
        opened = cls(checkpoint.tensors, checkpoint.read, where=str(path), digest=found, metadata=metadata)
        opened._close = checkpoint.close
        return opened

    def close(self) -> None:
        """Forget the open file; tensors that were read stay valid."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resident(self, device: torch.device | str) -> Statistics:
        """The same, with every tensor in the memory of a device."""
        tensors = {key: self._read(key).to(device) for key in self.infos}
        return Statistics(self.infos, tensors.__getitem__, where=self.where, digest=self.digest, metadata=self.metadata)

    def read(self, key: str) -> torch.Tensor:
        """One tensor, as it is stored.

        Raises:
            MergeError: there is none of that key.
        """
        if key not in self.infos:
            raise MergeError(f"{self.where}: there is no {key!r}", "search again in a new folder")
        return self._read(key)

    def of(
        self, tensor: str, sources: Sequence[str], kinds: Sequence[Statistic], like: torch.Tensor
    ) -> dict[Statistic, list[torch.Tensor]]:
        """The statistics of one tensor for `TensorInputs`: by kind, one per source; absent where it has none.

        Args:
            tensor: its name.
            sources: the sources, in order.
            kinds: the kinds wanted.
            like: a source's tensor, whose device and dtype they get.

        Raises:
            MergeError: there are none of a kind and source for any tensor, a shape does not fit the tensor, or a source
                lacks what another has.
        """
        found: dict[Statistic, list[torch.Tensor]] = {}
        for kind in kinds:
            without = [source for source in sources if (kind, source) not in self._owners]
            if without:
                raise MergeError(
                    f"{self.where}: has no {kind!r} statistics of source {without[0]!r}", "search again in a new folder"
                )
            keys = [statistic_key(kind, source, tensor) for source in sources]
            present = [key for key in keys if key in self.infos]
            if not present:
                continue
            shape = tuple(like.shape)
            if kind == "gram":
                inputs = like[0].numel() if like.dim() and len(like) else 0
                shape = (inputs, inputs)
            for key in keys:
                if key not in self.infos or self.infos[key].shape != shape:
                    had = list(self.infos[key].shape) if key in self.infos else "nothing"
                    raise MergeError(
                        f"{self.where}: has {had} under {key!r}, expected {list(shape)}", "search again in a new folder"
                    )
            found[kind] = [self._read(key).to(like.device, like.dtype) for key in keys]
        return found

    def recalibrated(self, tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The recalibrated value of a buffer: float64.

        Raises:
            MergeError: there is none, or of another shape.
        """
        value = self.read(recalibrated_key(tensor))
        if tuple(value.shape) != shape:
            raise MergeError(
                f"{self.where}: the recalibrated {tensor!r} has the shape {list(value.shape)}, expected {list(shape)}",
                "search again in a new folder",
            )
        return value

    def gathered(self) -> list[str]:
        """The keys of what was gathered from the sources: all but the recalibrated buffers."""
        return sorted(key for key in self.infos if not key.startswith(_RECALIBRATED))

    def gathered_digest(self) -> str:
        """sha256 (hex) of the keys, dtypes, shapes and bytes of what was gathered, whatever else the file holds."""
        import torch

        hasher = hashlib.sha256()
        for key in self.gathered():
            tensor = self._read(key).cpu().contiguous()
            hasher.update(f"{key} {tensor.dtype} {list(tensor.shape)};".encode())
            hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()


def required(statistics: Statistics | None, block: RecipeBlock) -> Statistics:
    """The statistics, where a block cannot do without.

    Raises:
        MergeError: there are none.
    """
    if statistics is None:
        raise MergeError(
            f"block {block.name!r}: its technique {block.technique!r} or its recalibrated buffers need statistics, and "
            "there are none",
            "pass the statistics file that was written with the recipe",
        )
    return statistics


def check_statistics(recipe: Recipe, statistics: Statistics | None) -> None:
    """Check, before anything is merged, that the statistics are those of the recipe.

    Raises:
        MergeError: the recipe names a file and none or another one was passed, or it needs one and there is none.
    """
    if recipe.statistics is not None and (statistics is None or statistics.digest != recipe.statistics):
        found = "none was passed" if statistics is None else f"{statistics.where} is another one"
        raise MergeError(
            f"the recipe needs the statistics file of sha256 {recipe.statistics[:12]}..., and {found}",
            "pass the file that was written with the recipe",
        )
    if recipe.statistics is None and recipe.needs_statistics:
        raise MergeError(
            "a technique of the recipe, or its recalibration, needs statistics, and the recipe names no file of them",
            "take the recipe that a search wrote, or search again",
        )


def write_statistics(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a statistics file tensor by tensor, under a temporary name first; returns its sha256.

    Args:
        path: the file; an old one is replaced at the end.
        infos: dtype and shape of every tensor, by key.
        tensors: every key once, with its tensor; taken one after the other.
        metadata: strings for the header.

    Raises:
        CheckpointError: a tensor is not as announced, or missing.
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in sorted(path.parent.glob(f".{path.name}.*.tmp")):
            shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            with CheckpointWriter(Path(folder), infos, sys.maxsize, metadata) as writer:
                for key, tensor in tensors:
                    writer.write(key, tensor)
                (written,) = writer.commit()
            written.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error})", "free space, or choose another folder"
        ) from None
    return sha256_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The free strings of a statistics file; empty where there is none, or a damaged one."""
    try:
        return read_header(path).metadata if path.is_file() else {}
    except CheckpointError:
        return {}

"""What a worker elsewhere reads of a search: fetched by digest, and kept on its machine for the next search.

Below the folder that ``AUTOMERGE_CACHE`` names (else one of the user's own in the system's temporary folder) each input
of a manifest has a folder named by the digest of its files, and so have a manifest of such inputs, a segmentation, and
a file of statistics. A folder gets its name only when it is whole. Of several processes on a machine that want the same
one fetches, and the others wait for it. Nothing is ever removed: whoever gives the folder its room empties it.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from automerge import storage
from automerge.documents import digest_of, write_atomically
from automerge.errors import SearchError, StorageError
from automerge.merging.statistics import Statistics, read_metadata
from automerge.stages.documents import MANIFEST, SEGMENTATION, STATISTICS, FileRecord, Input, Manifest

CACHE_VARIABLE = "AUTOMERGE_CACHE"


@dataclass(frozen=True)
class StatisticsFile:
    """Where a worker that does not see the search's folder gets the statistics.

    Attributes:
        uri: of the file; None if it is nowhere but in the search's folder.
        sha256, bytes: of the file.
        gathered: what they were gathered from, as in the file's metadata.
    """

    uri: str | None
    sha256: str
    bytes: int
    gathered: str

    @classmethod
    def of(cls, statistics: Statistics, path: Path, uri: str | None) -> Self:
        """Of the statistics that are in a file."""
        return cls(uri, statistics.digest, path.stat().st_size, statistics.metadata["gathered"])


@dataclass(frozen=True)
class SearchFiles:
    """What the trials of a search read, in a form that travels to its workers; picklable.

    Each is used where the search has it, if a worker sees it there and it is the same; else it comes from the cache.

    Attributes:
        inputs, segmentation, folder: the folders of fetch, segment and the search.
        manifest, blocks: content of ``manifest.json`` and of ``segmentation.json``.
        statistics: None if no technique needs any.
    """

    inputs: Path
    segmentation: Path
    folder: Path
    manifest: bytes
    blocks: bytes
    statistics: StatisticsFile | None = None

    @classmethod
    def of(cls, inputs: Path, segmentation: Path, folder: Path, statistics: StatisticsFile | None = None) -> Self:
        """Of the folders of the stages."""
        return cls(
            inputs.absolute(),
            segmentation.absolute(),
            folder.absolute(),
            (inputs / MANIFEST).read_bytes(),
            (segmentation / SEGMENTATION).read_bytes(),
            statistics,
        )

    def here(self) -> tuple[Path, Path, Path]:
        """The folders of fetch, segment and the search as this machine has them; what it lacks is fetched.

        Raises:
            StorageError: an input cannot be read or is not what the search has read, or the cache cannot be written.
            SearchError: this machine has no way to the statistics.
        """
        inputs, segmentation, folder = self.inputs, self.segmentation, self.folder
        if not _holds(inputs / MANIFEST, self.manifest):
            inputs = _cached_inputs(Manifest.model_validate_json(self.manifest))
        if not _holds(segmentation / SEGMENTATION, self.blocks):
            segmentation = _cached_document("segmentation", SEGMENTATION, self.blocks)
        statistics = self.statistics
        if statistics is not None and read_metadata(folder / STATISTICS).get("gathered") != statistics.gathered:
            folder = _cached_statistics(statistics, folder / STATISTICS)
        return inputs, segmentation, folder


def cache_folder() -> Path:
    """The cache of this machine.

    Raises:
        StorageError: it cannot be made, or is another user's.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"automerge-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = not named and folder.stat().st_uid != os.getuid()
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from None
    if foreign:
        raise _unusable(folder, "it belongs to another user")
    return folder.absolute()


def _cached_inputs(manifest: Manifest) -> Path:
    """A folder whose manifest has all that trials read of the given one: everything but the test data."""
    cached = []
    for item in manifest.inputs:
        if item.role != "test":
            folder = _cached_input(item)
            item = _moved(item, f"../{folder.name}")
        cached.append(item)
    moved = manifest.model_copy(update={"inputs": cached})
    return _cached_document("inputs", MANIFEST, moved.model_dump_json(indent=2).encode())


def _cached_input(item: Input) -> Path:
    files = {_key(item, record): record for record in item.files}

    def is_whole(folder: Path) -> bool:
        return all(_has(folder / key, record.bytes) for key, record in files.items())

    def make(folder: Path) -> None:
        listing = {entry.key: entry.uri for entry in storage.list_objects(item.uri)}
        for key, record in files.items():
            if key not in listing:
                raise StorageError(
                    f"{item.uri}: has no {key!r} any more",
                    "store again what was fetched for this search, or fetch again",
                )
            storage.download(listing[key], folder / key, record.sha256)

    return _cached(f"input-{digest_of({key: record.sha256 for key, record in files.items()})}", is_whole, make)


def _cached_statistics(statistics: StatisticsFile, original: Path) -> Path:
    uri = statistics.uri
    if uri is None:
        raise SearchError(
            f"a worker does not see {original}, which the techniques of this search need",
            "set AUTOMERGE_MIRROR to a place that the search and its workers reach, or share the folder",
        )

    def is_whole(folder: Path) -> bool:
        return _has(folder / STATISTICS, statistics.bytes)

    def make(folder: Path) -> None:
        storage.download(uri, folder / STATISTICS, statistics.sha256)

    return _cached(f"statistics-{statistics.sha256}", is_whole, make)


def _cached_document(kind: str, name: str, content: bytes) -> Path:
    return _cached(
        f"{kind}-{digest_of(content.decode())}",
        lambda folder: _holds(folder / name, content),
        lambda folder: write_atomically(folder / name, content),
    )


def _cached(name: str, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """A folder of the cache.

    Args:
        name: with the digest of what is in it.
        is_whole: whether a folder has all of that; something may have cleaned up.
        make: fills a folder; it may find what an attempt that was killed has left.
    """
    place = cache_folder() / name
    if is_whole(place):
        return place
    part = place.with_name(f".{name}.part")
    try:
        with place.with_name(f".{name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it, however the process ends
            if not is_whole(place):
                shutil.rmtree(place, ignore_errors=True)
                part.mkdir(exist_ok=True)
                make(part)
                part.replace(place)
    except OSError as error:
        raise _unusable(place.parent, error.strerror or str(error)) from None
    return place


def _moved(item: Input, folder: str) -> Input:
    """An input whose files are in another folder."""

    def path(old: str) -> str:
        return folder + old.removeprefix(item.place)

    files = [FileRecord(path=path(record.path), bytes=record.bytes, sha256=record.sha256) for record in item.files]
    return item.model_copy(update={"path": path(item.path), "files": files})


def _key(item: Input, record: FileRecord) -> str:
    return record.path.removeprefix(f"{item.place}/")


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _unusable(folder: Path, reason: str) -> StorageError:
    return StorageError(
        f"{folder}: the cache cannot be used ({reason})", f"set {CACHE_VARIABLE} to a folder that can be written"
    )

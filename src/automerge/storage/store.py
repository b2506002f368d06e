"""One interface for every place where files are: a URI in, local files and errors of one kind out."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from automerge.errors import StorageError
from automerge.plugins import nearest
from automerge.storage import local, s3
from automerge.storage.objects import DownloadedFile, ObjectInfo, StoredObject
from automerge.storage.record import FetchRecord, kept_file

__all__ = [
    "DownloadedFile",
    "ObjectInfo",
    "Store",
    "StoredObject",
    "check_scheme",
    "download",
    "fetch",
    "fetch_all",
    "find_object",
    "list_objects",
    "read_object",
    "read_range",
    "schemes",
    "upload",
    "write_object",
]

# Objects fetched at a time; each large one is itself fetched in parallel parts.
_PARALLEL_OBJECTS = 4


class Store(Protocol):
    """What the module of a scheme has to offer; each raises StorageError in one sentence."""

    def list_objects(self, uri: str) -> list[ObjectInfo]: ...
    def read_range(self, uri: str, start: int, stop: int) -> bytes: ...
    def download(self, uri: str, destination: Path, sha256: str | None = None) -> DownloadedFile: ...
    def upload_file(self, path: Path, uri: str) -> ObjectInfo: ...
    def child(self, uri: str, key: str) -> str: ...
    def find_object(self, uri: str) -> ObjectInfo | None: ...
    def read_object(self, uri: str) -> StoredObject | None: ...
    def write_object(self, uri: str, content: bytes, replacing: str | None) -> str | None: ...


_STORES: dict[str, Store] = {"file": local, "s3": s3}


def list_objects(uri: str) -> list[ObjectInfo]:
    """List a file or object, or everything below a folder or prefix, sorted by key.

    Raises:
        StorageError: nothing is there, or it cannot be read.
    """
    return _store(uri).list_objects(uri)


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Read the bytes ``start`` (inclusive) to ``stop`` (exclusive) of a file or object; fewer only at its end.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    return _store(uri).read_range(uri, start, stop)


def download(uri: str, destination: Path, sha256: str | None = None) -> DownloadedFile:
    """Make one file or object the local file ``destination``, under a temporary name until it is whole and verified.

    From S3: in parallel parts, resumed where an earlier attempt stopped, skipped where the file is there already. The
    content is checked against ``sha256``, and against the digest that the store holds.

    Args:
        uri: what to get.
        destination: the file to write.
        sha256: the digest (hex) that the content must have.

    Raises:
        StorageError: it is not there, cannot be read, was replaced meanwhile, or has another digest.
    """
    return _store(uri).download(uri, destination, sha256)


def fetch(
    uri: str, folder: Path, *, record: FetchRecord | None = None, sha256: str | None = None
) -> list[DownloadedFile]:
    """Download a file or object, or everything below a folder or prefix, into a local folder by relative name.

    Args:
        uri: what to get.
        folder: where the files go.
        record: what was fetched before: an object whose etag and size are still those is not transferred again if the
            local file is whole. What is fetched is added.
        sha256: the digest (hex) that is expected of a lone object: a local file of this content is kept, whatever the
            etag. Another digest is no error here.

    Returns:
        The files, sorted by relative name.

    Raises:
        StorageError: as :func:`download`; also if a key would leave the folder.
    """
    return fetch_all(list_objects(uri), folder, record=record, sha256=sha256)


def fetch_all(
    objects: Sequence[ObjectInfo], folder: Path, *, record: FetchRecord | None = None, sha256: str | None = None
) -> list[DownloadedFile]:
    """Download what was listed into a local folder, each object by its key, several at a time; see :func:`fetch`.

    Returns:
        The files, in the order of ``objects``.

    Raises:
        StorageError: as :func:`fetch`.
    """
    for entry in objects:
        if any(part in ("", ".", "..") for part in entry.key.split("/")) or "\0" in entry.key:
            raise StorageError(f"{entry.uri}: its key {entry.key!r} is no name for a local file", "rename the object")
    pinned = sha256 if len(objects) == 1 else None

    def one(entry: ObjectInfo) -> DownloadedFile:
        destination = folder / entry.key
        found = kept_file(entry, destination, pinned) if pinned is not None else None
        if found is None and record is not None:
            found = record.find(entry, destination)
        if found is None:
            found = download(entry.uri, destination)
            if record is not None:
                record.add(found)
        return found

    with ThreadPoolExecutor(max_workers=_PARALLEL_OBJECTS) as pool:
        futures = [pool.submit(one, entry) for entry in objects]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def upload(path: Path, uri: str) -> list[ObjectInfo]:
    """Copy a file to a URI (into it if it ends in a slash), or every file of a folder below a URI.

    Returns:
        What was written; keys are relative to the URI for a folder, base names for a file.

    Raises:
        StorageError: there is nothing to upload, or it cannot be read or written.
    """
    store = _store(uri)
    if path.is_file():
        return [store.upload_file(path, uri)]
    if not path.is_dir():
        raise StorageError(f"{path}: no such file or folder", "check the path")
    keys = [entry.key for entry in local.list_objects(str(path))]
    if not keys:
        raise StorageError(f"{path}: an empty folder, nothing to upload", "check the path")
    return [_uploaded(store, path / key, uri, key) for key in keys]


def find_object(uri: str) -> ObjectInfo | None:
    """What one file or object is now; None if there is none.

    Raises:
        StorageError: the store does not answer, or does not let us look.
    """
    return _store(uri).find_object(uri)


def read_object(uri: str) -> StoredObject | None:
    """Read one small file or object whole, with the etag of what was read; None if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    return _store(uri).read_object(uri)


def write_object(uri: str, content: bytes, *, replacing: str | None) -> str | None:
    """Write one small file or object, unless somebody else has written it since one last looked.

    Of several processes that write to one place at once, one succeeds, and a reader sees the whole of the one or of the
    other. An S3 server has to know conditional writes (``If-Match``, ``If-None-Match``), as Amazon's does.

    Args:
        uri: where to.
        content: all of it.
        replacing: the etag of what shall be replaced; None: nothing is there yet.

    Returns:
        The new etag; None, and nothing is written, if what is there is something else.

    Raises:
        StorageError: it cannot be written.
    """
    return _store(uri).write_object(uri, content, replacing)


def _uploaded(store: Store, path: Path, uri: str, key: str) -> ObjectInfo:
    written = store.upload_file(path, store.child(uri, key))
    return ObjectInfo(written.uri, key, written.size, written.etag)


def check_scheme(uri: str) -> None:
    """Refuse a URI whose scheme no store knows.

    Raises:
        StorageError: it is one.
    """
    _store(uri)


def schemes() -> Sequence[str]:
    """The schemes that a URI may have; a plain path has none."""
    return sorted(_STORES)


def _store(uri: str) -> Store:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    scheme = match.group(1) if match else "file"
    if scheme not in _STORES:
        raise StorageError(f"{uri}: unknown scheme {scheme + '://'!r}", nearest(scheme, list(schemes())))
    return _STORES[scheme]

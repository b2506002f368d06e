"""What the stores return."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a store.

    Attributes:
        uri: where it is.
        key: its name relative to the URI that was listed; the base name if that was the object itself.
        size: bytes.
        etag: changes whenever the content does.
    """

    uri: str
    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class StoredObject:
    """The content of a small object, and which version of it that is.

    Attributes:
        content: all of it.
        etag: of this version; what `automerge.storage.write_object` asks for.
    """

    content: bytes
    etag: str


@dataclass(frozen=True)
class DownloadedFile:
    """One object that is now a local file.

    Attributes:
        path: the file.
        size: bytes.
        sha256: of its content (hex), computed from the file.
        uri: where it came from.
        etag: of the object when it was read, as of :class:`ObjectInfo`.
        transferred: bytes that this call fetched; less than ``size`` where a download was resumed or not needed.
    """

    path: Path
    size: int
    sha256: str
    uri: str
    etag: str
    transferred: int

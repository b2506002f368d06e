"""What was fetched from where, so that it is not fetched again: a JSON file beside the files it speaks of."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from automerge.documents import write_atomically
from automerge.storage.objects import DownloadedFile, ObjectInfo


@dataclass(frozen=True)
class _Entry:
    uri: str
    etag: str
    size: int
    sha256: str


class FetchRecord:
    """The origin, etag, size and digest of every file that was fetched below one folder; safe to call from threads.

    It only saves transfers: one that is missing or damaged is an empty one, and a file is taken for fetched only if its
    content still has the digest.

    Args:
        path: the record, in the folder. Entries go by the files' names relative to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            recorded: Any = json.loads(path.read_bytes())
            self._entries = {
                str(name): _Entry(**entry) for name, entry in recorded.items() if (path.parent / name).is_file()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            self._entries = {}

    def find(self, entry: ObjectInfo, destination: Path) -> DownloadedFile | None:
        """The file that an earlier fetch made of an object as it is listed now; None if there is none, or not whole."""
        known = self._entries.get(self._name(destination))
        if known is None or (known.uri, known.etag, known.size) != (entry.uri, entry.etag, entry.size):
            return None
        return kept_file(entry, destination, known.sha256)

    def add(self, file: DownloadedFile) -> None:
        """Remember a file that was fetched."""
        with self._lock:
            self._entries[self._name(file.path)] = _Entry(file.uri, file.etag, file.size, file.sha256)
            entries = {name: asdict(self._entries[name]) for name in sorted(self._entries)}
            write_atomically(self._path, (json.dumps(entries, indent=2) + "\n").encode())

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path.parent).as_posix()


def kept_file(entry: ObjectInfo, destination: Path, sha256: str) -> DownloadedFile | None:
    """The file at ``destination``, as of an object that needs no transfer, if its content has the digest."""
    try:
        with destination.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        size = destination.stat().st_size
    except OSError:
        return None
    return DownloadedFile(destination, size, found, entry.uri, entry.etag, 0) if found == sha256.lower() else None

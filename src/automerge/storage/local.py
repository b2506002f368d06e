"""``file://`` URIs and plain paths."""

import difflib
import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote, urlsplit

from automerge.documents import write_atomically
from automerge.errors import StorageError
from automerge.storage.objects import DownloadedFile, ObjectInfo, StoredObject

_CHUNK = 4 * 2**20
# linux/fs.h: share the blocks of another file until one of the two is written to.
_FICLONE = 0x40049409


def local_path(uri: str) -> Path:
    """The path behind a ``file://`` URI or a plain path.

    Raises:
        StorageError: the URI names another host.
    """
    if not uri.startswith("file://"):
        return Path(uri)
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise StorageError(f"{uri}: a file:// URI of another host cannot be read", "write file:///absolute/path")
    # '?' and '#' are ordinary characters of a path.
    return Path(unquote(uri.removeprefix("file://").removeprefix(parts.netloc)))


def list_objects(uri: str) -> list[ObjectInfo]:
    """The file, or every file below the folder, sorted by key."""
    path = local_path(uri)
    if path.is_dir():
        files = [
            (Path(folder) / name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names
        ]
        return [_info(path / key, key) for key in sorted(files) if (path / key).is_file()]
    if not path.is_file():
        raise _no_such(uri, path)
    return [_info(path, path.name)]


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes ``start`` to ``stop`` of a file."""
    path = local_path(uri)
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    except FileNotFoundError:
        raise _no_such(uri, path) from None
    except OSError as error:
        _fail(uri, "read", error)


def download(uri: str, destination: Path, sha256: str | None = None) -> DownloadedFile:
    """Copy a file; a copy and no hard link, since whoever changes one of the two must not change the other.

    Where the file system can share blocks until they are written to, nothing is copied.
    """
    source = local_path(uri)
    if not source.is_file():
        raise _no_such(uri, source)
    try:
        # Taken before the content is read: a change in between gives the file another etag.
        etag = _info(source, source.name).etag
        if destination.exists() and destination.samefile(source):
            digest, transferred = _digest(source), 0
            check_digest(uri, digest, sha256)
        else:
            digest, transferred = _copy(uri, source, destination, sha256), source.stat().st_size
        return DownloadedFile(destination, destination.stat().st_size, digest, uri, etag, transferred)
    except OSError as error:
        _fail(uri, f"copied to {destination}", error)


def upload_file(path: Path, uri: str) -> ObjectInfo:
    """Copy one file to a path; into it where the URI ends in a slash or is a folder."""
    target = local_path(uri)
    if uri.endswith("/") or target.is_dir():
        target = target / path.name
    try:
        _copy(str(path), path, target, None)
    except OSError as error:
        _fail(str(path), f"copied to {target}", error)
    return _info(target, target.name)


def find_object(uri: str) -> ObjectInfo | None:
    """What a file is now; None if there is none."""
    path = local_path(uri)
    return _info(path, path.name) if path.is_file() else None


def read_object(uri: str) -> StoredObject | None:
    """A whole file; None if there is none."""
    try:
        with local_path(uri).open("rb") as file:
            return StoredObject(file.read(), _etag(os.fstat(file.fileno())))
    except FileNotFoundError:
        return None
    except OSError as error:
        _fail(uri, "read", error)


def write_object(uri: str, content: bytes, replacing: str | None) -> str | None:
    """Write a file if it is the one that is to be replaced; a lock beside it makes that one step."""
    path = local_path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _etag(path.stat()) if path.exists() else None
            if found != replacing:
                return None
            write_atomically(path, content)
            return _etag(path.stat())
    except OSError as error:
        _fail(uri, "written", error)


def child(uri: str, key: str) -> str:
    """The URI or path of a key below a folder."""
    return f"{uri.rstrip('/')}/{quote(key) if uri.startswith('file://') else key}"


def check_digest(uri: str, found: str, expected: str | None) -> None:
    """Raise a StorageError unless the digest is the expected one, if there is one."""
    if expected is not None and found != expected.lower():
        raise StorageError(
            f"{uri}: the content has sha256 {found}, expected {expected}",
            "it was changed or damaged: store it again, or correct the digest",
        )


def _copy(uri: str, source: Path, destination: Path, sha256: str | None) -> str:
    destination.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{destination.name}.", suffix=".tmp", dir=destination.parent)
    temporary = Path(name)
    try:
        with source.open("rb") as reader, os.fdopen(descriptor, "w+b") as writer:
            digest = hashlib.sha256()
            try:
                fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
                digest = hashlib.file_digest(writer, "sha256")
            except OSError:
                while chunk := reader.read(_CHUNK):
                    digest.update(chunk)
                    writer.write(chunk)
            check_digest(uri, digest.hexdigest(), sha256)
            writer.flush()
            os.fsync(writer.fileno())
        temporary.chmod(0o644)
        temporary.replace(destination)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _info(path: Path, key: str) -> ObjectInfo:
    status = path.stat()
    return ObjectInfo(str(path.absolute()), key, status.st_size, _etag(status))


def _etag(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _no_such(uri: str, path: Path) -> StorageError:
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return StorageError(
        f"{uri}: no such file", f"did you mean {path.parent / close[0]}?" if close else "check the path"
    )


def _fail(uri: str, action: str, error: OSError) -> NoReturn:
    raise StorageError(f"{uri}: cannot be {action} ({error.strerror or error})", "check the path and its permissions")

"""``s3://`` URIs, by boto3: credentials, region and endpoint come from where boto3 looks for them.

A download fetches parts in parallel into a file of the final size under a temporary name. Beside it lies a record of
the parts that are complete, each with its digest; the next attempt checks the digests and fetches only the rest. Every
part is requested with the etag seen at the start, so that an object replaced in between is noticed.
"""

import base64
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from automerge.documents import digest_of, write_atomically
from automerge.errors import MissingExtraError, StorageError
from automerge.storage.local import check_digest
from automerge.storage.objects import DownloadedFile, ObjectInfo, StoredObject

# Large enough that a request's latency does not count, small enough that little is lost with a broken connection.
PART_BYTES = 8 * 2**20
_PARALLEL_PARTS = 8
# A body that breaks off: botocore retries requests, but not the reading of what they return.
_BODY_ATTEMPTS = 5
# How often the record of complete parts is written: this much time is lost at most when the process is killed.
_RECORD_SECONDS = 1.0
# Uploads above this go in parts; a part is a retry's unit there, and S3 takes at most 10 000 of them (156 GiB).
_MULTIPART_BYTES = 16 * 2**20

_DENIED = {
    "403",
    "401",
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_REPLACED = {"412", "PreconditionFailed"}
# The second is Amazon's answer to the later one of two writes at the same moment.
_CONFLICT = _REPLACED | {"409", "ConditionalRequestConflict"}
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, if temporary), or AWS_PROFILE"


@dataclass(frozen=True)
class _Object:
    """What S3 says of one object."""

    size: int
    etag: str
    sha256: str | None


def list_objects(uri: str) -> list[ObjectInfo]:
    """The object, or every object below the prefix, sorted by key."""
    bucket, key = _split(uri)
    with _translated(uri):
        if key and not key.endswith("/"):
            found = _head(uri, bucket, key)
            if found is not None:
                return [ObjectInfo(uri, key.rsplit("/", 1)[-1], found.size, found.etag)]
            key += "/"
        objects = [
            ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Key"].removeprefix(key), entry["Size"], entry["ETag"])
            for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
            for entry in page.get("Contents", [])
            # Consoles mark folders by an empty object of that name.
            if not entry["Key"].endswith("/")
        ]
        if not objects:
            raise _no_such_object(uri, bucket, key.rstrip("/"))
    return sorted(objects, key=lambda entry: entry.key)


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes ``start`` to ``stop`` of an object."""
    bucket, key = _split(uri, needs_key=True)
    if stop <= start:
        return b""
    with _translated(uri):
        return _retried(lambda: _get(bucket, key, start, stop), uri)


def download(uri: str, destination: Path, sha256: str | None = None) -> DownloadedFile:
    """Download one object, or what is missing of it; see the module's docstring."""
    bucket, key = _split(uri, needs_key=True)
    with _translated(uri):
        found = _head(uri, bucket, key)
        if found is None:
            raise _no_such_object(uri, bucket, key)
    if sha256 is not None and found.sha256 is not None:
        check_digest(uri, found.sha256, sha256)
    expected = sha256.lower() if sha256 is not None else found.sha256
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if (
            expected is not None
            and destination.is_file()
            and destination.stat().st_size == found.size
            and _digest(destination) == expected
        ):
            return DownloadedFile(destination, found.size, expected, uri, found.etag, 0)
        with _translated(uri):
            return _Download(uri, bucket, key, found, destination).run(expected)
    except OSError as error:
        raise StorageError(
            f"{uri}: cannot be downloaded to {destination} ({error.strerror or error})",
            f"it needs {found.size} bytes in a folder that can be written",
        ) from None


def upload_file(path: Path, uri: str) -> ObjectInfo:
    """Upload one file with its sha256 as metadata; below the prefix, under its own name, where the URI ends in a slash.

    S3 checks a digest of every part on arrival, and the object appears only when it is complete.
    """
    bucket, key = _split(uri)
    if not key or key.endswith("/"):
        key += path.name
    target = f"s3://{bucket}/{key}"
    try:
        before = path.stat()
        digest = _digest(path)
        with _translated(target):
            from boto3.s3.transfer import TransferConfig

            config = TransferConfig(
                multipart_threshold=_MULTIPART_BYTES,
                multipart_chunksize=max(_MULTIPART_BYTES, -(-before.st_size // 10_000)),
                max_concurrency=_PARALLEL_PARTS,
            )
            extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": digest}}
            _client().upload_file(str(path), bucket, key, ExtraArgs=extra, Config=config)
            found = _head(target, bucket, key)
        after = path.stat()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})", "check the path") from None
    if found is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise StorageError(f"{path}: changed while it was uploaded to {target}", "upload it again")
    return ObjectInfo(target, key.rsplit("/", 1)[-1], found.size, found.etag)


def find_object(uri: str) -> ObjectInfo | None:
    """What an object is now; None if there is none."""
    bucket, key = _split(uri, needs_key=True)
    with _translated(uri):
        found = _head(uri, bucket, key)
    return None if found is None else ObjectInfo(uri, key.rsplit("/", 1)[-1], found.size, found.etag)


def read_object(uri: str) -> StoredObject | None:
    """A whole object; None if there is none."""
    bucket, key = _split(uri, needs_key=True)
    with _translated(uri):
        from botocore.exceptions import ClientError

        etag = ""

        def get() -> bytes:
            nonlocal etag
            answer = _client().get_object(Bucket=bucket, Key=key)
            etag = str(answer["ETag"])
            body: bytes = answer["Body"].read()
            return body

        try:
            return StoredObject(_retried(get, uri), etag)
        except ClientError as error:
            if _code(error) not in _ABSENT:
                raise
            _check_bucket(uri, bucket)
            return None


def write_object(uri: str, content: bytes, replacing: str | None) -> str | None:
    """Write an object by a conditional request."""
    bucket, key = _split(uri, needs_key=True)
    condition = {"IfNoneMatch": "*"} if replacing is None else {"IfMatch": replacing}
    with _translated(uri):
        from botocore.exceptions import ClientError

        try:
            answer = _client().put_object(Bucket=bucket, Key=key, Body=content, ChecksumAlgorithm="SHA256", **condition)
        except ClientError as error:
            if _code(error) in _CONFLICT or (replacing is not None and _code(error) in _ABSENT):
                return None
            raise
    return str(answer["ETag"])


def child(uri: str, key: str) -> str:
    """The URI of a key below a prefix."""
    return f"{uri.rstrip('/')}/{key}"


class _Download:
    """One download in progress: a file under a temporary name and the record of its complete parts."""

    def __init__(self, uri: str, bucket: str, key: str, found: _Object, destination: Path) -> None:
        self._uri, self._bucket, self._key, self._found = uri, bucket, key, found
        self._destination = destination
        self._partial = destination.with_name(f".{destination.name}.part")
        self._record = destination.with_name(f".{destination.name}.part.json")
        self._ranges = [(start, min(start + PART_BYTES, found.size)) for start in range(0, found.size, PART_BYTES)]
        self._identity = digest_of([uri, found.etag, found.size, PART_BYTES])
        self._done: dict[int, str] = {}
        self._lock = threading.Lock()
        self._recorded_at = time.monotonic()
        self._stopped = False

    def run(self, expected: str | None) -> DownloadedFile:
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between opening and locking, another download may have finished and renamed this very file.
                if not os.path.samestat(os.fstat(descriptor), self._partial.stat()):
                    raise BlockingIOError
            except (BlockingIOError, FileNotFoundError):
                raise StorageError(
                    f"{self._destination}: another process is downloading to it", "wait until it has finished"
                ) from None
            self._resume(descriptor)
            missing = [index for index in range(len(self._ranges)) if index not in self._done]
            self._fetch(descriptor, missing)
            digest = _digest(self._partial)
            if expected is not None and digest != expected:
                # Nothing of it can be trusted: the next attempt begins anew.
                self._record.unlink(missing_ok=True)
                self._partial.unlink(missing_ok=True)
                check_digest(self._uri, digest, expected)
            os.fsync(descriptor)
            self._partial.replace(self._destination)
            self._record.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        transferred = sum(self._ranges[index][1] - self._ranges[index][0] for index in missing)
        return DownloadedFile(self._destination, self._found.size, digest, self._uri, self._found.etag, transferred)

    def _resume(self, descriptor: int) -> None:
        """Take over the parts of an earlier attempt whose bytes are what was recorded, and make room for the rest."""
        recorded: Any = None
        try:
            recorded = json.loads(self._record.read_bytes())
        except (OSError, ValueError):
            os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, self._found.size)
        if self._found.size:
            # Take the room on the disk now: a full disk shows before the transfer.
            os.posix_fallocate(descriptor, 0, self._found.size)
        if not isinstance(recorded, dict) or recorded.get("identity") != self._identity:
            return
        parts = recorded.get("parts")
        for index, (start, stop) in enumerate(self._ranges):
            digest = parts.get(str(index)) if isinstance(parts, dict) else None
            if digest and hashlib.sha256(os.pread(descriptor, stop - start, start)).hexdigest() == digest:
                self._done[index] = digest

    def _fetch(self, descriptor: int, missing: list[int]) -> None:
        with ThreadPoolExecutor(max_workers=_PARALLEL_PARTS) as pool:
            futures = [pool.submit(self._part, descriptor, index) for index in missing]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=True, cancel_futures=True)
                self._save()
                raise

    def _part(self, descriptor: int, index: int) -> None:
        if self._stopped:
            return
        try:
            self._get_part(descriptor, index)
        except BaseException:
            self._stopped = True
            raise

    def _get_part(self, descriptor: int, index: int) -> None:
        start, stop = self._ranges[index]
        body = _retried(lambda: _get(self._bucket, self._key, start, stop, self._found.etag), self._uri)
        if len(body) != stop - start:
            raise StorageError(f"{self._uri}: {len(body)} bytes arrived where {stop - start} were asked for", _AGAIN)
        view, at = memoryview(body), start
        while view:
            written = os.pwrite(descriptor, view, at)
            view, at = view[written:], at + written
        with self._lock:
            self._done[index] = hashlib.sha256(body).hexdigest()
            if time.monotonic() - self._recorded_at >= _RECORD_SECONDS:
                self._save()

    def _save(self) -> None:
        parts = {str(index): self._done[index] for index in sorted(self._done)}
        write_atomically(self._record, json.dumps({"identity": self._identity, "parts": parts}).encode())
        self._recorded_at = time.monotonic()


_AGAIN = "run it again: what has arrived is kept"


def _split(uri: str, needs_key: bool = False) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        raise StorageError(f"{uri}: {bucket!r} is no bucket name", "write s3://bucket/key")
    if needs_key and (not key or key.endswith("/")):
        raise StorageError(f"{uri}: names no object", "write s3://bucket/key")
    return bucket, key


def _client() -> Any:
    """The boto3 client of this process and of what the environment says now."""
    # Not by items(): another thread may take a variable of its own away meanwhile.
    settings = tuple((name, os.environ[name]) for name in sorted(os.environ) if name.startswith("AWS_"))
    return _new_client(os.getpid(), settings)


_client_lock = threading.Lock()


def _new_client(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    with _client_lock:
        return _cached_client(pid, settings)


@functools.lru_cache(maxsize=4)
def _cached_client(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError:
        raise MissingExtraError("s3:// URIs", "s3") from None

    session = Session()

    def build(addressing: str) -> Any:
        config = Config(
            s3={"addressing_style": addressing},
            retries={"mode": "standard", "max_attempts": 5},
            max_pool_connections=4 * _PARALLEL_PARTS,
            connect_timeout=10,
            read_timeout=60,
        )
        return session.client("s3", config=config)

    client = build("auto")
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    # Other servers than Amazon's rarely have a host name for every bucket.
    return client if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else build("path")


def _head(uri: str, bucket: str, key: str) -> _Object | None:
    """What S3 says of an object; None when it is not there, though its bucket is."""
    from botocore.exceptions import ClientError

    try:
        answer = _client().head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if _code(error) not in _ABSENT:
            raise
        _check_bucket(uri, bucket)
        return None
    sha256 = answer.get("Metadata", {}).get("sha256")
    checksum = answer.get("ChecksumSHA256", "")
    # With a '-' it is a digest of the parts' digests, not of the content.
    if sha256 is None and checksum and "-" not in checksum:
        sha256 = base64.b64decode(checksum).hex()
    return _Object(int(answer["ContentLength"]), str(answer["ETag"]), sha256)


def _check_bucket(uri: str, bucket: str) -> None:
    from botocore.exceptions import ClientError

    try:
        _client().head_bucket(Bucket=bucket)
    except ClientError as error:
        # Who may read objects may still not be allowed to ask for the bucket.
        if _code(error) in _ABSENT | {"NoSuchBucket"}:
            raise _no_such_bucket(uri, bucket) from None


def _get(bucket: str, key: str, start: int, stop: int, etag: str | None = None) -> bytes:
    from botocore.exceptions import ClientError

    match = {} if etag is None else {"IfMatch": etag}
    try:
        answer = _client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **match)
    except ClientError as error:
        if _code(error) in ("416", "InvalidRange"):
            return b""
        raise
    body: bytes = answer["Body"].read()
    return body


def _retried(get: Callable[[], bytes], uri: str) -> bytes:
    """Read a body, again where the connection breaks off in the middle of it."""
    from botocore.exceptions import ConnectionClosedError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    for attempt in range(_BODY_ATTEMPTS):
        try:
            return get()
        except (ConnectionClosedError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError) as error:
            if attempt == _BODY_ATTEMPTS - 1:
                raise StorageError(
                    f"{uri}: the connection broke off {_BODY_ATTEMPTS} times ({type(error).__name__})", _AGAIN
                ) from None
            # Exponential, with jitter so that parallel parts do not return all at once.
            time.sleep(0.1 * 2**attempt * (1 + random.random()))  # noqa: S311 - no secret depends on it
    raise AssertionError("unreachable")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn every error of boto3 into one sentence. None of them quotes a credential or a signed URL."""
    try:
        import boto3.exceptions as transfer
        import botocore.exceptions as aws
    except ImportError:
        raise MissingExtraError("s3:// URIs", "s3") from None
    try:
        yield
    except transfer.S3UploadFailedError as error:
        # s3transfer wraps the first error without chaining it everywhere; its text ends with that error's.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, aws.ClientError):
            raise _of_answer(uri, cause) from None
        raise StorageError(f"{uri}: the upload failed ({error})", "run it again") from None
    except aws.ClientError as error:
        raise _of_answer(uri, error) from None
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError):
        raise StorageError(f"{uri}: no S3 credentials found", f"set {_CREDENTIALS}") from None
    except (aws.ProfileNotFound, aws.ConfigParseError, aws.ConfigNotFound) as error:
        raise StorageError(f"{uri}: {error}", "correct AWS_PROFILE or the AWS configuration file") from None
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        raise StorageError(
            f"{uri}: the S3 endpoint {_endpoint()} cannot be reached ({type(error).__name__})",
            "check the network and AWS_ENDPOINT_URL_S3",
        ) from None
    except aws.BotoCoreError as error:
        raise StorageError(f"{uri}: {error}", "check the URI and the AWS settings") from None
    except ValueError as error:
        if "endpoint" not in str(error).lower():
            raise
        raise StorageError(
            f"{uri}: the S3 endpoint in the AWS settings is no URL", "correct AWS_ENDPOINT_URL_S3"
        ) from None


def _of_answer(uri: str, error: Any) -> StorageError:
    code, message = _code(error), error.response.get("Error", {}).get("Message", "")
    bucket, key = _split(uri)
    if code in _DENIED:
        return StorageError(f"{uri}: access denied by {_endpoint()} ({code})", f"check {_CREDENTIALS}")
    if code == "NoSuchBucket":
        return _no_such_bucket(uri, bucket)
    if code in _ABSENT:
        return _no_such_object(uri, bucket, key)
    if code in _REPLACED:
        return StorageError(f"{uri}: was replaced during the download", "run it again to get the new object")
    if code in ("301", "PermanentRedirect", "AuthorizationHeaderMalformed"):
        return StorageError(f"{uri}: the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's region")
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{uri}: the clock of this machine is wrong", "set the clock")
    return StorageError(f"{uri}: S3 answers {code} ({message})", "run it again, or ask who runs the store")


def _no_such_bucket(uri: str, bucket: str) -> StorageError:
    return StorageError(f"{uri}: no such bucket {bucket!r} at {_endpoint()}", "check the name and AWS_ENDPOINT_URL_S3")


def _no_such_object(uri: str, bucket: str, key: str) -> StorageError:
    return StorageError(f"{uri}: no such object", _near(bucket, key))


def _near(bucket: str, key: str) -> str:
    """A remedy: the nearest of the keys that are in the same folder, if they may be listed."""
    import difflib

    from botocore.exceptions import BotoCoreError, ClientError

    folder = key.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    try:
        answer = _client().list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=1000)
    except (BotoCoreError, ClientError):
        return "check the key"
    keys = [entry["Key"] for entry in answer.get("Contents", [])]
    keys += [entry["Prefix"].rstrip("/") for entry in answer.get("CommonPrefixes", [])]
    close = difflib.get_close_matches(key, sorted(keys), n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(f's3://{bucket}/{name}' for name in close)}?"
    return f"s3://{bucket}/{prefix} has {', '.join(sorted(keys)[:5])}" if keys else f"s3://{bucket}/{prefix} is empty"


def _endpoint() -> str:
    """The endpoint without a password that someone may have written into it."""
    parts = urlsplit(_client().meta.endpoint_url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

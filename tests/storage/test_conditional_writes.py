"""Several writers of one object: one of them succeeds, and nobody overwrites what he has not seen."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from automerge.errors import StorageError
from automerge.storage import StoredObject, check_scheme, find_object, read_object, write_object
from automerge.testing.s3_server import S3Server


@pytest.fixture(params=["path", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder of each scheme, where nothing is."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_env")
        yield f"s3://{server.bucket}/{tmp_path.name}"
    else:
        yield f"{'file://' if request.param == 'file' else ''}{tmp_path}/deep/er"


def test_what_was_changed_meanwhile_is_not_replaced(place: str) -> None:
    uri = f"{place}/state"
    assert read_object(uri) is None
    assert find_object(uri) is None
    first = write_object(uri, b"one", replacing=None)
    assert first is not None
    assert write_object(uri, b"two", replacing=None) is None
    assert read_object(uri) == StoredObject(b"one", first)
    second = write_object(uri, b"three", replacing=first)
    assert second not in (None, first)
    assert write_object(uri, b"four", replacing=first) is None
    assert read_object(uri) == StoredObject(b"three", str(second))
    found = find_object(uri)
    assert found is not None
    assert (found.key, found.size, found.etag) == ("state", 5, second)


def test_what_is_gone_cannot_be_replaced(place: str) -> None:
    etag = write_object(f"{place}/one", b"one", replacing=None)
    assert write_object(f"{place}/other", b"two", replacing=etag) is None
    assert read_object(f"{place}/other") is None


def test_nothing_is_an_object_too(place: str) -> None:
    etag = write_object(f"{place}/empty", b"", replacing=None)
    assert read_object(f"{place}/empty") == StoredObject(b"", str(etag))


def test_of_many_writers_one_succeeds(place: str) -> None:
    uri = f"{place}/state"
    seen: str | None = None
    for turn in range(3):
        contents = [f"{turn} {at}".encode() for at in range(8)]
        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(partial(write_object, uri, replacing=seen), contents))
        (winner,) = [at for at, etag in enumerate(written) if etag is not None]
        seen = written[winner]
        assert read_object(uri) == StoredObject(contents[winner], str(seen))


def test_errors_are_one_sentence(tmp_path: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for access in (read_object, lambda uri: write_object(uri, b"", replacing=None)):
        with pytest.raises(StorageError, match=r"file/state: cannot be .* \(Not a directory\)|exists"):
            access(f"{tmp_path}/file/state")
        with pytest.raises(StorageError, match="no such bucket 'nowhere'"):
            access("s3://nowhere/state")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    for access in (find_object, read_object, lambda uri: write_object(uri, b"", replacing=None)):
        with pytest.raises(StorageError, match="access denied") as caught:
            access(f"s3://{s3_env.bucket}/state")
        assert "wrong-and-secret" not in str(caught.value)
    with pytest.raises(StorageError, match="unknown scheme 'gs://'"):
        check_scheme("gs://bucket/key")

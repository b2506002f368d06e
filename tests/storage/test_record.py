"""What was fetched once is not transferred again, whatever the store knows of its content."""

from pathlib import Path

import pytest

from automerge.storage import FetchRecord, fetch
from automerge.testing.s3_server import S3Server


def put(server: S3Server, key: str, content: bytes) -> None:
    """As any tool puts an object: nothing but its content, without a digest."""
    from botocore.config import Config

    config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
    import boto3

    client = boto3.client("s3", config=config)
    client.put_object(Bucket=server.bucket, Key=key, Body=content)
    assert "ChecksumSHA256" not in client.head_object(Bucket=server.bucket, Key=key, ChecksumMode="ENABLED")


def transferred(uri: str, folder: Path, sha256: str | None = None) -> int:
    """What a fetch transfers that knows only what the last one wrote."""
    record = FetchRecord(folder / ".fetched.json")
    return sum(file.transferred for file in fetch(uri, folder / "in", record=record, sha256=sha256))


@pytest.fixture(params=["s3", "local"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, object]:
    """A folder of either kind, and how a file is put into it."""
    if request.param == "local":
        (tmp_path / "from").mkdir()
        return str(tmp_path / "from"), lambda name, content: (tmp_path / "from" / name).write_bytes(content)
    server: S3Server = request.getfixturevalue("s3_env")
    prefix = f"record/{tmp_path.name}"
    return f"s3://{server.bucket}/{prefix}", lambda name, content: put(server, f"{prefix}/{name}", content)


def test_only_what_changed_is_transferred(place: tuple[str, object], tmp_path: Path) -> None:
    uri, write = place
    write("a", b"hello")  # type: ignore[operator]
    write("b", b"worlds")  # type: ignore[operator]
    assert transferred(uri, tmp_path) == 11
    assert transferred(uri, tmp_path) == 0
    write("a", b"jello")  # type: ignore[operator]
    assert transferred(uri, tmp_path) == 5, "replaced by one of the same size"
    assert (tmp_path / "in" / "a").read_bytes() == b"jello"
    (tmp_path / "in" / "b").write_bytes(b"w0rlds")
    assert transferred(uri, tmp_path) == 6, "damaged here"
    (tmp_path / "in" / "b").unlink()
    assert transferred(uri, tmp_path) == 6, "removed here"
    assert (tmp_path / "in" / "b").read_bytes() == b"worlds"
    assert transferred(uri, tmp_path) == 0


def test_another_origin_is_another_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(name.encode())
        assert transferred(str(tmp_path / name), tmp_path) == 3
        assert (tmp_path / "in" / "a").read_bytes() == name.encode()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"in/a": 1}', b'{"in/a": {"uri": "x"}}', b"\xff"])
def test_a_damaged_record_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    assert transferred(str(tmp_path / "a"), tmp_path) == 5
    (tmp_path / ".fetched.json").write_bytes(content)
    assert transferred(str(tmp_path / "a"), tmp_path) == 5
    assert transferred(str(tmp_path / "a"), tmp_path) == 0


def test_what_the_digest_pins_is_kept_without_a_record(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "a").write_bytes(b"hello")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"hello")
    assert transferred(str(tmp_path / "a"), tmp_path, hashlib.sha256(b"jello").hexdigest()) == 5
    (tmp_path / ".fetched.json").unlink()
    assert transferred(str(tmp_path / "a"), tmp_path, hashlib.sha256(b"hello").hexdigest().upper()) == 0

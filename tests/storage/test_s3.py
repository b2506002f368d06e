"""s3:// against a real server: transfers, resumption, and every way in which it can go wrong."""

import contextlib
import functools
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from automerge.checkpoint import parse_header
from automerge.errors import StorageError
from automerge.storage import download, fetch, list_objects, read_range, s3, upload
from automerge.testing.s3_server import S3Server

MIB = 2**20


def content_of(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(size)


@pytest.fixture
def prefix(s3_env: S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of the bucket for this test alone."""
    return f"s3://{s3_env.bucket}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 256 * 1024)


@functools.cache
def client_of(server: S3Server) -> Any:
    return server.client()


def put(server: S3Server, uri: str, content: bytes, **options: object) -> None:
    key = uri.removeprefix(f"s3://{server.bucket}/")
    client_of(server).put_object(Bucket=server.bucket, Key=key, Body=content, **options)


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


@pytest.mark.parametrize("size", [0, 1, 20 * MIB + 17])
def test_a_file_goes_up_and_comes_back(size: int, prefix: str, tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    source.write_bytes(content_of(size))
    (uploaded,) = upload(source, f"{prefix}/weights.bin")
    assert (uploaded.uri, uploaded.key, uploaded.size) == (f"{prefix}/weights.bin", "weights.bin", size)
    # Above 16 MiB it goes in parts, which shows in the etag.
    assert ("-" in uploaded.etag) == (size > 16 * MIB)
    got = download(f"{prefix}/weights.bin", tmp_path / "deep" / "copy.bin")
    assert got.path.read_bytes() == source.read_bytes()
    assert (got.size, got.transferred, got.sha256) == (size, size, hashlib.sha256(source.read_bytes()).hexdigest())
    assert leftovers(got.path.parent) == []


def test_what_is_here_already_is_not_fetched_again(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    upload(tmp_path / "a", f"{prefix}/a")
    assert download(f"{prefix}/a", tmp_path / "b").transferred == 5
    assert download(f"{prefix}/a", tmp_path / "b").transferred == 0
    (tmp_path / "b").write_bytes(b"jello")
    assert download(f"{prefix}/a", tmp_path / "b").transferred == 5
    assert (tmp_path / "b").read_bytes() == b"hello"


def test_a_folder_goes_up_and_comes_back(prefix: str, s3_env: S3Server, tmp_path: Path) -> None:
    names = ["config.json", "data/train #1.bin", "data/ü%20?.bin"]
    for name in names:
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(name.encode())
    assert [entry.key for entry in upload(tmp_path / "up", f"{prefix}/model")] == names
    put(s3_env, f"{prefix}/model/", b"")
    put(s3_env, f"{prefix}/model-other", b"not below the prefix")
    for uri in (f"{prefix}/model", f"{prefix}/model/"):
        assert [(entry.key, entry.size) for entry in list_objects(uri)] == [
            (name, len(name.encode())) for name in names
        ]
    files = fetch(f"{prefix}/model", tmp_path / "down")
    assert [file.path.relative_to(tmp_path / "down").as_posix() for file in files] == names
    assert all((tmp_path / "down" / name).read_bytes() == name.encode() for name in names)


def test_listing_goes_beyond_one_page(prefix: str, monkeypatch: pytest.MonkeyPatch, s3_env: S3Server) -> None:
    for i in range(5):
        put(s3_env, f"{prefix}/{i}", b"")
    original = s3._client

    class SmallPages:
        def __getattr__(self, name: str) -> object:
            return getattr(original(), name)

        def get_paginator(self, name: str) -> object:
            paginator = original().get_paginator(name)

            class Paginator:
                def paginate(self, **options: object) -> object:
                    return paginator.paginate(**options, PaginationConfig={"PageSize": 2})

            return Paginator()

    monkeypatch.setattr(s3, "_client", SmallPages)
    assert [entry.key for entry in list_objects(prefix)] == ["0", "1", "2", "3", "4"]


def test_ranges(prefix: str, s3_env: S3Server) -> None:
    put(s3_env, f"{prefix}/a", b"0123456789")
    assert read_range(f"{prefix}/a", 2, 5) == b"234"
    assert read_range(f"{prefix}/a", 8, 50) == b"89"
    assert read_range(f"{prefix}/a", 10, 50) == b""
    assert read_range(f"{prefix}/a", 3, 3) == b""


def test_a_header_is_read_from_s3_without_the_tensors(prefix: str, s3_env: S3Server) -> None:
    import safetensors.torch
    import torch

    put(s3_env, f"{prefix}/m.safetensors", safetensors.torch.save({"a": torch.zeros(1000)}))
    (entry,) = list_objects(f"{prefix}/m.safetensors")
    header = parse_header(lambda start, stop: read_range(entry.uri, start, stop), entry.size, entry.uri)
    assert list(header.tensors) == ["a"]


# What a user reads when it goes wrong.


def test_a_key_that_does_not_exist(prefix: str, s3_env: S3Server, tmp_path: Path) -> None:
    put(s3_env, f"{prefix}/low.safetensors", b"")
    wanted = f"{prefix}/lwo.safetensors"
    for call in (lambda: list_objects(wanted), lambda: download(wanted, tmp_path / "x")):
        with pytest.raises(StorageError) as error:
            call()
        assert str(error.value) == f"{wanted}: no such object; did you mean {prefix}/low.safetensors?"
    with pytest.raises(StorageError, match="no such object"):
        read_range(wanted, 0, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_does_not_exist(s3_env: S3Server, tmp_path: Path) -> None:
    uri = "s3://absent-bucket/model/x"
    (tmp_path / "file").write_bytes(b"x")
    for call in (
        lambda: list_objects(uri),
        lambda: list_objects("s3://absent-bucket"),
        lambda: download(uri, tmp_path / "x"),
        lambda: read_range(uri, 0, 1),
        lambda: upload(tmp_path / "file", uri),
    ):
        with pytest.raises(StorageError, match=r"no such bucket 'absent-bucket' at http://127\.0\.0\.1:"):
            call()


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(
    name: str, prefix: str, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(s3_env, f"{prefix}/a", b"x")
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv(name, "WRONGVALUE")
    for call in (
        lambda: list_objects(f"{prefix}/a"),
        lambda: list_objects(prefix + "/"),
        lambda: download(f"{prefix}/a", tmp_path / "x"),
        lambda: read_range(f"{prefix}/a", 0, 1),
        lambda: upload(tmp_path / "file", f"{prefix}/b"),
    ):
        with pytest.raises(
            StorageError, match=r"access denied by http://127.0.0.1:\d+ .*AWS_SECRET_ACCESS_KEY"
        ) as error:
            call()
        assert "WRONGVALUE" not in str(error.value)
        assert s3_env.secret_key not in str(error.value) and s3_env.access_key not in str(error.value)


def test_no_credentials(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no S3 credentials found; set AWS_ACCESS_KEY_ID"):
        list_objects(f"{prefix}/a")


def test_an_endpoint_that_is_not_there(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(StorageError, match=f"the S3 endpoint {endpoint} cannot be reached"):
        read_range(f"{prefix}/a", 0, 1)


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("AWS_ENDPOINT_URL_S3", "no url", "the S3 endpoint in the AWS settings is no URL"),
        ("AWS_PROFILE", "absent", r"\(absent\) could not be found; correct AWS_PROFILE"),
    ],
)
def test_wrong_settings(variable: str, value: str, sentence: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StorageError, match=sentence):
        list_objects(f"{prefix}/a")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://Bad bucket/key", "s3://models"])
def test_uris_that_name_no_object(uri: str, s3_env: S3Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is no bucket name|names no object"):
        download(uri, tmp_path / "x")


def test_a_key_that_would_leave_the_folder_is_not_fetched(prefix: str, s3_env: S3Server, tmp_path: Path) -> None:
    from automerge.storage import ObjectInfo, fetch_all

    put(s3_env, f"{prefix}/a", b"x")
    for key in ("../outside", "/outside", "a/../../outside", "a//b", ""):
        with pytest.raises(StorageError, match="is no name for a local file"):
            fetch_all([ObjectInfo(f"{prefix}/a", key, 1, "")], tmp_path / "in")
    assert list(tmp_path.iterdir()) == []


# Digests.


def test_content_that_is_not_what_was_uploaded_is_refused(prefix: str, s3_env: S3Server, tmp_path: Path) -> None:
    promised = hashlib.sha256(b"hello").hexdigest()
    put(s3_env, f"{prefix}/a", b"jello", Metadata={"sha256": promised})
    with pytest.raises(
        StorageError, match=f"the content has sha256 {hashlib.sha256(b'jello').hexdigest()}, expected {promised}"
    ):
        download(f"{prefix}/a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_callers_digest_decides(prefix: str, s3_env: S3Server, tmp_path: Path) -> None:
    put(s3_env, f"{prefix}/a", b"hello")
    good = hashlib.sha256(b"hello").hexdigest()
    assert download(f"{prefix}/a", tmp_path / "a", good.upper()).sha256 == good
    with pytest.raises(StorageError, match=f"has sha256 {good}, expected 00"):
        download(f"{prefix}/a", tmp_path / "b", "00")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_known_wrong_digest_is_refused_before_the_transfer(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    upload(tmp_path / "a", f"{prefix}/a")
    monkeypatch.setattr(s3, "_get", None)
    with pytest.raises(StorageError, match="expected 00"):
        download(f"{prefix}/a", tmp_path / "b", "00")


# Interruptions.


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from automerge.storage import download, s3
s3.PART_BYTES = 256 * 1024
s3._RECORD_SECONDS = 0
s3._PARALLEL_PARTS = 2
save, saved = s3._Download._save, 0
def save_and_die(self):
    global saved
    save(self)
    saved += 1
    if saved == 5:
        os.kill(os.getpid(), signal.SIGKILL)
s3._Download._save = save_and_die
download(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.fixture
def killed(prefix: str, small_parts: None, s3_env: S3Server, tmp_path: Path) -> bytes:
    """The content of ``prefix/a``, after a download of it was killed with 5 of 13 parts recorded."""
    content = content_of(3 * MIB + 5)
    (tmp_path / "source").write_bytes(content)
    upload(tmp_path / "source", f"{prefix}/a")
    command = [sys.executable, "-c", KILLED, f"{prefix}/a", str(tmp_path / "a")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert leftovers(tmp_path) == [".a.part", ".a.part.json"]
    return content


def test_a_killed_download_goes_on_where_it_stopped(killed: bytes, prefix: str, tmp_path: Path) -> None:
    got = download(f"{prefix}/a", tmp_path / "a")
    assert got.path.read_bytes() == killed
    assert got.transferred == len(killed) - 5 * 256 * 1024
    assert leftovers(tmp_path) == []


def test_a_recorded_part_that_was_damaged_is_fetched_again(killed: bytes, prefix: str, tmp_path: Path) -> None:
    index = min(int(index) for index in json.loads((tmp_path / ".a.part.json").read_bytes())["parts"])
    with (tmp_path / ".a.part").open("r+b") as file:
        file.seek(index * 256 * 1024 + 100)
        file.write(b"power cut")
    got = download(f"{prefix}/a", tmp_path / "a")
    assert got.path.read_bytes() == killed
    assert got.transferred == len(killed) - 4 * 256 * 1024


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b'{"identity": 1}', None])
def test_a_record_that_cannot_be_used_means_from_the_start(
    record: bytes | None, killed: bytes, prefix: str, tmp_path: Path
) -> None:
    if record is None:
        (tmp_path / ".a.part.json").unlink()
    else:
        (tmp_path / ".a.part.json").write_bytes(record)
    got = download(f"{prefix}/a", tmp_path / "a")
    assert got.path.read_bytes() == killed and got.transferred == len(killed)


def test_an_object_replaced_after_the_kill_is_fetched_anew(
    killed: bytes, prefix: str, s3_env: S3Server, tmp_path: Path
) -> None:
    new = content_of(len(killed), seed=1)
    put(s3_env, f"{prefix}/a", new)
    got = download(f"{prefix}/a", tmp_path / "a")
    assert got.path.read_bytes() == new and got.transferred == len(new)


def after_parts(monkeypatch: pytest.MonkeyPatch, count: int, happens: Callable[[], None]) -> None:
    """Let something happen once, between two parts of a download."""
    original, lock, seen = s3._get, threading.Lock(), 0

    def get(*arguments: object) -> bytes:
        nonlocal seen
        with lock:
            seen += 1
            if seen == count:
                happens()
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(s3, "_get", get)
    monkeypatch.setattr(s3, "_PARALLEL_PARTS", 1)


def test_an_object_replaced_during_the_download_is_noticed(
    prefix: str, small_parts: None, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_env, f"{prefix}/a", content_of(2 * MIB))
    after_parts(monkeypatch, 4, lambda: put(s3_env, f"{prefix}/a", content_of(2 * MIB, seed=1)))
    with pytest.raises(StorageError, match="was replaced during the download; run it again"):
        download(f"{prefix}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert download(f"{prefix}/a", tmp_path / "a").path.read_bytes() == content_of(2 * MIB, seed=1)


def test_ctrl_c_keeps_what_has_arrived(
    prefix: str, small_parts: None, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_env, f"{prefix}/a", content_of(2 * MIB))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_parts(patch, 4, interrupt)
        download(f"{prefix}/a", tmp_path / "a")
    assert download(f"{prefix}/a", tmp_path / "a").transferred == 5 * 256 * 1024


def test_two_downloads_to_one_file_do_not_mix(
    prefix: str, small_parts: None, s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_env, f"{prefix}/a", content_of(2 * MIB))

    def second() -> None:
        with pytest.raises(StorageError, match="another process is downloading to it"):
            download(f"{prefix}/a", tmp_path / "a")

    after_parts(monkeypatch, 2, second)
    assert download(f"{prefix}/a", tmp_path / "a").path.read_bytes() == content_of(2 * MIB)


def test_a_full_disk_is_one_sentence(prefix: str, s3_env: S3Server, tmp_path: Path) -> None:
    import resource

    put(s3_env, f"{prefix}/a", content_of(100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot be downloaded to .*; it needs 100000 bytes"):
            download(f"{prefix}/a", tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "a").exists()


# A network that damages what it carries.


class Proxy:
    """Forwards to the server; ``damage`` may change what comes back, or end the connection by returning None."""

    def __init__(self, server: S3Server, damage: Callable[[bytes], bytes | None]) -> None:
        self._target = int(server.endpoint.rsplit(":", 1)[1])
        self._damage = damage
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pump, args=(client, server, lambda data: data), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, self._damage), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes | None]) -> None:
        try:
            while (data := source.recv(65536)) and (changed := change(data)) is not None:
                target.sendall(changed)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def network(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[bytes], bytes | None]], None]]:
    proxies = []

    def damage_by(damage: Callable[[bytes], bytes | None]) -> None:
        proxies.append(Proxy(s3_env, damage))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxies[-1].endpoint)

    yield damage_by
    for proxy in proxies:
        proxy.close()


def test_connections_that_break_off_are_survived(prefix: str, network: Callable[..., None], tmp_path: Path) -> None:
    content = content_of(20 * MIB)
    (tmp_path / "source").write_bytes(content)
    upload(tmp_path / "source", f"{prefix}/a")
    seen = 0

    def cut(data: bytes) -> bytes | None:
        nonlocal seen
        seen += len(data)
        if seen > 5 * MIB and cuts:
            seen = 0
            cuts.pop()
            return None
        return data

    cuts = [1, 2, 3]
    network(cut)
    got = download(f"{prefix}/a", tmp_path / "a")
    assert got.path.read_bytes() == content
    assert cuts == []


def test_a_network_that_always_breaks_off_is_one_sentence(
    prefix: str, network: Callable[..., None], s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_BODY_ATTEMPTS", 2)
    put(s3_env, f"{prefix}/a", content_of(MIB))
    network(lambda data: None if len(data) > 20_000 else data)
    with pytest.raises(StorageError, match=r"broke off 2 times .*what has arrived is kept"):
        download(f"{prefix}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_bit_flipped_on_the_way_is_noticed_and_not_kept(
    prefix: str, network: Callable[..., None], tmp_path: Path
) -> None:
    content = content_of(MIB)
    (tmp_path / "source").write_bytes(content)
    upload(tmp_path / "source", f"{prefix}/a")

    def flip(data: bytes) -> bytes:
        if len(data) > 20_000:
            flips.append(1)
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    flips: list[int] = []
    network(flip)
    with pytest.raises(StorageError, match="the content has sha256"):
        download(f"{prefix}/a", tmp_path / "a")
    assert flips
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_without_boto3_the_sentence_says_what_to_install(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from automerge.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "boto3.exceptions", None)
    with pytest.raises(MissingExtraError, match=r"automerge-models\[s3\]"):
        list_objects(f"{prefix}/a")


def test_importing_storage_does_not_load_boto3() -> None:
    code = "import sys, automerge.storage; assert not {'boto3', 'botocore', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

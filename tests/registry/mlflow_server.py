"""A real MLflow server."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import urllib3

from tests.trigger.service import wait_for


@contextmanager
def running_mlflow(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server on a free port of loopback that may send webhooks there; stopped with all its processes.

    Args:
        folder: of its database, and of the artifacts that go through it.
        options: of the command, in place of artifacts in the folder.
        environment: what it needs besides, e.g. to reach S3.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += options or ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    pool, url = urllib3.PoolManager(), f"http://127.0.0.1:{port}"

    def is_there() -> bool:
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            return bool(pool.request("GET", f"{url}/health", retries=False, timeout=5).status == 200)
        except urllib3.exceptions.HTTPError:
            return False

    try:
        wait_for(is_there, 240)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

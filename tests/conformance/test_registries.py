"""Every built-in registry keeps the contract."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from automerge.registry.kubeflow import KubeflowRegistry
from automerge.registry.mlflow import MlflowRegistry
from automerge.spec import RegistrySpec
from automerge.testing.registries import check_registry
from tests.registry.kubeflow_server import running_model_registry


def test_mlflow_on_sqlite(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    spec = RegistrySpec(uri=f"sqlite:///{tmp_path}/mlflow.db")
    check_registry(lambda: MlflowRegistry(spec), tmp_path / "files")


def test_kubeflow(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with running_model_registry() as server:
        spec = RegistrySpec(kind="kubeflow", uri=server.url, artifacts=str(tmp_path / "artifacts"))
        check_registry(lambda: KubeflowRegistry(spec), tmp_path / "files")


@pytest.mark.slow
def test_mlflow_on_a_server(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"),
            *("--backend-store-uri=sqlite:///server.db", "--artifacts-destination=artifacts"),
        ],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, TimeoutError):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
        spec = RegistrySpec(uri=f"http://127.0.0.1:{port}")
        check_registry(lambda: MlflowRegistry(spec), tmp_path / "files")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

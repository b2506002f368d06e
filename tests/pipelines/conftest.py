"""The command line in this process, and a server for it to talk to."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from automerge.cli import main
from automerge_pipelines.settings import Settings
from automerge_pipelines.versions import Package, compile_package
from tests.e2e.tiny import tiny_spec
from tests.pipelines.commands import Command, Done
from tests.pipelines.kfp_server import KfpServer, running_kfp


@pytest.fixture
def automerge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, logs_as_before: None
) -> Command:
    """Runs `automerge` with these arguments in a folder of its own, without settings of this machine."""
    for name in [name for name in os.environ if name.startswith(("AUTOMERGE_", "KF_PIPELINES_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["automerge", "--log-level", "ERROR", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def server(automerge: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A server with one user and without authentication, which the environment names."""
    with running_kfp() as running:
        monkeypatch.setenv("AUTOMERGE_KFP_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture(scope="session")
def package() -> Package:
    """The pipeline, compiled with the default settings."""
    return compile_package(Settings())


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """The file of a spec."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_spec("s3://models/tiny", "sqlite:///mlflow.db").model_dump(mode="json")))
    return path

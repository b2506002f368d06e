"""What tests of several packages share."""

import inspect
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from automerge.testing.s3_server import S3Server, running_s3
from tests.telemetry.restored import restored_logs

if TYPE_CHECKING:
    from tests.e2e.tiny import TinyPair

# The machine that runs the tests may be busy: time per example says nothing about the code.
settings.register_profile("automerge", deadline=None)
settings.load_profile("automerge")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with one bucket; ``s3.environment`` is what a subprocess needs to reach it."""
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_env(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the environment set so that ``s3://`` URIs mean it during this test."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    # Neither the user's own configuration nor the cloud's credential service has a say.
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(autouse=True)
def no_log_handler_is_left() -> Iterator[None]:
    """One that a test leaves writes into the tests of others, or into what was closed with its own test."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    left = [handler for handler in root.handlers if handler not in before]
    root.handlers[:] = before
    assert not left


@pytest.fixture(autouse=True, scope="session")
def stacks_without_source() -> Iterator[None]:
    """kfp's setters ask for the whole stack and use one name of it. To find the source of every frame takes, in a
    process with as many modules as that of the tests, seconds of each pipeline that is compiled."""

    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        return [
            inspect.FrameInfo(frame, frame.f_code.co_filename, line, frame.f_code.co_name, None, None)
            for frame, line in traceback.walk_stack(sys._getframe(1))
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", stack)
        yield


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """For what runs the command line in this process."""
    with restored_logs():
        yield


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without models, to be copied."""
    from tests.trigger.registry import make_database

    return make_database(tmp_path_factory.mktemp("mlflow") / "template.db")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> "TinyPair":
    """Checkpoints and data of two specialists and their base, as files; read only."""
    from tests.e2e.tiny import prepare

    return prepare(tmp_path_factory.mktemp("pair"))

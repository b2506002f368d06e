"""Local runs: how they fail, and that they leave nothing behind. The whole flow runs in tests/e2e."""

import io
import os
from pathlib import Path

import pytest
from kfp.local.config import LocalExecutionConfig

from automerge.spec import Spec
from pipelines.local import PipelineError, run_local
from tests.e2e.tiny import tiny_spec


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """The tiny job without its files."""
    return tiny_spec(str(tmp_path / "nowhere"), f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_failed_task_is_named_with_its_own_sentence(
    spec: Spec, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    echo = io.StringIO()
    with pytest.raises(PipelineError) as raised:
        run_local(spec, tmp_path / "root", echo=echo)
    sentence = str(raised.value)
    assert sentence.startswith("task 'fetch' failed: ")
    assert "nowhere" in sentence
    assert sentence.endswith(f"read {tmp_path / 'root' / 'pipeline.log'}")
    assert "\x1b" not in sentence
    assert echo.getvalue() == "fetch\n"
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not [warning for warning in recwarn if "kfp" in str(warning.filename)]


def test_the_log_keeps_everything_of_every_run(spec: Spec, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(PipelineError):
            run_local(spec, tmp_path / "root")
    log = (tmp_path / "root" / "pipeline.log").read_text()
    assert log.count("Running pipeline: 'automerge-merge'") == 2
    assert log.count("error: ") == 2


def test_calling_a_pipeline_does_not_run_it_afterwards(spec: Spec, tmp_path: Path) -> None:
    before = LocalExecutionConfig.instance
    with pytest.raises(PipelineError):
        run_local(spec, tmp_path / "root")
    assert LocalExecutionConfig.instance is before


@pytest.mark.parametrize("name", ["python3-runs", "{{runs}}"])
def test_a_folder_that_the_runner_would_rewrite_is_refused(spec: Spec, tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match="choose another folder"):
        run_local(spec, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_that_cannot_be_made_is_refused(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match="cannot be written"):
        run_local(spec, tmp_path / "file" / "root")
    assert os.listdir(tmp_path) == ["file"]

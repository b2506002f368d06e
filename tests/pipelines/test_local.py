"""Local runs: how they fail, and that they leave nothing behind. The whole flow runs in tests/e2e."""

import io
import json
from pathlib import Path

import pytest
from kfp.local.config import LocalExecutionConfig

from automerge.errors import SpecError
from automerge.spec import Spec
from automerge_pipelines.arguments import LONGEST_ARGUMENT, RESERVED, spec_argument
from automerge_pipelines.local import PipelineError, run_local
from tests.e2e.tiny import tiny_spec


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """The tiny job without its files."""
    return tiny_spec(str(tmp_path / "nowhere"), f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_failed_task_is_named_with_its_own_sentence(
    spec: Spec, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    echo, before = io.StringIO(), LocalExecutionConfig.instance
    with pytest.raises(PipelineError) as raised:
        run_local(spec, tmp_path / "root", echo=echo)
    sentence = str(raised.value)
    assert sentence.startswith("task 'fetch' failed: ")
    assert "nowhere" in sentence
    assert sentence.endswith(f"read {tmp_path / 'root' / 'pipeline.log'}")
    assert "\x1b" not in sentence
    assert echo.getvalue() == "fetch\n"
    assert LocalExecutionConfig.instance is before, "calling a pipeline would still run it"
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not [warning for warning in recwarn if "kfp" in str(warning.filename)]


def test_the_log_is_appended_to_and_the_largest_spec_arrives(spec: Spec, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "pipeline.log").write_text("an earlier run\n")
    filler = "x" * (LONGEST_ARGUMENT - RESERVED - len(json.dumps(spec_argument(spec))) - 20)
    large = spec.model_copy(update={"model": spec.model.model_copy(update={"arguments": {"a": filler}})})
    with pytest.raises(SpecError, match="as a pipeline argument"):
        spec_argument(large.model_copy(update={"private": ["y" * 20]}))
    with pytest.raises(PipelineError, match=r"task 'fetch' failed: .*nowhere"):
        run_local(large, root)
    log = (root / "pipeline.log").read_text()
    assert log.startswith("an earlier run\n")
    assert "Running pipeline: 'automerge-merge'" in log


@pytest.mark.parametrize("name", ["python3-runs", "{{runs}}"])
def test_a_folder_that_the_runner_would_rewrite_is_refused(spec: Spec, tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match="choose another folder"):
        run_local(spec, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_that_cannot_be_made_is_refused(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match="cannot be written"):
        run_local(spec, tmp_path / "file" / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

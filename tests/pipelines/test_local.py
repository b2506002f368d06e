"""Local runs: how they fail, and that they leave nothing behind. The whole flow runs in tests/e2e."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kfp import components, local
from kfp.local.config import LocalExecutionConfig
from mlflow import MlflowClient

from automerge.errors import SpecError
from automerge.spec import Spec
from automerge_pipelines.arguments import LONGEST_ARGUMENT, RESERVED, spec_argument
from automerge_pipelines.local import PipelineError, run_local
from automerge_pipelines.merge_pipeline import compile_pipeline
from automerge_pipelines.settings import Settings
from tests.e2e.tiny import prepare, tiny_spec


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
    assert sentence.startswith("task 'resolve' failed: ")
    assert "nowhere" in sentence
    assert sentence.endswith(f"read {tmp_path / 'root' / 'pipeline.log'}")
    assert "\x1b" not in sentence
    assert echo.getvalue() == "resolve\n"
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
    with pytest.raises(PipelineError, match=r"task 'resolve' failed: .*nowhere"):
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


class TestAsCompiledForACluster:
    """With the exit handler, and with the inputs on a volume that every input's own pod writes to."""

    SETTINGS = Settings.model_validate({"workspace": {"size": "1Gi"}, "defaults": {"retries": 0}})

    @pytest.fixture
    def run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logs_as_before: None
    ) -> Iterator[Callable[[Spec], str]]:
        """Runs the compiled pipeline and returns what the engine and the tasks printed."""
        # The engine replaces it, and the logs' handlers, for the time of a task; where tasks run side by side it leaves
        # them replaced.
        monkeypatch.setattr("builtins.print", print)
        pipeline = components.load_component_from_file(str(compile_pipeline(self.SETTINGS, tmp_path / "pipeline.yaml")))
        before = LocalExecutionConfig.instance

        def call(spec: Spec) -> str:
            (tmp_path / "workspace").mkdir()
            local.init(
                local.SubprocessRunner(use_venv=False),
                pipeline_root=str(tmp_path / "root"),
                workspace_root=str(tmp_path / "workspace"),
                raise_on_error=False,
            )
            pipeline(spec=spec_argument(spec))
            return capsys.readouterr().out

        yield call
        LocalExecutionConfig.instance = before

    def test_registers_a_version_and_reports_the_status(self, run: Callable[[Spec], str], tmp_path: Path) -> None:
        pair = prepare(tmp_path / "tiny")
        registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
        search = {"trials": 3, "initial": 2, "warm_start": False, "split": None, "refine": None}
        quick = {"resamples": 100, "baselines": False, "onnx": False}
        spec = tiny_spec(str(pair.folder), registry, search=search, evaluation=quick)
        printed = run(spec)
        assert MlflowClient(registry, registry).get_model_version("tiny", "1")
        assert "ended: succeeded" in printed
        assert len(re.findall(r"Executing task \S*fetch-input", printed)) == len(pair.keys)
        (inputs,) = (tmp_path / "root").glob("**/fetch/inputs")
        assert [path.name for path in inputs.rglob("*") if path.is_file()] == ["manifest.json"]

    def test_reports_the_status_of_a_failure(self, run: Callable[[Spec], str], spec: Spec) -> None:
        printed = run(spec)
        assert "nowhere" in printed
        assert "ended: failed" in printed

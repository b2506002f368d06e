"""The merge pipeline on this machine: the compiled graph and its tasks as subprocesses, without Docker or a cluster."""

import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from google.protobuf import json_format  # type: ignore[import-untyped]
from kfp import components, local
from kfp.local.config import LocalExecutionConfig

from automerge.errors import AutoMergeError
from automerge.spec import Spec
from automerge.stages.process import ERROR_PREFIX
from automerge_pipelines.arguments import spec_argument
from automerge_pipelines.merge_pipeline import build_pipeline
from automerge_pipelines.settings import Settings

LOG = "pipeline.log"


class PipelineError(AutoMergeError):
    """A local run cannot start, or one of its tasks failed."""


@dataclass(frozen=True)
class LocalRun:
    """How a local run ended, and where its outputs are.

    Attributes:
        verdict: ``pass`` or ``fail``, by the quality gate.
        folder: the run's own folder, below the pipeline root.
        inputs, segmentation, search, model, evaluation: what the stages wrote.
        report: the HTML report.
        registration: the folder with ``registration.json``; None if the gate refused the model.
        log: everything that the engine and the tasks printed.
    """

    verdict: str
    folder: Path
    inputs: Path
    segmentation: Path
    search: Path
    model: Path
    evaluation: Path
    report: Path
    registration: Path | None
    log: Path


def run_local(spec: Spec, pipeline_root: Path, *, echo: TextIO | None = None) -> LocalRun:
    """Run the merge pipeline by ``kfp.local`` with a subprocess of this interpreter for each task.

    Tasks inherit the environment, and so its credentials. A failed task is not started again.

    Args:
        spec: the spec, with absolute paths.
        pipeline_root: each run gets a folder of its own in it; the log is ``pipeline.log``, appended to.
        echo: gets the name of each task as it starts, and the lines that our code logs in it; nothing by default.

    Raises:
        SpecError: the spec is too large to be an argument.
        PipelineError: the pipeline root is unusable, or a task failed; the task's own sentence is part of it.
    """
    root = pipeline_root.resolve()
    if "python3" in str(root) or "{{" in str(root):
        raise PipelineError(
            f"{root}: a path with the text 'python3' or '{{{{' is changed by the local runner", "choose another folder"
        )
    argument = spec_argument(spec)
    try:
        root.mkdir(parents=True, exist_ok=True)
        log = (root / LOG).open("a", encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"{root}: cannot be written ({error.strerror})", "choose another folder") from None
    with log:
        reader = _LogReader(log, echo)
        with _local_execution(root), redirect_stdout(reader):
            try:
                outputs = _without_retries()(spec=argument).outputs
            except RuntimeError as error:
                raise PipelineError(reader.failure or _plain(str(error)), f"read {root / LOG}") from None
    folder = Path(outputs["evaluation"].path).parents[1]
    registration = folder / "register" / "registration"
    passed = outputs["verdict"] == "pass"
    if passed != registration.is_dir():
        raise PipelineError(
            f"{folder}: the verdict is {outputs['verdict']!r}, and register {'did not run' if passed else 'ran'}",
            f"read {root / LOG}",
        )
    return LocalRun(
        verdict=outputs["verdict"],
        folder=folder,
        inputs=folder / "fetch" / "inputs",
        segmentation=folder / "segment" / "segmentation",
        search=folder / "search-merge" / "search",
        model=folder / "search-merge" / "model",
        evaluation=folder / "evaluate" / "evaluation",
        report=folder / "evaluate" / "evaluation" / "report.html",
        registration=registration if passed else None,
        log=root / LOG,
    )


def _without_retries() -> Any:
    """The pipeline, but a failed task ends it: here nothing is preempted, and waiting would only delay the message.

    It has no exit handler, out of which it could not return where its outputs are.
    """

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stripped(item) for key, item in value.items() if key != "retryPolicy"}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    graph = json_format.MessageToDict(build_pipeline(Settings(exit_handler=False)).pipeline_spec)
    return components.load_component_from_text(json.dumps(stripped(graph)))


@contextmanager
def _local_execution(root: Path) -> Iterator[None]:
    """Calling a pipeline runs it, inside; afterwards it is as before."""
    before = LocalExecutionConfig.instance
    with warnings.catch_warnings():
        # That settings for a cluster, and an image whose name does not say Python, mean nothing here is intended.
        warnings.filterwarnings("ignore", module=r"kfp\.local\.")
        try:
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
            yield
        finally:
            LocalExecutionConfig.instance = before


_COLOUR = re.compile(r"\x1b\[\d*m")
_START = re.compile(r"Executing task '([^']+)'")
_INDENT = " " * 4
_OWN_LINE = re.compile(r'\d\d:\d\d:\d\d |\{"ts": ')
"""How the two styles of our log lines begin; the engine's executor prints between them."""


class _LogReader(io.TextIOBase):
    """Takes what ``kfp.local`` prints: keeps all of it in the log, hands our own lines on, finds a failure's sentence.

    The lines of tasks are indented by four spaces, those of the engine are not.
    """

    def __init__(self, log: TextIO, echo: TextIO | None) -> None:
        self._log = log
        self._echo = echo
        self._rest = ""
        self._task = ""
        self._error: list[str] = []

    @property
    def failure(self) -> str:
        """The failed task's name and the sentence it ended with; empty if it had none."""
        return f"task {self._task!r} failed: " + "\n".join(self._error) if self._error else ""

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Take a piece of text; lines are handled as they become whole."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._take(_plain(line))
        return len(text)

    def flush(self) -> None:
        """Write the log through, so that it can be followed."""
        if not self._log.closed:
            self._log.flush()

    def _take(self, line: str) -> None:
        self._log.write(f"{line}\n")
        started = _START.search(line)
        own = line.removeprefix(_INDENT)
        if started and not line.startswith(_INDENT):
            self._task, self._error = started[1], []
            self._hand_on(self._task)
        elif line.startswith(_INDENT) and own.startswith(ERROR_PREFIX):
            self._error = [own.removeprefix(ERROR_PREFIX)]
        elif line.startswith(_INDENT) and self._error and own.strip():
            self._error.append(own)
        elif line.startswith(_INDENT) and _OWN_LINE.match(own):
            self._hand_on(own)

    def _hand_on(self, line: str) -> None:
        if self._echo is not None:
            self._echo.write(f"{line}\n")  # not by print, which kfp.local has replaced
            self._echo.flush()


def _plain(text: str) -> str:
    return _COLOUR.sub("", text)

"""run: the whole flow, six calls in a row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from automerge.errors import SearchError
from automerge.preservation import Evaluation
from automerge.registry.registry import RegisteredVersion
from automerge.searching.search import SearchProgress, SearchResult
from automerge.spec import Spec
from automerge.stages.documents import RECIPE, TRIALS
from automerge.stages.evaluate import evaluate
from automerge.stages.fetch import fetch
from automerge.stages.loading import prepare_compute
from automerge.stages.merge import merge
from automerge.stages.register import register
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.telemetry.traces import span


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        search: the search's outcome.
        evaluation: None if the search was interrupted.
        registration: None if the search was interrupted or the quality gate refused the model.
    """

    search: SearchResult
    evaluation: Evaluation | None = None
    registration: RegisteredVersion | None = None


def run(
    spec: Spec, folder: Path, *, resume: bool = False, progress: Callable[[SearchProgress], None] | None = None
) -> RunResult:
    """Fetch, segment, search, merge, evaluate and register, each stage in a folder of its own below ``folder``.

    Args:
        spec: the spec.
        folder: the run's folder.
        resume: go on with a search that was begun in ``folder``.
        progress: called after each trial of the search.

    Raises:
        AutoMergeError: what any of the stages raises; before anything is fetched, a run was begun in ``folder`` and
            ``resume`` is off, or the device is not there.
    """
    inputs, blocks, found, model, measured = (
        folder / stage for stage in ("fetch", "segment", "search", "merge", "evaluate")
    )
    if (found / TRIALS).exists() and not resume:
        raise SearchError(f"{folder}: a run was begun here", "pass --resume to go on, or another folder")
    prepare_compute(spec)
    with span("run", pipeline=spec.name, model_family=spec.model.target):
        fetch(spec, inputs)
        segment(spec, inputs, blocks)
        result = search(spec, inputs, blocks, found, resume=resume, progress=progress)
        if result.stopped == "interrupted":
            return RunResult(result)
        merge(spec, inputs, found / RECIPE, model)
        evaluation = evaluate(spec, inputs, blocks, found, model, measured)
        if evaluation.gate.verdict == "fail":
            return RunResult(result, evaluation)
        return RunResult(
            result, evaluation, register(spec, inputs, blocks, found, model, measured, folder / "register")
        )

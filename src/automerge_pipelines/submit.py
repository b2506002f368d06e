"""Submitting: one run of a deployed pipeline for one spec, and following it to its end."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import kfp_server_api

from automerge_pipelines.client import KubeflowError, Server
from automerge_pipelines.in_cluster import secret_exists
from automerge_pipelines.parameters import S3_SECRET
from automerge_pipelines.recurring_runs import UNFINISHED
from automerge_pipelines.versions import Version

EVALUATE, REGISTER = "evaluate", "register"
"""The task that judges the model by the quality gate, and the one that only runs if the model passes."""

Verdict = Literal["passed", "refused"]

_COUNTS = {*UNFINISHED, "SUCCEEDED"} - {"CANCELING"}
"""States of a run that make another one of its name needless."""

_LONGEST_NAME = 128
_PATIENCE = 300.0
"""Seconds without an answer, e.g. while the server is restarted, after which waiting is given up."""

# Names of the engine's own nodes, which are no tasks of a pipeline; by its source, not seen on a cluster.
_PLUMBING = re.compile(r"^(root|executor|system-).*|.*-driver$|.*\(\d+\)$")
_CANNOT_START = re.compile(r'CreateContainerConfigError|secrets? "[^"]+" not found')


class RunError(KubeflowError):
    """A run that we followed failed or was cancelled."""

    exit_code = 1


@dataclass(frozen=True)
class Submitted:
    """A run on the server.

    Attributes:
        id, name, url: of the run.
        started: it was started now; else it was there already.
        state: the server's word for it when it was found.
    """

    id: str
    name: str
    url: str
    started: bool
    state: str


def run_name(name: str, parameters: Mapping[str, Any], version: str) -> str:
    """The same for the same spec, parameters and version: ``<spec>-<digest>-<version>``."""
    digest = sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name}-{digest}-{version}"[:_LONGEST_NAME]


def check_secret(server: Server, version: Version, parameters: Mapping[str, Any]) -> bool | None:
    """Whether the secret with the storage's credentials is there; None where that cannot be known.

    Raises:
        KubeflowError: the namespace has no such secret.
    """
    default = version.parameters.get(S3_SECRET, {}).get("defaultValue")
    name = parameters.get(S3_SECRET, default)
    if not name or server.pods is None:
        return None
    found = secret_exists(str(name), server.pods)
    if found is False:
        raise KubeflowError(
            f"namespace {server.pods}: the secret {name!r} with the storage's credentials is missing",
            f"create it there, name another one with --parameter {S3_SECRET}=NAME, or pass --without-secret where the "
            "pods have rights of their own (workload identity)",
        )
    return found


def submit(
    server: Server,
    version: Version,
    parameters: Mapping[str, Any],
    name: str,
    experiment_id: str,
    *,
    service_account: str | None = None,
    again: bool = False,
) -> Submitted:
    """Start a run, unless one of this name goes on or has succeeded.

    The server has no way to make that one step: two who submit the same at the same moment both start a run.

    Args:
        server: where.
        version: what to run.
        parameters: of :func:`automerge_pipelines.parameters.run_parameters`.
        name: of the run.
        experiment_id: where it is grouped.
        service_account: of the pods; the server's default if None.
        again: start it whatever there is.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    if not again:
        listed = server.runs.run_service_list_runs
        for found in server.named(listed, "runs", name, experiment_id=experiment_id, sort_by="created_at desc"):
            state = str(found.state or UNFINISHED[0])
            if state in _COUNTS and found.storage_state != "ARCHIVED":
                return Submitted(found.run_id, name, run_url(server, found.run_id), False, state)
    made = server.ask(
        server.runs.run_service_create_run,
        kfp_server_api.V2beta1Run(
            display_name=name,
            experiment_id=experiment_id,
            pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.id
            ),
            runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(parameters)),
            service_account=service_account,
        ),
    )
    return Submitted(made.run_id, name, run_url(server, made.run_id), True, str(made.state or UNFINISHED[0]))


def run_url(server: Server, run_id: str) -> str:
    """The page of a run in the user interface."""
    return f"{server.ui}/#/runs/details/{run_id}"


def wait(
    server: Server,
    run: Submitted,
    progress: Callable[[str, str], None],
    *,
    timeout: float | None = None,
    poll: float = 10.0,
) -> Verdict:
    """Follow a run to its end.

    Args:
        server: where.
        run: the run.
        progress: is told the name of the run or of a task, and its state, whenever one changes.
        timeout: seconds; None for as long as it takes.
        poll: seconds between two looks.

    Returns:
        Whether the quality gate let the model pass, which is to say whether `register` ran.

    Raises:
        RunError: the run failed or was cancelled.
        KubeflowError: the run cannot start for want of a secret, or is not done in time; the server did not answer for
            five minutes, or does not say which tasks ran.
    """
    begin = answered = time.monotonic()
    seen: dict[str, str] = {}
    while True:
        try:
            found = server.ask(server.runs.run_service_get_run, run.id)
            answered = time.monotonic()
        except KubeflowError as error:
            if not error.transient or time.monotonic() - answered > _PATIENCE:
                raise
        else:
            for key, name, state in _states(found):
                if seen.get(key) != state:
                    seen[key] = state
                    progress(name, state)
            verdict = _verdict(found, run)
            if verdict is not None:
                return verdict
        left = None if timeout is None else begin + timeout - time.monotonic()
        if left is not None and left <= 0:
            raise KubeflowError(
                f"run {run.name!r} is not done after {timeout:g} seconds; it goes on",
                f"look at {run.url}, or wait again by the same command",
                transient=True,
            )
        time.sleep(poll if left is None else min(poll, left))


def look(server: Server, run: Submitted) -> Verdict | None:
    """Ask once how a run ended; None while it goes on.

    Raises:
        RunError: the run failed or was cancelled.
        KubeflowError: the run cannot start for want of a secret; the server does not answer, refuses, or does not say
            which tasks ran.
    """
    return _verdict(server.ask(server.runs.run_service_get_run, run.id), run)


def _states(found: Any) -> Iterator[tuple[str, str, str]]:
    """A key, the name and the state of the run and of each of its tasks."""
    yield "", "run", str(found.state or UNFINISHED[0])
    for number, task in enumerate(_tasks(found)):
        if not _PLUMBING.fullmatch(task.display_name or "") and task.state is not None:
            yield task.task_id or task.pod_name or f"{number}", str(task.display_name), str(task.state)


def _tasks(found: Any) -> list[Any]:
    return (found.run_details.task_details if found.run_details is not None else None) or []


def _verdict(found: Any, run: Submitted) -> Verdict | None:
    """How a run ended; None while it goes on."""
    state = str(found.state or UNFINISHED[0])
    if state in UNFINISHED:
        stuck = next((said for said in _messages(found) if _CANNOT_START.search(said)), None)
        if stuck is not None:
            raise KubeflowError(
                f"run {run.name!r} cannot start a pod ({stuck})",
                f"create the secret it waits for, or end the run: {run.url}",
            )
        return None
    tasks = [(str(task.display_name), str(task.state)) for task in _tasks(found)]
    failed = [name for name, task in tasks if task == "FAILED" and not _PLUMBING.fullmatch(name)]
    # Older servers call a run with an exit handler a success whatever failed in it (kubeflow/pipelines#11405).
    if state == "SUCCEEDED" and not failed:
        if (REGISTER, "SUCCEEDED") in tasks:
            return "passed"
        if (EVALUATE, "SUCCEEDED") in tasks:
            return "refused"
        raise KubeflowError(
            f"run {run.name!r} succeeded, but the server does not say whether {EVALUATE!r} and {REGISTER!r} ran",
            f"see whether the model was registered: {run.url}",
        )
    where = f" in {', '.join(repr(name) for name in dict.fromkeys(failed))}" if failed else ""
    said = next(_messages(found), "")
    word = {"FAILED": "failed", "SUCCEEDED": "failed", "CANCELED": "was cancelled"}.get(state, f"ended as {state}")
    raise RunError(f"run {run.name!r} {word}{where}" + (f" ({said})" if said else ""), f"its log is at {run.url}")


def _messages(found: Any) -> Iterator[str]:
    """What the server says of errors, those of tasks first."""
    for each in [*_tasks(found), found]:
        history = [status.error for status in each.state_history or [] if status.error is not None]
        for error in [each.error, *history]:
            if error is not None and error.message:
                yield " ".join(str(error.message).split()).rstrip(".")

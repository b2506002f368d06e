"""Recurring runs: those of a schedules file, each made once and replaced when it changes.

A recurring run of ours says in its description of which schedule and pipeline it is, and the digest of its content. So
everything is found again, and a deployment that died is completed by the next one.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import kfp_server_api

from automerge.spec import load_spec
from automerge_pipelines.arguments import spec_argument
from automerge_pipelines.client import Server, equals
from automerge_pipelines.parameters import run_parameters
from automerge_pipelines.schedules import Schedule
from automerge_pipelines.versions import Package, Version

UNFINISHED = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "CANCELING")
"""States of a run that goes on, or is about to begin."""

_MARKER = re.compile(r"schedule=(?P<schedule>\S+) pipeline=(?P<pipeline>\S+) content=sha256:(?P<content>[0-9a-f]{64})")


@dataclass(frozen=True)
class Wanted:
    """A schedule with everything that its recurring run is made of."""

    schedule: Schedule
    parameters: Mapping[str, Any]


Action = Literal["created", "updated", "unchanged", "enabled", "disabled", "deleted", "waits", "not listed"]


@dataclass(frozen=True)
class Change:
    """What happened to a recurring run.

    ``waits``: it is disabled, and is deleted by a later deployment, because one of its runs goes on.
    ``not listed``: it is ours, no schedule names it any more, and it was left.
    """

    name: str
    action: Action


def prepare_schedules(package: Package, schedules: Sequence[Schedule]) -> list[Wanted]:
    """Read the specs of the schedules, before anything is asked of a server.

    Raises:
        SpecError: a spec cannot be read or is wrong, or a parameter is not one of the pipeline.
    """
    return [
        Wanted(
            schedule,
            run_parameters(
                package.parameters,
                spec_argument(load_spec(schedule.spec)),
                schedule.parameters,
                f"schedule {schedule.name!r}",
            ),
        )
        for schedule in schedules
    ]


def apply_schedules(
    server: Server, version: Version, wanted: Sequence[Wanted], experiment_id: str, *, prune: bool = False
) -> list[Change]:
    """Make the recurring runs of this pipeline those that are wanted.

    The server cannot change a recurring run, only switch it on and off; so one whose content differs is replaced, the
    new one first. Should we die in between, both start their runs until the next deployment removes the old one: a
    merge that is done twice registers one version, while one that is missed goes unnoticed.

    The old one is deleted so that a run of it goes on; since older servers end such a run, it is only disabled while it
    has one, and deleted by a later deployment.

    Args:
        server: where.
        version: what the recurring runs start.
        wanted: of :func:`prepare_schedules`.
        experiment_id: where the runs are grouped.
        prune: delete those of ours that are no longer wanted, instead of reporting them.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    found = list(our_recurring_runs(server, version.pipeline))
    changes = []
    for each in wanted:
        name = each.schedule.name
        content = _content(each, version, experiment_id)
        same = [run for run, marker in found if (marker["schedule"], marker["content"]) == (name, content)]
        others = [run for run, marker in found if marker["schedule"] == name and run not in same]
        if same:
            changes.append(Change(name, _switch(server, same[0], each.schedule.enabled)))
        else:
            made = _recurring_run(each, version, experiment_id, content, server)
            server.ask(server.recurring_runs.recurring_run_service_create_recurring_run, made)
            changes.append(Change(name, "updated" if others else "created"))
        retired = [Change(old.display_name, _retire(server, old)) for old in [*same[1:], *others]]
        changes += [change for change in retired if change.action == "waits"]
    listed = {each.schedule.name for each in wanted}
    for run, marker in found:
        if marker["schedule"] not in listed:
            changes.append(Change(run.display_name, _retire(server, run) if prune else "not listed"))
    return changes


def list_recurring_runs(server: Server) -> Iterator[Any]:
    """All recurring runs that we may see, ours or not, as the server's API has them.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    listed = server.recurring_runs.recurring_run_service_list_recurring_runs
    return server.pages(listed, "recurring_runs", **server.own())


def our_recurring_runs(server: Server, pipeline: str) -> Iterator[tuple[Any, re.Match[str]]]:
    """Those that were made here for a pipeline, each with what its description says: schedule, pipeline, content.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    for run in list_recurring_runs(server):
        marker = _MARKER.search(run.description or "")
        if marker is not None and marker["pipeline"] == pipeline:
            yield run, marker


def version_of(run: Any) -> str:
    """The id of the version that a recurring run starts; empty where it takes the newest."""
    reference = run.pipeline_version_reference
    return str((reference.pipeline_version_id if reference is not None else None) or run.pipeline_version_id or "")


def _content(wanted: Wanted, version: Version, experiment_id: str) -> str:
    """Digest of all that cannot be changed in a recurring run."""
    content = {
        "cron": wanted.schedule.cron,
        "parameters": dict(wanted.parameters),
        "service_account": wanted.schedule.service_account,
        "version": version.id,
        "experiment": experiment_id,
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _recurring_run(wanted: Wanted, version: Version, experiment_id: str, content: str, server: Server) -> Any:
    schedule = wanted.schedule
    return kfp_server_api.V2beta1RecurringRun(
        display_name=f"{schedule.name}-{content[:12]}",
        description=f"Made by `automerge deploy`, which finds it by: schedule={schedule.name} "
        f"pipeline={version.pipeline} content=sha256:{content}",
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=version.pipeline_id, pipeline_version_id=version.id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(wanted.parameters)),
        service_account=schedule.service_account,
        max_concurrency="1",
        no_catchup=True,
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=schedule.cron)),
        mode="ENABLE" if schedule.enabled else "DISABLE",
        experiment_id=experiment_id,
        **server.own(),
    )


def _switch(server: Server, run: Any, enabled: bool) -> Action:
    """Enable or disable a recurring run, if it is not so already."""
    if (run.mode == "ENABLE") == enabled:
        return "unchanged"
    api = server.recurring_runs
    change = (
        api.recurring_run_service_enable_recurring_run if enabled else api.recurring_run_service_disable_recurring_run
    )
    server.ask(change, run.recurring_run_id)
    return "enabled" if enabled else "disabled"


def _retire(server: Server, run: Any) -> Literal["deleted", "waits"]:
    """Delete a recurring run, or only disable it while one of its runs goes on."""
    started = server.pages(
        server.runs.run_service_list_runs,
        "runs",
        filter=equals("recurring_run_id", run.recurring_run_id),
        sort_by="created_at desc",
        **server.own(),
    )
    if any((item.state or UNFINISHED[0]) in UNFINISHED for item in started):
        _switch(server, run, False)
        return "waits"
    server.ask(
        server.recurring_runs.recurring_run_service_delete_recurring_run,
        run.recurring_run_id,
        propagation_policy="ORPHAN",
    )
    return "deleted"

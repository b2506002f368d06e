"""Deploying: a pipeline version for each content, recurring runs for a schedules file, and what is there already.

Everything is found by name before it is made, so a deployment that was interrupted is completed by the next one.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import kfp_server_api
import yaml

from automerge.plugins import nearest
from automerge.spec import load_spec
from automerge_pipelines.arguments import spec_argument
from automerge_pipelines.client import KubeflowError, Server, equals
from automerge_pipelines.merge_pipeline import compile_pipeline, version_name
from automerge_pipelines.parameters import declared_parameters, run_parameters
from automerge_pipelines.schedules import Schedule
from automerge_pipelines.settings import Settings

EXPERIMENT = "automerge"
"""Where the runs are grouped if nothing else is said."""

UNFINISHED = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "CANCELING")
"""States of a run that goes on, or is about to begin."""

_NEWEST = "created_at desc"
_OUR_VERSION = re.compile(r".+-[0-9a-f]{12}")
_MARKER = re.compile(r"schedule=(?P<schedule>\S+) pipeline=(?P<pipeline>\S+) content=sha256:(?P<content>[0-9a-f]{64})")


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        pipeline: the pipeline's name.
        version: the version's name, which says the content.
        content: the compiled YAML.
        parameters: what a run may set, by name.
    """

    pipeline: str
    version: str
    content: bytes
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Version:
    """A version on the server.

    Attributes:
        pipeline, name: of pipeline and version.
        pipeline_id, id: what the server calls them.
        parameters: what a run may set, by name.
    """

    pipeline: str
    name: str
    pipeline_id: str
    id: str
    parameters: Mapping[str, Any]


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


def compile_package(settings: Settings) -> Package:
    """Compile the pipeline with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        content = compile_pipeline(settings, Path(folder) / "pipeline.yaml").read_bytes()
    pipeline = next(yaml.safe_load_all(content))
    return Package(settings.name, version_name(content), content, declared_parameters(pipeline))


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


def upload(server: Server, package: Package) -> tuple[Version, bool]:
    """The version with this content, and whether it was uploaded now.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    pipeline_id = _find_pipeline(server, package.pipeline) or _create_pipeline(server, package.pipeline)
    found = _find_version(server, pipeline_id, package.version)
    uploaded = found is None
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pipeline.yaml"
            path.write_bytes(package.content)
            try:
                found = server.ask(
                    server.uploads.upload_pipeline_version, str(path), name=package.version, pipelineid=pipeline_id
                )
            except KubeflowError as error:
                found = _find_version(server, pipeline_id, package.version) if error.status == 409 else None
                if found is None:
                    raise
                uploaded = False  # someone else was faster
    return (
        Version(package.pipeline, package.version, pipeline_id, found.pipeline_version_id, package.parameters),
        uploaded,
    )


def find_version(server: Server, pipeline: str, name: str | None = None) -> Version:
    """A version of a deployed pipeline, by default the newest.

    Raises:
        KubeflowError: the server does not answer or refuses, or has no such pipeline or version.
    """
    pipeline_id = _find_pipeline(server, pipeline)
    if pipeline_id is None:
        others = [item.display_name for item in _pipelines(server)]
        raise KubeflowError(
            f"{server.endpoint}: there is no pipeline {pipeline!r}",
            f"{nearest(pipeline, others)} or run `automerge deploy` first"
            if others
            else "run `automerge deploy` first",
        )
    versions = server.pages(
        server.pipelines.pipeline_service_list_pipeline_versions, "pipeline_versions", pipeline_id, sort_by=_NEWEST
    )
    names = []
    for found in versions:
        if name is None or found.display_name == name:
            get = server.pipelines.pipeline_service_get_pipeline_version
            document = found.pipeline_spec or server.ask(get, pipeline_id, found.pipeline_version_id).pipeline_spec
            return Version(
                pipeline,
                found.display_name,
                pipeline_id,
                found.pipeline_version_id,
                declared_parameters(document or {}),
            )
        names.append(found.display_name)
    if not names:
        raise KubeflowError(
            f"{server.endpoint}: the pipeline {pipeline!r} has no version", "run `automerge deploy` first"
        )
    raise KubeflowError(
        f"{server.endpoint}: the pipeline {pipeline!r} has no version {name!r}", nearest(str(name), names[:10])
    )


def find_experiment(server: Server, name: str = EXPERIMENT) -> str:
    """The id of the experiment with this name, which is made if there is none.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    listed = server.experiments.experiment_service_list_experiments
    for found in server.named(listed, "experiments", name, **server.own()):
        return str(found.experiment_id)
    experiment = kfp_server_api.V2beta1Experiment(display_name=name, **server.own())
    try:
        made = server.ask(server.experiments.experiment_service_create_experiment, experiment)
    except KubeflowError as error:
        if error.status != 409:
            raise
        made = next(server.named(listed, "experiments", name, **server.own()), None)  # someone else was faster
        if made is None:
            raise
    return str(made.experiment_id)


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
    found = list(_our_recurring_runs(server, version.pipeline))
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


def prune_versions(server: Server, version: Version, keep: int) -> list[str]:
    """Delete the versions that we made, but the newest ``keep``, the deployed one, and what recurring runs start.

    Returns:
        The names of the deleted versions. Runs that used them stay, without their graph in the user interface.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    used = {_version_of(run) for run in _recurring_runs(server)} | {version.id}
    ours = [
        found
        for found in server.pages(
            server.pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            version.pipeline_id,
            sort_by=_NEWEST,
        )
        if _OUR_VERSION.fullmatch(found.display_name)
    ]
    deleted = []
    for old in ours[keep:]:
        if old.pipeline_version_id not in used:
            server.ask(
                server.pipelines.pipeline_service_delete_pipeline_version, version.pipeline_id, old.pipeline_version_id
            )
            deleted.append(old.display_name)
    return deleted


@dataclass(frozen=True)
class Listing:
    """What is deployed of a pipeline.

    Attributes:
        versions: name and time of each, the newest first.
        recurring_runs: of each that we made: name, cron, whether it is enabled, and the name of its version.
    """

    versions: list[tuple[str, str]]
    recurring_runs: list[tuple[str, str, bool, str]]


def list_deployed(server: Server, pipeline: str) -> Listing:
    """The versions and recurring runs of a pipeline.

    Raises:
        KubeflowError: the server does not answer or refuses, or has no such pipeline.
    """
    first = find_version(server, pipeline)
    versions = list(
        server.pages(
            server.pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            first.pipeline_id,
            sort_by=_NEWEST,
        )
    )
    names = {found.pipeline_version_id: found.display_name for found in versions}
    return Listing(
        [(found.display_name, _time(found.created_at)) for found in versions],
        [
            (run.display_name, _cron(run), run.mode == "ENABLE", names.get(_version_of(run), "a deleted version"))
            for run, _ in _our_recurring_runs(server, pipeline)
        ],
    )


def _pipelines(server: Server) -> Iterator[Any]:
    return server.pages(server.pipelines.pipeline_service_list_pipelines, "pipelines", **server.own())


def _find_pipeline(server: Server, name: str) -> str | None:
    listed = server.pipelines.pipeline_service_list_pipelines
    found = next(server.named(listed, "pipelines", name, **server.own()), None)
    return None if found is None else str(found.pipeline_id)


def _create_pipeline(server: Server, name: str) -> str:
    pipeline = kfp_server_api.V2beta1Pipeline(
        display_name=name, name=name, description="Merges models; made by `automerge deploy`.", **server.own()
    )
    try:
        return str(server.ask(server.pipelines.pipeline_service_create_pipeline, pipeline).pipeline_id)
    except KubeflowError as error:
        found = _find_pipeline(server, name) if error.status == 409 else None
        if found is None:
            raise
        return found  # someone else was faster


def _find_version(server: Server, pipeline_id: str, name: str) -> Any:
    listed = server.pipelines.pipeline_service_list_pipeline_versions
    return next(server.named(listed, "pipeline_versions", name, pipeline_id), None)


def _recurring_runs(server: Server) -> Iterator[Any]:
    listed = server.recurring_runs.recurring_run_service_list_recurring_runs
    return server.pages(listed, "recurring_runs", **server.own())


def _our_recurring_runs(server: Server, pipeline: str) -> Iterator[tuple[Any, re.Match[str]]]:
    for run in _recurring_runs(server):
        marker = _MARKER.search(run.description or "")
        if marker is not None and marker["pipeline"] == pipeline:
            yield run, marker


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
        sort_by=_NEWEST,
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


def _version_of(run: Any) -> str:
    reference = run.pipeline_version_reference
    return str((reference.pipeline_version_id if reference is not None else None) or run.pipeline_version_id or "")


def _cron(run: Any) -> str:
    schedule = run.trigger.cron_schedule if run.trigger is not None else None
    return str(schedule.cron) if schedule is not None else ""


def _time(value: Any) -> str:
    return value.strftime("%Y-%m-%d %H:%M") if value is not None else ""

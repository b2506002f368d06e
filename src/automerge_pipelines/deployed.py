"""What is deployed of a pipeline: listing it, and deleting what is no longer needed."""

import re
from dataclasses import dataclass
from typing import Any

from automerge_pipelines.client import Server
from automerge_pipelines.recurring_runs import list_recurring_runs, our_recurring_runs, version_of
from automerge_pipelines.versions import Version, find_version, list_versions

_OUR_VERSION = re.compile(r".+-[0-9a-f]{12}")


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
    versions = list(list_versions(server, find_version(server, pipeline).pipeline_id))
    names = {found.pipeline_version_id: found.display_name for found in versions}
    return Listing(
        [(found.display_name, _time(found.created_at)) for found in versions],
        [
            (run.display_name, _cron(run), run.mode == "ENABLE", names.get(version_of(run), "a deleted version"))
            for run, _ in our_recurring_runs(server, pipeline)
        ],
    )


def prune_versions(server: Server, version: Version, keep: int) -> list[str]:
    """Delete the versions that we made, but the newest ``keep``, the deployed one, and what recurring runs start.

    Returns:
        The names of the deleted versions. Runs that used them stay, without their graph in the user interface.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    used = {version_of(run) for run in list_recurring_runs(server)} | {version.id}
    listed = list_versions(server, version.pipeline_id)
    ours = [found for found in listed if _OUR_VERSION.fullmatch(found.display_name)]
    deleted = []
    for old in ours[keep:]:
        if old.pipeline_version_id not in used:
            server.ask(
                server.pipelines.pipeline_service_delete_pipeline_version, version.pipeline_id, old.pipeline_version_id
            )
            deleted.append(old.display_name)
    return deleted


def _cron(run: Any) -> str:
    schedule = run.trigger.cron_schedule if run.trigger is not None else None
    return str(schedule.cron) if schedule is not None else ""


def _time(value: Any) -> str:
    return value.strftime("%Y-%m-%d %H:%M") if value is not None else ""

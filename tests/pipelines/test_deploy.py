"""`automerge deploy`: what a deployment makes, and that another one makes nothing again."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest

from automerge_pipelines.client import KubeflowError, Server, connect
from automerge_pipelines.deployed import prune_versions
from automerge_pipelines.experiments import find_experiment
from automerge_pipelines.recurring_runs import Change, apply_schedules, prepare_schedules
from automerge_pipelines.schedules import Schedule, load_schedules
from automerge_pipelines.versions import Package, Version, find_version, upload
from tests.pipelines.commands import Command
from tests.pipelines.kfp_server import KfpServer

CREATE = "recurring_run_service_create_recurring_run"
DELETE = "recurring_run_service_delete_recurring_run"
UPLOAD = "upload_pipeline_version"


@pytest.fixture
def client(server: KfpServer) -> Server:
    return connect(server.endpoint)


@pytest.fixture
def version(client: Server, package: Package) -> Version:
    return upload(client, package)[0]


@pytest.fixture
def schedules(spec: Path, tmp_path: Path) -> Path:
    path = tmp_path / "schedules.yaml"
    path.write_text("schedules: [{name: nightly, cron: 0 2 * * *, spec: tiny.json, parameters: {cpu: 8}}]")
    return path


class Scheduling:
    """Applies schedules of one spec."""

    def __init__(self, client: Server, package: Package, version: Version, spec: Path) -> None:
        self.client, self.package, self.version, self.spec = client, package, version, spec
        self.experiment = find_experiment(client, "automerge")

    def apply(self, *schedules: dict[str, Any], prune: bool = False) -> list[Change]:
        models = [Schedule.model_validate({"spec": self.spec, "cron": "0 2 * * *", **each}) for each in schedules]
        wanted = prepare_schedules(self.package, models)
        return apply_schedules(self.client, self.version, wanted, self.experiment, prune=prune)


@pytest.fixture
def scheduling(client: Server, package: Package, version: Version, spec: Path) -> Iterator[Scheduling]:
    yield Scheduling(client, package, version, spec)


def test_the_first_deployment_uploads_and_the_second_changes_nothing(
    automerge: Command, server: KfpServer, schedules: Path
) -> None:
    first = automerge("deploy", "--schedules", schedules)
    assert first.code == 0, first
    assert re.search(r"^pipeline automerge-merge: version 0\.1\.0-[0-9a-f]{12} uploaded$", first.out, re.M), first
    assert "recurring run nightly: created" in first.out
    assert server.changes() == [
        "pipeline_service_create_pipeline",
        UPLOAD,
        "experiment_service_create_experiment",
        CREATE,
    ]
    second = automerge("deploy", "--schedules", schedules)
    assert second.out == first.out.replace("uploaded", "is there already").replace("created", "unchanged")
    assert server.changes() == []


def test_other_settings_are_another_version_and_the_recurring_run_follows(
    automerge: Command, server: KfpServer, schedules: Path, tmp_path: Path
) -> None:
    automerge("deploy", "--schedules", schedules)
    (tmp_path / "deployment.yaml").write_text("image: registry.example/automerge@sha256:" + "0" * 64)
    done = automerge("deploy", "--settings", "deployment.yaml", "--schedules", schedules)
    assert "uploaded" in done.out
    assert "recurring run nightly: updated" in done.out
    old, new = server.pipeline_versions.values()
    assert old["name"] != new["name"]
    assert old["pipeline_id"] == new["pipeline_id"]
    [left] = server.recurring_runs.values()
    assert left["pipeline_version_reference"]["pipeline_version_id"] == new["pipeline_version_id"]
    back = automerge("deploy")
    assert f"version {old['name']} is there already" in back.out
    assert f"notice: version {new['name']} is newer, and what `automerge submit` takes" in back.err


def test_what_a_recurring_run_is_made_of(scheduling: Scheduling, server: KfpServer, spec: Path) -> None:
    scheduling.apply(
        {"name": "nightly", "parameters": {"cpu": 8, "image": "a:1"}, "service_account": "merger"},
        {"name": "off", "cron": "30 0 2 ? * SUN", "enabled": False},
    )
    nightly, off = server.recurring_runs.values()
    assert re.fullmatch(r"nightly-[0-9a-f]{12}", nightly["display_name"])
    assert nightly["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert nightly["max_concurrency"] == "1"
    assert nightly["no_catchup"] is True
    assert nightly["mode"] == "ENABLE"
    assert nightly["service_account"] == "merger"
    parameters = nightly["runtime_config"]["parameters"]
    assert {name: value for name, value in parameters.items() if name != "spec"} == {"cpu": "8", "image": "a:1"}
    assert json.loads(parameters["spec"])["name"] == "tiny"
    assert (off["mode"], off["trigger"]["cron_schedule"]["cron"]) == ("DISABLE", "30 0 2 ? * SUN")
    assert "service_account" not in off


def test_a_changed_schedule_replaces_its_recurring_run_the_new_one_first(
    scheduling: Scheduling, server: KfpServer
) -> None:
    scheduling.apply({"name": "nightly"}, {"name": "weekly"})
    server.changes()
    assert scheduling.apply({"name": "nightly", "cron": "0 3 * * *"}, {"name": "weekly"}) == [
        Change("nightly", "updated"),
        Change("weekly", "unchanged"),
    ]
    assert server.changes() == [CREATE, DELETE]
    crons = [run["trigger"]["cron_schedule"]["cron"] for run in server.recurring_runs.values()]
    assert sorted(crons) == ["0 0 2 * * *", "0 0 3 * * *"]


def test_a_changed_spec_is_a_changed_schedule(scheduling: Scheduling, server: KfpServer, spec: Path) -> None:
    scheduling.apply({"name": "nightly"})
    value = json.loads(spec.read_text())
    value["search"]["trials"] = 9
    spec.write_text(json.dumps(value))
    assert scheduling.apply({"name": "nightly"}) == [Change("nightly", "updated")]
    [run] = server.recurring_runs.values()
    assert json.loads(run["runtime_config"]["parameters"]["spec"])["search"]["trials"] == 9


def test_enabled_is_changed_in_place_also_where_someone_else_changed_it(
    scheduling: Scheduling, server: KfpServer
) -> None:
    scheduling.apply({"name": "nightly"})
    server.changes()
    assert scheduling.apply({"name": "nightly", "enabled": False}) == [Change("nightly", "disabled")]
    assert scheduling.apply({"name": "nightly"}) == [Change("nightly", "enabled")]
    assert [name.split("_")[3] for name in server.changes()] == ["disable", "enable"]
    next(iter(server.recurring_runs.values()))["mode"] = "DISABLE"
    assert scheduling.apply({"name": "nightly"}) == [Change("nightly", "enabled")]


def test_one_that_is_no_longer_listed_is_reported_and_deleted_only_when_asked(
    automerge: Command, server: KfpServer, schedules: Path
) -> None:
    automerge("deploy", "--schedules", schedules)
    [run] = server.recurring_runs.values()
    # Neither made by us nor of this pipeline: not ours to delete.
    server.recurring_runs["by-hand"] = {**run, "recurring_run_id": "by-hand", "description": "by hand"}
    other = run["description"].replace("automerge-merge", "another-pipeline")
    server.recurring_runs["other"] = {**run, "recurring_run_id": "other", "description": other}
    schedules.write_text("schedules: []")
    done = automerge("deploy", "--schedules", schedules)
    assert f"notice: recurring run {run['display_name']}: no longer in" in done.err
    assert len(server.recurring_runs) == 3
    done = automerge("deploy", "--schedules", schedules, "--prune-schedules")
    assert f"recurring run {run['display_name']}: deleted" in done.out
    assert set(server.recurring_runs) == {"by-hand", "other"}


@pytest.mark.parametrize("died_at", [CREATE, DELETE])
def test_a_deployment_that_died_in_between_is_completed_by_the_next(
    automerge: Command, server: KfpServer, schedules: Path, died_at: str
) -> None:
    automerge("deploy", "--schedules", schedules)
    schedules.write_text(schedules.read_text().replace("0 2", "0 3"))
    server.break_on.append(died_at)
    done = automerge("deploy", "--schedules", schedules)
    assert done.error.endswith(
        "the connection broke before the answer; try again: what the call was to make is looked for first"
    )
    # One of the two at least is there, whichever call failed.
    assert len(server.recurring_runs) == (1 if died_at == CREATE else 2)
    assert automerge("deploy", "--schedules", schedules).code == 0
    [run] = server.recurring_runs.values()
    assert run["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"


def test_a_recurring_run_whose_run_goes_on_is_disabled_and_deleted_later(
    scheduling: Scheduling, server: KfpServer
) -> None:
    scheduling.apply({"name": "nightly"})
    [old] = server.recurring_runs.values()
    run = {"run_id": "r", "display_name": "r", "state": "RUNNING", "recurring_run_id": old["recurring_run_id"]}
    server.runs["r"] = {**run, "created_at": "2026-11-02T00:00:00Z"}
    changed = {"name": "nightly", "cron": "0 3 * * *"}
    assert scheduling.apply(changed) == [Change("nightly", "updated"), Change(old["display_name"], "waits")]
    assert [each["mode"] for each in server.recurring_runs.values()] == ["DISABLE", "ENABLE"]
    assert scheduling.apply(changed) == [Change("nightly", "unchanged"), Change(old["display_name"], "waits")]
    server.runs["r"]["state"] = "SUCCEEDED"
    assert scheduling.apply(changed) == [Change("nightly", "unchanged")]
    assert len(server.recurring_runs) == 1
    assert server.ended_by_deletion == []


def test_a_deletion_asks_the_server_to_spare_the_runs(scheduling: Scheduling, server: KfpServer) -> None:
    """A run that begins between the look and the deletion goes on, where the server knows how."""
    scheduling.apply({"name": "nightly"})
    [old] = server.recurring_runs.values()
    run = {"run_id": "r", "display_name": "r", "state": "RUNNING", "created_at": "2026-11-02T00:00:00Z"}
    look = server.run_service_list_runs

    def begins_after_the_look(*arguments: Any) -> dict[str, Any]:
        answer = look(*arguments)
        server.runs["r"] = {**run, "recurring_run_id": old["recurring_run_id"]}
        return answer

    server.run_service_list_runs = begins_after_the_look  # type: ignore[method-assign]
    scheduling.apply({"name": "nightly", "cron": "0 3 * * *"})
    assert old["recurring_run_id"] not in server.recurring_runs
    assert server.ended_by_deletion == []


def test_two_of_the_same_become_one(scheduling: Scheduling, server: KfpServer) -> None:
    """Two deployments at the same moment both make it."""
    scheduling.apply({"name": "nightly"})
    [first] = server.recurring_runs.values()
    server.recurring_runs["twin"] = {**first, "recurring_run_id": "twin", "created_at": "2026-11-30T00:00:00Z"}
    assert scheduling.apply({"name": "nightly"}) == [Change("nightly", "unchanged")]
    assert list(server.recurring_runs) == [first["recurring_run_id"]]


def test_pruning_keeps_the_newest_what_is_in_use_and_what_is_not_ours(
    client: Server, version: Version, server: KfpServer, scheduling: Scheduling
) -> None:
    scheduling.apply({"name": "nightly"})  # uses `version`, the oldest
    for name in [*(f"0.1.0-{number:012x}" for number in range(5)), "by hand"]:
        server._add(
            "pipeline_versions",
            "pipeline_version_id",
            {**server.pipeline_versions[version.id], "name": name, "display_name": name},
        )
    deployed = find_version(client, version.pipeline, "0.1.0-000000000002")
    assert prune_versions(client, deployed, 2) == ["0.1.0-000000000001", "0.1.0-000000000000"]
    names = [found["name"] for found in server.pipeline_versions.values()]
    assert names == [version.name, "0.1.0-000000000002", "0.1.0-000000000003", "0.1.0-000000000004", "by hand"]


def test_prune_by_the_command(automerge: Command, server: KfpServer, tmp_path: Path) -> None:
    for image in ("a:1", "a:2", "a:3"):
        (tmp_path / "deployment.yaml").write_text(f"image: {image}")
        done = automerge("deploy", "--settings", "deployment.yaml", "--prune", "2")
    assert done.code == 0
    assert len(re.findall("^version .* deleted$", done.out, re.M)) == 1
    assert len(server.pipeline_versions) == 2


def test_listing(automerge: Command, server: KfpServer, schedules: Path) -> None:
    automerge("deploy", "--schedules", schedules)
    server.changes()
    done = automerge("deploy", "--list")
    [found] = server.pipeline_versions.values()
    [run] = server.recurring_runs.values()
    assert done.out.split() == [
        *("version", found["name"], "2026-11-01", "00:02"),
        *("recurring", "run", run["display_name"], "enabled", "0", "0", "2", "*", "*", "*", f"({found['name']})"),
    ]
    assert server.changes() == []


def test_someone_else_makes_the_same_at_the_same_moment(client: Server, package: Package, server: KfpServer) -> None:
    """Each is not there when we look, and there when we make it."""
    version, uploaded = upload(client, package)
    experiment = find_experiment(client, "automerge")
    assert uploaded
    for what in ("pipeline_service_list_pipelines", "pipeline_service_list_pipeline_versions"):
        server.see_nothing_once(what)
        assert upload(client, package) == (version, False)
    server.see_nothing_once("experiment_service_list_experiments")
    assert find_experiment(client, "automerge") == experiment
    assert len(server.pipelines) == len(server.pipeline_versions) == len(server.experiments) == 1


def test_on_a_server_of_several_users_everything_is_in_the_namespace(
    automerge: Command, server: KfpServer, schedules: Path
) -> None:
    server.multi_user = True
    assert "no namespace is named; name yours with --namespace" in automerge("deploy").error
    done = automerge("deploy", "--schedules", schedules, "--namespace", "team")
    assert done.code == 0, done
    for kind in (server.pipelines, server.experiments, server.recurring_runs):
        assert [item["namespace"] for item in kind.values()] == ["team"]
    assert "unchanged" in automerge("deploy", "--schedules", schedules, "--namespace", "team").out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "schedules: [{name: a, cron: 0 25 * * *, spec: tiny.json}]",
            "schedules.0.cron: the hour 25 is not from 0 to 23",
        ),
        ("schedules: [{name: a, cron: '* *', spec: tiny.json}]", "schedules.0.cron: '* *' has 2 fields; cron has 5"),
        ("schedules: [{name: A, cron: 0 2 * * *, spec: tiny.json}]", "'A' is not valid; use up to 50 small letters"),
        ("schedules: [{name: a, cron: 0 2 * * *, spec: tiny.json, paused: true}]", "paused: unknown key"),
        ("schedules: [{name: a, cron: 0 2 * * *}]", "schedules.0.spec: this key is missing"),
        (
            "schedules: [&a {name: a, cron: 0 2 * * *, spec: tiny.json}, *a]",
            "two schedules are called 'a'; rename one",
        ),
        ("schedules: [{name: a, cron: 0 2 * * *, spec: none.json}]", "none.json: cannot be read (No such file"),
        (
            "schedules: [{name: a, cron: 0 2 * * *, spec: tiny.json, parameters: {memroy: 8Gi}}]",
            "schedule 'a': the pipeline has no parameter 'memroy' to set; did you mean 'memory'?",
        ),
        (
            "schedules: [{name: a, cron: 0 2 * * *, spec: tiny.json, parameters: {spec: x}}]",
            "the parameter 'spec' is the content of the file",
        ),
        ("[]", "the file of schedules is empty or not a mapping"),
    ],
)
def test_a_wrong_schedules_file_is_refused_before_any_request(
    automerge: Command, server: KfpServer, schedules: Path, text: str, said: str
) -> None:
    schedules.write_text(text)
    assert said in automerge("deploy", "--schedules", schedules).error
    assert server.log == []


def test_prune_schedules_needs_schedules(automerge: Command, server: KfpServer) -> None:
    assert "--prune-schedules needs --schedules" in automerge("deploy", "--prune-schedules").error


def test_relative_specs_start_at_the_schedules_file(schedules: Path, spec: Path) -> None:
    [schedule] = load_schedules(schedules)
    assert schedule.spec == spec
    assert schedule.cron == "0 0 2 * * *"


def test_the_server_refuses_what_its_description_does_not_have(client: Server, version: Version) -> None:
    """The stand-in is strict: what we send is checked, not only received."""
    wrong = [
        kfp_server_api.V2beta1RecurringRun(display_name="a", max_concurrency=1),
        kfp_server_api.V2beta1RecurringRun(display_name="a", mode="ON"),
    ]
    for each in wrong:
        with pytest.raises(KubeflowError, match="400"):
            client.ask(client.recurring_runs.recurring_run_service_create_recurring_run, each)
    with pytest.raises(KubeflowError, match="filtering on unrecognized field 'colour'"):
        list(
            client.pages(
                client.runs.run_service_list_runs,
                "runs",
                filter='{"predicates": [{"operation": "EQUALS", "key": "colour", "stringValue": "red"}]}',
            )
        )

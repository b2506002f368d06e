"""`automerge submit`: one run for one spec, and how it is followed."""

import json
import re
from pathlib import Path

import pytest

from automerge_pipelines.versions import Package
from tests.pipelines.commands import Command, Done
from tests.pipelines.kfp_server import KfpServer

CREATE = "run_service_create_run"


@pytest.fixture(autouse=True)
def deployed(server: KfpServer, package: Package) -> str:
    """The pipeline is there, in one version, whose name this is."""
    pipeline = server._add("pipelines", "pipeline_id", {"name": package.pipeline, "display_name": package.pipeline})
    query = {"pipelineid": pipeline["pipeline_id"], "name": package.version}
    server.upload_pipeline_version([], query, package.content)
    return package.version


def tasks(**changed: str) -> dict[str, str]:
    names = ("fetch", "segment", "search_merge", "evaluate", "register")
    return {**dict.fromkeys(names, "SUCCEEDED"), **changed}


def follow(automerge: Command, spec: Path, *options: object) -> Done:
    return automerge("submit", spec, "--wait", "--poll", "0.05", *options)


def test_a_run_is_started_once(automerge: Command, server: KfpServer, spec: Path, deployed: str) -> None:
    first = automerge("submit", spec, "--parameter", "memory=32Gi")
    assert first.code == 0, first
    [run] = server.runs.values()
    name = run["display_name"]
    assert re.fullmatch(rf"tiny-[0-9a-f]{{12}}-{re.escape(deployed)}", name)
    assert first.out.splitlines() == [
        f"started: {name} ({run['run_id']})",
        f"{server.endpoint}/#/runs/details/{run['run_id']}",
    ]
    parameters = run["runtime_config"]["parameters"]
    assert json.loads(parameters.pop("spec"))["name"] == "tiny"
    assert parameters == {"memory": "32Gi"}
    server.changes()
    second = automerge("submit", spec, "--parameter", "memory=32Gi")
    assert second.code == 0
    assert f"there already, pending: {name} ({run['run_id']}); --again starts another" in second.out
    assert server.changes() == []


def test_the_user_interface_may_be_elsewhere(
    automerge: Command, server: KfpServer, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOMERGE_KFP_UI", "https://kubeflow.example/_/pipeline/")
    done = automerge("submit", spec)
    [identity] = server.runs
    assert done.out.splitlines()[1] == f"https://kubeflow.example/_/pipeline/#/runs/details/{identity}"


@pytest.mark.parametrize(
    ("state", "storage", "starts"),
    [
        ("PENDING", "AVAILABLE", False),
        ("RUNNING", "AVAILABLE", False),
        ("PAUSED", "AVAILABLE", False),
        ("SUCCEEDED", "AVAILABLE", False),
        ("RUNTIME_STATE_UNSPECIFIED", "AVAILABLE", False),
        ("FAILED", "AVAILABLE", True),
        ("CANCELED", "AVAILABLE", True),
        ("CANCELING", "AVAILABLE", True),
        ("SUCCEEDED", "ARCHIVED", True),
    ],
)
def test_which_run_makes_another_needless(
    automerge: Command, server: KfpServer, spec: Path, state: str, storage: str, starts: bool
) -> None:
    automerge("submit", spec)
    next(iter(server.runs.values())).update(state=state, storage_state=storage)
    automerge("submit", spec)
    assert len(server.runs) == (2 if starts else 1)


def test_what_is_another_run(automerge: Command, server: KfpServer, spec: Path) -> None:
    automerge("submit", spec)
    automerge("submit", spec, "--again")
    automerge("submit", spec, "--parameter", "cpu=8")
    automerge("submit", spec, "--run-name", "by hand")
    automerge("submit", spec, "--run-name", "By Hand")  # the server's filter takes it for the same
    value = json.loads(spec.read_text())
    spec.write_text(json.dumps({**value, "search": {**value["search"], "seed": 1}}))
    automerge("submit", spec)
    names = [run["display_name"] for run in server.runs.values()]
    assert len(names) == 6
    assert len(set(names)) == 5
    assert names[0] == names[1]


def test_an_answer_that_was_lost_starts_no_second_run(automerge: Command, server: KfpServer, spec: Path) -> None:
    create = server.run_service_create_run

    def lost(*arguments: object) -> None:
        create(*arguments)  # type: ignore[arg-type]

    server.run_service_create_run = lost  # type: ignore[method-assign,assignment]
    assert "the connection broke before the answer" in automerge("submit", spec).error
    server.run_service_create_run = create  # type: ignore[method-assign]
    assert "there already" in automerge("submit", spec).out
    assert len(server.runs) == 1


def test_waiting_for_a_model_that_is_registered(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("PENDING")
    server.show("RUNNING", fetch="RUNNING", fetch_driver="SUCCEEDED")
    server.show("RUNNING", fetch="RUNNING", fetch_driver="SUCCEEDED")
    server.show("RUNNING", fetch="SUCCEEDED", segment="RUNNING")
    server.show("SUCCEEDED", **tasks())
    done = follow(automerge, spec)
    assert done.code == 0
    assert done.out.splitlines()[-1] == "passed: the model is registered"
    assert done.err.splitlines() == [
        "run: pending",
        *("run: running", "fetch: running"),
        *("fetch: succeeded", "segment: running"),
        *(
            "run: succeeded",
            "segment: succeeded",
            "search-merge: succeeded",
            "evaluate: succeeded",
            "register: succeeded",
        ),
    ]


@pytest.mark.parametrize("register", ["SKIPPED", None])
def test_waiting_for_a_model_that_the_gate_refuses(
    automerge: Command, server: KfpServer, spec: Path, register: str | None
) -> None:
    shown = (
        tasks(register=register) if register else {key: state for key, state in tasks().items() if key != "register"}
    )
    server.show("SUCCEEDED", **shown)
    done = follow(automerge, spec)
    assert done.code == 3
    assert "refused: the quality gate" in done.err
    assert "passed" not in done.out


def test_waiting_for_a_run_that_fails(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("RUNNING", fetch="RUNNING")
    server.show("FAILED", error="s3://models/tiny/base: no such object.", fetch="FAILED")
    done = follow(automerge, spec)
    assert done.code == 1
    [run] = server.runs.values()
    assert done.err.splitlines()[-1] == (
        f"error: run {run['display_name']!r} failed in 'fetch' (s3://models/tiny/base: no such object); "
        f"its log is at {server.endpoint}/#/runs/details/{run['run_id']}"
    )


def test_waiting_for_a_run_that_is_cancelled(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("CANCELING", fetch="RUNNING")
    server.show("CANCELED", fetch="FAILED")
    done = follow(automerge, spec)
    assert done.code == 1
    assert "was cancelled in 'fetch'" in done.err


def test_a_success_in_which_a_task_failed_is_none(automerge: Command, server: KfpServer, spec: Path) -> None:
    """So older servers report a run with an exit handler; it must not pass for a model that the gate refused."""
    server.show("SUCCEEDED", fetch="SUCCEEDED", segment="SUCCEEDED", search_merge="FAILED", report_status="SUCCEEDED")
    done = follow(automerge, spec)
    assert done.code == 1
    assert "failed in 'search-merge'; its log is at" in done.err


@pytest.mark.parametrize("shown", [{}, {"fetch": "SUCCEEDED", "report_status": "SUCCEEDED"}])
def test_a_success_that_says_nothing_of_the_gate_is_no_verdict(
    automerge: Command, server: KfpServer, spec: Path, shown: dict[str, str]
) -> None:
    server.show("SUCCEEDED", **shown)
    done = follow(automerge, spec)
    assert done.code == 2
    assert "succeeded, but the server does not say whether 'evaluate' and 'register' ran" in done.err


def test_an_attempt_that_failed_before_another_succeeded_is_no_failure(
    automerge: Command, server: KfpServer, spec: Path
) -> None:
    server.show("SUCCEEDED", **tasks(), **{"fetch(0)": "FAILED", "executor": "FAILED"})
    done = follow(automerge, spec)
    assert done.code == 0
    assert "(0)" not in done.err


@pytest.mark.parametrize(
    "message", ["CreateContainerConfigError", 'Error: secret "automerge-s3" not found', 'secrets "a" not found']
)
def test_a_pod_that_waits_for_a_secret_is_no_reason_to_wait_on(
    automerge: Command, server: KfpServer, spec: Path, message: str
) -> None:
    server.show("RUNNING", error=message, fetch="PENDING")
    done = follow(automerge, spec)
    assert done.code == 2
    assert f"cannot start a pod ({message}); create the secret it waits for" in done.err


def test_waiting_no_longer_than_is_said(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("RUNNING")
    done = follow(automerge, spec, "--timeout", "0.2")
    assert done.code == 2
    assert "is not done after 0.2 seconds; it goes on; look at" in done.err


def test_waiting_outlives_a_restart_of_the_server(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("RUNNING")
    server.show("SUCCEEDED", **tasks())
    server.fail["run_service_get_run"] = [503] * 7  # three attempts for each look
    assert follow(automerge, spec).code == 0


def test_waiting_ends_where_the_token_expires(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("RUNNING")
    server.fail["run_service_get_run"] = [401]
    done = follow(automerge, spec, "--timeout", "20")
    assert done.code == 2
    assert "(401: played by the test); set AUTOMERGE_KFP_TOKEN to a fresh one" in done.err


def test_waiting_for_a_run_that_was_there_already(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.show("SUCCEEDED", **tasks())
    assert follow(automerge, spec).code == 0
    done = follow(automerge, spec)
    assert done.code == 0
    assert "there already, succeeded" in done.out
    assert len(server.runs) == 1


def test_ctrl_c_leaves_the_run(
    automerge: Command, server: KfpServer, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("automerge_pipelines.submit.time.sleep", pressed)
    server.show("RUNNING")
    done = follow(automerge, spec)
    assert done.code == 130
    assert done.err.split("\n")[-4:] == ["the run goes on; the same command follows it again", "", "interrupted", ""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pipeline", "automerge-mrege"), "there is no pipeline 'automerge-mrege'; did you mean 'automerge-merge'?"),
        (("--version", "0.1.0-000000000000"), "has no version '0.1.0-000000000000'; choose one of: 0.1.0-"),
        (
            ("--parameter", "memroy=8Gi"),
            "--parameter: the pipeline has no parameter 'memroy' to set; did you mean 'memory'?",
        ),
        (("--parameter", "spec={}"), "--parameter: the pipeline has no parameter 'spec' to set"),
        (("--parameter", "memory"), "--parameter 'memory' is not of the form NAME=VALUE"),
    ],
)
def test_what_is_not_there(
    automerge: Command, server: KfpServer, spec: Path, options: tuple[str, ...], said: str
) -> None:
    assert said in automerge("submit", spec, *options).error
    assert server.runs == {}


def test_nothing_is_deployed(automerge: Command, server: KfpServer, spec: Path) -> None:
    server.pipeline_versions.clear()
    assert (
        "the pipeline 'automerge-merge' has no version; run `automerge deploy` first" in automerge("submit", spec).error
    )
    server.pipelines.clear()
    error = automerge("submit", spec).error
    assert "there is no pipeline 'automerge-merge'; run `automerge deploy` first" in error


def test_a_named_version_and_the_settings_pipeline(
    automerge: Command, server: KfpServer, spec: Path, tmp_path: Path, deployed: str
) -> None:
    old = next(iter(server.pipeline_versions.values()))
    newer = server._add("pipeline_versions", "pipeline_version_id", {**old, "name": "next", "display_name": "next"})
    automerge("submit", spec)
    automerge("submit", spec, "--version", deployed)
    references = [run["pipeline_version_reference"]["pipeline_version_id"] for run in server.runs.values()]
    assert references == [newer["pipeline_version_id"], old["pipeline_version_id"]]
    (tmp_path / "deployment.yaml").write_text("name: team-merge")
    assert "no pipeline 'team-merge'" in automerge("submit", spec, "--settings", "deployment.yaml").error


def test_a_wrong_spec_is_refused_before_any_request(automerge: Command, server: KfpServer, spec: Path) -> None:
    spec.write_text("name: x")
    done = automerge("submit", spec)
    assert done.code == 2
    assert "sources: this key is missing" in done.err
    assert server.log == []

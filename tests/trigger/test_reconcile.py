"""The decision loop step by step, crashes between any two of its writes, and the runs on Kubeflow Pipelines.

The registry is MLflow on SQLite; Kubeflow Pipelines is the strict server of the pipelines' tests.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge.errors import AutoMergeError
from automerge.spec import parse_spec
from automerge.trigger.config import TriggerConfig, load_config
from automerge.trigger.metrics import TriggerMetrics
from automerge.trigger.reconcile import DecisionLoop
from automerge.trigger.runners import KfpRuns, make_runner
from automerge.trigger.state import Run, State
from automerge_pipelines.settings import Settings
from automerge_pipelines.versions import Package, compile_package
from tests.pipelines.kfp_server import KfpServer, running_kfp
from tests.trigger.registry import add_version, client

CREATE = "run_service_create_run"
DONE = dict.fromkeys(("fetch", "segment", "search_merge", "evaluate", "register"), "SUCCEEDED")


@pytest.fixture(scope="session")
def package() -> Package:
    return compile_package(Settings())


@pytest.fixture
def kfp(package: Package, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A server on which the pipeline is deployed."""
    for name in ("AUTOMERGE_KFP_TOKEN", "AUTOMERGE_KFP_UI", "AUTOMERGE_KFP_CA_CERT"):
        monkeypatch.delenv(name, raising=False)
    with running_kfp() as server:
        pipeline = server._add("pipelines", "pipeline_id", {"name": package.pipeline, "display_name": package.pipeline})
        query = {"pipelineid": pipeline["pipeline_id"], "name": package.version}
        server.upload_pipeline_version([], query, package.content)
        yield server


class Bench:
    """A service without its web side and its thread, whose time the test sets; ``restart`` is what follows a crash."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.now = folder, 1_800_000_000.0
        self.configure(config)
        self.state = State(self.config.state)
        self.restart()

    def configure(self, config: dict[str, Any]) -> None:
        path = self.folder / "trigger.yaml"
        path.write_text(yaml.safe_dump(config))
        self.config: TriggerConfig = load_config(path)

    def restart(self) -> None:
        self.state.close()
        self.state = State(self.config.state)
        self.metrics = TriggerMetrics(self.config)
        self.loop = DecisionLoop(
            self.config, self.state, make_runner(self.config), self.metrics, self.folder, lambda: self.now
        )

    def step(self, seconds: float = 1.0) -> float:
        """An event comes, and the loop does what is due."""
        self.now += seconds
        self.loop.notice()
        return self.loop.step()

    def verbs(self) -> list[str]:
        return [each.verb for each in reversed(self.state.decisions(99))]

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def run(self) -> Run:
        [run] = self.state.runs(99)
        return run


@pytest.fixture
def bench(tmp_path: Path, config: dict[str, Any], kfp: KfpServer) -> Bench:
    config["runner"] = {"kind": "kfp", "endpoint": kfp.endpoint, "parameters": {"memory": "8Gi"}}
    config["rules"][0]["dry_run"] = False
    return Bench(tmp_path, config)


def test_from_one_candidate_to_a_verdict(bench: Bench, kfp: KfpServer, database: Path, tags: dict[str, str]) -> None:
    bench.step()
    assert bench.verbs() == []
    add_version(database, "digits-low", tags)
    bench.step()
    assert bench.verbs() == ["too_few"]
    add_version(database, "digits-high", tags)
    kfp.show("RUNNING", fetch="RUNNING")
    kfp.show("SUCCEEDED", **DONE)
    bench.step()
    assert bench.verbs() == ["too_few", "start"]
    [made] = kfp.runs.values()
    assert made["display_name"] == bench.run.name
    assert made["runtime_config"]["parameters"]["memory"] == "8Gi"
    assert (bench.run.state, bench.run.url) == ("started", f"{kfp.endpoint}/#/runs/details/{made['run_id']}")
    assert bench.count("automerge_trigger_runs_active", rule="digits") == 1
    bench.step()
    assert bench.run.state == "started"
    bench.step()
    assert bench.run.state == "passed"
    bench.step()
    assert len(kfp.runs) == 1
    assert bench.count("automerge_trigger_runs_total", rule="digits", outcome="passed") == 1
    assert bench.count("automerge_trigger_runs_active", rule="digits") == 0


@pytest.fixture
def pair(database: Path, tags: dict[str, str]) -> Path:
    """Two candidates."""
    for model in ("digits-low", "digits-high"):
        add_version(database, model, tags)
    return database


def test_a_crash_before_the_start(bench: Bench, kfp: KfpServer, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: KfpRuns, run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KfpRuns, "start", crash)
        bench.step()
    assert (bench.run.state, len(kfp.runs)) == ("intended", 0)
    bench.restart()
    bench.step()
    assert (bench.run.state, len(kfp.runs)) == ("started", 1)


@pytest.mark.parametrize("state", ["RUNNING", "FAILED", "SUCCEEDED"])
def test_a_crash_after_the_start_and_before_it_was_written_down(
    bench: Bench, kfp: KfpServer, pair: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "mark_started", crash)
        bench.step()
    assert (bench.run.state, len(kfp.runs)) == ("intended", 1)
    next(iter(kfp.runs.values()))["state"] = state  # and it may have ended meanwhile
    bench.restart()
    bench.step()
    assert (bench.run.state, len(kfp.runs)) == ("started", 1)
    assert bench.run.id in kfp.runs


def test_a_crash_after_the_verdict_and_before_it_was_written_down(
    bench: Bench, kfp: KfpServer, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    kfp.show("SUCCEEDED", **DONE)
    kfp.show("SUCCEEDED", **DONE)
    bench.step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "mark_ended", crash)
        bench.step()
    bench.restart()
    bench.step()
    assert (bench.run.state, len(kfp.runs)) == ("passed", 1)


def test_an_answer_that_was_lost_starts_no_second_run(bench: Bench, kfp: KfpServer, pair: Path) -> None:
    create = kfp.run_service_create_run

    def lost(*arguments: object) -> None:
        create(*arguments)  # type: ignore[arg-type]

    kfp.run_service_create_run = lost  # type: ignore[method-assign,assignment]
    bench.step()
    assert bench.run.state == "intended"
    assert "the connection broke before the answer" in bench.run.message
    kfp.run_service_create_run = create  # type: ignore[method-assign]
    bench.step()
    assert (bench.run.state, bench.run.message, len(kfp.runs)) == ("started", "", 1)


def test_a_server_that_is_away_only_delays(bench: Bench, kfp: KfpServer, pair: Path) -> None:
    kfp.fail[CREATE] = [503]
    bench.step()
    assert (bench.run.state, len(kfp.runs)) == ("intended", 0)
    assert "the server fails (503" in bench.run.message
    bench.step()
    assert (bench.run.state, bench.run.message, len(kfp.runs)) == ("started", "", 1)


def test_a_failed_run_is_started_again_by_an_admin_only(bench: Bench, kfp: KfpServer, pair: Path) -> None:
    kfp.show("FAILED", "out of memory", fetch="FAILED")
    bench.step()
    bench.step()
    assert bench.run.state == "failed"
    assert "failed in 'fetch' (out of memory)" in bench.run.message
    bench.step()
    assert len(kfp.runs) == 1
    assert bench.state.retry(bench.run, bench.run.spec, bench.now)
    bench.step()
    assert [run["display_name"] for run in kfp.runs.values()] == [bench.run.name, f"{bench.run.name}-2"]


def test_the_registered_version_is_found_by_its_spec(
    bench: Bench, config: dict[str, Any], kfp: KfpServer, pair: Path
) -> None:
    config["registries"][0]["ui"] = "https://mlflow.example"
    bench.configure(config)
    bench.restart()
    kfp.show("SUCCEEDED", **DONE)
    bench.step()
    [made] = kfp.runs.values()
    spec = parse_spec(made["runtime_config"]["parameters"]["spec"])  # what a task gets, and puts the digest of on it
    ours = {"automerge.spec.digest": spec.digest(), "automerge.recipe": "r"}
    add_version(pair, "merged", ours, alias=None)
    bench.step()
    assert (bench.run.state, bench.run.registered) == ("passed", "https://mlflow.example/#/models/merged/versions/1")


def test_a_refused_model_is_a_verdict(bench: Bench, kfp: KfpServer, pair: Path) -> None:
    kfp.show("SUCCEEDED", **{**DONE, "register": "SKIPPED"})
    bench.step()
    bench.step()
    assert bench.run.state == "refused"


def test_a_run_that_the_server_forgot(bench: Bench, kfp: KfpServer, pair: Path) -> None:
    bench.step()
    kfp.runs.clear()
    bench.step()
    assert (bench.run.state, bench.run.message) == ("failed", "the server does not know the run any more")


def test_a_candidate_without_its_data_is_a_decision_with_its_reason(
    bench: Bench, kfp: KfpServer, database: Path, tags: dict[str, str]
) -> None:
    add_version(database, "digits-low", tags)
    add_version(database, "digits-high", {"base": "base-1", "validation": "s3://data/validation"})
    bench.step()
    bench.step()
    assert bench.verbs() == ["invalid"]
    assert "set the tag 'test' on the version" in bench.state.decisions(1)[0].reason
    client(database).set_model_version_tag("digits-high", "1", "test", "s3://data/test")
    bench.step()
    assert bench.verbs() == ["invalid", "start"]


def test_what_waits_for_the_cool_down_is_started_without_an_event(
    bench: Bench, config: dict[str, Any], kfp: KfpServer, pair: Path, tags: dict[str, str]
) -> None:
    config["rules"][0]["cooldown_seconds"] = 100
    bench.configure(config)
    bench.restart()
    kfp.show("SUCCEEDED", **DONE)
    bench.step()
    bench.step()
    add_version(pair, "digits-low", tags)
    assert bench.step() < 100
    assert bench.verbs() == ["start", "cooling_down"]
    bench.now += 100
    bench.loop.step()
    assert bench.verbs() == ["start", "cooling_down", "start"]
    assert len(kfp.runs) == 2


def test_what_waits_for_a_place_is_started_when_one_is_free(
    bench: Bench, kfp: KfpServer, pair: Path, tags: dict[str, str]
) -> None:
    kfp.show("RUNNING", fetch="RUNNING")
    kfp.show("SUCCEEDED", **DONE)
    bench.step()
    add_version(pair, "digits-low", tags)
    bench.step()
    assert bench.verbs() == ["start", "busy"]
    bench.now += 1
    bench.loop.step()  # the first run ends, and that is noticed
    assert bench.loop.step() <= 10
    assert bench.verbs() == ["start", "busy", "start"]


def test_a_registry_that_is_away_is_asked_again_soon(bench: Bench, config: dict[str, Any]) -> None:
    config["registries"].append({"kind": "kubeflow", "name": "away", "uri": "http://127.0.0.1:9"})
    config["rules"].append({**config["rules"][0], "name": "other", "registry": "away", "select": {"tag": {"a": "b"}}})
    bench.configure(config)
    bench.restart()
    assert bench.step() == pytest.approx(5)
    found = bench.state.reconciles()
    assert "cannot read the candidates: the server does not answer" in found["away"].message
    assert found["mlflow"].succeeded == bench.now
    assert bench.count("automerge_trigger_reconcile_failures_total", registry="away") == 1
    assert bench.count("automerge_trigger_last_reconcile_timestamp_seconds", registry="mlflow") == bench.now
    assert bench.step() == pytest.approx(10)


def test_the_loop_survives_what_it_does_not_know(
    bench: Bench, pair: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    asked = threading.Event()

    def broken(self: KfpRuns, run: Run) -> None:
        asked.set()
        raise ZeroDivisionError

    monkeypatch.setattr(KfpRuns, "start", broken)
    bench.loop.start()
    assert asked.wait(60)
    bench.loop.stop()
    assert not bench.loop.alive
    assert "a step of the decision loop failed" in caplog.text
    assert bench.run.state == "intended"


def test_an_error_with_a_secret_is_struck_out(
    bench: Bench, pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOMERGE_KFP_TOKEN", "a-token-of-mine")

    def talkative(self: KfpRuns, run: Run) -> None:
        raise AutoMergeError("the server says: a-token-of-mine is not welcome")

    monkeypatch.setattr(KfpRuns, "start", talkative)
    bench.step()
    assert bench.run.message == "the server says: *** is not welcome"
    assert "a-token-of-mine" not in capsys.readouterr().out

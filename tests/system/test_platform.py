"""The whole of it on one machine, every part real: from an alias in MLflow to an alert in Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge.preservation import Evaluation
from automerge.stages.documents import Registration
from automerge.testing.s3_server import S3Server
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.helm.chart import CHART, objects, one
from tests.helm.program import installed_helm
from tests.observability.servers import Prometheus, running_gateway, running_prometheus
from tests.registry.mlflow_server import running_mlflow
from tests.trigger.service import SECRET, Service, alias_event, running_service, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

EVENTS = ["model_version_alias.created"]
HALVES = ("left", "right")


@dataclass(frozen=True)
class Platform:
    """What runs: each part's own client or address."""

    mlflow: Any
    service: Service
    prometheus: Prometheus
    root: str
    """Of the checkpoints and data, in S3."""

    def candidate(self, half: str, key: str) -> None:
        """A new version of a model, at a key in S3, gets the alias that the rule looks for."""
        made = self.mlflow.create_model_version(f"tiny-{half}", f"{self.root}/{key}", tags={"half": half})
        self.mlflow.set_registered_model_alias(f"tiny-{half}", "candidate", made.version)

    def runs(self, outcome: str) -> float:
        return self.service.metric("automerge_trigger_runs_total", rule="tiny", outcome=outcome)

    def ended(self, outcome: str, count: int = 1) -> None:
        """Wait until so many runs have ended so; another end is told with its log."""
        others = {"passed", "failed", "refused"} - {outcome}

        def look() -> bool:
            assert not any(self.runs(other) for other in others if outcome == "passed"), self.logs()
            return self.runs(outcome) == count

        wait_for(look, 300)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.service.folder.glob("runs/*/log.txt"))


def rule_of(root: str, mlflow: str) -> dict[str, Any]:
    """Two candidates are merged as soon as they are there; the best merge so far is the champion."""
    spec = tiny_spec(root, mlflow, evaluation={"resamples": 100, "onnx": False})
    value = spec.model_dump(mode="json")
    value["registry"]["promote"] = {"alias": "champion"}
    del value["sources"], value["tasks"]
    half = "$(candidate.tags.half)"
    task = {"name": half, "kind": "classification", "specialist": half}
    data = {split: f"{root}/{half}-{split}.safetensors" for split in ("validation", "test")}
    value["each"] = {"source": {"name": half, "uri": "$(candidate.uri)"}, "tasks": [{**task, **data}]}
    return {
        "name": "tiny",
        "registry": "mlflow",
        "models": ["tiny-*"],
        "select": {"alias": "candidate"},
        "cooldown_seconds": 0,
        "spec": value,
    }


def rules_of_the_chart(folder: Path) -> Path:
    """The alerts as Helm renders them for Prometheus' operator, in a file for Prometheus itself."""
    helm = installed_helm(folder)
    found = one(objects(helm, "--values", CHART / "ci" / "full-values.yaml"), "PrometheusRule", "")
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": found["spec"]["groups"]}))
    return path


@pytest.fixture(scope="module")
def platform(pair: TinyPair, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running_platform(pair, s3, tmp_path_factory.mktemp("platform")) as found:
        yield found


@contextmanager
def running_platform(pair: TinyPair, s3: S3Server, folder: Path) -> Iterator[Platform]:
    from mlflow import MlflowClient

    root = f"s3://{s3.bucket}/tiny"
    client = s3.client()
    for key in pair.keys:
        client.upload_file(str(pair.folder / key), s3.bucket, f"tiny/{key}")
    # MLflow has an S3 client of its own, which knows another variable.
    environment = {**s3.environment, "MLFLOW_S3_ENDPOINT_URL": s3.endpoint, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    artifacts = ("--no-serve-artifacts", "--default-artifact-root", f"s3://{s3.bucket}/mlflow")
    with (
        pytest.MonkeyPatch.context() as patch,
        running_mlflow(folder, *artifacts, environment=environment) as mlflow,
        running_gateway() as gateway,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        config = {
            "state": "trigger.sqlite",
            "registries": [{"kind": "mlflow", "uri": mlflow}],
            "reconcile_seconds": 3600,  # so that only deliveries start something
            "runner": {"kind": "local", "folder": "runs"},
            "rules": [rule_of(root, mlflow)],
        }
        environment["AUTOMERGE_PUSHGATEWAY"] = gateway
        with running_service(folder, config, environment) as service:
            watched = {"trigger": service.url.removeprefix("http://")}
            rules = rules_of_the_chart(folder)
            with running_prometheus(folder, rules, gateway=gateway, services=watched) as prometheus:
                registry = MlflowClient(mlflow, mlflow)
                registry.create_webhook("automerge", f"{service.url}/webhooks/mlflow", EVENTS, secret=SECRET)
                for half in HALVES:
                    registry.create_registered_model(f"tiny-{half}")
                yield Platform(registry, service, prometheus, root)


def test_from_an_alias_to_a_champion_and_from_a_failure_to_an_alert(platform: Platform, s3: S3Server) -> None:
    mlflow, service, prometheus = platform.mlflow, platform.service, platform.prometheus
    begin = time.monotonic()

    # Two fine-tunes become candidates; the webhook tells of it.
    for half in HALVES:
        platform.candidate(half, f"{half}.safetensors")
    platform.ended("passed")
    print(f"from the aliases to the champion: {time.monotonic() - begin:.1f} s")
    [run] = service.folder.glob("runs/*")

    # The merge is registered with its evidence, and is the champion, since there was none.
    [version] = mlflow.search_model_versions("name = 'tiny'")
    registered = Registration.read(run / "run" / "register" / "registration.json")
    assert registered.promotion is not None
    assert (registered.promotion.verdict, registered.promotion.reason) == ("promoted", "no version had the alias")
    assert mlflow.get_model_version_by_alias("tiny", "champion").version == version.version
    tags = {key.removeprefix("automerge."): value for key, value in version.tags.items()}
    assert (tags["recipe"], tags["gate"], tags["run"]) == (registered.recipe, "pass", run.name)
    assert tags["source.left.uri"] == f"{platform.root}/left.safetensors"
    assert len(tags["source.left.digest"]) == len(tags["source.right.digest"]) == len(tags["base.digest"]) == 64
    # A model server reads the weights from S3, without MLflow.
    weights = registered.registered.storage_uri
    assert weights is not None and weights.startswith(f"s3://{s3.bucket}/mlflow/")
    keys = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix=weights.removeprefix(f"s3://{s3.bucket}/"))
    assert any(found["Key"].endswith("/model.safetensors") for found in keys["Contents"])

    # Prometheus has what the evaluation says, and nothing to complain of.
    evaluation = Evaluation.read(run / "run" / "evaluate" / "evaluation.json")
    for task, result in evaluation.merged.tasks.items():
        assert result.pr is not None
        series = f'automerge_preservation_rate_ratio{{pipeline="tiny", task="{task}"}}'
        wait_for(lambda series=series: prometheus.values(series), 30)
        assert prometheus.values(series) == pytest.approx([result.pr.value / 100])
    assert prometheus.values('automerge_register_promoted{pipeline="tiny"}') == [1]
    assert prometheus.values("count(automerge_stage_last_run_success == 1)") == [6]
    wait_for(lambda: prometheus.values('automerge_trigger_runs_total{outcome="passed"}') == [1], 30)
    assert "AutoMergeTriggeredRunFailed" not in prometheus.firing()

    # The page shows the run, and where its result is. A delivery that comes twice starts nothing.
    page = service.get("/").text
    assert run.name in page
    assert f"#/models/tiny/versions/{version.version}" in page
    for outcome in ("accepted", "duplicate"):
        assert service.deliver(alias_event("tiny-left"), identity="the-same").outcome == outcome
    assert platform.runs("started") == 1

    # A candidate whose file is not there: the run fails, the alert fires, the champion stays.
    failure = time.monotonic()
    platform.candidate("left", "nowhere.safetensors")
    platform.ended("failed")
    wait_for(lambda: "AutoMergeTriggeredRunFailed" in prometheus.firing(), 60)
    print(f"from the alias to the alert: {time.monotonic() - failure:.1f} s")
    [alert] = [
        found
        for found in prometheus.ask("alerts")["alerts"]
        if found["labels"]["alertname"] == "AutoMergeTriggeredRunFailed"
    ]
    assert alert["labels"]["rule"] == "tiny"
    assert "tiny" in alert["annotations"]["description"]
    assert prometheus.values('automerge_stage_last_run_success{stage="fetch"}') == [0]
    page = service.get("/").text
    assert "nowhere.safetensors" in page
    assert mlflow.get_model_version_by_alias("tiny", "champion").version == version.version
    assert [found.version for found in mlflow.search_model_versions("name = 'tiny'")] == [version.version]
    assert service.stop() == 0
    print(f"in all: {time.monotonic() - begin:.1f} s")

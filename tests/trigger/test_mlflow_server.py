"""From an alias that is set on a real MLflow server, by its webhook, to a merged version registered there."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny import TinyPair
from tests.registry.mlflow_server import running_mlflow
from tests.trigger.service import SECRET, running_service, wait_for
from tests.trigger.test_service import TEMPLATE, configured, tiny_rule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVENTS = ["model_version_alias.created", "model_version_tag.set", "model_version.created"]


def test_an_alias_becomes_a_merged_version(pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with running_mlflow(tmp_path) as mlflow:
        client = MlflowClient(mlflow, mlflow)
        config: dict[str, Any] = configured(tmp_path, TEMPLATE)
        config["registries"] = [{"kind": "mlflow", "uri": mlflow}]
        rule = tiny_rule(pair, tmp_path / "none")
        rule["spec"]["registry"] = {"kind": "mlflow", "uri": mlflow}
        rule["spec"]["each"]["source"]["uri"] = "$(candidate.tags.weights)"
        config["rules"] = [rule]
        with running_service(tmp_path, config, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}) as service:
            hook = client.create_webhook("automerge", f"{service.url}/webhooks/mlflow", EVENTS, secret=SECRET)
            tested = client.test_webhook(hook.webhook_id)
            assert (tested.success, tested.response_status) == (True, 200), tested
            assert json.loads(tested.response_body)["reason"] == "a test of the webhook"
            begin = time.monotonic()
            for half in ("left", "right"):
                client.create_registered_model(f"tiny-{half}")
                client.create_model_version(
                    f"tiny-{half}",
                    source=f"s3://models/tiny/{half}",
                    tags={"half": half, "weights": f"{pair.folder}/{half}.safetensors"},
                )
                client.set_registered_model_alias(f"tiny-{half}", "candidate", "1")
            wait_for(lambda: service.metric("automerge_trigger_decisions_total", rule="tiny", decision="start"), 60)
            print(f"alias to decision: {time.monotonic() - begin:.1f} s")
            wait_for(lambda: service.metric("automerge_trigger_runs_total", rule="tiny", outcome="passed"), 300)
            print(f"alias to merged version: {time.monotonic() - begin:.1f} s")
            [merged] = client.search_model_versions("name = 'tiny'")
            assert merged.tags["automerge.gate"] == "pass"
            # Our own version is announced as well, and must start nothing: not even as a candidate.
            client.set_registered_model_alias("tiny", "candidate", merged.version)
            wait_for(lambda: service.audited("delivery", model="tiny", kind="model_version_alias.created"), 60)
            wait_for(lambda: service.audited("delivery", model="tiny", outcome="ignored"), 60)
            time.sleep(3)
            assert service.metric("automerge_trigger_runs_total", rule="tiny", outcome="started") == 1
            assert f'href="{mlflow}/#/models/tiny-left"' in service.get("/").text
            assert service.stop() == 0

"""What the chart writes is what the product reads: its files are loaded, its command lines are parsed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from automerge.cli import cli
from automerge.errors import SpecError
from automerge.spec import load_spec
from automerge.trigger.config import TriggerConfig, load_config
from automerge.trigger.template import check_template
from automerge_pipelines.flow import CONFIG_KEYS
from automerge_pipelines.schedules import load_schedules
from automerge_pipelines.settings import load_settings
from tests.helm.chart import CHART, CI, Object, objects, one
from tests.helm.program import Helm
from tests.pipelines.kfp_server import running_kfp
from tests.trigger.registry import make_database
from tests.trigger.service import running_service

FULL = CHART / "ci" / "full-values.yaml"


def written(config_map: Object, folder: Path) -> Path:
    """The files of a config map, as a pod sees them."""
    folder.mkdir()
    for name, text in config_map["data"].items():
        (folder / name).write_text(text)
    return folder


def arguments(found: list[Object], kind: str, name: str, folder: Path) -> dict[str, Any]:
    """The command line of a pod, parsed by the command itself, with its files where the test has them."""
    (container,) = one(found, kind, name)["spec"]["template"]["spec"]["containers"]
    assert "command" not in container, "the image's entry point is automerge"
    words = [word.replace("/etc/automerge/", f"{folder}/") for word in container["args"]]
    command = cli.commands[words[0]]
    # Below its group: a command keeps the help option that it is first asked for.
    context = command.make_context(words[0], words[1:], parent=click.Context(cli, **cli.context_settings))
    assert isinstance(context, click.Context)
    return dict(context.params)


def test_the_job_deploys_what_the_values_say(helm: Helm, tmp_path: Path) -> None:
    found = objects(helm, "--values", FULL)
    folder = written(one(found, "ConfigMap", "-deploy"), tmp_path / "config")
    params = arguments(found, "Job", "-deploy", folder)
    assert params["endpoint"] == "https://kubeflow.example/pipeline"
    assert params["namespace"] == "merging-team"
    assert params["prune_schedules"] is True
    assert 10 in params.values()
    settings = load_settings(folder / "settings.yaml")
    assert settings.name == "merging"
    assert settings.defaults.timeout_seconds == 10_000_000
    assert settings.defaults.cpu == "4"
    assert settings.tasks["search-merge"].memory == "64Gi"
    nightly, weekly = load_schedules(folder / "schedules.yaml")
    assert (nightly.name, nightly.service_account, nightly.enabled) == ("nightly", "merger", True)
    assert nightly.parameters == {"memory": "32Gi", "cpu": 8}
    assert load_spec(nightly.spec).model.arguments == {"note": "a: b # c"}
    assert weekly.enabled is False


def test_the_job_runs(helm: Helm, tmp_path: Path) -> None:
    """Its command line and its files, against the stand-in of Kubeflow Pipelines; twice, as after an upgrade."""
    with running_kfp() as server:
        found = objects(helm, "--values", FULL, "--set", f"kfp.endpoint={server.endpoint}")
        folder = written(one(found, "ConfigMap", "-deploy"), tmp_path / "config")
        (container,) = one(found, "Job", "-deploy")["spec"]["template"]["spec"]["containers"]
        words = [word.replace("/etc/automerge/", f"{folder}/") for word in container["args"]]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOMERGE_")}
        said = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", "from automerge.cli import main; main()", *words],
                env=environment | {"HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        nightly, weekly = server.recurring_runs.values()
    assert "pipeline merging: version" in said[0]
    assert "recurring run nightly: created" in said[0]
    assert "recurring run nightly: unchanged" in said[1]
    assert (nightly["service_account"], nightly["mode"], weekly["mode"]) == ("merger", "ENABLE", "DISABLE")
    assert nightly["runtime_config"]["parameters"]["cpu"] == "8"


def test_prune_0_keeps_all(helm: Helm) -> None:
    (container,) = one(objects(helm, "--set", "deploy.prune=0"), "Job", "-deploy")["spec"]["template"]["spec"][
        "containers"
    ]
    assert not [word for word in container["args"] if word.startswith("--prune=")]


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_the_product_reads_every_file(helm: Helm, values: Path, tmp_path: Path) -> None:
    read = 0
    for each in objects(helm, "--values", values):
        if each["kind"] != "ConfigMap":
            continue
        if "trigger.yaml" in each["data"]:
            config = loaded_trigger(each, tmp_path / "trigger")
            assert str(config.state) == "/var/lib/automerge/trigger.sqlite"
            for rule in config.rules:
                check_template(rule)
            read += 1
        if "settings.yaml" in each["data"]:
            folder = written(each, tmp_path / "deploy")
            load_settings(folder / "settings.yaml")
            for schedule in load_schedules(folder / "schedules.yaml"):
                load_spec(schedule.spec)
            read += 1
    assert read or values.stem == "observability-values"


def loaded_trigger(config_map: Object, folder: Path) -> TriggerConfig:
    """The service's configuration; a template on a volume is put where the test has it."""
    text = config_map["data"]["trigger.yaml"].replace("/etc/automerge-specs", str(folder / "specs"))
    written({**config_map, "data": {"trigger.yaml": text}}, folder)
    (folder / "specs").mkdir()
    (rule, *_) = json.loads(text)["rules"]
    (folder / "specs" / "by-tag.yaml").write_text(json.dumps(rule["spec"]))
    return load_config(folder / "trigger.yaml")


def test_the_service_gets_what_the_values_say(helm: Helm, tmp_path: Path) -> None:
    found = objects(helm, "--values", FULL)
    config = loaded_trigger(one(found, "ConfigMap", "-trigger"), tmp_path / "config")
    assert [registry.title for registry in config.registries] == ["mlflow", "ours"]
    assert (config.reconcile_seconds, config.max_body_bytes, config.replay_seconds) == (60, 20_000_000, 600)
    assert config.runner.kind == "kfp"
    assert config.runner.endpoint == "https://kubeflow.example/pipeline"
    assert config.runner.namespace == "merging-team"
    assert config.runner.pipeline == "merging", "what the job deploys"
    assert config.runner.parameters == {"memory": "32Gi", "cpu": 8}
    digits, by_tag = config.rules
    model = digits.spec["model"]
    assert isinstance(model, dict)
    assert model["arguments"] == {"note": 'quotes " and {{ braces }} stay\nand so do lines'}
    assert (digits.maximum, digits.cooldown_seconds) == (4, 86400)
    assert (by_tag.spec, by_tag.dry_run) == (digits.spec, True)


def test_the_files_that_are_read_are_checked(helm: Helm, tmp_path: Path) -> None:
    config_map = one(objects(helm, "--values", FULL), "ConfigMap", "-trigger")
    config_map["data"]["trigger.yaml"] = config_map["data"]["trigger.yaml"].replace("max_body_bytes", "max_body")
    with pytest.raises(SpecError, match="unknown key"):
        loaded_trigger(config_map, tmp_path / "config")


def test_the_service_listens_where_the_service_leads(helm: Helm, tmp_path: Path) -> None:
    found = objects(helm, "--values", FULL)
    (container,) = one(found, "Deployment", "merging-trigger")["spec"]["template"]["spec"]["containers"]
    folder = written({"data": {"trigger.yaml": ""}}, tmp_path / "config")
    params = arguments(found, "Deployment", "merging-trigger", folder)
    (port,) = container["ports"]
    assert (params["host"], params["port"]) == ("0.0.0.0", port["containerPort"])  # noqa: S104 - of the container
    (exposed,) = one(found, "Service", "merging-trigger")["spec"]["ports"]
    assert exposed["targetPort"] == port["name"]


def test_probes_test_and_scrapes_ask_what_the_service_answers(helm: Helm, tmp_path: Path) -> None:
    found = objects(helm, "--values", FULL)
    config = json.loads(one(found, "ConfigMap", "merging-trigger")["data"]["trigger.yaml"])
    database = make_database(tmp_path / "mlflow.db")
    config |= {
        "state": "trigger.sqlite",
        "registries": [{"kind": "mlflow", "uri": f"sqlite:///{database}"}],
        "rules": config["rules"][:1],
    }
    (container,) = one(found, "Deployment", "merging-trigger")["spec"]["template"]["spec"]["containers"]
    probes = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    (endpoint,) = one(found, "ServiceMonitor", "merging-trigger")["spec"]["endpoints"]
    (test,) = one(found, "Pod", "merging-test")["spec"]["containers"]
    with running_service(tmp_path, config) as service:
        for path in probes:
            assert service.get(path).status == 200, path
        assert "automerge_trigger_runs_active" in service.get(endpoint["path"]).text
        program = test["args"][-1].replace("http://merging-trigger:80", service.url)
        assert service.url in program
        for expected in (0, 1):
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
            assert done.returncode == expected, done.stderr
            service.kill()


def test_a_change_of_the_configuration_restarts_the_pod_and_no_other_change_does(helm: Helm) -> None:
    def template(*more: str) -> Object:
        found: Object = one(objects(helm, "--values", FULL, *more), "Deployment", "merging-trigger")["spec"]["template"]
        return found

    assert template() != template("--set", "trigger.reconcileSeconds=61")
    assert template() == template("--set", "deploy.backoffLimit=1")


def test_the_tasks_find_the_gateway(helm: Helm) -> None:
    found = objects(helm, "--values", FULL)
    data = one(found, "ConfigMap", "merging-tasks")["data"]
    assert set(data) <= set(CONFIG_KEYS)
    gateway = one(found, "Service", "pushgateway")
    name, namespace = gateway["metadata"]["name"], gateway["metadata"]["namespace"]
    assert data["AUTOMERGE_PUSHGATEWAY"] == f"http://{name}.{namespace}:{gateway['spec']['ports'][0]['port']}"
    named = objects(helm, "--set", "pushgateway.url=http://there:9091")
    assert one(named, "ConfigMap", "automerge")["data"] == {"AUTOMERGE_PUSHGATEWAY": "http://there:9091"}
    given = objects(
        helm, "--set", "pushgateway.url=http://there:9091,tasks.configMap.data.AUTOMERGE_PUSHGATEWAY=http://own"
    )
    assert one(given, "ConfigMap", "automerge")["data"] == {"AUTOMERGE_PUSHGATEWAY": "http://own"}

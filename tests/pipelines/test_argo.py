"""Argo Workflows: valid, up to date, with the right settings on every task, and its steps run in their order."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hera.workflows import models as argo
from mlflow import MlflowClient

from automerge.errors import SpecError
from automerge.preservation import Evaluation
from automerge.searching.store import read_trials
from automerge.spec import load_spec, parse_spec
from automerge.stages.documents import Registration
from automerge.testing.s3_server import S3Server
from automerge_pipelines.argo import COMPILED, write_argo
from automerge_pipelines.flow import CONFIG_KEYS, FLOW, REGISTRY_SECRET_KEYS, S3_SECRET_KEYS
from automerge_pipelines.schedules import Schedule
from automerge_pipelines.settings import Settings
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.pipelines.argo_executor import Finished, RunStep, run_workflow, subprocess_runner

pytestmark = pytest.mark.timeout(900)

Json = dict[str, Any]

NAMES = [row.name for row in FLOW]

EVERYTHING = Settings.model_validate(
    {
        "name": "merge",
        "image": "registry.example/automerge@sha256:" + "0" * 64,
        "image_pull_policy": "IfNotPresent",
        "image_pull_secrets": ["pull"],
        "s3_secret": "storage",
        "registry_secret": "models",
        "config_map": "endpoints",
        "labels": {"kueue.x-k8s.io/queue-name": "gpu"},
        "annotations": {"example.com/note": "a note"},
        "defaults": {"node_selector": {"pool": "cpu"}, "env": {"AUTOMERGE_LOG_FORMAT": "json"}},
        "tasks": {
            "search-merge": {
                "cpu": 8,
                "cpu_limit": 16,
                "memory": "64Gi",
                "accelerator_count": 2,
                "shared_memory": "8Gi",
                "node_selector": {"pool": "gpu"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "seconds": 60}],
                "retries": 5,
                "timeout_seconds": 7200,
            },
            "register": {"retries": 0},
        },
        "workspace": {"size": "100Gi", "storage_class": "fast"},
        "ttl_seconds": 86400,
        "deadline_seconds": 14400,
    }
)
VARIANTS = {
    "default": Settings(),
    "workspace": Settings.model_validate({"workspace": {"size": "1Gi"}}),
    "one pod fetches": Settings.model_validate({"workspace": {"size": "1Gi"}, "parallel_fetch": False}),
    "no exit handler": Settings(exit_handler=False),
    "everything": EVERYTHING,
}


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """The spec of the tiny job, whose files are not read."""
    path = tmp_path / "spec.json"
    path.write_text(tiny_spec("s3://models/tiny", "sqlite:///mlflow.db").model_dump_json())
    return path


def compiled(settings: Settings, folder: Path, **options: Any) -> list[Json]:
    return list(yaml.safe_load_all(write_argo(settings, folder / "argo.yaml", **options).read_text()))


def template_of(document: Json, name: str) -> Json:
    (found,) = (each for each in document["spec"]["templates"] if each["name"] == name)
    return found


def check(document: Json) -> None:
    """Argo's schema, strictly, and that of Kubernetes for the pods and the volume claim."""
    model = {"WorkflowTemplate": argo.WorkflowTemplate, "CronWorkflow": argo.CronWorkflow}[document["kind"]]
    known = model.model_validate(document).model_dump(mode="json", exclude_none=True, by_alias=True)
    assert known == document, "the models drop what they do not know"
    spec = document["spec"]
    claims = spec.get("volumeClaimTemplates", [])
    for claim in claims:
        object_of_kubernetes("v1", "PersistentVolumeClaim", claim)
    shared = [{"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": "run-1"}} for claim in claims]
    for template in spec.get("templates", []):
        if "container" in template:
            pod = {
                key: template[key]
                for key in ("nodeSelector", "tolerations", "activeDeadlineSeconds")
                if key in template
            }
            pod |= {key: spec[key] for key in ("securityContext", "imagePullSecrets") if key in spec}
            pod |= {"containers": [{"name": "main", **template["container"]}]}
            pod |= {"volumes": [*template.get("volumes", []), *shared]}
            object_of_kubernetes("v1", "Pod", {"metadata": spec.get("podMetadata", {}), "spec": pod})


def object_of_kubernetes(version: str, kind: str, content: Json) -> None:
    for release in ("1.28", "1.34", "1.37"):
        kubernetes_validate.validate({"apiVersion": version, "kind": kind, **content}, release, strict=True)


# --- the schema


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_valid(name: str, tmp_path: Path, spec_file: Path) -> None:
    schedule = Schedule(name="nightly", cron="0 3 * * *", spec=spec_file, service_account="automerge")
    options: Json = {"schedules": [schedule], "timezone": "Europe/Berlin", "namespace": "models"}
    template, cron = compiled(VARIANTS[name], tmp_path, **options)
    for document in (template, cron):
        check(document)
        assert document["metadata"]["namespace"] == "models"
    assert cron["spec"]["workflowSpec"]["workflowTemplateRef"]["name"] == template["metadata"]["name"]


def first_container(document: Json) -> Json:
    return document["spec"]["templates"][1]["container"]


BREAKS: dict[str, Callable[[Json], Any]] = {
    "unknown key of the spec": lambda document: document["spec"].update(entryPoint="merge"),
    "unknown key of a template": lambda document: document["spec"]["templates"][1].update(retries=3),
    "unknown key of a task": lambda document: document["spec"]["templates"][0]["dag"]["tasks"][0].update(after=[]),
    "unknown key of a container": lambda document: first_container(document).update(arguments=["-v"]),
    "misspelt context": lambda document: first_container(document)["securityContext"].update(runAsNonroot=True),
    "misspelt reference": lambda document: first_container(document)["env"][2]["valueFrom"].update(secretKey={}),
    "command of the wrong type": lambda document: first_container(document).update(command="automerge"),
    "missing name of a mount": lambda document: first_container(document)["volumeMounts"][0].pop("name"),
    "no quantity": lambda document: first_container(document)["resources"]["limits"].update(memory={"size": "4Gi"}),
    "text for a number": lambda document: document["spec"].update(activeDeadlineSeconds="soon"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_manifest_fails_the_check(name: str, tmp_path: Path) -> None:
    (document,) = compiled(Settings(), tmp_path)
    check(document)
    BREAKS[name](document)
    with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
        check(document)


def test_the_compiled_template_is_up_to_date_and_does_not_depend_on_the_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from automerge_pipelines.argo import write_argo
from automerge_pipelines.schedules import Schedule
from automerge_pipelines.settings import Settings
write_argo(Settings(), Path(sys.argv[1]))
"""
    for seed in ("0", "1"):
        path = tmp_path / f"{seed}.yaml"
        subprocess.run([sys.executable, "-c", code, path], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert path.read_bytes() == COMPILED.read_bytes(), "compile it again: make pipeline"
    assert COMPILED.read_bytes().isascii()


# --- what each task gets


@pytest.mark.parametrize("name", NAMES)
def test_default_settings_of_a_task(name: str, tmp_path: Path) -> None:
    (document,) = compiled(Settings(), tmp_path)
    assert settings_of(document, name) == {
        "image": "{{workflow.parameters.image}}",
        "retries": {"fetch": "3", "segment": "1", "search-merge": "2", "evaluate": "1", "register": "3"}[name],
        "requests": {"cpu": "4", "memory": "16Gi"} if name in MODELS else {"cpu": "1", "memory": "4Gi"},
        "limits": {"memory": "16Gi" if name in MODELS else "4Gi"},
        "secrets": {
            "fetch": S3,
            "segment": {},
            "search-merge": S3,
            "evaluate": {},
            "register": {**S3, "automerge-registry": list(REGISTRY_SECRET_KEYS)},
        }[name],
        "config": {"automerge": list(CONFIG_KEYS)},
        "env": {
            "HOME": "/tmp",
            "AUTOMERGE_RUN": "{{workflow.name}}",
            **({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if name in MODELS else {}),
        },
    }


MODELS = ("search-merge", "evaluate")
S3 = {"automerge-s3": list(S3_SECRET_KEYS)}


def settings_of(document: Json, name: str) -> Json:
    """What a table of tasks has columns for; what is not set is left out."""
    template = template_of(document, name)
    container = template["container"]
    references: dict[str, dict[str, list[str]]] = {"secretKeyRef": {}, "configMapKeyRef": {}}
    for entry in container["env"]:
        for kind, reference in entry.get("valueFrom", {}).items():
            assert reference["key"] == entry["name"]
            assert reference["optional"] is True
            references[kind].setdefault(reference["name"], []).append(reference["key"])
    found = {
        "image": container["image"],
        "pull": container.get("imagePullPolicy"),
        "retries": template.get("retryStrategy", {}).get("limit"),
        "timeout": template.get("activeDeadlineSeconds"),
        "requests": container["resources"]["requests"],
        "limits": container["resources"]["limits"],
        "nodes": template.get("nodeSelector"),
        "tolerations": template.get("tolerations"),
        "shm": [each["emptyDir"] for each in template["volumes"] if each["name"] == "shm"] or None,
        "secrets": references["secretKeyRef"],
        "config": references["configMapKeyRef"],
        "env": {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry},
    }
    return {key: value for key, value in found.items() if value is not None}


def test_all_settings_reach_the_task_that_they_are_for(tmp_path: Path) -> None:
    (document,) = compiled(EVERYTHING, tmp_path)
    config = [
        key for key in CONFIG_KEYS if key != "AUTOMERGE_LOG_FORMAT"
    ]  # a variable of the settings stands in its place
    assert settings_of(document, "search-merge") == {
        "image": "{{workflow.parameters.image}}",
        "pull": "IfNotPresent",
        "retries": "5",
        "timeout": 7200,
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"},
        "nodes": {"pool": "gpu"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
        ],
        "shm": [{"medium": "Memory", "sizeLimit": "8Gi"}],
        "secrets": {"storage": list(S3_SECRET_KEYS)},
        "config": {"endpoints": config},
        "env": {
            "HOME": "/tmp",
            "AUTOMERGE_RUN": "{{workflow.name}}",
            "AUTOMERGE_LOG_FORMAT": "json",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        },
    }
    evaluate = settings_of(document, "evaluate")
    assert evaluate["limits"] == {"memory": "16Gi"}
    assert evaluate["nodes"] == {"pool": "cpu"}
    assert "retryStrategy" not in template_of(document, "register")
    for name in ("fetch", "fetch-input", "resolve"):
        assert settings_of(document, name)["secrets"] == {"storage": list(S3_SECRET_KEYS)}
    assert settings_of(document, "report-status")["secrets"] == {}

    spec = document["spec"]
    assert {item["name"]: item.get("value") for item in spec["arguments"]["parameters"]} == {
        "spec": None,
        "image": EVERYTHING.image,
    }
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["podMetadata"] == {
        "labels": {"kueue.x-k8s.io/queue-name": "gpu"},
        "annotations": {"example.com/note": "a note"},
    }
    assert spec["activeDeadlineSeconds"] == 14400
    assert spec["ttlStrategy"] == {"secondsAfterCompletion": 86400}
    assert spec["podGC"] == {"strategy": "OnWorkflowCompletion", "deleteDelayDuration": "86400s"}
    assert spec["onExit"] == "report-status"
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "100Gi"}},
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_is_confined_and_retried_whatever_ended_it(variant: str, tmp_path: Path) -> None:
    (document,) = compiled(VARIANTS[variant], tmp_path)
    context = document["spec"]["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 65532
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    pods = [template for template in document["spec"]["templates"] if "container" in template]
    assert {template["name"] for template in pods} >= set(NAMES)
    for template in pods:
        container = template["container"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        empty = {volume["name"] for volume in template["volumes"] if "emptyDir" in volume}
        assert mounts["/tmp"] in empty
        assert mounts["/var/run/secrets/kubernetes.io/serviceaccount"] in empty, "the token is not for our code"
        retry = template.get("retryStrategy", {"retryPolicy": "Always", "backoff": {}})
        assert retry["retryPolicy"] == "Always"
        assert "maxDuration" not in retry["backoff"], "it would count from the first start"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_text_of_a_run_is_part_of_a_command(variant: str, tmp_path: Path) -> None:
    """But names that Argo makes, and, behind an option's equals sign, an input's name."""
    (document,) = compiled(VARIANTS[variant], tmp_path)
    found = set()
    for template in document["spec"]["templates"]:
        container = template.get("container", {})
        for word in [*container.get("command", []), *container.get("args", [])]:
            assert "\n" not in word or "{{" not in word
            found |= {word} if "{{" in word else set()
    assert found <= {"{{workflow.status}}", "--run={{workflow.name}}", "--input={{inputs.parameters.input}}"}


# --- the schedules


def test_a_schedule_runs_the_template_with_its_spec_one_run_at_a_time(tmp_path: Path, spec_file: Path) -> None:
    schedules = [
        Schedule(name="nightly", cron="30 3 * * mon-fri", spec=spec_file),
        Schedule(
            name="yearly",
            cron="0 0 0 1 1 *",
            spec=spec_file,
            parameters={"image": "mirror.example/automerge:1"},
            enabled=False,
            service_account="automerge",
        ),
    ]
    _, *crons = compiled(EVERYTHING, tmp_path, schedules=schedules, timezone="Europe/Berlin")
    for cron, (name, start, suspended) in zip(
        crons, [("nightly", "30 3 * * mon-fri", False), ("yearly", "0 0 1 1 *", True)], strict=True
    ):
        assert cron["metadata"]["name"] == name
        assert {key: value for key, value in cron["spec"].items() if key != "workflowSpec"} == {
            "schedules": [start],
            "timezone": "Europe/Berlin",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 300,
            "suspend": suspended,
        }
    nightly, yearly = (cron["spec"]["workflowSpec"] for cron in crons)
    assert nightly["workflowTemplateRef"] == yearly["workflowTemplateRef"] == {"name": "merge"}
    assert "serviceAccountName" not in nightly
    assert yearly["serviceAccountName"] == "automerge"
    given = [{item["name"]: item["value"] for item in flow["arguments"]["parameters"]} for flow in (nightly, yearly)]
    assert [parse_spec(values.pop("spec")) for values in given] == [load_spec(spec_file)] * 2
    assert given == [{}, {"image": "mirror.example/automerge:1"}]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"cron": "*/10 0 3 * * *"},
            "schedule 'nightly': Argo Workflows starts nothing at second '*/10'; write a cron of five fields",
        ),
        (
            {"parameters": {"cpu": 4}},
            "schedule 'nightly': the workflow template has no parameter 'cpu'; it has 'image'; put the rest into the "
            "deployment settings",
        ),
    ],
)
def test_what_argo_cannot_schedule(changes: Json, sentence: str, tmp_path: Path, spec_file: Path) -> None:
    schedule = Schedule.model_validate({"name": "nightly", "cron": "0 3 * * *", "spec": spec_file, **changes})
    with pytest.raises(SpecError) as raised:
        write_argo(Settings(), tmp_path / "argo.yaml", schedules=[schedule])
    assert str(raised.value) == sentence
    assert not (tmp_path / "argo.yaml").exists()


def test_a_name_that_argo_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has 64 characters, and Argo Workflows takes 63; shorten it"):
        write_argo(Settings(name="n" * 64), tmp_path / "argo.yaml")


# --- the steps


@dataclass
class Cluster:
    """What a cluster brings: storage, a registry, and how a step is run.

    Attributes:
        folder: an empty one.
        root: where the tiny pair is.
        registry: tracking server.
        secrets, config_maps: of the namespace.
    """

    folder: Path
    root: str
    registry: str
    secrets: dict[str, dict[str, str]]
    config_maps: dict[str, dict[str, str]]

    def run(self, document: Json, run_step: RunStep | None = None, **changes: Any) -> Finished:
        """Run a template with the tiny spec."""
        spec = tiny_spec(self.root, self.registry, **changes).model_dump(mode="json")
        spec["registry"]["uri"] = None
        number = len(list(self.folder.glob("run-*")))
        folder = self.folder / f"run-{number}"
        folder.mkdir()
        return run_workflow(
            document,
            folder,
            run_step or subprocess_runner(folder),
            parameters={"spec": yaml.safe_dump(spec)},
            secrets=self.secrets,
            config_maps=self.config_maps,
        )


@pytest.fixture
def cluster(s3: S3Server, pair: TinyPair, tmp_path: Path) -> Cluster:
    """The pair in a bucket of a real server, whose address and keys only config map and secret have."""
    client = s3.client()
    for key in pair.keys:
        client.upload_file(str(pair.folder / key), s3.bucket, f"argo/{key}")
    registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
    kept = dict(s3.environment)
    secret = {key: kept.pop(key) for key in S3_SECRET_KEYS if key in kept}
    return Cluster(
        tmp_path,
        f"s3://{s3.bucket}/argo",
        registry,
        {"automerge-s3": secret},
        {"automerge": {**kept, "MLFLOW_TRACKING_URI": registry}},
    )


QUICK = {
    "search": {"trials": 3, "initial": 2, "split": None, "refine": None},
    "evaluation": {"resamples": 100, "baselines": False, "onnx": False},
}


def stage_folder(finished: Finished, task: str, stage: str) -> Path:
    if finished.volume is not None:
        return finished.volume / "run" / stage
    return finished.artifacts / task / stage


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "workspace"])
def test_the_steps_lead_to_a_registered_model(variant: str, cluster: Cluster, tmp_path: Path) -> None:
    (document,) = compiled(VARIANTS[variant], tmp_path)
    log: list[list[str]] = []
    finished = cluster.run(
        document, subprocess_runner(tmp_path / "steps", log=log), gate={"min_worst_pr": 50.0}, **QUICK
    )
    assert finished.status == "Succeeded"
    inputs = [f"fetch-input({number})" for number in range(7)]
    around = ["resolve", *inputs, "fetch-input"] if variant == "workspace" else []
    assert finished.phases == dict.fromkeys([*around, *NAMES, "report-status"], "Succeeded")
    assert set(finished.attempts.values()) == {1}
    assert [argv[1] for argv in log if argv[0] == "automerge" and argv[1] != "resolve"] == [
        *["fetch"] * (8 if variant == "workspace" else 1),
        "segment",
        "evaluate",
        "register",
        "report-status",
    ]
    assert [argv for argv in log if argv[0] != "automerge"] == [
        [
            "sh",
            "-ec",
            "trap : TERM\n"
            "automerge search /spec/spec.yaml --output /workspace/run --resume\n"
            "automerge merge /spec/spec.yaml --output /workspace/run",
        ]
    ]
    evaluation = Evaluation.read(stage_folder(finished, "evaluate", "evaluate") / "evaluation.json")
    assert evaluation.gate.verdict == "pass"
    registration = Registration.read(stage_folder(finished, "register", "register") / "registration.json")
    assert (registration.registered.model, registration.registered.version) == ("tiny", "1")
    assert registration.recipe == evaluation.recipe
    client = MlflowClient(cluster.registry, cluster.registry)
    assert client.get_model_version("tiny", "1").tags["automerge.recipe"] == evaluation.recipe


@pytest.mark.slow
def test_a_model_that_the_gate_refuses_ends_well_and_is_not_registered(cluster: Cluster, tmp_path: Path) -> None:
    (document,) = compiled(VARIANTS["default"], tmp_path)
    finished = cluster.run(document, gate={"min_worst_pr": 1000.0}, **QUICK)
    assert finished.status == "Succeeded"
    assert finished.phases["evaluate"] == "Succeeded"
    assert finished.phases["register"] == "Skipped"
    assert finished.attempts["evaluate"] == 1
    assert (stage_folder(finished, "evaluate", "evaluate") / "report.html").is_file()
    assert MlflowClient(cluster.registry, cluster.registry).search_registered_models() == []


@pytest.mark.slow
def test_an_artifact_that_is_not_declared_is_missed(cluster: Cluster, tmp_path: Path) -> None:
    (document,) = compiled(VARIANTS["default"], tmp_path)
    broken = copy.deepcopy(document)
    inputs = template_of(broken, "segment")["inputs"]
    inputs["artifacts"] = [artifact for artifact in inputs["artifacts"] if artifact["name"] != "fetch"]
    finished = cluster.run(broken, **QUICK)
    assert finished.status == "Failed"
    assert finished.phases["segment"] == "Failed"
    retries = template_of(document, "segment")["retryStrategy"]["limit"]
    assert finished.attempts["segment"] == int(retries) + 1
    assert finished.phases["report-status"] == "Succeeded"


@pytest.mark.slow
def test_without_the_secret_nothing_is_fetched(cluster: Cluster, tmp_path: Path, capsys: Any) -> None:
    (document,) = compiled(VARIANTS["no exit handler"], tmp_path)
    cluster.secrets.clear()
    finished = cluster.run(document, **QUICK)
    assert finished.phases == {"fetch": "Failed"}
    assert "error: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_a_search_whose_pod_was_lost_goes_on_in_the_next(
    ended_by: signal.Signals, cluster: Cluster, tmp_path: Path
) -> None:
    (document,) = compiled(VARIANTS["one pod fetches"], tmp_path)
    codes: list[int] = []
    seen: list[str] = []

    def end_once(argv: list[str], process: "subprocess.Popen[bytes]", mounts: dict[str, Path]) -> None:
        if codes or "automerge search" not in argv[-1]:
            return
        log = mounts["/workspace"] / "run" / "search" / "trials.jsonl"
        while process.poll() is None:
            whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
            if sum(json.loads(line)["event"] == "tell" for line in whole.splitlines()[1:]) >= 2:
                os.killpg(process.pid, ended_by)
                codes.append(process.wait())
                seen.extend(log.read_text().rpartition("\n")[0].splitlines())
                return
            time.sleep(0.01)

    search = {"trials": 12, "initial": 4, "split": None, "refine": None}
    runner = subprocess_runner(tmp_path / "steps", watch=end_once)
    finished = cluster.run(document, runner, **{**QUICK, "search": search})
    assert codes == [{signal.SIGKILL: -9, signal.SIGTERM: 130}[ended_by]]
    assert finished.status == "Succeeded"
    assert finished.attempts["search-merge"] == 2
    log = stage_folder(finished, "search-merge", "search") / "trials.jsonl"
    assert log.read_text().splitlines()[: len(seen)] == seen, "what was paid for is kept"
    assert len(read_trials(log)) == 12


def test_it_does_not_change_the_bytes_of_the_kubeflow_pipeline(tmp_path: Path) -> None:
    """Hera's import does, which gave a pipeline version of another name for the same content."""
    code = (
        "import sys; from pathlib import Path; import automerge_pipelines.argo; "
        "from automerge_pipelines.merge_pipeline import COMPILED, compile_pipeline; "
        "from automerge_pipelines.settings import Settings; "
        "sys.exit(compile_pipeline(Settings(), Path(sys.argv[1])).read_bytes() != COMPILED.read_bytes())"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "pipeline.yaml"], check=True)

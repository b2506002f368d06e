"""The compiled pipeline: up to date, valid, and with the right settings on every executor."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format  # type: ignore[import-untyped]
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

from automerge_pipelines.flow import CONFIG_KEYS, REGISTRY_SECRET_KEYS, S3_SECRET_KEYS
from automerge_pipelines.merge_pipeline import COMPILED, Format, compile_pipeline, version_name
from automerge_pipelines.settings import Settings

Json = dict[str, Any]


def parameter(name: str) -> str:
    return f"{{{{$.inputs.parameters['pipelinechannel--{name}']}}}}"


CPU, MEMORY = parameter("cpu"), parameter("memory")
ACCELERATOR = {"resourceType": parameter("accelerator_type"), "resourceCount": parameter("accelerator_count")}
SECRETS = {"s3_secret": S3_SECRET_KEYS, "registry_secret": REGISTRY_SECRET_KEYS}

TABLE: list[tuple[str, int, bool, str, str, bool, list[str]]] = [
    # task, retries, cached, CPU, memory, runs models, secrets
    ("resolve", 3, False, "1", "4Gi", False, ["s3_secret"]),
    ("fetch", 3, True, "1", "4Gi", False, ["s3_secret"]),
    ("segment", 1, True, "1", "4Gi", False, []),
    ("search-merge", 2, True, CPU, MEMORY, True, ["s3_secret"]),
    ("evaluate", 1, True, CPU, MEMORY, True, []),
    ("register", 3, False, "1", "4Gi", False, ["s3_secret", "registry_secret"]),
    ("report-status", 1, False, "1", "4Gi", False, []),
]

CLUSTER = Settings.model_validate(
    {
        "name": "merge-on-gpus",
        "image": "registry.example/automerge@sha256:" + "0" * 64,
        "image_pull_policy": "IfNotPresent",
        "image_pull_secrets": ["pull"],
        "s3_secret": "s3",
        "labels": {"kueue.x-k8s.io/queue-name": "gpu", "team": "vision"},
        "annotations": {"sidecar.istio.io/inject": "false"},
        "defaults": {"memory": "32Gi", "accelerator_count": 1, "node_selector": {"pool": "ml"}},
        "tasks": {
            "fetch": {"memory": "8Gi", "retries": 5, "timeout_seconds": 7200},
            "search-merge": {
                "cpu": 8,
                "cpu_limit": "16",
                "accelerator_type": "amd.com/gpu",
                "accelerator_count": 4,
                "shared_memory": "16Gi",
                "node_selector": {"gpu": "a100"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "timeout_seconds": 86400,
                "env": {"OMP_NUM_THREADS": "4"},
                "cache": False,
            },
            "evaluate": {"accelerator_count": 0},
        },
        "workspace": {"size": "500Gi", "storage_class": "fast"},
        "ttl_seconds": 3600,
        "deadline_seconds": 172800,
    }
)


def compiled(settings: Settings, folder: Path, form: Format = "kfp") -> list[Json]:
    path = compile_pipeline(settings, folder / f"{form}.yaml", form)
    return list(yaml.safe_load_all(path.read_text(encoding="ascii")))


@pytest.fixture(scope="module")
def default() -> list[Json]:
    """The pipeline and its platform part, as committed."""
    return list(yaml.safe_load_all(COMPILED.read_text(encoding="ascii")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    """The same with all settings that there are."""
    return compiled(CLUSTER, tmp_path_factory.mktemp("compiled"))


def tasks(pipeline: Json) -> Json:
    """All tasks by name, those inside conditions, loops and the exit handler included."""
    found: Json = {}
    for dag in [pipeline["root"], *pipeline["components"].values()]:
        found |= dag.get("dag", {}).get("tasks", {})
    return found


def container(documents: list[Json], task: str) -> Json:
    found: Json = documents[0]["deploymentSpec"]["executors"][f"exec-{task}"]["container"]
    return found


def resources(documents: list[Json], task: str) -> Json:
    """As the server of this release reads them, without their older form beside it."""
    found = dict(container(documents, task)["resources"])
    for key in ("cpuRequest", "cpuLimit", "memoryRequest", "memoryLimit"):
        found.pop(key, None)
    if "accelerator" in found:
        found["accelerator"] = {key: found["accelerator"][key] for key in ("resourceType", "resourceCount")}
    return found


def platform(documents: list[Json], task: str) -> Json:
    found: Json = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{task}"]
    return found


def test_the_committed_yaml_is_up_to_date(tmp_path: Path) -> None:
    fresh = compile_pipeline(Settings(), tmp_path / "fresh.yaml")
    assert fresh.read_bytes() == COMPILED.read_bytes(), "run: make pipeline"


def test_compiling_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(CLUSTER.model_dump(mode="json", exclude_none=True)))
    made = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.yaml"
        subprocess.run(
            [
                Path(sys.executable).with_name("automerge"),
                "compile",
                "--settings",
                tmp_path / "settings.yaml",
                "--output",
                path,
            ],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
        )
        made.add(path.read_bytes())
    assert len(made) == 1
    assert version_name(made.pop()).startswith("0.1.0-")


@pytest.mark.parametrize("which", ["default", "cluster"])
def test_parses_strictly(which: str, request: pytest.FixtureRequest) -> None:
    pipeline, platforms = request.getfixturevalue(which)
    assert json_format.ParseDict(pipeline, PipelineSpec()).pipeline_info.name in ("automerge-merge", "merge-on-gpus")
    json_format.ParseDict(platforms, PlatformSpec())
    executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(TABLE) + (which == "cluster")
    for settings in executors.values():
        json_format.ParseDict(settings, KubernetesExecutorConfig())


@pytest.mark.parametrize("which", ["default", "cluster"])
def test_every_parameter_reaches_the_task_that_reads_it(which: str, request: pytest.FixtureRequest) -> None:
    """Through every condition, loop and exit handler around it: the compiler itself forgets those of resources."""
    pipeline = request.getfixturevalue(which)[0]
    checked = 0
    for dag in [pipeline["root"], *pipeline["components"].values()]:
        defined = dag.get("inputDefinitions", {}).get("parameters", {})
        for task in dag.get("dag", {}).get("tasks", {}).values():
            for given in task.get("inputs", {}).get("parameters", {}).values():
                if "componentInputParameter" in given:
                    assert given["componentInputParameter"] in defined
                    checked += 1
    assert checked > 20


def test_a_misspelt_field_does_not_parse(default: list[Json]) -> None:
    pipeline = {**default[0], "deploymentSpecification": {}}
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict(pipeline, PipelineSpec())


@pytest.mark.parametrize(("task", "retries", "cached", "cpu", "memory", "models", "secrets"), TABLE)
def test_settings_of_each_executor_by_default(
    default: list[Json],
    task: str,
    retries: int,
    cached: bool,
    cpu: str,
    memory: str,
    models: bool,
    secrets: list[str],
) -> None:
    found = tasks(default[0])[task]
    assert found["cachingOptions"].get("enableCache", False) is cached
    assert found["retryPolicy"]["maxRetryCount"] == retries
    made = container(default, task)
    assert made["image"] == parameter("image")
    resources = made["resources"]
    assert resources["resourceCpuRequest"] == cpu
    assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == memory
    assert resources.get("accelerator") == (ACCELERATOR if models else None)
    allocator = [{"name": "PYTORCH_CUDA_ALLOC_CONF", "value": "expandable_segments:True"}]
    assert made.get("env", []) == (allocator if models else [])

    settings = platform(default, task)
    assert settings["securityContext"] == {"runAsNonRoot": True}
    assert [mount["mountPath"] for mount in settings["emptyDirMounts"]] == ["/tmp"]
    (config,) = settings["configMapAsEnv"]
    assert config["optional"] is True
    assert [item["envVar"] for item in config["keyToEnv"]] == list(CONFIG_KEYS)
    given = settings.get("secretAsEnv", [])
    names = [item["secretNameParameter"]["componentInputParameter"] for item in given]
    assert [name.removeprefix("pipelinechannel--") for name in names] == secrets
    assert all(item["optional"] is True for item in given)
    assert [[key["envVar"] for key in item["keyToEnv"]] for item in given] == [list(SECRETS[name]) for name in secrets]
    run = {"name": "AUTOMERGE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
    assert settings["fieldPathAsEnv"] == [run]


class TestOnACluster:
    """Every setting of the deployment settings."""

    def test_the_search_has_its_own_resources_whatever_a_run_says(self, cluster: list[Json]) -> None:
        assert resources(cluster, "search-merge") == {
            "resourceCpuRequest": "8",
            "resourceCpuLimit": "16",
            "resourceMemoryRequest": MEMORY,
            "resourceMemoryLimit": MEMORY,
            "accelerator": {"resourceType": "amd.com/gpu", "resourceCount": "4"},
        }
        settings = platform(cluster, "search-merge")
        assert settings["activeDeadlineSeconds"] == "86400"
        assert settings["nodeSelector"] == {"labels": {"gpu": "a100"}}
        assert settings["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "16Gi"} in settings[
            "emptyDirMounts"
        ]
        environment = {item["name"]: item["value"] for item in container(cluster, "search-merge")["env"]}
        assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4"}
        assert tasks(cluster[0])["search-merge"]["cachingOptions"] == {}

    def test_defaults_hold_for_the_others(self, cluster: list[Json]) -> None:
        evaluated = resources(cluster, "evaluate")
        assert evaluated == {
            "resourceCpuRequest": CPU,
            "resourceMemoryRequest": MEMORY,
            "resourceMemoryLimit": MEMORY,
        }
        fetched = resources(cluster, "fetch")
        assert fetched == {
            "resourceCpuRequest": "1",
            "resourceMemoryRequest": "8Gi",
            "resourceMemoryLimit": "8Gi",
        }
        parameters = cluster[0]["root"]["inputDefinitions"]["parameters"]
        assert parameters["memory"]["defaultValue"] == "32Gi"
        assert parameters["accelerator_count"]["defaultValue"] == "1"
        assert parameters["s3_secret"]["defaultValue"] == "s3"
        assert parameters["image"]["defaultValue"] == CLUSTER.image

    def test_every_pod_has_what_all_pods_have(self, cluster: list[Json]) -> None:
        names = [name.removeprefix("exec-") for name in cluster[0]["deploymentSpec"]["executors"]]
        assert sorted(names) == sorted([*(row[0] for row in TABLE), "fetch-input"])
        for name in names:
            settings = platform(cluster, name)
            assert settings["podMetadata"] == {"labels": CLUSTER.labels, "annotations": CLUSTER.annotations}
            assert settings["imagePullPolicy"] == "IfNotPresent"
            assert [item["secretName"] for item in settings["imagePullSecret"]] == ["pull"]
            assert settings["securityContext"] == {"runAsNonRoot": True}
            if name != "search-merge":
                assert settings["nodeSelector"] == {"labels": {"pool": "ml"}}

    def test_the_inputs_are_on_a_volume_of_the_run(self, cluster: list[Json]) -> None:
        config = cluster[1]["platforms"]["kubernetes"]["pipelineConfig"]
        assert config["workspace"] == {
            "size": "500Gi",
            "kubernetes": {"pvcSpecPatch": {"accessModes": ["ReadWriteMany"], "storageClassName": "fast"}},
        }
        for name in ("fetch-input", "fetch", "segment", "search-merge", "evaluate", "register"):
            given = tasks(cluster[0])[name]["inputs"]["parameters"]["workspace"]
            assert given == {"runtimeValue": {"constant": "{{$.workspace_path}}"}}

    def test_each_input_has_a_pod_and_fetch_waits_for_all(self, cluster: list[Json]) -> None:
        found = tasks(cluster[0])
        assert found["fetch-input"]["inputs"]["parameters"]["version"]["componentInputParameter"].endswith("loop-item")
        loop = next(name for name, task in found.items() if "parameterIterator" in task)
        assert loop in found["fetch"]["dependentTasks"]
        for name in ("resolve", "fetch-input", "fetch"):  # the volume ends with the run, so nothing of it is cached
            assert found[name]["cachingOptions"] == {}
        fetch_input, fetch = (platform(cluster, name) for name in ("fetch-input", "fetch"))
        assert fetch_input["activeDeadlineSeconds"] == fetch["activeDeadlineSeconds"] == "7200"
        assert found["fetch-input"]["retryPolicy"]["maxRetryCount"] == 5

    def test_one_pod_for_all_inputs_where_loops_in_exit_handlers_do_not_work(self, tmp_path: Path) -> None:
        documents = compiled(CLUSTER.model_copy(update={"parallel_fetch": False}), tmp_path)
        found = tasks(documents[0])
        assert "fetch-input" not in found
        assert not [task for task in found.values() if "parameterIterator" in task]
        assert found["fetch"]["inputs"]["parameters"]["workspace"]["runtimeValue"]["constant"] == "{{$.workspace_path}}"

    def test_a_finished_run_is_removed_and_a_long_one_stopped(self, cluster: list[Json]) -> None:
        config = cluster[1]["platforms"]["kubernetes"]["pipelineConfig"]
        assert config["resourceTtlOnCompletion"] == 3600
        assert config["activeDeadlineSeconds"] == 172800


def test_the_cache_is_keyed_by_what_the_inputs_are(default: list[Json]) -> None:
    given = tasks(default[0])["fetch"]["inputs"]["parameters"]["versions"]
    assert given == {"taskOutputParameter": {"outputParameterKey": "Output", "producerTask": "resolve"}}


def test_only_register_waits_for_the_gate(default: list[Json]) -> None:
    pipeline = default[0]
    name, condition = next((name, task) for name, task in tasks(pipeline).items() if name.startswith("condition"))
    assert (
        condition["triggerPolicy"]["condition"]
        == "inputs.parameter_values['pipelinechannel--evaluate-Output'] == 'pass'"
    )
    assert list(pipeline["components"][f"comp-{name}"]["dag"]["tasks"]) == ["register"]


def test_the_status_is_reported_whatever_happened(default: list[Json]) -> None:
    assert sorted(default[0]["root"]["dag"]["tasks"]) == ["exit-handler-1", "report-status"]
    assert tasks(default[0])["report-status"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}


def test_without_an_exit_handler_the_pipeline_has_outputs(tmp_path: Path) -> None:
    (pipeline, _) = compiled(Settings(exit_handler=False), tmp_path)
    assert "report-status" not in tasks(pipeline)
    assert set(pipeline["root"]["outputDefinitions"]["parameters"]) == {"verdict"}
    assert set(pipeline["root"]["outputDefinitions"]["artifacts"]) == {"evaluation", "model"}


def test_every_parameter_but_the_spec_has_a_default_and_all_are_described(default: list[Json]) -> None:
    parameters = default[0]["root"]["inputDefinitions"]["parameters"]
    assert [name for name, item in parameters.items() if "defaultValue" not in item] == ["spec"]
    # An optional parameter left at null cannot be run locally.
    assert all(item.get("defaultValue", "") is not None and item["description"] for item in parameters.values())


def test_kubernetes_native_objects_hold_the_same_pipeline(default: list[Json], tmp_path: Path) -> None:
    pipeline, held = compiled(Settings(), tmp_path, "kubernetes")
    assert (pipeline["kind"], held["kind"]) == ("Pipeline", "PipelineVersion")
    assert held["apiVersion"] == pipeline["apiVersion"] == "pipelines.kubeflow.org/v2beta1"
    assert held["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "automerge-merge"
    assert held["metadata"]["name"] == f"automerge-merge-{version_name(COMPILED.read_bytes())}"
    assert held["spec"]["pipelineSpec"] == default[0]
    assert held["spec"]["platformSpec"] == default[1]

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

from automerge_pipelines.merge_pipeline import (
    COMPILED,
    CONFIG_KEYS,
    REGISTRY_SECRET_KEYS,
    S3_SECRET_KEYS,
    compile_pipeline,
)

Json = dict[str, Any]

IMAGE = "{{$.inputs.parameters['pipelinechannel--image']}}"
CPU = "{{$.inputs.parameters['pipelinechannel--cpu']}}"
MEMORY = "{{$.inputs.parameters['pipelinechannel--memory']}}"
ACCELERATOR = {
    "resourceType": "{{$.inputs.parameters['pipelinechannel--accelerator_type']}}",
    "resourceCount": "{{$.inputs.parameters['pipelinechannel--accelerator_count']}}",
}
SECRETS = {"s3_secret": S3_SECRET_KEYS, "registry_secret": REGISTRY_SECRET_KEYS}

TABLE: list[tuple[str, int, bool, str, str, bool, list[str]]] = [
    # task, retries, cached, CPU, memory, accelerator, secrets
    ("fetch", 3, False, "1", "4Gi", False, ["s3_secret"]),
    ("segment", 1, True, "1", "4Gi", False, []),
    ("search-merge", 2, True, CPU, MEMORY, True, []),
    ("evaluate", 1, True, CPU, MEMORY, True, []),
    ("register", 3, False, "1", "4Gi", False, ["s3_secret", "registry_secret"]),
]


@pytest.fixture(scope="module")
def documents() -> tuple[Json, Json]:
    """The pipeline and its platform part, as committed."""
    pipeline, platform = yaml.safe_load_all(COMPILED.read_text(encoding="ascii"))
    return pipeline, platform


def tasks(pipeline: Json) -> Json:
    """All tasks by name, those inside the condition included."""
    nested = pipeline["components"]["comp-condition-1"]["dag"]["tasks"]
    return {**pipeline["root"]["dag"]["tasks"], **nested}


def test_the_committed_yaml_is_up_to_date(tmp_path: Path) -> None:
    fresh = compile_pipeline(tmp_path / "fresh.yaml")
    assert fresh.read_bytes() == COMPILED.read_bytes(), "run: make pipeline"


def test_compiling_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.yaml"
        subprocess.run(
            [sys.executable, "-m", "automerge_pipelines.merge_pipeline", "--output", str(path)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
        )
        assert path.read_bytes() == COMPILED.read_bytes()


def test_parses_strictly(documents: tuple[Json, Json]) -> None:
    pipeline, platform = documents
    assert json_format.ParseDict(pipeline, PipelineSpec()).pipeline_info.name == "automerge-merge"
    json_format.ParseDict(platform, PlatformSpec())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(TABLE)
    for settings in executors.values():
        json_format.ParseDict(settings, KubernetesExecutorConfig())


@pytest.mark.parametrize(("task", "retries", "cached", "cpu", "memory", "accelerator", "secrets"), TABLE)
def test_settings_of_each_executor(
    documents: tuple[Json, Json],
    task: str,
    retries: int,
    cached: bool,
    cpu: str,
    memory: str,
    accelerator: bool,
    secrets: list[str],
) -> None:
    pipeline, platform = documents
    found = tasks(pipeline)[task]
    assert found["cachingOptions"].get("enableCache", False) is cached
    assert found["retryPolicy"]["maxRetryCount"] == retries
    container = pipeline["deploymentSpec"]["executors"][f"exec-{task}"]["container"]
    assert container["image"] == IMAGE
    resources = container["resources"]
    assert resources["resourceCpuRequest"] == cpu
    assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == memory
    assert resources.get("accelerator") == (ACCELERATOR if accelerator else None)

    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{task}"]
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


def test_only_register_waits_for_the_gate(documents: tuple[Json, Json]) -> None:
    pipeline, _ = documents
    condition = pipeline["root"]["dag"]["tasks"]["condition-1"]
    assert (
        condition["triggerPolicy"]["condition"]
        == "inputs.parameter_values['pipelinechannel--evaluate-Output'] == 'pass'"
    )
    assert list(pipeline["components"]["comp-condition-1"]["dag"]["tasks"]) == ["register"]


def test_every_parameter_but_the_spec_has_a_default_and_all_are_described(documents: tuple[Json, Json]) -> None:
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert [name for name, item in parameters.items() if "defaultValue" not in item] == ["spec"]
    # An optional parameter left at null cannot be run locally.
    assert all(item.get("defaultValue", "") is not None and item["description"] for item in parameters.values())


def test_no_credential_can_be_written_into_the_pipeline(documents: tuple[Json, Json]) -> None:
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        assert "env" not in executor["container"]

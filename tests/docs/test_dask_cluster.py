"""The manifest of the Dask cluster: by the operator's schema, by Kubernetes', and its commands run."""

import copy
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from distributed import Client

ROOT = Path(__file__).parents[2]
CRDS = "operator/deployment/helm/dask-kubernetes-operator/crds"
RELEASE = "1.37"


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    cluster, policy = yaml.safe_load_all((ROOT / "docs" / "dask-cluster.yaml").read_text())
    return cluster, policy


def pod_specs() -> dict[str, dict[str, Any]]:
    cluster, _ = documents()
    return {role: cluster["spec"][role]["spec"] for role in ("worker", "scheduler")}


def container(role: str) -> dict[str, Any]:
    (found,) = pod_specs()[role]["containers"]
    return dict(found)


def strict(schema: Any) -> Any:
    """A schema that refuses what it does not know, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def operators_schema() -> dict[str, Any]:
    """Of a DaskCluster, as the operator's Helm chart installs it."""
    spec = importlib.util.find_spec("dask_kubernetes")  # found, not imported
    assert spec is not None
    assert spec.submodule_search_locations
    crd = yaml.safe_load((Path(spec.submodule_search_locations[0]) / CRDS / "daskcluster.yaml").read_text())
    (version,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    # What every object has, and no schema of a resource names.
    schema["properties"] |= {"apiVersion": {"const": "kubernetes.dask.org/v1"}, "kind": {"const": "DaskCluster"}}
    schema["properties"]["metadata"] = {"type": "object"}
    return dict(schema)


def test_the_operator_takes_it(operators_schema: dict[str, Any]) -> None:
    cluster, _ = documents()
    jsonschema.validate(cluster, operators_schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "worker", "replica"), 2),
        (("spec", "worker", "replicas"), "two"),
        (("spec", "worker", "spec", "containers", 0, "volumeMount"), []),
        (("spec", "scheduler", "spec", "containers", 0, "readinessProbe", "httpget"), {}),
        (("spec", "scheduler", "service", "ports", 0, "targetport"), 8786),
    ],
)
def test_the_operator_refuses_what_it_does_not_know(
    operators_schema: dict[str, Any], path: tuple[Any, ...], value: object
) -> None:
    cluster = copy.deepcopy(documents()[0])
    place: Any = cluster
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, operators_schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_kubernetes_takes_the_pods(role: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role}, "spec": pod_specs()[role]}
    kubernetes_validate.validate(pod, RELEASE, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "volume": []}}, RELEASE, strict=True)


def test_kubernetes_takes_service_and_policy() -> None:
    cluster, policy = documents()
    service = cluster["spec"]["scheduler"]["service"]
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "scheduler"}, "spec": service},
        RELEASE,
        strict=True,
    )
    kubernetes_validate.validate(policy, RELEASE, strict=True)
    name = cluster["metadata"]["name"]
    assert service["selector"] == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    assert policy["spec"]["podSelector"]["matchLabels"] == {"dask.org/cluster-name": name}
    assert service["type"] == "ClusterIP", "who reaches the scheduler can run code on the workers"


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_the_pods_have_no_rights(role: str) -> None:
    spec, main = pod_specs()[role], container(role)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532, "the image's user"
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert all(volume["emptyDir"]["sizeLimit"] for volume in volumes.values())
    assert mounts["tmp"] == "/tmp"


def test_a_worker_has_one_gpu_and_its_cache() -> None:
    worker = container("worker")
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert "--nthreads=1" in worker["args"]
    env = {each["name"]: each["value"] for each in worker["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in worker["volumeMounts"]}
    assert env["AUTOMERGE_CACHE"] == mounts["cache"]
    for each in worker["envFrom"]:
        ((_, reference),) = each.items()
        assert reference["optional"] is True
    assert worker["image"] == container("scheduler")["image"]


@contextmanager
def running(role: str, folder: Path, env: dict[str, str], **changes: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The container's command in a process of this machine."""
    main = container(role)
    arguments = [changes.get(argument, argument) for argument in main["args"]]
    for name, value in env.items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    program = Path(sys.executable).with_name(main["command"][0])
    with (folder / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(program), *main["command"][1:], *arguments],
            cwd=folder,
            env={**os.environ, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports() -> tuple[int, int]:
    with ExitStack() as stack:
        first, second = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        return first.getsockname()[1], second.getsockname()[1]


def test_the_commands_make_a_cluster(tmp_path: Path) -> None:
    port, web = free_ports()
    scheduler = {"--port=8786": f"--port={port}", "--dashboard-address=:8787": f"--dashboard-address=127.0.0.1:{web}"}
    probe = container("scheduler")["readinessProbe"]["httpGet"]["path"]
    # The operator sets these two.
    env = {"DASK_SCHEDULER_ADDRESS": f"tcp://127.0.0.1:{port}", "DASK_WORKER_NAME": "automerge-default-worker-1"}
    local = {"--local-directory=/tmp": f"--local-directory={tmp_path}"}
    assert set(scheduler) <= set(container("scheduler")["args"])
    assert set(local) <= set(container("worker")["args"])
    with running("scheduler", tmp_path, {}, **scheduler), running("worker", tmp_path, env, **local):
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{web}{probe}") as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "scheduler.log").read_text()
                time.sleep(0.1)
        with Client(f"tcp://127.0.0.1:{port}", set_as_default=False, timeout=60) as client:
            client.wait_for_workers(1, timeout=90)
            (worker,) = client.scheduler_info()["workers"].values()
            assert worker["name"] == "automerge-default-worker-1"
            assert worker["nthreads"] == 1
            assert worker["memory_limit"] == 0

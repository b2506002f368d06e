"""Who may do what: rights, containers, secrets, the network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automerge.secrets import SECRET_NAME
from tests.helm.chart import CHART, CI, NAMESPACE, Object, objects, one, pod_specs
from tests.helm.program import Helm

FULL = CHART / "ci" / "full-values.yaml"
CHOSEN_BY_THE_CLUSTER = "openshift-values"


@pytest.fixture(params=CI, ids=lambda path: path.stem)
def values(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_no_right_is_about_the_cluster(helm: Helm, values: Path) -> None:
    found = objects(helm, "--values", values)
    assert not [each for each in found if each["kind"].startswith("Cluster")]
    for role in (each for each in found if each["kind"] == "Role"):
        for rule in role["rules"]:
            assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
            if "secrets" in rule["resources"]:
                assert rule["resourceNames"]
                assert rule["verbs"] == ["get"]
    for binding in (each for each in found if each["kind"] == "RoleBinding"):
        assert binding["roleRef"]["kind"] == "Role"
        assert all(subject["namespace"] == NAMESPACE for subject in binding["subjects"])


def test_every_container_is_restricted(helm: Helm, values: Path) -> None:
    pods = pod_specs(objects(helm, "--values", values))
    assert pods
    for name, pod in pods.items():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        if values.stem == CHOSEN_BY_THE_CLUSTER:
            assert not {"runAsUser", "runAsGroup", "fsGroup"} & context.keys(), name
        else:
            assert isinstance(context["runAsUser"], int), name
            assert context["runAsUser"] > 0, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume] if "volumes" in pod else True
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
            assert container["resources"]["limits"]["memory"], name


def test_no_pod_has_a_token_of_kubernetes_that_it_does_not_need(helm: Helm, values: Path) -> None:
    needed = {"Deployment merging-trigger"} if values == FULL else set()
    pods = pod_specs(objects(helm, "--values", values))
    assert {name for name, pod in pods.items() if pod["automountServiceAccountToken"]} == needed


def _references(value: Any) -> Iterator[str]:
    """The names of all secrets that are referred to."""
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("secretKeyRef", "secretRef"):
                yield item["name"]
            elif key == "secret":
                yield item["secretName"]
            else:
                yield from _references(item)


def test_no_secret_is_made_and_all_that_are_read_were_named(helm: Helm, values: Path) -> None:
    found = objects(helm, "--values", values)
    assert not [each for each in found if each["kind"] == "Secret"]
    given = values.read_text() + (CHART / "values.yaml").read_text()
    for name, pod in pod_specs(found).items():
        for secret in _references(pod):
            assert secret in given, name
        for container in pod["containers"]:
            for variable in container.get("env", ()):
                assert not (SECRET_NAME.search(variable["name"]) and "value" in variable), name


def test_the_secrets_that_the_service_knows_come_from_existing_ones(helm: Helm) -> None:
    found = objects(helm, "--values", FULL, "--set", "kfp.existingSecret=kubeflow")
    (container,) = one(found, "Deployment", "trigger")["spec"]["template"]["spec"]["containers"]
    env = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef") for each in container["env"]}
    assert env["AUTOMERGE_WEBHOOK_SECRET"] == {"name": "webhook", "key": "AUTOMERGE_WEBHOOK_SECRET"}
    assert env["AUTOMERGE_ADMIN_TOKEN"] == {"name": "webhook", "key": "AUTOMERGE_ADMIN_TOKEN", "optional": True}
    assert env["AUTOMERGE_KFP_TOKEN"] == {"name": "kubeflow", "key": "AUTOMERGE_KFP_TOKEN"}
    for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        assert env[key] == {"name": "mlflow-credentials", "key": key, "optional": True}


def _selects(policy: Object, labels: dict[str, str]) -> bool:
    selector = policy["spec"]["podSelector"]
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )


def _labels(found: list[Object]) -> dict[str, dict[str, str]]:
    """The labels of all pods."""
    return {
        f"{each['kind']} {each['metadata']['name']}": (each if each["kind"] == "Pod" else each["spec"]["template"])[
            "metadata"
        ]["labels"]
        for each in found
        if each["kind"] in ("Deployment", "Job", "Pod")
    }


@pytest.mark.parametrize("path", [path for path in CI if path.stem != "no-trigger-values"], ids=lambda path: path.stem)
def test_every_pod_is_denied_all_that_is_not_listed(helm: Helm, path: Path) -> None:
    found = objects(helm, "--values", path)
    policies = [each for each in found if each["kind"] == "NetworkPolicy"]
    deny = one(found, "NetworkPolicy", "default-deny")
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & deny["spec"].keys()
    for name, labels in _labels(found).items():
        assert _selects(deny, labels), name
    for policy in policies:
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            assert rule["ports"], "a rule without ports allows all"
            assert rule.get("from") or rule.get("to"), "a rule without peers allows all"


def test_the_network_policies_are_about_the_pods_they_mean(helm: Helm) -> None:
    found = objects(helm, "--values", FULL)
    labels = _labels(found)
    chosen = {
        each["metadata"]["name"]: {name for name in labels if _selects(each, labels[name])}
        for each in found
        if each["kind"] == "NetworkPolicy"
    }
    trigger, job, test, gateway = (
        "Deployment merging-trigger",
        "Job merging-deploy",
        "Pod merging-test",
        "Deployment release-pushgateway",
    )
    assert chosen == {
        "merging-default-deny": {trigger, job, test, gateway},
        "merging-egress": {trigger, job},
        "merging-trigger": {trigger},
        "merging-test": {test},
        "merging-pushgateway": {gateway},
    }


def test_an_empty_list_of_peers_lets_nobody_in(helm: Helm) -> None:
    found = objects(
        helm, "--values", FULL, "--set-json", "networkPolicy.ingress=[]", "--set-json", "pushgateway.ingress=[]"
    )
    (rule,) = one(found, "NetworkPolicy", "merging-trigger")["spec"]["ingress"]
    assert rule["from"] == [
        {
            "podSelector": {
                "matchLabels": {
                    "app.kubernetes.io/name": "automerge",
                    "app.kubernetes.io/instance": "release",
                    "app.kubernetes.io/component": "test",
                }
            }
        }
    ]
    assert "ingress" not in one(found, "NetworkPolicy", "merging-pushgateway")["spec"]

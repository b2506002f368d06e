"""Wrong values are refused, with the place, before anything is rendered."""

import json

import pytest

from tests.helm.chart import CHART, CI
from tests.helm.program import Helm

MINIMAL = CHART / "ci" / "minimal-values.yaml"
RULE = {"name": "r", "registry": "mlflow", "models": ["*"], "select": {"alias": "candidate"}, "spec": {"name": "x"}}


def rule(**changes: object) -> str:
    return f"trigger.rules={json.dumps([{**RULE, **changes}])}"


REFUSED = {
    "unknown": "nothing=1",
    "unknown in the image": "image.tagg=1",
    "unknown in the trigger": "trigger.replicas=2",
    "unknown in the subchart": "pushgateway.replicas=2",
    "root": "podSecurityContext.runAsUser=0",
    "a user by name": 'podSecurityContext.runAsUser="root"',
    "a privilege": "podSecurityContext.privileged=true",
    "a digest that is none": 'image.digest="sha256:abc"',
    "a policy that is none": 'image.pullPolicy="Sometimes"',
    "no webhook secret": 'trigger.existingSecret=""',
    "no rules": "trigger.rules=[]",
    "no registries": "trigger.registries=[]",
    "a registry of no kind": 'trigger.registries=[{"kind": "git", "uri": "http://x"}]',
    "a runner of no kind": 'trigger.runner={"kind": "argo"}',
    "what the chart fills in": 'trigger.runner={"kind": "kfp", "endpoint": "http://x"}',
    "an unknown key of a rule": rule(minimun=2),
    "a rule without models": rule(models=[]),
    "a rule with one candidate": rule(minimum=1),
    "a rule without a spec": rule(spec={}),
    "an unknown setting": 'deploy.settings={"immage": "x"}',
    "a setting that is no quantity": 'deploy.settings={"defaults": {"memory": "much"}}',
    "settings of an unknown task": 'deploy.settings={"tasks": {"train": {}}}',
    "a schedule without cron": 'deploy.schedules=[{"name": "x", "spec": {"name": "x"}}]',
    "a schedule with a path": 'deploy.schedules=[{"name": "x", "cron": "0 2 * * *", "spec": "x.yaml"}]',
    "a secret as a value": 'trigger.extraEnv=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]',
    "a secret for the tasks": 'tasks.configMap.data={"MLFLOW_TRACKING_PASSWORD": "x"}',
    "a password in an address": 'kfp.endpoint="http://me:word@kubeflow"',
    "an address that is none": 'kfp.endpoint="kubeflow:8888"',
    "a label of the selectors": 'trigger.podLabels={"app.kubernetes.io/name": "x"}',
    "two gateways": 'pushgateway={"enabled": true, "url": "http://gateway:9091"}',
    "an alert that is none": 'prometheusRule.disabled=["AutoMergeRunFaild"]',
    "an empty peer, which is everybody": "networkPolicy.ingress=[{}]",
    "a volume for many": 'trigger.persistence.accessModes=["ReadOnlyMany"]',
    "a port that is none": "trigger.service.port=70000",
    "a negative count": "deploy.prune=-1",
}


@pytest.mark.parametrize("assignment", REFUSED.values(), ids=REFUSED.keys())
def test_wrong_values_are_refused(helm: Helm, assignment: str) -> None:
    done = helm("template", "release", CHART, "--values", MINIMAL, "--set-json", assignment)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr
    assert f"at '/{assignment.split('=')[0].split('.')[0]}" in done.stderr or "additional properties" in done.stderr


TAKEN = {
    "a secret by reference": 'trigger.extraEnv=[{"name": "A_TOKEN", "valueFrom": {"secretKeyRef": {}}}]',
    "numbers for quantities": 'deploy.settings={"defaults": {"cpu": 4, "memory": "1.5Gi"}}',
    "a rule by tag, with a path": rule(select={"tag": {"a": "b"}}, spec="/specs/a.yaml", maximum=None),
    "another gateway": 'pushgateway.url="http://gateway.monitoring:9091"',
    "no egress": "networkPolicy.egress=[]",
}


@pytest.mark.parametrize("assignment", TAKEN.values(), ids=TAKEN.keys())
def test_right_values_are_taken(helm: Helm, assignment: str) -> None:
    done = helm("template", "release", CHART, "--values", MINIMAL, "--set-json", assignment)
    assert done.returncode == 0, done.stderr


def test_every_mapping_of_the_schema_is_closed() -> None:
    """A mapping lists its keys and refuses others, or says of what kind its values are, or is Kubernetes' own."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    open_ones = []

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and "properties" in node and node.get("additionalProperties") is not False:
                open_ones.append(path)
            for key, value in node.items():
                walk(value, f"{path}/{key}")

    walk(schema, "")
    assert open_ones == []
    assert schema["additionalProperties"] is False
    assert len(CI) >= 6

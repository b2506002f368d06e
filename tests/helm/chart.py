"""The chart, and what Helm makes of it."""

from pathlib import Path
from typing import Any

import yaml

from tests.helm.program import Helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "automerge"
CI = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
NAMESPACE = "merging"
RELEASE = "release"

Object = dict[str, Any]


def rendered(helm: Helm, *arguments: str | Path, chart: Path = CHART) -> str:
    """The text of all objects, hooks and tests too."""
    done = helm("template", RELEASE, chart, "--namespace", NAMESPACE, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(helm: Helm, *arguments: str | Path, chart: Path = CHART) -> list[Object]:
    """The objects."""
    return parsed(rendered(helm, *arguments, chart=chart))


def parsed(text: str) -> list[Object]:
    """The objects in a text."""
    return [found for found in yaml.safe_load_all(text) if found]


def one(found: list[Object], kind: str, name: str) -> Object:
    """The one object of a kind whose name ends so."""
    (match,) = [each for each in found if each["kind"] == kind and each["metadata"]["name"].endswith(name)]
    return match


def pod_specs(found: list[Object]) -> dict[str, Object]:
    """The specs of all pods, by what they belong to."""
    templates = {
        f"{each['kind']} {each['metadata']['name']}": each["spec"]["template"]["spec"]
        for each in found
        if each["kind"] in ("Deployment", "Job", "StatefulSet", "DaemonSet")
    }
    return templates | {f"Pod {each['metadata']['name']}": each["spec"] for each in found if each["kind"] == "Pod"}

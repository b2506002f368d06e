"""What every chart must be: linted, valid for Kubernetes, deterministic, and able to be upgraded."""

import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from helm.generate import main
from tests.helm.chart import CHART, CI, NAMESPACE, ROOT, Object, objects, one, rendered
from tests.helm.program import Helm

RELEASES = tuple(sorted(Path(__file__).with_name("releases").glob("*.tar.gz")))
"""The chart of each earlier release (`git archive --format=tar.gz REVISION:helm/automerge`)."""

KUBERNETES = ("1.29", "1.33", "1.37")
OPERATOR = {
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
}
"""The Prometheus operator's kinds, which no schema here knows, and what each must have."""


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_lint_finds_nothing(helm: Helm, values: Path) -> None:
    done = helm("lint", "--strict", CHART, "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def test_lint_takes_the_defaults_and_finds_a_fault(helm: Helm, tmp_path: Path) -> None:
    assert helm("lint", "--strict", CHART).returncode == 0
    copy = Path(shutil.copytree(CHART, tmp_path / "automerge"))
    (copy / "templates" / "broken.yaml").write_text("kind: ConfigMap\nmetadata: {name: {{ .Values.image.no.such }}}")
    assert helm("lint", "--strict", copy).returncode != 0


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_kubernetes_takes_every_object(helm: Helm, values: Path, version: str) -> None:
    found = objects(helm, "--values", values, "--kube-version", version)
    for each in found:
        if each["kind"] in OPERATOR:
            assert each["apiVersion"] == "monitoring.coreos.com/v1"
            assert each["spec"].keys() == OPERATOR[each["kind"]]
        else:
            kubernetes_validate.validate(each, version, strict=True)
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in found]
    assert len(names) == len(set(names))


def test_the_validator_finds_a_fault(helm: Helm) -> None:
    deployment = one(objects(helm, "--values", CHART / "ci" / "minimal-values.yaml"), "Deployment", "trigger")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def test_an_old_kubernetes_is_refused(helm: Helm) -> None:
    done = helm("template", "release", CHART, "--kube-version", "1.20")
    assert done.returncode != 0
    assert "incompatible with Kubernetes" in done.stderr


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_two_renders_are_the_same(helm: Helm, values: Path) -> None:
    assert rendered(helm, "--values", values) == rendered(helm, "--values", values)


def test_nothing_is_random_dated_or_looked_up() -> None:
    words = (
        "rand",
        "now",
        "lookup",
        "genCA",
        "genSelf",
        "genSigned",
        "genPrivateKey",
        "uuidv4",
        "htpasswd",
        "getHostByName",
    )
    templates = sorted(CHART.rglob("*.yaml")) + sorted(CHART.rglob("*.tpl"))
    for path in templates:
        for action in path.read_text().split("{{")[1:]:
            called = action.split("}}")[0].replace("(", " ").split()
            assert not [word for word in called if word.startswith(words)], path


def test_the_version_of_the_application_is_that_of_the_package() -> None:
    """The chart's own version counts by itself."""
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == package
    for dependency in chart["dependencies"]:
        found = yaml.safe_load((CHART / "charts" / dependency["name"] / "Chart.yaml").read_text())
        assert found["version"] == dependency["version"]


def test_the_generated_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def immutable(found: list[Object]) -> dict[str, Any]:
    """What the API server lets nobody change; hooks are made anew."""
    parts: dict[str, Any] = {}
    for each in found:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Deployment":
            parts[name] = each["spec"]["selector"]
        elif each["kind"] == "PersistentVolumeClaim":
            parts[name] = each["spec"]
        elif each["kind"] == "RoleBinding":
            parts[name] = each["roleRef"]
        elif each["kind"] == "Job":
            assert "before-hook-creation" in each["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    return parts


def unpacked(release: Path, folder: Path) -> Path:
    """The chart of an earlier release, with its values of that time."""
    with tarfile.open(release) as archive:
        archive.extractall(folder / release.name, filter="data")
    return folder / release.name


def test_the_version_is_a_new_one() -> None:
    earlier = [release.name.removeprefix("automerge-").removesuffix(".tar.gz") for release in RELEASES]
    assert earlier and yaml.safe_load((CHART / "Chart.yaml").read_text())["version"] not in earlier


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_an_upgrade_keeps_the_values_and_changes_nothing_that_cannot_change(
    helm: Helm, release: Path, values: Path, tmp_path: Path
) -> None:
    """From an earlier release, by the values that it was installed with; and back again."""
    chart = unpacked(release, tmp_path)
    own = chart / "ci" / values.name
    before = objects(helm, "--values", own, chart=chart)
    after = objects(helm, "--values", own, "--is-upgrade")
    assert before != after
    assert immutable(before) == immutable(after)
    assert objects(helm, "--values", own, "--is-upgrade", chart=chart) == before


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_the_package_holds_all_that_is_rendered(helm: Helm, values: Path, tmp_path: Path) -> None:
    assert helm("package", CHART, "--destination", tmp_path).returncode == 0
    (package,) = tmp_path.glob("*.tgz")
    assert objects(helm, "--values", values, chart=package) == objects(helm, "--values", values)


def test_the_package_leaves_out_what_only_tests_read(helm: Helm, tmp_path: Path) -> None:
    assert helm("package", CHART, "--destination", tmp_path).returncode == 0
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as package:
        names = package.getnames()
    assert not [name for name in names if "/ci/" in name]
    assert "automerge/files/rules.yaml" in names
    assert "automerge/charts/pushgateway/Chart.yaml" in names


@pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)
def test_every_object_has_a_namespace_and_labels(helm: Helm, values: Path) -> None:
    ours = [each for each in objects(helm, "--values", values) if each["metadata"].get("labels")]
    for each in ours:
        assert each["metadata"]["namespace"] in (NAMESPACE, "merging-team")
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "release"
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "automerge"
    assert ours


def test_the_notes_say_what_is_left_to_do(helm: Helm) -> None:
    done = helm("install", "release", CHART, "--dry-run=client", "--values", CHART / "ci" / "minimal-values.yaml")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    assert "kubectl create secret generic -n default automerge-trigger" in notes
    assert "http://release-automerge-trigger.default:8080/webhooks/mlflow" in notes
    assert "There is no Pushgateway" in notes

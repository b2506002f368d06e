"""Reading candidates: from MLflow on SQLite, and from a server that answers as Kubeflow Model Registry's API says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mr_openapi import models

from automerge.errors import RegistryError
from automerge.trigger.config import Rule, WatchedRegistry
from automerge.trigger.registries import model_page, reader, version_page
from tests.registry.kubeflow_server import ModelRegistryServer, running_model_registry
from tests.trigger.registry import add_version, client


def rule(**changes: Any) -> Rule:
    return Rule.model_validate(
        {"name": "r", "registry": "m", "models": ["digits-*"], "select": {"alias": "candidate"}, "spec": {}, **changes}
    )


def mlflow(database: Path) -> WatchedRegistry:
    return WatchedRegistry(kind="mlflow", uri=f"sqlite:///{database}")


def test_mlflow_by_alias(database: Path) -> None:
    add_version(database, "digits-low", {"base": "b"})
    number = add_version(database, "digits-low", {"base": "c"})  # the alias moves to it
    add_version(database, "digits-high", {}, alias=None)
    add_version(database, "other", {})
    client(database).set_registered_model_tag("digits-low", "team", "vision")
    client(database).set_registered_model_tag("digits-low", "base", "of-the-model")
    [found] = reader(mlflow(database))(rule())
    assert (found.registry, found.model, found.version, found.uri) == ("mlflow", "digits-low", number, "s3://m/x")
    assert found.tags == {"team": "vision", "base": "c"}
    assert found.created > 1_600_000_000_000


def test_mlflow_by_tags(database: Path) -> None:
    add_version(database, "digits-low", {"stage": "ready", "size": "s"}, alias=None)
    add_version(database, "digits-high", {"stage": "ready", "size": "l"}, alias=None)
    add_version(database, "other", {"stage": "ready", "size": "s"}, alias=None)
    found = reader(mlflow(database))(rule(select={"tag": {"stage": "ready", "size": "s"}}))
    assert [each.model for each in found] == ["digits-low"]


def test_mlflow_beyond_one_page(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("automerge.trigger.registries._PAGE", 2)
    for number in range(5):
        add_version(database, f"digits-{number}", {"stage": "ready"})
    assert len(reader(mlflow(database))(rule())) == 5
    assert len(reader(mlflow(database))(rule(select={"tag": {"stage": "ready"}}))) == 5


def test_mlflow_that_does_not_answer_is_one_sentence() -> None:
    read = reader(WatchedRegistry(kind="mlflow", uri="http://127.0.0.1:9"))
    with pytest.raises(RegistryError, match=r"^http://127.0.0.1:9: the registry does not answer; start it"):
        read(rule())


def test_the_page_of_a_model() -> None:
    registry = WatchedRegistry(kind="mlflow", uri="http://mlflow:5000", ui="https://mlflow.example/")
    assert model_page(registry, "org/digits low") == "https://mlflow.example/#/models/org%2Fdigits%20low"


def test_the_page_of_what_a_merge_registered(database: Path) -> None:
    for digest in ("aa", "bb", "bb"):
        number = add_version(database, "merged", {"automerge.spec.digest": digest}, alias=None)
    registry = mlflow(database).model_copy(update={"ui": "https://mlflow.example"})
    assert version_page(registry, "bb") == f"https://mlflow.example/#/models/merged/versions/{number}"
    assert version_page(registry, "cc") == ""
    assert version_page(mlflow(database), "bb") == ""  # a file has no page


def text(value: str) -> dict[str, str]:
    return {"metadataType": "MetadataStringValue", "string_value": value}


READY = {"stage": text("ready"), "steps": {"metadataType": "MetadataIntValue", "int_value": "12"}}


@pytest.fixture
def kubeflow() -> Iterator[ModelRegistryServer]:
    """Lists in pages of one."""
    with running_model_registry() as server:
        server.page = 1
        for number, (name, state, properties) in enumerate(
            [
                ("digits-low", "LIVE", {"team": text("vision")}),
                ("digits-old", "ARCHIVED", {}),
                ("digits-high", "LIVE", {}),
                ("other", "LIVE", {}),
            ],
            start=1,
        ):
            values = {"id": str(number), "name": name, "state": state, "customProperties": properties}
            server.models[str(number)] = models.RegisteredModel.from_dict(values)
        for key, model, name, state, properties in [
            ("11", "1", "v1", "LIVE", READY),
            ("12", "1", "v2", "LIVE", {}),
            ("13", "1", "v3", "ARCHIVED", READY),
            ("31", "3", "v1", "LIVE", READY),
        ]:
            values = {"id": key, "registeredModelId": model, "name": name, "state": state}
            server.versions[key] = models.ModelVersion.from_dict({**values, "customProperties": properties})
        server.artifacts["1"] = ("11", models.DocArtifact(name="card", uri="s3://models/card"))
        server.artifacts["2"] = ("11", models.ModelArtifact(name="weights", uri="s3://models/low"))
        yield server


def test_kubeflow_by_properties(kubeflow: ModelRegistryServer) -> None:
    read = reader(WatchedRegistry(kind="kubeflow", uri=kubeflow.url))
    low, high = read(rule(select={"tag": {"stage": "ready"}}))
    assert (low.model, low.version, low.uri, low.created) == ("digits-low", "v1", "s3://models/low", 11)
    assert low.tags == {"team": "vision", "stage": "ready", "steps": "12"}
    assert (high.model, high.uri) == ("digits-high", "")


def test_kubeflow_elsewhere_is_one_sentence(kubeflow: ModelRegistryServer) -> None:
    for uri, reason in [
        (f"{kubeflow.url}/wrong", r"no such operation: .* \(404\); check the uri"),
        ("http://127.0.0.1:9", "the server does not answer .*; start it, or correct its uri"),
    ]:
        with pytest.raises(
            RegistryError, match=f"^Kubeflow Model Registry at {uri}: cannot read the candidates: {reason}"
        ):
            reader(WatchedRegistry(kind="kubeflow", uri=uri))(rule(select={"tag": {"stage": "ready"}}))

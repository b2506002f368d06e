"""Reading candidates: from MLflow on SQLite, and from a server that answers as Kubeflow Model Registry's API says."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from automerge.errors import RegistryError
from automerge.trigger.config import Rule, WatchedRegistry
from automerge.trigger.registries import model_page, reader, version_page
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


MODELS = [
    {"id": "1", "name": "digits-low", "state": "LIVE", "customProperties": {"team": text("vision")}},
    {"id": "2", "name": "digits-old", "state": "ARCHIVED"},
    {"id": "3", "name": "digits-high", "state": "LIVE"},
    {"id": "4", "name": "other", "state": "LIVE"},
]
READY = {"stage": text("ready"), "steps": {"metadataType": "MetadataIntValue", "int_value": "12"}}
VERSIONS = {
    "1": [
        {"id": "11", "name": "v1", "state": "LIVE", "customProperties": READY},
        {"id": "12", "name": "v2", "state": "LIVE"},
        {"id": "13", "name": "v3", "state": "ARCHIVED", "customProperties": READY},
    ],
    "3": [{"id": "31", "name": "v1", "state": "LIVE", "customProperties": READY}],
}
ARTIFACTS = {"11": [{"id": "111", "artifactType": "model-artifact", "uri": "s3://models/low"}]}


class _Kubeflow(BaseHTTPRequestHandler):
    """Lists in pages of one, whatever page size is asked for."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query, strict_parsing=True)
        parts = address.path.removeprefix("/api/model_registry/v1alpha3/").split("/")
        match parts:
            case ["registered_models"]:
                items: list[Any] = MODELS
            case ["registered_models", model, "versions"]:
                items = VERSIONS[model]
            case ["model_versions", version, "artifacts"]:
                items = ARTIFACTS.get(version, [])
            case _:
                self.send_error(404)
                return
        assert set(query) <= {"pageSize", "nextPageToken"}
        at = int(query.get("nextPageToken", ["0"])[0])
        following = str(at + 1) if at + 1 < len(items) else ""
        body = json.dumps({"items": items[at : at + 1], "nextPageToken": following, "pageSize": 1, "size": 1}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def kubeflow() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Kubeflow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_kubeflow_by_properties(kubeflow: str) -> None:
    read = reader(WatchedRegistry(kind="kubeflow", uri=kubeflow))
    low, high = read(rule(select={"tag": {"stage": "ready"}}))
    assert (low.model, low.version, low.uri, low.created) == ("digits-low", "v1", "s3://models/low", 11)
    assert low.tags == {"team": "vision", "stage": "ready", "steps": "12"}
    assert (high.model, high.uri) == ("digits-high", "")


def test_kubeflow_elsewhere_is_one_sentence(kubeflow: str) -> None:
    read = reader(WatchedRegistry(kind="kubeflow", uri=f"{kubeflow}/wrong"))
    with pytest.raises(RegistryError, match="the registry answers 404; check address and rights"):
        read(rule(select={"tag": {"stage": "ready"}}))
    silent = reader(WatchedRegistry(kind="kubeflow", uri="http://127.0.0.1:9"))
    with pytest.raises(RegistryError, match="the registry does not answer"):
        silent(rule(select={"tag": {"stage": "ready"}}))

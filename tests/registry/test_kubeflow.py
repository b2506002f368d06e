"""Kubeflow Model Registry beyond the common contract: crashes, races, what is written, and errors in one sentence."""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from automerge.errors import MissingExtraError, RegistryError
from automerge.registry import kubeflow_api
from automerge.registry.kubeflow import KubeflowRegistry
from automerge.registry.kubeflow_api import plain_properties
from automerge.registry.registry import RegistryEntry, load_registry
from automerge.spec import RegistrySpec, parse_spec
from automerge.storage import store
from automerge.testing.registries import make_entry
from automerge.testing.s3_server import S3Server
from tests.registry.kubeflow_server import ModelRegistryServer, running_model_registry


@pytest.fixture
def entry(tmp_path: Path) -> RegistryEntry:
    folder = tmp_path / "files"
    folder.mkdir()
    return make_entry(folder)


@pytest.fixture
def server() -> Iterator[ModelRegistryServer]:
    with running_model_registry() as running:
        yield running


@pytest.fixture
def registry(server: ModelRegistryServer, tmp_path: Path) -> KubeflowRegistry:
    return KubeflowRegistry(RegistrySpec(kind="kubeflow", uri=server.url, artifacts=str(tmp_path / "artifacts")))


def test_what_is_written(
    registry: KubeflowRegistry, server: ModelRegistryServer, entry: RegistryEntry, tmp_path: Path
) -> None:
    made = registry.register(entry)
    place = tmp_path / "artifacts" / entry.model / entry.recipe_digest[:12]
    [model], [version] = server.models.values(), server.versions.values()
    [(owner, artifact)] = server.artifacts.values()
    assert (model.name, version.name, version.state, owner) == (entry.model, place.name, "LIVE", version.id)
    assert version.description == "A merged model."
    [documents] = place.glob("documents-*")
    assert plain_properties(version) == {
        "automerge.recipe": entry.recipe_digest,
        "automerge.spec": "digits",
        "automerge.pr.low": "97.20",
        "automerge.gate": "pass",
        "automerge.metric.pr_mean": "97.2",
        "automerge.documents": documents.as_uri(),
        "automerge.onnx.files": (place / "onnx").as_uri(),
        "automerge.complete": "true",
    }
    assert (artifact.name, artifact.uri) == ("weights", (place / "weights").as_uri())
    assert artifact.model_source_id == entry.recipe_digest
    assert made.uri == f"model-registry://{entry.model}/{place.name}"
    assert (made.url, made.storage_uri) == (server.url, None)  # no model server reads this machine's disk


def test_the_files_are_in_s3_where_a_model_server_loads_them(
    server: ModelRegistryServer, entry: RegistryEntry, s3_env: S3Server, tmp_path: Path
) -> None:
    bucket = s3_env.bucket
    spec = RegistrySpec(kind="kubeflow", uri=server.url, artifacts=f"s3://{bucket}/merged/")
    made = KubeflowRegistry(spec).register(entry)
    assert made.storage_uri == f"s3://{bucket}/merged/{entry.model}/{made.version}/weights"
    keys = [each.key for each in store.list_objects(made.storage_uri)]
    assert keys == ["heads/low.safetensors", "model.safetensors"]
    fetched = KubeflowRegistry(spec).download(entry.model, made.version, tmp_path / "fetched")
    assert (fetched / "weights" / "model.safetensors").read_bytes() == bytes(range(256))


@pytest.mark.parametrize(
    "call",
    # The version's id is 2: the update that completes it.
    [("POST", "registered_models"), ("POST", "model_versions"), ("POST", "artifacts"), ("PATCH", "2")],
)
def test_an_interrupted_registration_is_completed(
    call: tuple[str, str], registry: KubeflowRegistry, server: ModelRegistryServer, entry: RegistryEntry
) -> None:
    """A call is refused; what came before it stays, is not taken for a version, and is used by the next attempt."""
    server.refuse[call] = 503
    with pytest.raises(RegistryError, match=r"cannot register .*: refused on purpose \(503\); see the registry's log"):
        registry.register(entry)
    assert registry.find(entry.model, entry.recipe_digest) is None
    assert all(version.state == "ARCHIVED" for version in server.versions.values())
    server.refuse.clear()
    late = replace(entry, tags={**entry.tags, "pr.low": "97.30"})
    assert registry.register(late).created
    assert [len(kind) for kind in (server.models, server.versions, server.artifacts)] == [1, 1, 1]
    [version] = server.versions.values()
    assert plain_properties(version)["automerge.pr.low"] == "97.30"


def test_weights_that_had_arrived_are_not_sent_again(
    registry: KubeflowRegistry, server: ModelRegistryServer, entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    original = store.upload
    monkeypatch.setattr("automerge.storage.upload", lambda path, uri: (sent.append(path.name), original(path, uri)))
    server.refuse["POST", "model_versions"] = 500
    with pytest.raises(RegistryError):
        registry.register(entry)
    assert {"model.safetensors", "low.safetensors"} < set(sent)
    sent.clear()
    server.refuse.clear()
    [half] = Path(registry.artifacts).rglob("model.safetensors")
    half.write_bytes(b"half")
    registry.register(entry)
    assert "model.safetensors" in sent
    assert "low.safetensors" not in sent


def test_a_version_that_a_person_archived_stays_registered(
    registry: KubeflowRegistry, server: ModelRegistryServer, entry: RegistryEntry
) -> None:
    made = registry.register(entry)
    [version] = server.versions.values()
    version.state = "ARCHIVED"
    assert registry.register(entry) == made.model_copy(update={"created": False})
    assert version.state == "ARCHIVED"


def test_a_version_of_this_name_that_is_not_ours_is_left_alone(
    registry: KubeflowRegistry, server: ModelRegistryServer, entry: RegistryEntry
) -> None:
    registry.register(entry)
    other = entry.recipe_digest[:12] + "0" * 52
    with pytest.raises(RegistryError, match=r"is in the way: its recipe is .*; register under another model name"):
        registry.register(replace(entry, recipe_digest=other))


def test_setting_an_alias_keeps_what_else_is_known_of_the_model(
    registry: KubeflowRegistry, server: ModelRegistryServer, entry: RegistryEntry
) -> None:
    made = registry.register(entry)
    [model] = server.models.values()
    model.custom_properties = kubeflow_api.properties({"team": "vision", "share": 0.5})
    model.state = "ARCHIVED"
    registry.set_alias(entry.model, "champion", made.version)
    [model] = server.models.values()
    assert plain_properties(model) == {"team": "vision", "share": "0.5", "automerge.alias.champion": made.version}
    assert model.state == "ARCHIVED"


def test_it_works_where_an_event_loop_is_running(registry: KubeflowRegistry, entry: RegistryEntry) -> None:
    async def in_a_notebook() -> bool:
        return registry.register(entry).created

    assert asyncio.run(in_a_notebook())


def test_the_token_is_read_from_its_file(
    registry: KubeflowRegistry, server: ModelRegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    registry.find("digits", "0" * 64)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    registry.find("digits", "0" * 64)
    assert server.tokens == {None, "Bearer s3cret"}
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RegistryError, match="the token cannot be read"):
        registry.find("digits", "0" * 64)


def test_a_pods_own_token_is_not_sent_in_the_clear(
    registry: KubeflowRegistry, server: ModelRegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("s3cret")
    monkeypatch.setattr(kubeflow_api, "_POD_TOKEN", tmp_path / "token")
    registry.find("digits", "0" * 64)
    assert server.tokens == {None}
    assert kubeflow_api._token("https://registry") == "s3cret"


def test_a_server_that_refuses_does_not_answer_or_is_another_is_said(
    server: ModelRegistryServer, entry: RegistryEntry, tmp_path: Path
) -> None:
    server.refuse["GET", "registered_model"] = 403
    for uri, reason in [
        (server.url, r"refused on purpose \(403\); name a file with a token that may do this in KF_PIPELINES_SA_TOKEN"),
        ("http://127.0.0.1:9", "the server does not answer .*; start it"),
    ]:
        registry = KubeflowRegistry(RegistrySpec(kind="kubeflow", uri=uri, artifacts=str(tmp_path)))
        with pytest.raises(RegistryError, match=f"^Kubeflow Model Registry at {uri}: cannot find .*: {reason}"):
            registry.find(entry.model, entry.recipe_digest)
    server.refuse.clear()
    registry = KubeflowRegistry(RegistrySpec(kind="kubeflow", uri=f"{server.url}/wrong", artifacts=str(tmp_path)))
    with pytest.raises(RegistryError, match=r"\(404\); check the uri"):
        registry.register(entry)


@pytest.mark.parametrize("says", ["<html>Sign in</html>", "[]", '{"items": 3}', '{"name": 7, "id": []}'])
def test_another_server_is_recognised(server: ModelRegistryServer, registry: KubeflowRegistry, says: str) -> None:
    server.models["1"] = SimpleNamespace(name="digits", to_dict=dict)
    server.says = says
    with pytest.raises(RegistryError, match=r"cannot find .*: this is no Kubeflow Model Registry; check the uri$"):
        registry.find("digits", "0" * 64)


def test_files_that_cannot_be_put_anywhere_are_said(server: ModelRegistryServer, entry: RegistryEntry) -> None:
    registry = KubeflowRegistry(RegistrySpec(kind="kubeflow", uri=server.url, artifacts="/dev/null/merged"))
    with pytest.raises(RegistryError, match=r"^registry\.artifacts: "):
        registry.register(entry)
    assert not server.versions


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"artifacts": "s3://models"}, "needs 'uri', the registry's address"),
        ({"uri": "sqlite:///x", "artifacts": "s3://models"}, "needs 'uri', the registry's address"),
        ({"uri": "http://registry"}, "needs 'artifacts', a folder for the merged models"),
    ],
)
def test_what_is_missing_is_said_by_the_spec_before_anything_is_paid_for(values: dict[str, str], reason: str) -> None:
    with pytest.raises(ValidationError, match=f"kind 'kubeflow' {reason}"):
        RegistrySpec(kind="kubeflow", **values)


def test_without_its_client_the_extra_is_named(registry: KubeflowRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "mr_openapi" or name.startswith("mr_openapi.")]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "mr_openapi":
                raise ModuleNotFoundError("No module named 'mr_openapi'", name="mr_openapi")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"automerge-models\[kubeflow\]"):
        registry.find("digits", "0" * 64)


def test_the_spec_chooses_the_registry(server: ModelRegistryServer, tmp_path: Path) -> None:
    spec = parse_spec(
        f"""
        name: digits
        model: {{kind: factory, target: "m:f"}}
        sources: [{{name: a, uri: a}}, {{name: b, uri: b}}]
        tasks: [{{name: t, kind: classification, specialist: a, validation: v, test: t}}]
        registry: {{kind: kubeflow, uri: "{server.url}", artifacts: "{tmp_path}"}}
        """
    )
    registry = load_registry(spec)
    assert isinstance(registry, KubeflowRegistry)
    assert registry.find("digits", "0" * 64) is None

"""Kubeflow Model Registry as the registry; the files go to the spec's ``registry.artifacts``, for it keeps none.

Below that folder, ``<model>/<version>/`` holds ``weights/``, ``onnx/`` and ``documents-<digest of the documents>/``.
The version is named by its recipe: the first 12 digits of the digest. The registry lets no two versions of a model have
one name, nor two artifacts of a version, so of several processes that register one recipe at once one makes the
version.

The registry has no call that makes a version with its artifact. A version is made as archived, gets its artifact, and
becomes live with the property ``automerge.complete`` when all is in place; what a crash left is completed by the next
attempt. A version that was archived later, by a person, stays registered.

There are no aliases: one is a property ``automerge.alias.<alias>`` of the registered model, with the version's name.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automerge import storage
from automerge.documents import digest_of
from automerge.errors import RegistryError, StorageError
from automerge.registry.kubeflow_api import call, found_or_none, items, plain_properties, properties
from automerge.registry.registry import RegisteredVersion, RegistryEntry, check_files, weight_files
from automerge.spec import RegistrySpec

if TYPE_CHECKING:
    from mr_openapi import ModelRegistryServiceApi

PREFIX = "automerge."
_RECIPE = f"{PREFIX}recipe"
_COMPLETE = f"{PREFIX}complete"
_DOCUMENTS = f"{PREFIX}documents"
_ONNX = f"{PREFIX}onnx.files"
_ALIAS = f"{PREFIX}alias."
_ARTIFACT = "weights"

_NAME_DIGITS = 12
_LONGEST_VALUE = 5000
_LONGEST_KEY = 250
_SERVED_SCHEMES = ("s3://", "gs://", "https://", "hdfs://")


class KubeflowRegistry:
    """Registers merged models in Kubeflow Model Registry.

    Args:
        spec: ``uri`` is the server, ``artifacts`` the folder of the files; of kind ``kubeflow``, a spec has both.
    """

    kind = "kubeflow"

    def __init__(self, spec: RegistrySpec) -> None:
        assert spec.uri is not None and spec.artifacts is not None  # noqa: S101 - the spec has checked it
        self.uri, self.artifacts = spec.uri.rstrip("/"), spec.artifacts.rstrip("/")

    def find(self, model: str, recipe_digest: str) -> RegisteredVersion | None:
        """The version of a recipe, or None."""

        async def work(api: "ModelRegistryServiceApi") -> tuple[Any, str] | None:
            parent = await _model(api, model)
            version = await _version(api, parent, _name(recipe_digest)) if parent is not None else None
            if version is None or not _is_complete(version):
                return None
            _check_recipe(model, version, recipe_digest)
            return version, await _weights(api, version)

        found = call(self.uri, f"find a version of {model!r}", work)
        return self._registered(model, *found, created=False) if found is not None else None

    def register(self, entry: RegistryEntry) -> RegisteredVersion:
        """Register a merged model once for each recipe; see the module's description for crashes and races."""
        found = self.find(entry.model, entry.recipe_digest)
        if found is not None:
            return found
        check_files(entry)
        name = _name(entry.recipe_digest)
        place = f"{self.artifacts}/{entry.model}/{name}"
        with _storage_errors():
            documents = _upload(entry, place)
        values: dict[str, str | float] = {
            **_values(entry),
            _RECIPE: entry.recipe_digest,
            _DOCUMENTS: documents,
            **({_ONNX: _address(f"{place}/onnx")} if entry.onnx else {}),
        }

        async def work(api: "ModelRegistryServiceApi") -> tuple[Any, str]:
            version = await _ensure_version(api, await _ensure_model(api, entry.model), name, values, entry.description)
            _check_recipe(entry.model, version, entry.recipe_digest)
            await _ensure_artifact(api, version, entry, _address(f"{place}/weights"))
            version = await api.get_model_version(version.id)
            if not _is_complete(version):
                version = await _complete(api, version, values, entry.description)
            return version, await _weights(api, version)

        version, weights = call(self.uri, f"register {entry.model!r}", work)
        with _storage_errors():
            # Of several processes that came here at once, the first to write this made the version.
            marker = f"{place}/registered-{version.id}.json"
            created = storage.write_object(marker, b"{}\n", replacing=None) is not None
        return self._registered(entry.model, version, weights, created=created)

    def download(self, model: str, version: str, folder: Path) -> Path:
        """Download a version's weights, ONNX files and documents into ``folder``, which must be empty or missing."""
        if folder.exists() and any(folder.iterdir()):
            raise RegistryError(f"{folder}: the folder is not empty", "name a new one")
        found, weights = self._get(model, version)
        places = {"weights": weights, "onnx": found.get(_ONNX), "documents": found.get(_DOCUMENTS)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            _storage_errors(),
            tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary,
        ):
            whole = Path(temporary) / "version"
            for name, place in places.items():
                if place:
                    storage.fetch(place, whole / name)
            if folder.exists():
                folder.rmdir()
            whole.rename(folder)
        return folder

    def read_document(self, model: str, version: str, name: str) -> bytes | None:
        """One document of a version, whole; None if it has none of this name."""
        found, _ = self._get(model, version)
        if _DOCUMENTS not in found:
            return None
        with _storage_errors():
            document = storage.read_object(f"{found[_DOCUMENTS]}/{name}")
        return document.content if document is not None else None

    def with_alias(self, model: str, alias: str) -> RegisteredVersion | None:
        """The version that carries an alias, or None."""

        async def work(api: "ModelRegistryServiceApi") -> tuple[Any, str] | None:
            parent = await _model(api, model)
            name = plain_properties(parent).get(f"{_ALIAS}{alias}") if parent is not None else None
            version = await _version(api, parent, name) if name is not None else None
            return (version, await _weights(api, version)) if version is not None else None

        found = call(self.uri, f"look for the alias {alias!r} of {model!r}", work)
        return self._registered(model, *found, created=False) if found is not None else None

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Give an alias to a version, and take it from the one that carried it."""
        from mr_openapi.models import RegisteredModelUpdate

        async def work(api: "ModelRegistryServiceApi") -> None:
            parent = await _model(api, model)
            if parent is None or await _version(api, parent, version) is None:
                raise RegistryError(f"model {model!r} has no version {version}", "check both names")
            # An update replaces all properties.
            all_properties = {**(parent.custom_properties or {}), **properties({f"{_ALIAS}{alias}": version})}
            update = RegisteredModelUpdate(customProperties=all_properties, state=parent.state)
            await api.update_registered_model(parent.id, update)

        call(self.uri, f"set the alias {alias!r} of {model!r}", work)

    def _get(self, model: str, version: str) -> tuple[dict[str, str], str]:
        """A version's properties, and where its weights are."""

        async def work(api: "ModelRegistryServiceApi") -> tuple[dict[str, str], str] | None:
            parent = await _model(api, model)
            found = await _version(api, parent, version) if parent is not None else None
            return (plain_properties(found), await _weights(api, found)) if found is not None else None

        found = call(self.uri, f"read version {version} of {model!r}", work)
        if found is None:
            raise RegistryError(f"{self.uri}: model {model!r} has no version {version}", "check both names")
        return found

    def _registered(self, model: str, version: Any, weights: str, *, created: bool) -> RegisteredVersion:
        return RegisteredVersion(
            registry=self.kind,
            model=model,
            version=version.name,
            uri=f"model-registry://{model}/{version.name}",  # what KServe's initializer of this registry takes
            url=self.uri,
            storage_uri=weights if weights.startswith(_SERVED_SCHEMES) else None,
            created=created,
        )


async def _model(api: "ModelRegistryServiceApi", name: str) -> Any | None:
    return await found_or_none(api.find_registered_model(name=name))


async def _version(api: "ModelRegistryServiceApi", model: Any, name: str) -> Any | None:
    return await found_or_none(api.find_model_version(name=name, parent_resource_id=model.id))


async def _artifact(api: "ModelRegistryServiceApi", version: Any) -> Any | None:
    """The artifact with the weights."""
    async for item in items(api.get_model_version_artifacts, version.id):
        artifact = item.actual_instance
        if artifact.name == _ARTIFACT and artifact.artifact_type == "model-artifact":
            return artifact
    return None


async def _weights(api: "ModelRegistryServiceApi", version: Any) -> str:
    artifact = await _artifact(api, version)
    return str(artifact.uri or "") if artifact is not None else ""


async def _ensure_model(api: "ModelRegistryServiceApi", name: str) -> Any:
    from mr_openapi import ApiException
    from mr_openapi.models import RegisteredModelCreate

    found = await _model(api, name)
    if found is not None:
        return found
    try:
        return await api.create_registered_model(RegisteredModelCreate(name=name))
    except ApiException:  # servers differ in the status for a name that is taken
        found = await _model(api, name)
        if found is None:
            raise
        return found


async def _ensure_version(
    api: "ModelRegistryServiceApi", model: Any, name: str, values: Mapping[str, str | float], description: str
) -> Any:
    from mr_openapi import ApiException
    from mr_openapi.models import ModelVersionCreate, ModelVersionState

    found = await _version(api, model, name)
    if found is not None:
        return found
    made = ModelVersionCreate(
        name=name,
        registeredModelId=model.id,
        state=ModelVersionState.ARCHIVED,
        description=description or None,
        customProperties=properties(values),
    )
    try:
        return await api.create_model_version(made)
    except ApiException:
        found = await _version(api, model, name)
        if found is None:
            raise
        return found


async def _ensure_artifact(api: "ModelRegistryServiceApi", version: Any, entry: RegistryEntry, uri: str) -> None:
    """Give the version its artifact.

    It is the only artifact: KServe's initializer of this registry takes the first one of a version.
    """
    from mr_openapi import ApiException
    from mr_openapi.models import Artifact, ModelArtifact

    if await _artifact(api, version) is not None:
        return
    artifact = ModelArtifact(
        name=_ARTIFACT,
        uri=uri,
        artifactType="model-artifact",
        modelFormatName="safetensors",
        modelSourceKind="automerge",
        modelSourceClass="recipe",
        modelSourceId=entry.recipe_digest,
    )
    try:
        await api.upsert_model_version_artifact(version.id, Artifact(artifact))
    except ApiException:
        if await _artifact(api, version) is None:
            raise


async def _complete(
    api: "ModelRegistryServiceApi", version: Any, values: Mapping[str, str | float], description: str
) -> Any:
    from mr_openapi.models import ModelVersionState, ModelVersionUpdate

    update = ModelVersionUpdate(
        state=ModelVersionState.LIVE,
        description=description or None,
        customProperties=properties({**values, _COMPLETE: "true"}),
    )
    return await api.update_model_version(version.id, update)


def _is_complete(version: Any) -> bool:
    return plain_properties(version).get(_COMPLETE) == "true"


def _check_recipe(model: str, version: Any, recipe_digest: str) -> None:
    found = plain_properties(version).get(_RECIPE)
    if found != recipe_digest:
        raise RegistryError(
            f"version {version.name} of {model!r} is in the way: its recipe is {found or 'not named'}",
            "register under another model name",
        )


def _upload(entry: RegistryEntry, place: str) -> str:
    """Upload the files; returns where the documents are, as others reach it."""
    for path in weight_files(entry):
        target = f"{place}/weights/{path.relative_to(entry.weights).as_posix()}"
        # Equal recipes make equal weights, so name and size tell what had arrived.
        there = storage.find_object(target)
        if there is None or there.size != path.stat().st_size:
            storage.upload(path, target)
    for path in entry.onnx:
        storage.upload(path, f"{place}/onnx/{path.name}")
    # Runs that differ in their documents can end at one recipe: each keeps its own together.
    contents = {path.name: _digest(path) for path in entry.documents}
    documents = f"{place}/documents-{digest_of(contents)[:_NAME_DIGITS]}"
    for path in entry.documents:
        storage.upload(path, f"{documents}/{path.name}")
    return _address(documents)


def _digest(path: Path) -> str:
    with path.open("rb") as file:  # a statistics file may be as large as the model
        return hashlib.file_digest(file, "sha256").hexdigest()


def _address(place: str) -> str:
    """A place as others reach it: a path becomes a URI."""
    return place if "://" in place else Path(place).absolute().as_uri()


def _values(entry: RegistryEntry) -> dict[str, str | float]:
    """Tags and metrics as properties. The params are left out: the recipe is among the documents."""
    tags = {f"{PREFIX}{key}"[:_LONGEST_KEY]: value[:_LONGEST_VALUE] for key, value in entry.tags.items()}
    metrics = {
        f"{PREFIX}metric.{key}"[:_LONGEST_KEY]: value for key, value in entry.metrics.items() if math.isfinite(value)
    }
    return {**tags, **metrics}


def _name(recipe_digest: str) -> str:
    return recipe_digest[:_NAME_DIGITS]


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise RegistryError(f"registry.artifacts: {error.problem}", error.remedy) from None

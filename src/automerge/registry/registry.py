"""What a registry does, whatever stands behind it.

A registry files a merged model under the digest of its recipe: registering the same recipe twice gives the first
version. Implementations are found by the entry-point group ``automerge.registries``; each is called with the spec's
:class:`~automerge.spec.RegistrySpec` and must pass :func:`automerge.testing.registries.check_registry`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from pydantic import Field

from automerge.documents import Model
from automerge.errors import RegistryError
from automerge.plugins import load_plugin

if TYPE_CHECKING:
    from automerge.spec import Spec


@dataclass(frozen=True)
class RegistryEntry:
    """A merged model to be registered, with everything that is kept beside it.

    Attributes:
        model: the registered model's name.
        recipe_digest: the key: one version for each digest.
        weights: folder with the merged weights.
        onnx: ONNX files; none if the model could not be exported.
        documents: spec, manifest, segmentation, trials, recipe, evaluation, report.
        tags: short facts to find and judge a version by, without the registry's prefix.
        params: what the recipe says, by block.
        metrics: finite numbers.
        description: a few lines of Markdown for whoever opens the version.
        files: which files of ``weights`` belong to the model, by relative name; none named: all.
    """

    model: str
    recipe_digest: str
    weights: Path
    onnx: Sequence[Path] = ()
    documents: Sequence[Path] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    description: str = ""
    files: Sequence[str] = ()


def weight_files(entry: RegistryEntry) -> list[Path]:
    """The files of the merged weights, sorted."""
    files = [entry.weights / name for name in entry.files]
    return sorted(files or (path for path in entry.weights.rglob("*") if path.is_file()))


def check_files(entry: RegistryEntry) -> None:
    """Refuse an entry before anything of it is registered.

    Raises:
        RegistryError: one of its files is missing.
    """
    for path in (entry.weights, *weight_files(entry), *entry.onnx, *entry.documents):
        if not path.exists():
            raise RegistryError(f"{path}: no such file to register", "run the stage that writes it")


class RegisteredVersion(Model):
    """A version as the registry knows it."""

    registry: str = Field(description="The registry's kind.")
    model: str
    version: str
    uri: str = Field(description="Names the version to the registry's own tools, e.g. 'models:/digits/3'.")
    url: str = Field(description="Where to look at it: a page of the server, or the database where there is no server.")
    storage_uri: str | None = Field(
        default=None,
        description="Folder of the merged weights, as a model server takes it (KServe's storageUri); null where only "
        "the registry's own client reaches them.",
    )
    created: bool = Field(description="False: the recipe had been registered before, and this is its first version.")


class Promotion(Model):
    """What became of the alias that a registered version may take from the one that carries it."""

    alias: str
    verdict: Literal["promoted", "kept"] = Field(description="'promoted': the registered version has the alias now.")
    reason: str
    previous: str | None = Field(description="The version that had the alias; null if none had it.")
    rates: dict[str, float] = Field(
        default_factory=dict, description="By task, percent of what the previous version reaches; above 100 is better."
    )


class Registry(Protocol):
    """Files merged models by the digest of their recipe.

    Every method raises :class:`~automerge.errors.RegistryError` where the registry refuses or cannot be reached.
    """

    def find(self, model: str, recipe_digest: str) -> RegisteredVersion | None:
        """The first version that was registered for a recipe (``created`` is False), or None."""
        ...

    def register(self, entry: RegistryEntry) -> RegisteredVersion:
        """Register a merged model, unless its recipe has a version already.

        Can be repeated after a crash at any point, and mends what the crash left.
        """
        ...

    def download(self, model: str, version: str, folder: Path) -> Path:
        """Fetch a version; returns the folder with ``weights/``, ``onnx/`` and ``documents/`` in it.

        ``folder`` gets all of it or, on an error, nothing.
        """
        ...

    def read_document(self, model: str, version: str, name: str) -> bytes | None:
        """One document of a version, by its file name; None if the version has none of this name."""
        ...

    def with_alias(self, model: str, alias: str) -> RegisteredVersion | None:
        """The version that carries an alias (``created`` is False), or None."""
        ...

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Give an alias to a version, and take it from the one that carried it."""
        ...


def load_registry(spec: "Spec") -> Registry:
    """The registry that a spec names.

    Raises:
        PluginError: no registry of this kind is installed.
        MissingExtraError: the registry's client library is not installed.
        RegistryError: the registry's address is not usable.
    """
    make = load_plugin("registries", spec.registry.kind, where="registry.kind")
    return cast(Registry, make(spec.registry))

"""manifest.json, merged.json, registration.json: what a run was given and made; and the names of all documents.

``statistics.safetensors`` lies beside ``recipe.json``: `automerge.merging.statistics` describes it.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from automerge.checkpoint.layout import is_adapter
from automerge.documents import Document, Model
from automerge.registry.registry import Promotion, RegisteredVersion

MANIFEST = "manifest.json"
MERGED = "merged.json"
SEGMENTATION = "segmentation.json"
TRIALS = "trials.jsonl"
REFINEMENT = "refinement-{}.json"  # the state of the one that starts from a trial, by its number
RECIPE = "recipe.json"
FRONT = "front.json"
STATISTICS = "statistics.safetensors"
EVALUATION = "evaluation.json"
REPORT = "report.html"
REGISTRATION = "registration.json"


class FrontPoint(Model):
    """A recipe that no other trial beats in every task."""

    number: int = Field(description="Of its trial; its recipe is in the folder front/<number>.")
    cp: dict[str, float] = Field(description="Capability preservation by task, on validation data.")
    rates: dict[str, float] = Field(description="Preservation rate on validation data by task, percent.")


class Front(Document):
    """front.json: the Pareto front of a search, by the first task's capability preservation."""

    FORMAT: ClassVar[str] = "automerge/front"

    tasks: list[str]
    points: list[FrontPoint]


class FileRecord(Model):
    """One file below the folder of its document."""

    path: str = Field(description="Relative to the document's folder.")
    bytes: int
    sha256: str


Role = Literal["base", "source", "validation", "test"]


def place_of(role: Role, name: str) -> str:
    """The folder of an input's files, relative to the manifest's."""
    return f"{'checkpoints' if role in ('base', 'source') else 'data'}/{name}"


class Input(Model):
    """One checkpoint or data set that was fetched."""

    name: str = Field(description="'base', a source's name, or '<task>/validation' and '<task>/test'.")
    role: Role
    uri: str
    path: str = Field(description="File or folder, relative to the manifest's folder.")
    digest: str = Field(description="A checkpoint's digest (its weights only), or the digest of all files of data.")
    files: list[FileRecord]

    @property
    def place(self) -> str:
        """The folder of its files, relative to the manifest's."""
        return place_of(self.role, self.name)

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter."""
        names = [record.path.removeprefix(f"{self.path}/") for record in self.files]
        return self.role == "source" and is_adapter(names)


class Manifest(Document):
    """manifest.json: every input of a run, by digest."""

    FORMAT: ClassVar[str] = "automerge/manifest"

    spec: str = Field(description="Digest of the spec.")
    inputs: list[Input]

    def path(self, folder: Path, name: str) -> Path:
        """Where an input lies, given the manifest's folder."""
        return folder / self.input(name).path

    def input(self, name: str) -> Input:
        """The input of that name."""
        return next(item for item in self.inputs if item.name == name)

    def digests(self) -> dict[str, str]:
        """Digest by name."""
        return {item.name: item.digest for item in self.inputs}


class Merged(Document):
    """merged.json: the merged model's files, by digest."""

    FORMAT: ClassVar[str] = "automerge/merged"

    recipe: str = Field(description="Digest of the recipe.")
    weights: str = Field(description="Digest of the merged weights.")
    parameter_count: int
    files: list[FileRecord]


class Registration(Document):
    """registration.json: the version under which the merged model is registered."""

    FORMAT: ClassVar[str] = "automerge/registration"

    recipe: str = Field(description="Digest of the recipe: the key of the registration.")
    registered: RegisteredVersion
    promotion: Promotion | None = Field(
        default=None, description="What became of the alias; null if none was asked for."
    )

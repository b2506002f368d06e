"""What every stage after fetch starts from: the fetched inputs, opened by the spec."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from automerge.checkpoint.open import Checkpoint, open_checkpoint
from automerge.errors import SpecError
from automerge.merging.recipe import BASE
from automerge.merging.technique import usable_techniques
from automerge.models.architecture import Architecture, load_architecture
from automerge.plugins import load_plugin
from automerge.spec import Spec, TaskSpec
from automerge.stages.documents import MANIFEST, Manifest
from automerge.tasks.task import Task, TaskData, load_task


@dataclass(frozen=True)
class Inputs:
    """The fetched inputs of a spec.

    Attributes:
        spec: the spec.
        folder: where `fetch` wrote them.
        manifest: their list, by digest.
        architecture: how the model is built and called.
    """

    spec: Spec
    folder: Path
    manifest: Manifest
    architecture: Architecture

    @classmethod
    def open(cls, spec: Spec, folder: Path) -> "Inputs":
        """Read the manifest and load the model kind.

        Raises:
            SpecError: nothing was fetched into the folder, or for a spec with other inputs.
            PluginError, ModelError: the model kind is unknown or cannot be used.
        """
        manifest = Manifest.read(folder / MANIFEST)
        wanted = {source.name: source.uri for source in spec.sources}
        if spec.base is not None:
            wanted[BASE] = spec.base.uri
        for task in spec.tasks:
            wanted |= {f"{task.name}/validation": task.validation, f"{task.name}/test": task.test}
        fetched = {item.name: item.uri for item in manifest.inputs}
        if wanted != fetched:
            differ = sorted(name for name in {*wanted, *fetched} if wanted.get(name) != fetched.get(name))
            raise SpecError(
                f"{folder}: was fetched for a spec with another {differ[0]!r}", "run `automerge fetch` again"
            )
        checkpoints = [item.name for item in manifest.inputs if item.role in ("base", "source")]
        architecture = load_architecture(spec.model, {name: manifest.path(folder, name) for name in checkpoints})
        return cls(spec, folder, manifest, architecture)

    @property
    def references(self) -> list[str]:
        """The checkpoints that tasks are measured against, in the order of the tasks, each once."""
        return list(dict.fromkeys(self.spec.reference_of(task) for task in self.spec.tasks))

    def arguments(self, reference: str) -> dict[str, Any]:
        """The overrides of the model's arguments for a source; none for the base."""
        return next((source.arguments for source in self.spec.sources if source.name == reference), {})

    def open_checkpoints(self, stack: ExitStack) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
        """Open the base (None without one) and the sources; ``stack`` closes them."""

        def opened(name: str) -> Checkpoint:
            return stack.enter_context(open_checkpoint(self.manifest.path(self.folder, name)))

        base = opened(BASE) if self.spec.base is not None else None
        return base, {source.name: opened(source.name) for source in self.spec.sources}

    def task(self, task: TaskSpec) -> Task:
        """The task's plug-in."""
        path = self.manifest.path(self.folder, self.spec.reference_of(task))
        return load_task(task, path if path.is_dir() else path.parent)

    def data(self, task: TaskSpec, split: str) -> TaskData:
        """The task's ``validation`` or ``test`` data."""
        return self.task(task).load(self.manifest.path(self.folder, f"{task.name}/{split}"))


def check_plugins(spec: Spec) -> list[str]:
    """Check that every plug-in, loss and metric that a spec names exists; returns notices.

    Raises:
        PluginError, TaskError, SearchError: one does not, or no technique fits.
    """
    load_plugin("models", spec.model.kind, where="model.kind")
    load_plugin("registries", spec.registry.kind, where="registry.kind")
    for task in spec.tasks:
        load_task(task, None)
    _, notices = usable_techniques(
        spec.search.techniques,
        sources=len(spec.sources),
        has_base=spec.base is not None,
        unnormalised=spec.search.weights == "independent",
    )
    return notices


def private_names(patterns: Sequence[str], checkpoints: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """The private tensors of each checkpoint: those whose names match a pattern of the spec."""
    return {
        owner: [name for name in checkpoint.tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for owner, checkpoint in checkpoints.items()
    }

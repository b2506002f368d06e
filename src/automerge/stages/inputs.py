"""What every stage after fetch starts from: the fetched inputs, opened by the spec."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automerge.checkpoint.checkpoint import Checkpoint
from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.open import open_checkpoint
from automerge.errors import MergeError, SpecError
from automerge.merging.recipe import BASE, Vocabulary
from automerge.merging.technique import Declaration, usable_techniques
from automerge.models.architecture import Architecture, load_architecture
from automerge.models.state import state_names
from automerge.plugins import load_plugin
from automerge.searching.gathering import needed_statistics, refuse_sources_without_tasks
from automerge.spec import Spec, TaskSpec
from automerge.stages.documents import MANIFEST, Input, Manifest
from automerge.tasks.task import Task, TaskData, load_task


def inputs_folder(artifact: str, workspace: str) -> Path:
    """Where the inputs of a pipeline's run are: on the volume that its tasks share, or else in fetch's artifact."""
    return Path(workspace) / "inputs" if workspace else Path(artifact)


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
        architecture = load_architecture(spec.model, model_paths(manifest.inputs, folder))
        return cls(spec, folder, manifest, architecture)

    @property
    def references(self) -> list[str]:
        """The checkpoints that tasks are measured against, in the order of the tasks, each once."""
        return list(dict.fromkeys(self.spec.reference_of(task) for task in self.spec.tasks))

    def arguments(self, reference: str) -> dict[str, Any]:
        """The overrides of the model's arguments for a source; none for the base."""
        return next((source.arguments for source in self.spec.sources if source.name == reference), {})

    def open_checkpoints(self, stack: ExitStack) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
        """Open the base (None without one) and the sources, adapters upon the base; ``stack`` closes them."""
        opened = open_inputs(self.manifest.inputs, self.folder, stack)
        return opened.get(BASE), {source.name: opened[source.name] for source in self.spec.sources}

    def build(self, reference: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model of a checkpoint, to hold the given tensors: where `merge.vocabulary` allows it, with their rows.

        Raises:
            ModelError: it cannot be built, or cannot have that many rows.
        """
        module = self.architecture.build(reference, self.arguments(reference))
        if self.spec.merge.vocabulary == "error":
            return module
        state = module.state_dict(keep_vars=True)
        rows = {
            len(tensors[name])
            for group in vocabulary_names(self.spec, self.architecture, module).values()
            for name in group
            if name in tensors and len(tensors[name]) != len(state[name])
        }
        # More than one number is no vocabulary's: loading then names the tensors.
        return self.architecture.resize_vocabulary(module, rows.pop()) if len(rows) == 1 else module

    def vocabulary(self, infos: Mapping[str, Mapping[str, TensorInfo]]) -> tuple[Vocabulary | None, dict[str, str]]:
        """What the recipe says of vocabularies of different size, and the model's tied names; see `vocabulary_of`."""
        if self.spec.merge.vocabulary == "error":
            return None, {}
        source = self.spec.sources[0].name
        with torch.device("meta"):
            module = self.architecture.build(source, self.arguments(source))
        groups = vocabulary_names(self.spec, self.architecture, module)
        return vocabulary_of(self.spec, groups, vocabulary_rows(groups, infos)), state_names(module).tied

    def companion_files(self, owner: str) -> list[Path]:
        """The files that make a folder of this checkpoint's weights loadable; an adapter's go before its base's."""
        own = self.architecture.companion_files(self.manifest.path(self.folder, owner))
        if not self.manifest.input(owner).is_adapter:
            return own
        files = {path.name: path for path in self.architecture.companion_files(self.manifest.path(self.folder, BASE))}
        # The base's configuration is what the model was built from.
        files |= {path.name: path for path in own if path.name != "config.json"}
        return [files[name] for name in sorted(files)]

    def task(self, task: TaskSpec) -> Task:
        """The task's plug-in."""
        return load_task(task, tokenizer_folder(self.manifest.inputs, self.folder, self.spec.reference_of(task)))

    def data(self, task: TaskSpec, split: str) -> TaskData:
        """The task's ``validation`` or ``test`` data."""
        return self.task(task).load(self.manifest.path(self.folder, f"{task.name}/{split}"))


def model_paths(inputs: Iterable[Input], folder: Path) -> dict[str, Path]:
    """Where the model of each checkpoint is described, by name: where its weights are; an adapter's, with the base."""
    items = {item.name: item for item in inputs if item.role in ("base", "source")}
    return {name: folder / (items[BASE] if item.is_adapter else item).path for name, item in items.items()}


def tokenizer_folder(inputs: Iterable[Input], folder: Path, name: str) -> Path:
    """Where the tokenizer of a checkpoint is: an adapter may bring its own, or have its base's."""
    items = {item.name: item for item in inputs}
    path = folder / items[name].path
    if items[name].is_adapter and not any(path.glob("tokenizer*")):
        path = folder / items[BASE].path
    return path if path.is_dir() else path.parent


def open_inputs(inputs: Iterable[Input], folder: Path, stack: ExitStack) -> dict[str, Checkpoint]:
    """Open the base and the sources, by name, adapters upon the base; ``stack`` closes them."""
    opened: dict[str, Checkpoint] = {}
    items = [item for item in inputs if item.role in ("base", "source")]
    for item in sorted(items, key=lambda item: item.role != "base"):
        opened[item.name] = stack.enter_context(open_checkpoint(folder / item.path, opened.get(BASE)))
    return opened


def vocabulary_names(
    spec: Spec, architecture: Architecture, module: nn.Module, *, private: bool = False
) -> dict[str, list[str]]:
    """The tensors with one row per token: their names, each with all that are tied to it and itself.

    They are those of `merge.vocabulary_tensors`, else those that the model names; without private ones, or these alone.

    Raises:
        SpecError: there are none.
    """
    names = state_names(module)
    every = [*names.parameters, *names.buffers, *names.tied]
    patterns = spec.merge.vocabulary_tensors
    chosen = (
        [name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if patterns
        else architecture.vocabulary_tensors(module)
    )
    if not chosen:
        raise SpecError(
            f"merge.vocabulary_tensors: no tensor of the model matches {', '.join(patterns)}"
            if patterns
            else "merge.vocabulary: the model does not say which of its tensors have one row per token",
            "name them, such as '*embed_tokens.weight'",
        )
    canonical = dict.fromkeys(names.tied.get(name, name) for name in chosen)
    return {
        name: [name, *(alias for alias, target in names.tied.items() if target == name)]
        for name in canonical
        if any(fnmatchcase(name, pattern) for pattern in spec.private) == private
    }


def vocabulary_rows(
    groups: Mapping[str, Sequence[str]], infos: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, int]:
    """The number of rows of each checkpoint that has tensors of the vocabulary.

    Args:
        groups: `vocabulary_names`.
        infos: dtype and shape by checkpoint and name.

    Raises:
        MergeError: one has such tensors with different numbers of rows.
    """
    rows: dict[str, int] = {}
    for owner, tensors in infos.items():
        held = [name for group in groups.values() for name in group if name in tensors]
        for name in held:
            length = tensors[name].shape[0] if tensors[name].shape else 0
            if rows.setdefault(owner, length) != length:
                raise MergeError(
                    f"checkpoint {owner!r}: {held[0]!r} has {rows[owner]} rows and {name!r} {length}, so they are not "
                    "of one vocabulary",
                    "name those that are in merge.vocabulary_tensors, and declare the others as private",
                )
    return rows


def vocabulary_of(spec: Spec, groups: Mapping[str, Sequence[str]], rows: Mapping[str, int]) -> Vocabulary | None:
    """The number of rows to which the inputs are brought, by `merge.vocabulary`; None where all have the same.

    Args:
        spec: the spec.
        groups: `vocabulary_names`.
        rows: `vocabulary_rows`.

    Raises:
        SpecError, MergeError: the spec's rule does not apply.
    """
    if len(set(rows.values())) < 2:
        return None
    rule = spec.merge.vocabulary
    if rule == "error":
        raise SpecError("merge.vocabulary: is 'error', and the checkpoints differ", "set it to 'base' or 'largest'")
    if rule == "base" and BASE not in rows:
        raise MergeError(
            "merge.vocabulary is 'base', and the base has no tensor of the vocabulary", "set it to 'largest'"
        )
    return Vocabulary(rule=rule, rows=rows[BASE] if rule == "base" else max(rows.values()), tensors=sorted(groups))


def check_plugins(spec: Spec) -> list[str]:
    """Check that every plug-in, loss and metric that a spec names exists; returns notices.

    Raises:
        PluginError, TaskError, SearchError: one does not, or no technique fits.
    """
    load_plugin("models", spec.model.kind, where="model.kind")
    load_plugin("registries", spec.registry.kind, where="registry.kind")
    for task in spec.tasks:
        load_task(task, None)
    techniques, notices = techniques_of(spec)
    refuse_sources_without_tasks(
        needed_statistics(techniques.values()),
        [source.name for source in spec.sources],
        [spec.reference_of(task) for task in spec.tasks],
    )
    return notices


def techniques_of(spec: Spec) -> tuple[dict[str, Declaration], list[str]]:
    """The techniques that the spec's search can use, by name, and notices about those it cannot.

    Raises:
        PluginError, SearchError: one is unknown, or none fits.
    """
    has_base = spec.base is not None
    return usable_techniques(
        spec.search.techniques,
        sources=len(spec.sources),
        has_base=has_base,
        unnormalised=has_base and spec.search.weights == "independent",
    )


def private_names(patterns: Sequence[str], checkpoints: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """The private tensors of each checkpoint: those whose names match a pattern of the spec."""
    return {
        owner: [name for name in checkpoint.tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for owner, checkpoint in checkpoints.items()
    }

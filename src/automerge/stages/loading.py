"""Loaded checkpoints and the recipe around them: what search and evaluate share."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from automerge.checkpoint.adapter import Adapter
from automerge.checkpoint.info import TensorInfo
from automerge.errors import ModelError, SpecError
from automerge.merging.apply import convert
from automerge.merging.recipe import BASE, InputDigest, OutputDtype, Recipe, RecipeBlock, Vocabulary, torch_dtype
from automerge.merging.vocabulary import fit_tensor, fitted_infos, spellings
from automerge.models.heads import Heads
from automerge.searching.evaluator import MeasuredTask
from automerge.segmenting.segmentation import Block, Segmentation
from automerge.spec import Spec
from automerge.stages.documents import SEGMENTATION
from automerge.stages.inputs import Inputs, private_names

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """All checkpoints of a run in host memory. What needs them on a device takes them there: models, and the merger.

    Attributes:
        inputs: where they come from.
        device: where models run and are merged.
        tensors: tensors by checkpoint (a source's name, or ``base``) and by name, aliases of tied ones included.
        private: names of each checkpoint's private tensors.
        vocabulary: to how many rows the checkpoints are brought before they are merged; None where they agree.
        fitted: the same as ``tensors``, with that many rows; what both have is one object.
    """

    inputs: Inputs
    device: torch.device
    tensors: dict[str, Tensors]
    private: dict[str, list[str]]
    vocabulary: Vocabulary | None
    fitted: dict[str, Tensors]

    @classmethod
    def load(cls, inputs: Inputs, device: torch.device) -> "Loaded":
        """Read every tensor of every checkpoint; what an adapter leaves as it is, once for the base.

        Raises:
            CheckpointError: one cannot be read.
            MergeError: the vocabularies differ in a way that `merge.vocabulary` does not settle.
        """
        with ExitStack() as stack:
            base, sources = inputs.open_checkpoints(stack)
            opened = sources if base is None else {BASE: base, **sources}
            tensors: dict[str, Tensors] = {}
            for owner, checkpoint in opened.items():
                common = tensors[BASE] if isinstance(checkpoint, Adapter) else {}
                read = checkpoint.changed if isinstance(checkpoint, Adapter) else checkpoint.tensors
                tensors[owner] = {**common, **{name: checkpoint.read(name) for name in read}}
            private = private_names(inputs.spec.private, opened)
            shared = {
                owner: {name: info for name, info in checkpoint.tensors.items() if name not in private[owner]}
                for owner, checkpoint in opened.items()
            }
            vocabulary, tied = inputs.vocabulary(shared)
            fitted = tensors if vocabulary is None else _fitted(vocabulary, tied, shared, tensors)
            return cls(inputs, device, tensors, private, vocabulary, fitted)

    @property
    def base(self) -> Tensors | None:
        """The base's tensors as they are merged; None without a base."""
        return self.fitted.get(BASE)

    @property
    def sources(self) -> dict[str, Tensors]:
        """The sources' tensors as they are merged, in the spec's order."""
        return {source.name: self.fitted[source.name] for source in self.inputs.spec.sources}

    def shared(self, owner: str, *, fitted: bool = False) -> Tensors:
        """The tensors of a checkpoint that are not private; ``fitted``: as they are merged, not as they are."""
        private = set(self.private[owner])
        tensors = self.fitted if fitted else self.tensors
        return {name: tensor for name, tensor in tensors[owner].items() if name not in private}

    def heads(
        self,
        shared: Mapping[str, torch.Tensor],
        references: Sequence[str] | None = None,
        *,
        dtype: OutputDtype = "same",
        like: str | None = None,
    ) -> Heads:
        """Modules over shared tensors, one for the private tensors of each reference.

        Args:
            shared: the shared tensors by name; copied.
            references: whose heads; by default those of all tasks.
            dtype: of all floating tensors, as `merge` would write them; ``same``: each in its own.
            like: a checkpoint in whose dtypes the heads are, so that it runs under the head of another.

        Raises:
            MergeError: a private tensor does not fit ``dtype``.
        """

        def build(reference: str) -> nn.Module:
            return self.inputs.build(reference, shared)

        def private(reference: str, name: str) -> torch.Tensor:
            tensor = self.tensors[reference][name]
            other = self.tensors[like].get(name) if like is not None else None
            if other is not None and tensor.is_floating_point() and other.is_floating_point():
                tensor = tensor.to(other.dtype)
            return convert(name, f"checkpoint {reference!r}", tensor, dtype)

        own = {
            reference: {name: private(reference, name) for name in self.private[reference]}
            for reference in (references if references is not None else self.inputs.references)
        }
        if dtype != "same":
            wanted = torch_dtype(dtype)
            shared = {name: each.to(wanted) if each.is_floating_point() else each for name, each in shared.items()}
        return Heads(build, own, shared, self.device)

    def measured(self, split: str) -> dict[str, MeasuredTask]:
        """Every task with its ``validation`` or ``test`` data, by name."""
        return {
            task.name: MeasuredTask(
                task=self.inputs.task(task),
                reference=self.inputs.spec.reference_of(task),
                data=self.inputs.data(task, split),
                batch_size=task.batch_size,
            )
            for task in self.inputs.spec.tasks
        }

    def recipe(self, segmentation: Segmentation, blocks: Sequence[RecipeBlock]) -> Recipe:
        """A recipe of these inputs with the given blocks."""
        digests = self.inputs.manifest.digests()
        spec = self.inputs.spec
        return Recipe(
            release=version("automerge-models"),
            base=InputDigest(name=BASE, digest=digests[BASE]) if spec.base is not None else None,
            sources=[InputDigest(name=source.name, digest=digests[source.name]) for source in spec.sources],
            seed=spec.search.seed,
            dtype=spec.merge.dtype,
            integer_buffers=spec.merge.integer_buffers,
            blocks=list(blocks),
            tied=segmentation.tied,
            private={owner: names for owner, names in self.private.items() if names},
            vocabulary=self.vocabulary,
        )


def _fitted(
    vocabulary: Vocabulary,
    tied: Mapping[str, str],
    infos: Mapping[str, Mapping[str, TensorInfo]],
    tensors: Mapping[str, Tensors],
) -> dict[str, Tensors]:
    groups = spellings(vocabulary, tied)
    return {
        owner: {
            **tensors[owner],
            **{
                name: fit_tensor(vocabulary, groups, infos, lambda owner, name: tensors[owner][name], owner, name)
                for name in changed
            },
        }
        for owner, changed in fitted_infos(vocabulary, groups, infos).items()
    }


def read_segmentation(folder: Path, spec: Spec) -> Segmentation:
    """The segmentation that `segment` wrote for this spec.

    Raises:
        SpecError: there is none, or it was cut by another granularity than the spec's.
    """
    path = folder / SEGMENTATION
    segmentation = Segmentation.read(path)
    if segmentation.granularity != spec.segmentation.granularity:
        raise SpecError(
            f"{path}: was cut by granularity {segmentation.granularity!r}, and the spec says "
            f"{spec.segmentation.granularity!r}",
            "run `automerge segment` again",
        )
    return segmentation


def mergeable_blocks(segmentation: Segmentation, private: Mapping[str, Sequence[str]]) -> list[Block]:
    """The blocks without their private tensors; those with nothing left are dropped."""
    names = {name for owned in private.values() for name in owned}
    kept = []
    for block in segmentation.blocks:
        parameters = [name for name in block.parameters if name not in names]
        buffers = [name for name in block.buffers if name not in names]
        if parameters or buffers:
            kept.append(block.model_copy(update={"parameters": parameters, "buffers": buffers}))
    return kept


def prepare_compute(spec: Spec) -> torch.device:
    """Set torch's threads and determinism as the spec says; returns the device.

    Raises:
        ModelError: the device is not there.
    """
    if spec.compute.threads is not None:
        torch.set_num_threads(spec.compute.threads)
    # As torch.use_deterministic_algorithms(True, warn_only=True), which also imports torch's compiler: two seconds.
    torch.set_deterministic_debug_mode("warn")
    return device_of(spec)


def device_of(spec: Spec) -> torch.device:
    """The device of ``compute.device``; ``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        ModelError: the device is not there.
    """
    name = spec.compute.device
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= available:
        found = f"only cuda:0 to cuda:{available - 1} are" if available else "no CUDA device is"
        raise ModelError(f"compute.device: {name!r} was asked for and {found} available", "use 'auto' or 'cpu'")
    return device

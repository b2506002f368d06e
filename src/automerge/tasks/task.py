"""The interface of a task kind: data, a loss, and metrics, all as ratios of sums over samples.

A mean over tokens is not a mean of samples' means, and a perplexity is not a mean at all; but both follow from sums. So
a task gives each sample a numerator and a denominator, and every figure (over all data, a batch, or a bootstrap
resample) is transform(sum of numerators / sum of denominators).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from automerge.errors import TaskError
from automerge.plugins import load_plugin, nearest
from automerge.spec import TaskSpec

Transform = Literal["identity", "exp"]
Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TaskData:
    """Samples of one task.

    Attributes:
        inputs: what the model is called with, by name; tensors [n, ...].
        targets: what its logits are compared with, by name; tensors [n, ...].
        keys: for each sample the digests of the documents that begin in it, for data whose rows are not what was
            collected: texts that were packed, or padded to the longest. None: a row is what was collected.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    keys: Sequence[tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        if self.keys is not None and len(self.keys) != len(self):
            raise ValueError(f"{len(self.keys)} keys for {len(self)} samples")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batches(self, batch_size: int) -> Iterator[Self]:
        """Consecutive batches in the order of the data; the last may be smaller."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self._map(
                lambda tensor, rows=rows: tensor[rows],  # type: ignore[misc]
                None if self.keys is None else self.keys[rows],
            )

    def subset(self, indices: Sequence[int]) -> Self:
        """The samples at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return self._map(
            lambda tensor: tensor[index], None if self.keys is None else [self.keys[row] for row in index.tolist()]
        )

    def to(self, device: torch.device | str) -> Self:
        """The same samples on a device."""
        return self._map(lambda tensor: tensor.to(device), self.keys)

    def sample_digests(self) -> list[str]:
        """sha256 (hex) of each sample's inputs, without its targets: equal digests are the same sample.

        Of data with ``keys``: these, one after the other; there may be more or fewer of them than rows.
        """
        if self.keys is not None:
            return [key for keys in self.keys for key in keys]
        hashers = [hashlib.sha256() for _ in range(len(self))]
        for name in sorted(self.inputs):
            tensor = self.inputs[name].cpu()
            header = f"{name} {tensor.dtype} {list(tensor.shape[1:])};".encode()
            rows = tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8).numpy()
            for hasher, row in zip(hashers, rows, strict=True):
                hasher.update(header)
                hasher.update(row.tobytes())
        return [hasher.hexdigest() for hasher in hashers]

    def _map(self, function: Callable[[Tensor], Tensor], keys: Sequence[tuple[str, ...]] | None) -> Self:
        return type(self)(
            {name: function(tensor) for name, tensor in self.inputs.items()},
            {name: function(tensor) for name, tensor in self.targets.items()},
            keys,
        )


StandIn = Literal["soft", "loss", "perplexity"]
"""What stands in for a metric where a gradient is wanted: the mean probability of the right answer
(`Task.soft_metric`), the mean loss, or its exponential."""


class Metric(NamedTuple):
    """What a metric is called, which way is better, and what it is like that has a gradient."""

    name: str
    higher_is_better: bool
    stand_in: StandIn = "soft"


@dataclass(frozen=True)
class Ratio:
    """One figure by sample: transform(sum(numerator) / sum(denominator)).

    Attributes:
        numerator: float64 [n].
        denominator: float64 [n], not negative.
        transform: applied to the ratio of the sums.
    """

    numerator: Column
    denominator: Column
    transform: Transform = "identity"

    @property
    def value(self) -> float:
        """The figure over all samples."""
        ratio = float(self.numerator.sum() / self.denominator.sum())
        with np.errstate(over="ignore"):
            return float(np.exp(ratio)) if self.transform == "exp" else ratio


@dataclass(frozen=True)
class Scores:
    """One model on one task's data, by sample.

    Attributes:
        losses: the loss; numerator and denominator [n].
        metrics: the task's chosen metrics by name.
        soft: the probability of the right answer, if it was asked for.
        tempered: the loss at each of the temperatures that were asked for.
    """

    losses: Ratio
    metrics: dict[str, Ratio]
    soft: Ratio | None = None
    tempered: dict[float, Ratio] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.losses.numerator)

    @property
    def mean_loss(self) -> float:
        """The loss over all samples: sum of numerators / sum of denominators."""
        return self.losses.value

    def subset(self, rows: Sequence[int]) -> Self:
        """The scores of some samples, in that order."""
        index = np.asarray(rows, dtype=np.int64)

        def taken(ratio: Ratio) -> Ratio:
            return Ratio(ratio.numerator[index], ratio.denominator[index], ratio.transform)

        return type(self)(
            taken(self.losses),
            {name: taken(ratio) for name, ratio in self.metrics.items()},
            None if self.soft is None else taken(self.soft),
            {at: taken(ratio) for at, ratio in self.tempered.items()},
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The scores of consecutive batches as one."""

        def joined(ratios: list[Ratio]) -> Ratio:
            return Ratio(
                np.concatenate([ratio.numerator for ratio in ratios]),
                np.concatenate([ratio.denominator for ratio in ratios]),
                ratios[0].transform,
            )

        soft = [part.soft for part in parts if part.soft is not None]
        return cls(
            joined([part.losses for part in parts]),
            {name: joined([part.metrics[name] for part in parts]) for name in parts[0].metrics},
            joined(soft) if soft else None,
            {at: joined([part.tempered[at] for part in parts]) for at in parts[0].tempered},
        )


class Task(ABC):
    """One task kind, bound to one task of a spec; registered under the entry point group ``automerge.tasks``.

    A subclass declares ``LOSSES``, ``METRICS`` and ``DEFAULT_METRICS``, and the names of the ``arguments`` it takes.

    Args:
        spec: one of the spec's ``tasks``.
        tokenizer_folder: the reference's checkpoint folder, for kinds that read text.

    Raises:
        TaskError: the loss, a metric or an argument is unknown; the sentence gives its path and the nearest name.
    """

    LOSSES: ClassVar[tuple[str, ...]]
    METRICS: ClassVar[tuple[Metric, ...]]
    DEFAULT_METRICS: ClassVar[tuple[str, ...]]
    ARGUMENTS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: TaskSpec, tokenizer_folder: Path | None = None) -> None:
        self.spec = spec
        self.tokenizer_folder = tokenizer_folder
        where = f"tasks.{spec.name}"
        declared = {metric.name: metric for metric in self.METRICS}
        if spec.loss not in self.LOSSES:
            raise TaskError(
                f"{where}.loss: {spec.kind} has no loss {spec.loss!r}", nearest(spec.loss, list(self.LOSSES))
            )
        names = list(dict.fromkeys(spec.metrics)) or list(self.DEFAULT_METRICS)
        for name in names:
            if name not in declared:
                raise TaskError(f"{where}.metrics: {spec.kind} has no metric {name!r}", nearest(name, list(declared)))
        for name in spec.arguments:
            if name not in self.ARGUMENTS:
                remedy = nearest(name, list(self.ARGUMENTS)) if self.ARGUMENTS else "remove it: this kind takes none"
                raise TaskError(f"{where}.arguments: {spec.kind} has no argument {name!r}", remedy)
        self.metrics = [declared[name] for name in names]

    @abstractmethod
    def load(self, path: Path) -> TaskData:
        """Read data from a file, or from a folder that holds one.

        Raises:
            TaskError: the file is missing, empty, damaged or not in the kind's form; the sentence names it.
        """

    @abstractmethod
    def loss(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The loss of each sample, summed over its parts (tokens): float32 [n], differentiable.

        The mean loss is ``loss(...).sum() / loss_weights(...).sum()``.

        Args:
            logits: what the model returned, [n, ...].
            targets: the ``targets`` of the same samples, on the device of the logits.

        Raises:
            TaskError: the logits do not fit the targets.
        """

    @abstractmethod
    def loss_weights(self, targets: dict[str, Tensor]) -> Tensor:
        """The number of parts of each sample that have a loss: float32 [n]; 1 where a sample has one."""

    @abstractmethod
    def metric_ratios(self, logits: Tensor, targets: dict[str, Tensor], losses: Ratio) -> dict[str, Ratio]:
        """The chosen metrics (``self.metrics``) of each sample, by name; ``losses`` may be reused for them."""

    @abstractmethod
    def chance(self, metric: str, data: TaskData) -> float:
        """The value that a metric reaches on these data by the best constant guess, the same for every sample."""

    def soft_metric(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The probability of the right answer, summed over the parts of each sample: float32 [n], differentiable.

        Divided by ``loss_weights`` it lies between 0 and 1: the accuracy that drawing the answer from the model's own
        distribution has in expectation. Arguments as of ``loss``. By default a kind has none.

        Raises:
            TaskError: the kind has none, or the logits do not fit the targets.
        """
        raise self.unfit(
            f"the kind {self.spec.kind!r} has no soft metric", "set search.objective to 'loss_ratio' or 'gap'"
        )

    def guess_loss(self, data: TaskData) -> float:
        """The mean loss of the best constant guess on these data, nats; by default a kind does not say.

        Raises:
            TaskError: the kind does not say.
        """
        raise self.unfit(
            f"the kind {self.spec.kind!r} does not say the loss of a guess", "set search.gap_reference to 'other'"
        )

    def score(
        self, logits: Tensor, targets: dict[str, Tensor], *, soft: bool = False, temperatures: Sequence[float] = ()
    ) -> Scores:
        """Loss and chosen metrics of each sample; columns float64 [n]. Arguments as of ``loss``.

        Args:
            logits, targets: as of ``loss``.
            soft: also the soft metric.
            temperatures: also the loss of the logits divided by each of these.
        """
        with torch.no_grad():
            weights = to_column(self.loss_weights(targets))
            losses = Ratio(to_column(self.loss(logits, targets)), weights)
            return Scores(
                losses,
                self.metric_ratios(logits, targets, losses),
                Ratio(to_column(self.soft_metric(logits, targets)), weights) if soft else None,
                {at: Ratio(to_column(self.loss(logits / at, targets)), weights) for at in temperatures},
            )

    def unfit(self, problem: str, remedy: str) -> TaskError:
        """An error that names this task."""
        return TaskError(f"task {self.spec.name!r}: {problem}", remedy)


def to_column(tensor: Tensor) -> Column:
    """A tensor [n] as a float64 column on the CPU."""
    column: Column = tensor.detach().double().cpu().numpy()
    return column


def load_task(spec: TaskSpec, tokenizer_folder: Path | None = None) -> Task:
    """The task of one entry of the spec's ``tasks``.

    Raises:
        PluginError: the kind is unknown; the nearest name is given.
        TaskError: the plug-in is not a ``Task``, or a loss, metric or argument is unknown.
    """
    kind = load_plugin("tasks", spec.kind, f"tasks.{spec.name}.kind")
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise TaskError(
            f"tasks.{spec.name}.kind: the plug-in {spec.kind!r} is not a subclass of automerge.tasks.task.Task",
            "mend the plug-in's entry point",
        )
    return kind(spec, tokenizer_folder)

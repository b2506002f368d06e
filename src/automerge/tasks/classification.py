"""Task kind ``classification``: logits [n, classes] against class numbers [n]."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from automerge.errors import TaskError
from automerge.tasks.data import TENSOR_SUFFIXES, find_data_file, read_inputs_and_labels
from automerge.tasks.task import Metric, Ratio, Task, TaskData, to_column

_TOP_K = {"top1": 1, "top5": 5}


class Classification(Task):
    """Cross-entropy (nats), and the shares of samples whose class is the first, or among the first five.

    Data: safetensors or npz with ``inputs`` (or ``inputs.<name>``) [n, ...] and ``labels`` [n].
    """

    LOSSES = ("cross_entropy",)
    METRICS = (Metric("top1", True), Metric("top5", True))
    DEFAULT_METRICS = ("top1",)

    def load(self, path: Path) -> TaskData:
        """See ``Task.load``; targets: ``labels`` int64 [n], not negative."""
        file = find_data_file(path, TENSOR_SUFFIXES)
        inputs, labels = read_inputs_and_labels(file)
        if labels is None:
            raise TaskError(f"{file}: there are no labels", "store the class numbers as 'labels'")
        if labels.ndim != 1:
            raise TaskError(
                f"{file}: the labels have the shape {list(labels.shape)}", "store one class number a sample"
            )
        if int(labels.min()) < 0:
            raise TaskError(f"{file}: the label {int(labels.min())} is negative", "number the classes from 0")
        return TaskData(inputs, {"labels": labels})

    def loss(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each sample: float32 [n]; logits [n, classes]. See ``Task.loss``."""
        labels = self._checked(logits, targets)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def loss_weights(self, targets: dict[str, Tensor]) -> Tensor:
        """Ones [n]."""
        return torch.ones_like(targets["labels"], dtype=torch.float32)

    def soft_metric(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The probability of the right class: float32 [n]. See ``Task.soft_metric``."""
        labels = self._checked(logits, targets)
        return logits.float().softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)

    def guess_loss(self, data: TaskData) -> float:
        """The entropy of the labels: the loss of guessing each class as often as it comes."""
        shares = torch.bincount(data.targets["labels"]).double() / len(data)
        return float(-torch.xlogy(shares, shares).sum())

    def metric_ratios(self, logits: Tensor, targets: dict[str, Tensor], losses: Ratio) -> dict[str, Ratio]:
        """See ``Task.metric_ratios``.

        Among equal logits the lower class counts as ahead, so a constant output scores as one guess.
        """
        labels = self._checked(logits, targets).unsqueeze(1)
        own = logits.gather(1, labels)
        classes = torch.arange(logits.shape[1], device=logits.device)
        ahead = ((logits > own) | ((logits == own) & (classes < labels))).sum(dim=1)
        return {
            metric.name: Ratio(to_column(ahead < _TOP_K[metric.name]), losses.denominator) for metric in self.metrics
        }

    def chance(self, metric: str, data: TaskData) -> float:
        """The share of the one, or five, most frequent classes of the data."""
        counts = torch.bincount(data.targets["labels"]).sort(descending=True).values
        return float(counts[: _TOP_K[metric]].sum()) / len(data)

    def _checked(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        labels = targets["labels"]
        if logits.ndim != 2 or len(logits) != len(labels):
            raise self.unfit(
                f"the model returned {list(logits.shape)} for {len(labels)} samples, not [samples, classes]",
                "use a model with a classification head",
            )
        if len(labels) and int(labels.max()) >= logits.shape[1]:
            raise self.unfit(
                f"the data have the label {int(labels.max())} and the model only {logits.shape[1]} outputs",
                "check the labels, or the model's number of classes",
            )
        return labels

"""Evaluating one recipe: merge into the live model, and measure every task's validation loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from automerge.merging.recipe import Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.tasks.run import evaluate_task
from automerge.tasks.task import Task, TaskData


@dataclass(frozen=True)
class MeasuredTask:
    """A task with its data, ready to be measured.

    Attributes:
        task: the plug-in.
        reference: the checkpoint that it is measured against, whose head it runs under.
        data: validation or test data.
        batch_size: samples a forward pass.
    """

    task: Task
    reference: str
    data: TaskData
    batch_size: int


class RecipeEvaluator:
    """Callable: the blocks of a recipe -> the mean loss by task. Nothing is allocated for a new recipe but activations.

    Args:
        recipe: any recipe of this merge; its blocks are replaced for each evaluation.
        merger: holds the inputs on the device.
        heads: the model under evaluation; its live tensors are written in place.
        architecture: how a module is called.
        tasks: the tasks by name.
        device: where it all runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        merger: ResidentMerger,
        heads: Heads,
        architecture: Architecture,
        tasks: Mapping[str, MeasuredTask],
        device: torch.device,
    ) -> None:
        self._recipe = recipe
        self._merger = merger
        self._heads = heads
        self._architecture = architecture
        self._tasks = tasks
        self._device = device

    def __call__(self, blocks: Sequence[RecipeBlock]) -> dict[str, float]:
        """Merge by ``blocks`` and measure.

        Raises:
            MergeError: a tensor cannot be merged so.
            TaskError: a loss is not finite.
        """
        self._merger.apply(self._recipe.model_copy(update={"blocks": list(blocks)}), self._heads.live)
        return mean_losses(self._tasks, self._heads.module, self._architecture, self._device)


def mean_losses(
    tasks: Mapping[str, MeasuredTask],
    module_of: Callable[[str], torch.nn.Module],
    architecture: Architecture,
    device: torch.device,
) -> dict[str, float]:
    """The mean loss by task, each under the module of its reference.

    Raises:
        TaskError: a loss is not finite.
    """
    losses = {}
    for name, measured in tasks.items():
        scores = evaluate_task(
            architecture, module_of(measured.reference), measured.task, measured.data, measured.batch_size, device
        )
        losses[name] = scores.mean_loss
    return losses

"""Evaluating one recipe: merge into the live model, and measure every task on its validation data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from automerge.merging.recipe import Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.searching.fidelity import Race
from automerge.tasks.run import evaluate_task
from automerge.tasks.task import Scores, Task, TaskData


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


@dataclass(frozen=True)
class Outcome:
    """What came of evaluating one recipe.

    Attributes:
        scores: by task, of the samples that were measured.
        samples: forward passes of single samples.
        fidelity: the share of the validation data that was measured; 1 unless the race stopped it.
    """

    scores: dict[str, Scores]
    samples: int
    fidelity: float = 1.0


class RecipeEvaluator:
    """Callable: the blocks of a recipe -> its scores by task. Nothing is allocated for a new recipe but activations.

    Args:
        recipe: any recipe of this merge; its blocks are replaced for each evaluation.
        merger: holds the inputs on the device.
        heads: the model under evaluation; its live tensors are written in place.
        architecture: how a module is called.
        tasks: the tasks by name.
        device: where it all runs.
        soft, temperatures: what the objective needs beside losses and metrics (`automerge.tasks.task.Task.score`).

    Attributes:
        recalibrate: called after each merge, to bring BatchNorm's statistics to what fits; None: they are averages.
    """

    def __init__(
        self,
        recipe: Recipe,
        merger: ResidentMerger,
        heads: Heads,
        architecture: Architecture,
        tasks: Mapping[str, MeasuredTask],
        device: torch.device,
        *,
        soft: bool = False,
        temperatures: Sequence[float] = (),
    ) -> None:
        self.recipe = recipe
        self.merger = merger
        self.heads = heads
        self.architecture = architecture
        self.tasks = tasks
        self.device = device
        self._soft = soft
        self._temperatures = tuple(temperatures)
        self.recalibrate: Callable[[], object] | None = None

    def __call__(self, blocks: Sequence[RecipeBlock], race: Race | None = None) -> Outcome:
        """Merge by ``blocks`` and measure, on all data or until the race says that there is no hope.

        Raises:
            MergeError: a tensor cannot be merged so.
            TaskError: a loss is not finite.
        """
        self.merge(blocks)
        if race is None:
            return self.measure(None)
        parts: dict[str, list[Scores]] = {name: [] for name in self.tasks}
        samples = 0
        for step in range(race.steps):
            for name, scores in self.measure(race.rows(step)).scores.items():
                parts[name].append(scores)
                samples += len(scores)
            found = {name: Scores.concatenate(each) for name, each in parts.items()}
            if step + 1 < race.steps and race.is_hopeless(found):
                return Outcome(found, samples, race.share(step))
        return Outcome(race.restored(found), samples)

    def merge(self, blocks: Sequence[RecipeBlock]) -> None:
        """Bring the live model to what ``blocks`` say.

        Raises:
            MergeError: a tensor cannot be merged so.
        """
        self.merger.apply(self.recipe.model_copy(update={"blocks": list(blocks)}), self.heads.live)
        if self.recalibrate is not None:
            self.recalibrate()

    def measure(self, rows: Mapping[str, Sequence[int]] | None) -> Outcome:
        """Measure the live model as it is: on all data, or on some rows of each task.

        Raises:
            TaskError: a loss is not finite.
        """
        found = measure_tasks(
            self.tasks,
            self.heads.module,
            self.architecture,
            self.device,
            rows=rows,
            soft=self._soft,
            temperatures=self._temperatures,
        )
        return Outcome(found, sum(len(scores) for scores in found.values()))


def measure_tasks(
    tasks: Mapping[str, MeasuredTask],
    module_of: Callable[[str], torch.nn.Module],
    architecture: Architecture,
    device: torch.device,
    *,
    rows: Mapping[str, Sequence[int]] | None = None,
    soft: bool = False,
    temperatures: Sequence[float] = (),
) -> dict[str, Scores]:
    """The scores by task, each under the module of its reference.

    Args:
        tasks: the tasks.
        module_of: the module by reference.
        architecture: how it is called.
        device: where it is.
        rows: by task, which samples, in this order; None: all.
        soft, temperatures: see `automerge.tasks.task.Task.score`.

    Raises:
        TaskError: a loss is not finite.
    """
    return {
        name: evaluate_task(
            architecture,
            module_of(measured.reference),
            measured.task,
            measured.data if rows is None else measured.data.subset(rows[name]),
            measured.batch_size,
            device,
            soft=soft,
            temperatures=temperatures,
        )
        for name, measured in tasks.items()
    }


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
    return {name: scores.mean_loss for name, scores in measure_tasks(tasks, module_of, architecture, device).items()}


def tasks_by_form(
    module_of: Callable[[str], torch.nn.Module], tasks: Mapping[str, MeasuredTask]
) -> list[tuple[torch.nn.Module, list[str]]]:
    """The tasks whose samples can be in one batch, by name: those of one module with inputs of one form."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, task in tasks.items():
        form = [(key, tensor.dtype, tuple(tensor.shape[1:])) for key, tensor in sorted(task.data.inputs.items())]
        groups.setdefault((id(module_of(task.reference)), *form), []).append(name)
    return [(module_of(tasks[names[0]].reference), names) for names in groups.values()]

"""Few-shot fine-tuning: the rival that merging must stand beside.

A merge is chosen by means of validation data; the same data could train the model instead. This is the usual way to do
so: all parameters, all tasks mixed and counted alike, AdamW (Loshchilov and Hutter 2019,
https://arxiv.org/abs/1711.05101), a warm-up and a cosine to zero, gradients clipped to norm 1.

Learning rate, number of steps and, where there is BatchNorm, the treatment of its statistics are chosen on a part of
the data that is held back. Then the model is trained from the start again on all data with what was chosen: the part
held back has no further say, so there is nothing to overfit by choosing, and few-shot data are too few to leave a part
of them unused. No function here takes test data: what is chosen is chosen without them.

Compute is counted as a search counts it, in forward passes of single samples; a backward pass costs as much as two
forward passes. Everything counts: every learning rate that was tried, every look at the part held back, and the last
training.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from automerge.errors import TaskError
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.models.state import state_names
from automerge.searching.evaluator import MeasuredTask
from automerge.tasks.run import check_tokens, run_on
from automerge.tasks.task import Scores, TaskData

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WARM_UP = 0.1
"""Share of the schedule in which the learning rate rises."""

BACKWARD_COST = 2
"""Of a backward pass, in forward passes."""

Criterion = Literal["loss", "soft_metric", "metric"]
Statistics = Literal["batch", "kept"]

# A tensor's name, and the reference whose head it belongs to; None: it is shared.
Key = tuple[str | None, str]


@dataclass(frozen=True)
class Setting:
    """What one attempt tries.

    Attributes:
        learning_rate: the highest of the schedule.
        statistics: BatchNorm normalises by the ``batch`` and moves its running statistics, or by the statistics that it
            has, which are ``kept``. None: the model has no BatchNorm.
    """

    learning_rate: float
    statistics: Statistics | None


@dataclass(frozen=True)
class Attempt:
    """A training on a part of the data.

    Attributes:
        setting: what was tried.
        scores: the criterion on the part held back, bigger is better: before training and after each epoch.
        diverged: the loss became infinite or NaN, and the attempt ended there.
    """

    setting: Setting
    scores: list[float]
    diverged: bool


@dataclass(frozen=True)
class Chosen:
    """With what the model was trained on all data.

    Attributes:
        setting: that of the best attempt; None: no attempt was better than the model that was given, which is left as
            it was.
        steps: of the optimiser, as many as the best attempt had taken at its best epoch.
        scheduled_steps: after which the learning rate would be 0.
        score: the criterion on the part held back, at the best attempt's best epoch.
    """

    setting: Setting | None
    steps: int
    scheduled_steps: int
    score: float


@dataclass(frozen=True)
class FineTuned:
    """A tuned model, and what it took.

    Attributes:
        state: the shared tensors by name; copies.
        private: reference -> its private tensors by name; copies.
        samples: what was computed, in forward passes of single samples.
        seconds: wall time.
        chosen: what was chosen on the part held back.
        attempts: all attempts, in the order in which they were made.
    """

    state: dict[str, Tensor]
    private: dict[str, dict[str, Tensor]]
    samples: int
    seconds: float
    chosen: Chosen
    attempts: list[Attempt]


def fine_tune(
    heads: Heads,
    tasks: Mapping[str, MeasuredTask],
    architecture: Architecture,
    device: torch.device,
    *,
    seed: int,
    budget_samples: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    statistics: Sequence[Statistics] = ("batch", "kept"),
    criterion: Criterion = "soft_metric",
    held_back: int = 4,
    batch_size: int = 32,
    max_epochs: int = 100,
) -> FineTuned:
    """Train all parameters of the live model, shared and private, on the tasks' data.

    The budget is divided among the attempts (each learning rate, and with BatchNorm each treatment of its statistics)
    and the last training: all have the same schedule and, over a part of the data or all, batches in the same manner.
    The result depends on the arguments alone, and on the device and the number of threads.

    Args:
        heads: the model to start from; afterwards its live tensors *and* its private ones are the tuned ones, so that
            it is no longer fit to run merges under the heads of the sources: make another for that.
        tasks: the tasks by name, with the data to learn from: what a search has, validation data.
        architecture: how a module is called.
        device: where the model is.
        seed: of the split, the batches and dropout.
        budget_samples: most forward passes of single samples, a backward pass counting as two.
        learning_rates: those tried.
        statistics: the treatments of BatchNorm's statistics that are tried, each with every learning rate.
        criterion: what the part held back decides by, as a mean over the tasks: the ``loss``; the ``soft_metric``, the
            probability of the right answer; or the task's first ``metric``, and of equal ones the loss. The default is
            the one that did best on four splits of the digits pair (seeds 30 to 33), by 0.2 to 0.6 points of mean PR.
        held_back: one sample in so many is held back, the same share of each class.
        batch_size: samples of a step, of all tasks together; about.
        max_epochs: most epochs of an attempt, whatever the budget.

    Raises:
        TaskError: the budget does not suffice for one epoch, a task has a single sample or no such criterion, the model
            that was given has a loss that is not finite, or the last training diverges.
    """
    started = time.perf_counter()
    for task in tasks.values():
        check_tokens(heads.module(task.reference), task.task, task.data)
    run = _Run(heads, tasks, architecture, device, seed, batch_size, criterion)
    everything = {name: list(range(len(task.data))) for name, task in tasks.items()}
    held = {name: held_back_rows(task.data, held_back, seed, name) for name, task in tasks.items()}
    fitted = {name: sorted(set(everything[name]) - set(held[name])) for name in tasks}
    treatments: Sequence[Statistics | None] = statistics if run.batch_norms else (None,)
    settings = [Setting(rate, treatment) for treatment in treatments for rate in learning_rates]
    epochs = _epochs(run, len(settings), fitted, held, everything, budget_samples, max_epochs)
    steps = epochs * run.steps_of(fitted)

    with run.training():
        try:
            begin = run.score(held)
        except _DivergedError:
            raise TaskError(
                "fine-tuning: the model that it starts from has a loss that is not finite",
                "check the weights and the inputs",
            ) from None
        best, attempts = Chosen(None, 0, steps, begin[0]), []
        highest = begin
        for setting in settings:
            run.restore()
            scores, diverged = [begin], False
            try:
                for done in run.train(fitted, setting, steps, steps):
                    if done % run.steps_of(fitted) == 0:
                        scores.append(run.score(held))
                        if scores[-1] > highest:
                            highest = scores[-1]
                            best = Chosen(setting, done, steps, highest[0])
            except _DivergedError:
                diverged = True
            attempts.append(Attempt(setting, [score[0] for score in scores], diverged))
        run.restore()
        if best.setting is not None:
            try:
                for _ in run.train(everything, best.setting, steps, best.steps):
                    pass
            except _DivergedError:
                raise TaskError(
                    f"fine-tuning diverged at learning rate {best.setting.learning_rate:g} on all data, and had not on "
                    "a part of them",
                    "give it smaller learning rates",
                ) from None
    tensors = run.copies()
    private: dict[str, dict[str, Tensor]] = {}
    for (reference, name), tensor in tensors.items():
        if reference is not None:
            private.setdefault(reference, {})[name] = tensor
    return FineTuned(
        state={name: tensor for (reference, name), tensor in tensors.items() if reference is None},
        private=private,
        samples=run.samples,
        seconds=time.perf_counter() - started,
        chosen=best,
        attempts=attempts,
    )


def held_back_rows(data: TaskData, every: int, seed: int, name: str) -> list[int]:
    """One row in ``every``, at random, and of each class that share: sorted.

    Classes are those of targets called ``labels`` with one number a sample; other data are drawn from as they are.

    Raises:
        TaskError: there is a single sample, or ``every`` is below 2.
    """
    if len(data) < 2 or every < 2:
        raise TaskError(
            f"task {name!r}: one in {every} of {len(data)} samples cannot be held back with something left to learn",
            "give more validation data, and hold back one in two or fewer",
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    labels = data.targets.get("labels")
    if labels is not None and labels.dim() == 1:
        order = order[labels.cpu()[order].argsort(stable=True)]
    # Evenly through the classes one after the other: each gives its share, within one sample.
    return sorted(order[(every - 1) // 2 :: every].tolist() or order[:1].tolist())


class _DivergedError(Exception):
    """A loss is not finite."""


class _Run:
    """The model under training, its first state, and the count of what was computed."""

    def __init__(
        self,
        heads: Heads,
        tasks: Mapping[str, MeasuredTask],
        architecture: Architecture,
        device: torch.device,
        seed: int,
        batch_size: int,
        criterion: Criterion,
    ) -> None:
        self._heads = heads
        self._tasks = tasks
        self._architecture = architecture
        self._device = device
        self._seed = seed
        self._batch_size = batch_size
        self._criterion = criterion
        self.samples = 0
        # References without a head of their own have one module.
        self._modules: dict[str, nn.Module] = {}
        for task in tasks.values():
            module = heads.module(task.reference)
            if all(module is not other for other in self._modules.values()):
                self._modules[task.reference] = module
        self._keys = {reference: _keys(heads, reference) for reference in self._modules}
        self._tensors: dict[Key, Tensor] = {
            key: heads.live[key[1]] if key[0] is None else tensor
            for keys in self._keys.values()
            for key, tensor in keys.items()
        }
        self._groups = _groups(heads, tasks)
        self._initial = self.copies()
        self.batch_norms: list[_BatchNorm] = [
            layer
            for module in self._modules.values()
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None
        ]

    def copies(self) -> dict[Key, Tensor]:
        """Copies of all parameters and buffers."""
        return {key: tensor.detach().clone() for key, tensor in self._tensors.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back the model that was given."""
        for key, tensor in self._tensors.items():
            tensor.copy_(self._initial[key])

    @contextmanager
    def training(self) -> Iterator[None]:
        """Parameters want gradients; afterwards, and after an error with the model that was given, they do not."""
        try:
            for module in self._modules.values():
                for parameter in module.parameters():
                    parameter.requires_grad_(parameter.is_floating_point())
            yield
        except BaseException:
            self.restore()
            raise
        finally:
            for module in self._modules.values():
                module.eval().requires_grad_(False)

    def steps_of(self, rows: Mapping[str, Sequence[int]]) -> int:
        """Steps of an epoch; so few that BatchNorm never meets a batch of one."""
        smallest = min(sum(len(rows[name]) for name in group) for _, group in self._groups)
        return max(1, min(-(-_total(rows) // self._batch_size), smallest // 2))

    def score(self, rows: Mapping[str, Sequence[int]]) -> tuple[float, ...]:
        """The criterion on some rows, bigger is better; further entries decide among equals.

        Raises:
            _DivergedError: a loss is not finite.
            TaskError: a task has no such criterion.
        """
        for module in self._modules.values():
            module.eval()
        scores = {name: self._scores(task, rows[name]) for name, task in self._tasks.items()}
        self.samples += _total(rows)
        loss = _mean(each.mean_loss for each in scores.values())
        if self._criterion == "loss":
            return (-loss,)
        if self._criterion == "metric":
            return _mean(_first_metric(self._tasks[name], each) for name, each in scores.items()), -loss
        return (_mean(each.soft.value for each in scores.values() if each.soft is not None),)

    @torch.inference_mode()
    def _scores(self, task: MeasuredTask, rows: Sequence[int]) -> Scores:
        parts = []
        for batch in task.data.subset(rows).batches(task.batch_size):
            moved = batch.to(self._device)
            logits = run_on(self._architecture, self._heads.module(task.reference), task.task, moved)
            parts.append(task.task.score(logits, moved.targets, soft=self._criterion == "soft_metric"))
        scores = Scores.concatenate(parts)
        if not math.isfinite(scores.mean_loss):
            raise _DivergedError
        return scores

    def train(
        self, rows: Mapping[str, Sequence[int]], setting: Setting, scheduled_steps: int, steps: int
    ) -> Iterator[int]:
        """Train from the state that the model is in; gives the number of steps done after each.

        Raises:
            _DivergedError: the loss is not finite.
        """
        trained = {key: tensor for key, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter)}
        trained = {key: tensor for key, tensor in trained.items() if tensor.is_floating_point()}
        # Narrower weights would swallow most updates.
        masters = {
            key: tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()
            for key, tensor in trained.items()
        }
        # Without decay of biases and of the scales of normalisations, as is usual.
        optimiser = torch.optim.AdamW(
            [
                {"params": [each for each in masters.values() if each.dim() > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [each for each in masters.values() if each.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=setting.learning_rate,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _schedule(scheduled_steps))
        weights = {
            name: float(task.task.loss_weights(task.data.subset(rows[name]).targets).sum())
            for name, task in self._tasks.items()
        }
        batches = _batches(rows, self.steps_of(rows), torch.Generator().manual_seed(self._seed))
        cuda = [self._device] if self._device.type == "cuda" else []
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            for module in self._modules.values():
                module.train()
            if setting.statistics == "kept":
                for layer in self.batch_norms:
                    layer.eval()
            with torch.random.fork_rng(devices=cuda):
                # Dropout of a step, whatever was computed between the steps.
                torch.manual_seed(self._seed + step)
                gradients = self._gradients(batch, weights, self.steps_of(rows), trained)
            for key, master in masters.items():
                gradient = gradients.get(key)
                master.grad = None if gradient is None else gradient.to(master.dtype)
            nn.utils.clip_grad_norm_(list(masters.values()), CLIP_NORM)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                for key, master in masters.items():
                    master.grad = None
                    if master is not trained[key]:
                        trained[key].copy_(master)
            yield step

    def _gradients(
        self,
        batch: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        steps: int,
        trained: Mapping[Key, Tensor],
    ) -> dict[Key, Tensor]:
        """Of the mean over the tasks of their mean losses; a step's share of it, so unbiased whatever is in a batch."""
        gradients: dict[Key, Tensor] = {}
        for reference, group in self._groups:
            parts = {name: self._tasks[name].data.subset(batch[name]).to(self._device) for name in group if batch[name]}
            if not parts:
                continue
            first = next(iter(parts))
            inputs = {name: torch.cat([part.inputs[name] for part in parts.values()]) for name in parts[first].inputs}
            # In one batch: BatchNorm must see the mixture that it will meet.
            logits = run_on(
                self._architecture, self._heads.module(reference), self._tasks[first].task, TaskData(inputs, {})
            )
            loss = torch.zeros((), device=self._device)
            for name, own in zip(parts, torch.split(logits, [len(part) for part in parts.values()]), strict=True):
                losses = self._tasks[name].task.loss(own, parts[name].targets)
                loss = loss + losses.sum() * (steps / weights[name] / len(self._tasks))
            if not bool(torch.isfinite(loss)):
                raise _DivergedError
            own_keys = {key: tensor for key, tensor in self._keys[reference].items() if key in trained}
            found = torch.autograd.grad(loss, list(own_keys.values()), allow_unused=True)
            for key, gradient in zip(own_keys, found, strict=True):
                if gradient is not None:
                    gradients[key] = gradients[key] + gradient if key in gradients else gradient
        self.samples += (1 + BACKWARD_COST) * _total(batch)
        return gradients


def _keys(heads: Heads, reference: str) -> dict[Key, Tensor]:
    """A module's own parameters and buffers; the shared ones are other objects than the live ones, on their memory."""
    module = heads.module(reference)
    names = state_names(module)
    state = module.state_dict(keep_vars=True)
    return {
        (None if name in heads.live else reference, name): state[name] for name in [*names.parameters, *names.buffers]
    }


def _groups(heads: Heads, tasks: Mapping[str, MeasuredTask]) -> list[tuple[str, list[str]]]:
    """The tasks whose samples fit into one batch, with the reference of their module: inputs of one form."""
    groups: dict[tuple[Any, ...], tuple[str, list[str]]] = {}
    modules: dict[int, str] = {}
    for name, task in tasks.items():
        reference = modules.setdefault(id(heads.module(task.reference)), task.reference)
        form = [(key, tensor.dtype, tuple(tensor.shape[1:])) for key, tensor in sorted(task.data.inputs.items())]
        groups.setdefault((reference, *form), (reference, []))[1].append(name)
    return list(groups.values())


def _batches(
    rows: Mapping[str, Sequence[int]], steps: int, generator: torch.Generator
) -> Iterator[dict[str, list[int]]]:
    """Without end: epochs of ``steps`` batches, each with its share of every task's rows, in an order of its own."""
    while True:
        orders = {name: torch.randperm(len(own), generator=generator).tolist() for name, own in rows.items()}
        for step in range(steps):
            yield {
                name: [own[at] for at in orders[name][step * len(own) // steps : (step + 1) * len(own) // steps]]
                for name, own in rows.items()
            }


def _epochs(
    run: _Run,
    attempts: int,
    fitted: Mapping[str, Sequence[int]],
    held: Mapping[str, Sequence[int]],
    everything: Mapping[str, Sequence[int]],
    budget: int,
    most: int,
) -> int:
    """The most epochs of an attempt with which the whole stays within the budget, whatever is chosen."""
    training = 1 + BACKWARD_COST

    def cost(epochs: int) -> int:
        last = -(-epochs * run.steps_of(fitted) // run.steps_of(everything)) * _total(everything)
        return _total(held) + attempts * epochs * (training * _total(fitted) + _total(held)) + training * last

    if cost(1) > budget:
        raise TaskError(
            f"fine-tuning: {attempts} attempts of one epoch and a last training take {cost(1)} forward passes, and the "
            f"budget is {budget}",
            "raise the budget, or give fewer learning rates",
        )
    return max(epochs for epochs in range(1, most + 1) if cost(epochs) <= budget)


def _schedule(steps: int) -> Callable[[int], float]:
    """The learning rate's factor by step, from 0: linear warm-up, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return factor


def _first_metric(task: MeasuredTask, scores: Scores) -> float:
    metric = task.task.metrics[0]
    if not metric.higher_is_better:
        raise TaskError(
            f"task {task.task.spec.name!r}: its first metric is {metric.name!r}, of which less is better",
            "choose the criterion 'loss' or 'soft_metric'",
        )
    return scores.metrics[metric.name].value


def _total(rows: Mapping[str, Sequence[int]]) -> int:
    return sum(len(own) for own in rows.values())


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)

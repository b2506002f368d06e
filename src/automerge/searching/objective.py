"""Objectives: what a merged model keeps of each task, by its validation data, and one number of all tasks.

A search maximises the aggregate of the tasks' *capability preservation* (CP), which is 1 where all is kept and lower
where something is lost. By the name of the objective, CP is

``loss_ratio``
    (L_s + e) / (L_m + e), with the specialist's loss L_s and the merged model's L_m: arXiv 2601.22748, section 3.
``gap``
    1 / (1 + x) with the excess loss x = (L_m - L_s) / (L_ref - L_s), a part of what the specialist is better than a
    reference: a guess, the base, or the best other source. The ratio of two losses near 0 is about confidence; their
    difference, in units of what there is to lose, is not.
``metric``
    the mean over the task's metrics of metric(merged) / metric(specialist), the preservation rate itself. What two
    recipes with equal metrics are worth is settled by their calibrated loss (that of the best temperature, Guo et al.,
    https://arxiv.org/abs/1706.04599), in units smaller than one sample.
``soft_metric``
    the same of differentiable stand-ins of the metrics: the mean probability of the right answer for an accuracy, the
    loss itself for a perplexity. As smooth as a loss, but an answer that is lost costs the same however sure the
    specialist was of it.

With the harmonic mean H of CP as the aggregate, the cost that an optimiser minimises, 1 / H, is for ``loss_ratio`` and
``gap`` linear in the losses: so its gradient on a mini-batch is unbiased.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from automerge.documents import Model
from automerge.errors import SearchError
from automerge.preservation import preservation_rate
from automerge.tasks.task import Ratio, Scores, StandIn, Task, TaskData

Name = Literal["loss_ratio", "gap", "metric", "soft_metric"]
Aggregate = Literal["harmonic", "worst", "pareto"]

TEMPERATURES = (0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83)
"""Where the calibrated loss is looked for: steps of a factor of sqrt(2), within 1 % of the loss at the optimum."""

LARGEST_GAIN = -0.5
"""Excess losses below this count as this: CP stays finite where a merge is far better than a weak specialist."""

SMALLEST_CP = 1e-3
"""CP of a task that has lost everything: the harmonic mean, and the logarithm of the cost, stay finite."""


class Measure(Model):
    """One model on one task's validation data, as far as objectives need it."""

    loss: float
    metrics: dict[str, float] = Field(default_factory=dict)
    soft: float | None = Field(default=None, description="Mean probability of the right answer, if it was measured.")
    calibrated: float | None = Field(default=None, description="Loss at the best temperature, if it was measured.")

    @classmethod
    def of(cls, scores: Scores) -> "Measure":
        """The figures over all samples of the scores."""
        return cls(
            loss=scores.mean_loss,
            metrics={name: ratio.value for name, ratio in scores.metrics.items()},
            soft=None if scores.soft is None else scores.soft.value,
            calibrated=min((ratio.value for ratio in scores.tempered.values()), default=None),
        )


class TaskReference(Model):
    """What a task's merged model is measured against."""

    specialist: Measure = Field(description="The specialist (of a guard task: the base).")
    nothing: float | None = Field(default=None, description="The loss that counts as nothing kept, for 'gap'.")
    higher_is_better: dict[str, bool] = Field(
        default_factory=dict, description="By metric; those in which the specialist is no better than a guess left out."
    )
    stand_ins: dict[str, StandIn] = Field(
        default_factory=dict,
        description="What stands in for the same metrics where a gradient is wanted; for all where there are none.",
    )
    samples: int = Field(default=1, ge=1, description="Validation samples.")

    @classmethod
    def of(cls, task: Task, data: TaskData, scores: Scores, nothing: float | None) -> "TaskReference":
        """The reference that a specialist's scores on some validation data are.

        Args:
            task: the task.
            data: the samples, for the metrics' values by chance.
            scores: the specialist's, of the same samples.
            nothing: the loss that counts as nothing kept.
        """
        defined = {
            metric.name: metric.higher_is_better
            for metric in task.metrics
            if _is_better(scores.metrics[metric.name].value, task.chance(metric.name, data), metric.higher_is_better)
        }
        return cls(
            specialist=Measure.of(scores),
            nothing=nothing,
            higher_is_better=defined,
            stand_ins={
                metric.name: metric.stand_in for metric in task.metrics if metric.name in (defined or scores.metrics)
            },
            samples=len(scores),
        )


class Objective(Model):
    """An objective with its references: pure arithmetic on measures."""

    name: Name
    aggregate: Aggregate = "harmonic"
    epsilon: float = 0.0
    tasks: dict[str, TaskReference]

    def check(self) -> None:
        """Refuse references with which the objective is undefined.

        Raises:
            SearchError: there are such; the sentence names the task.
        """
        for task, reference in self.tasks.items():
            if self.name == "gap":
                nothing = reference.nothing
                if nothing is None or not nothing > reference.specialist.loss:
                    raise SearchError(
                        f"task {task!r}: the specialist's validation loss {reference.specialist.loss:.6g} is not below "
                        f"the {'missing reference' if nothing is None else f'reference loss {nothing:.6g}'}, so the "
                        "objective 'gap' is undefined",
                        "set search.gap_reference or search.objective to another, or check the data",
                    )
            if self.name in ("metric", "soft_metric"):
                specialist = reference.specialist
                zero = [
                    name
                    for name, kind in reference.stand_ins.items()
                    if (kind == "soft" and not specialist.soft) or (kind == "loss" and specialist.loss == 0)
                ]
                if not (reference.higher_is_better if self.name == "metric" else reference.stand_ins) or zero:
                    why = f"has nothing of {zero[0]!r}" if zero else "is no better than a guess in any metric"
                    raise SearchError(
                        f"task {task!r}: the specialist {why} on validation data, so the objective {self.name!r} is "
                        "undefined",
                        "check the data, or set search.objective to 'gap'",
                    )
        self.preservation({task: reference.specialist for task, reference in self.tasks.items()})

    def preservation(self, measures: Mapping[str, Measure]) -> dict[str, float]:
        """CP by task.

        Raises:
            SearchError: it is undefined: a loss is negative or not finite, or 0 without an epsilon.
        """
        return {task: self._task(task, reference, measures[task]) for task, reference in self.tasks.items()}

    def validation_rates(self, measures: Mapping[str, Measure]) -> dict[str, float]:
        """Preservation rate on validation data by task, percent; tasks without a defined metric are left out."""
        return {
            task: 100.0 * _mean_rate(reference, measures[task])
            for task, reference in self.tasks.items()
            if reference.higher_is_better
        }

    def value(self, cp: Mapping[str, float]) -> float:
        """The aggregate of CP: what a search maximises; of a Pareto search the harmonic mean, which ranks its front."""
        return min(cp.values()) if self.aggregate == "worst" else harmonic_mean(cp)

    def columns(self, task: str, scores: Scores) -> dict[str, Ratio]:
        """The figures by sample that decide on a task, by name: 'loss', 'soft', or metrics."""
        if self.name == "metric":
            return {name: scores.metrics[name] for name in self.tasks[task].higher_is_better}
        if self.name != "soft_metric":
            return {"loss": scores.losses}
        kinds = set(self.tasks[task].stand_ins.values())
        found = {"soft": _soft(scores, task)} if "soft" in kinds else {}
        return found | ({"loss": scores.losses} if kinds - {"soft"} else {})

    def loss(self, task: str, losses: Tensor, soft: Tensor) -> Tensor:
        """A differentiable stand-in for 1 / CP of one task, 1 where all is kept; scalar.

        For ``metric``, which has no gradient, it is that of ``soft_metric``: linear in the probabilities of the right
        answers, so that a mini-batch's gradient is unbiased there.

        Args:
            task: the task.
            losses: mean loss of a batch; scalar.
            soft: mean probability of the right answer in the batch; scalar.
        """
        reference = self.tasks[task]
        specialist = reference.specialist
        if self.name == "loss_ratio":
            return (losses + self.epsilon) / (specialist.loss + self.epsilon)
        if self.name == "gap":
            assert reference.nothing is not None  # noqa: S101 - check() has refused it
            return 1 + (losses - specialist.loss) / (reference.nothing - specialist.loss)
        rates = [_stand_in_rate(kind, specialist, losses, soft) for kind in reference.stand_ins.values()]
        return 2 - torch.stack(rates).mean()

    def _task(self, task: str, reference: TaskReference, measure: Measure) -> float:
        specialist = reference.specialist
        if self.name == "loss_ratio":
            return loss_ratio(specialist.loss, measure.loss, self.epsilon, task)
        _refuse_bad_loss(task, measure.loss)
        if self.name == "gap":
            return 1.0 / (1.0 + max(LARGEST_GAIN, _excess(reference, measure.loss, specialist.loss)))
        if self.name == "soft_metric":
            if measure.soft is None and "soft" in reference.stand_ins.values():
                raise SearchError(f"task {task!r}: the soft metric was not measured", "report it")
            loss, soft = (torch.tensor(value or 0.0, dtype=torch.float64) for value in (measure.loss, measure.soft))
            rates = [float(_stand_in_rate(kind, specialist, loss, soft)) for kind in reference.stand_ins.values()]
            return max(SMALLEST_CP, sum(rates) / len(rates))
        rate = _mean_rate(reference, measure)
        if measure.calibrated is None or specialist.calibrated is None:
            raise SearchError(f"task {task!r}: the calibrated loss was not measured", "report it")
        excess = max(0.0, measure.calibrated - specialist.calibrated)
        scale = max(specialist.calibrated, 1e-6)
        # Less than half of what one sample is worth, whatever the loss.
        return max(SMALLEST_CP, rate + 0.5 / reference.samples * scale / (scale + excess))


def loss_ratio(specialist_loss: float, merged_loss: float, epsilon: float, task: str) -> float:
    """(specialist_loss + epsilon) / (merged_loss + epsilon); bigger is better.

    Raises:
        SearchError: the ratio is undefined: a loss is negative or not finite, or one of them is 0 without an epsilon.
    """
    for who, loss in (("specialist's", specialist_loss), ("merged model's", merged_loss)):
        _refuse_bad_loss(task, loss, who)
        if loss + epsilon == 0:
            raise SearchError(
                f"task {task!r}: the {who} validation loss is 0, so the loss ratio is undefined",
                "set search.epsilon, e.g. 0.001",
            )
    return (specialist_loss + epsilon) / (merged_loss + epsilon)


def harmonic_mean(cp: Mapping[str, float]) -> float:
    """H: the harmonic mean of CP over the tasks."""
    return len(cp) / sum(1.0 / value for value in cp.values())


def _refuse_bad_loss(task: str, loss: float, who: str = "merged model's") -> None:
    if not math.isfinite(loss) or loss < 0:
        raise SearchError(f"task {task!r}: the {who} validation loss is {loss}", "check the data and the loss")


def _excess(reference: TaskReference, loss: float, specialist_loss: float) -> float:
    assert reference.nothing is not None  # noqa: S101 - check() has refused it
    return (loss - specialist_loss) / (reference.nothing - specialist_loss)


def _is_better(value: float, chance: float, higher_is_better: bool) -> bool:
    return value > chance if higher_is_better else value < chance


def _stand_in_rate(kind: StandIn, specialist: Measure, loss: Tensor, soft: Tensor) -> Tensor:
    """What a merged model keeps of a metric, by its stand-in; scalar, 1 where all is kept."""
    if kind == "perplexity":
        return torch.exp(specialist.loss - loss)
    if kind == "loss":
        return specialist.loss / loss
    assert specialist.soft  # noqa: S101 - check() has refused it
    return soft / specialist.soft


def _mean_rate(reference: TaskReference, measure: Measure) -> float:
    rates = [
        preservation_rate(measure.metrics[name], reference.specialist.metrics[name], higher)
        for name, higher in reference.higher_is_better.items()
    ]
    return sum(rates) / len(rates) / 100.0


def _soft(scores: Scores, task: str) -> Ratio:
    if scores.soft is None:
        raise SearchError(f"task {task!r}: the soft metric was not measured", "report it")
    return scores.soft

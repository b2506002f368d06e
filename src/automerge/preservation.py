"""Preservation rate (PR) and preservation discrepancy (PD): what a merged model kept of its sources.

Vocabulary and formulas are those of the AutoMerge paper (arXiv 2601.22748): for one task, PR is the mean over its
metrics of metric(merged) / metric(specialist) on test data, in percent; PD is the difference of the tasks' PRs, in
points. A metric where lower is better enters by the inverted ratio. Where the specialist itself is no better than a
guess a ratio says nothing, so the metric's PR is undefined and the reason is kept.

The documents come first, the arithmetic below them: ``preservation`` measures, ``check_gate`` judges.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from automerge.documents import Document, Model
from automerge.spec import GateSpec

Role = Literal["merged", "base", "source", "technique"]


class Interval(Model):
    """A value with its bootstrap confidence interval."""

    value: float
    low: float
    high: float


class MetricInfo(Model):
    """What a metric means on one task's test data."""

    name: str
    higher_is_better: bool
    chance: float = Field(description="The metric's value for the best constant guess on these test data.")
    undefined: str | None = Field(default=None, description="Why the metric's PR is undefined; null: it is defined.")


class TaskInfo(Model):
    """One task, as it was measured."""

    name: str
    kind: str
    reference: str = Field(description="The specialist source, or 'base' for a guard task.")
    guard: bool
    validation_samples: int
    test_samples: int
    test_data: str | None = Field(
        default=None, description="Digest of the test samples in their order; null in documents of earlier releases."
    )
    metrics: list[MetricInfo]


class TaskResult(Model):
    """One model on one task's test data."""

    loss: float
    metrics: dict[str, Interval]
    metric_pr: dict[str, float | None] = Field(description="Percent, by metric; null where undefined.")
    pr: Interval | None = Field(description="Percent: the mean over the defined metrics; null where none is.")


class ModelResult(Model):
    """One row of the table: a model on every task."""

    name: str
    role: Role
    tasks: dict[str, TaskResult]
    mean_pr: float | None
    worst_pr: float | None
    pd: float | None = Field(description="Largest minus smallest PR, points.")
    pd_pairwise: float | None = Field(description="Mean absolute difference of the PRs over all pairs, points.")


class GateVerdict(Model):
    """Whether the merged model may be registered."""

    verdict: Literal["pass", "fail"]
    reasons: list[str] = Field(description="Why it fails, or which limits it met; one sentence each.")


class OnnxResult(Model):
    """The merged model as ONNX."""

    status: Literal["exported", "failed", "off"]
    files: dict[str, str] = Field(
        default_factory=dict, description="File name by the reference whose head it has; 'merged' where all share one."
    )
    written: list[str] = Field(
        default_factory=list,
        description="Names of all files of the export, also of weights beside their graph; they only work together.",
    )
    max_abs_difference: float | None = Field(
        default=None, description="Largest absolute difference to torch's outputs on validation data."
    )
    reason: str | None = Field(default=None, description="Why it failed.")


class Evaluation(Document):
    """evaluation.json: every model on every task, and the verdict."""

    FORMAT: ClassVar[str] = "automerge/evaluation"

    recipe: str = Field(description="Digest of the recipe that made the merged model.")
    tasks: list[TaskInfo]
    models: list[ModelResult] = Field(description="The merged model first.")
    warnings: list[str]
    gate: GateVerdict
    onnx: OnnxResult
    confidence: float
    resamples: int

    @property
    def merged(self) -> ModelResult:
        """The merged model's row."""
        return self.models[0]


Floats = npt.NDArray[np.float64]


class SampleRatio(Protocol):
    """A figure by sample: transform(sum(numerator) / sum(denominator)); both float64 [n]."""

    @property
    def numerator(self) -> Floats: ...
    @property
    def denominator(self) -> Floats: ...
    @property
    def transform(self) -> Literal["identity", "exp"]: ...


class SampleScores(Protocol):
    """One model on one task's test data, by sample (``automerge.tasks.task.Scores`` is one)."""

    @property
    def losses(self) -> SampleRatio: ...
    @property
    def metrics(self) -> Mapping[str, SampleRatio]: ...


@dataclass(frozen=True)
class Measurement:
    """One task, and every model's scores on the same test samples in the same order.

    Attributes:
        info: the task; its metrics' ``undefined`` is filled in by ``preservation``. The first metric is the task's main
            one.
        scores: by the model's name; that of ``info.reference`` must be among them.
    """

    info: TaskInfo
    scores: Mapping[str, SampleScores]


@dataclass(frozen=True)
class Preservation:
    """What ``preservation`` found; the parts of an ``Evaluation``.

    Attributes:
        tasks: the tasks, with the reasons why a metric's PR is undefined.
        models: one row a model, in the order given.
        warnings: a sentence for each specialist that is not clearly better than another source on its own task.
    """

    tasks: list[TaskInfo]
    models: list[ModelResult]
    warnings: list[str]


def preservation(
    measurements: Sequence[Measurement], roles: Mapping[str, Role], *, confidence: float, resamples: int, seed: int
) -> Preservation:
    """PR, PD and their intervals of every model, relative to each task's reference.

    The intervals are percentile intervals of the paired bootstrap (Efron and Tibshirani 1993, ch. 13): each resample
    draws n test samples with replacement, the same ones for all models of a task, and forms every figure anew from its
    sums. A task's draws depend on ``seed`` and its name only.

    A metric's PR is undefined unless the reference is clearly better than chance: the worse end of its interval must be
    strictly better than the best constant guess. So the top-5 accuracy of a task with five classes has no PR. A task's
    PR is the mean over its defined metrics. A row's mean, worst and PD are over the tasks with a PR, and null where the
    model was not measured on every task; PD needs two PRs.

    Args:
        measurements: the tasks.
        roles: the models by name, in the order of the rows.
        confidence: level of the intervals, between 0 and 1.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        Rows, tasks and warnings.
    """
    infos: list[TaskInfo] = []
    results: dict[str, dict[str, TaskResult]] = {name: {} for name in roles}
    warnings: list[str] = []
    for measurement in measurements:
        figures = _figures(measurement, resamples, seed)
        reference = figures[measurement.info.reference]
        info = _with_reasons(measurement.info, reference, confidence)
        infos.append(info)
        for name in roles:
            if name in figures:
                loss = _value(measurement.scores[name].losses)
                results[name][info.name] = _task_result(info, loss, figures[name], reference, confidence)
        others = {name: figures[name] for name, role in roles.items() if role == "source" and name in figures}
        warnings += _weak_specialist(info, reference, others, confidence)
    rows = [_row(name, role, results[name], infos) for name, role in roles.items()]
    return Preservation(infos, rows, warnings)


def preservation_rate(merged: float, specialist: float, higher_is_better: bool) -> float:
    """One metric's PR, percent: 100 merged / specialist, inverted where lower is better. Equal values give 100."""
    return float(_rates(np.array([merged]), np.array([specialist]), higher_is_better)[0])


def discrepancy(rates: Sequence[float]) -> tuple[float | None, float | None]:
    """PD of the tasks' PRs, points: largest minus smallest, and the mean absolute difference over all pairs.

    Null for fewer than two tasks; for two tasks both are the absolute difference.
    """
    if len(rates) < 2:
        return None, None
    pairs = [abs(first - second) for first, second in itertools.combinations(rates, 2)]
    return max(rates) - min(rates), math.fsum(pairs) / len(pairs)


def check_gate(gate: GateSpec, row: ModelResult, tasks: Sequence[TaskInfo]) -> GateVerdict:
    """Whether a model may be registered.

    ``min_worst_pr`` is met if the lower end of every task's interval reaches it; ``max_pd`` by the PD's value. A task
    whose PR is undefined, or that was not measured, fails a gate that sets a limit; so does a PD limit with fewer than
    two tasks.
    """
    if gate.min_worst_pr is None and gate.max_pd is None:
        return GateVerdict(verdict="pass", reasons=["no limits set"])
    failures: list[str] = []
    met: list[str] = []
    intervals: dict[str, Interval] = {}
    for task in tasks:
        result = row.tasks.get(task.name)
        if result is None:
            failures.append(f"task {task.name!r}: the model was not measured on it")
        elif result.pr is None:
            why = "; ".join(f"{metric.name}: {metric.undefined}" for metric in task.metrics if metric.undefined)
            failures.append(f"task {task.name!r}: the preservation rate is undefined ({why})")
        else:
            intervals[task.name] = result.pr
    if gate.min_worst_pr is not None and intervals:
        name, interval = min(intervals.items(), key=lambda item: item[1].low)
        holds = interval.low >= gate.min_worst_pr
        (met if holds else failures).append(
            f"task {name!r}: the lower end of the preservation rate's interval is {interval.low:.2f} %, "
            f"{'not below' if holds else 'below'} the limit of {gate.min_worst_pr:g} %"
        )
    if gate.max_pd is not None and not failures and row.pd is None:
        failures.append("the preservation discrepancy needs two tasks")
    elif gate.max_pd is not None and row.pd is not None:
        holds = row.pd <= gate.max_pd
        (met if holds else failures).append(
            f"the preservation discrepancy is {row.pd:.2f} points, {'not above' if holds else 'above'} "
            f"the limit of {gate.max_pd:g}"
        )
    return GateVerdict(verdict="fail", reasons=failures) if failures else GateVerdict(verdict="pass", reasons=met)


def shared_samples(validation: Sequence[str], test: Sequence[str]) -> int:
    """How many test samples are also among the validation samples, by their digests."""
    seen = frozenset(validation)
    return sum(digest in seen for digest in test)


@dataclass(frozen=True)
class _Figure:
    """A metric over all samples, and over each resample [resamples]."""

    value: float
    resampled: Floats

    def interval(self, confidence: float) -> Interval:
        low, high = _percentiles(self.resampled, confidence)
        return Interval(value=self.value, low=low, high=high)


_CHUNK_ELEMENTS = 2**22
"""Drawn indices held at a time: 32 MB."""


def _figures(measurement: Measurement, resamples: int, seed: int) -> dict[str, dict[str, _Figure]]:
    """The metrics of every model on one task, by model and metric."""
    info = measurement.info
    ratios = [
        (name, metric.name, scores.metrics[metric.name])
        for name, scores in measurement.scores.items()
        for metric in info.metrics
    ]
    lengths = sorted({len(ratio.numerator) for _, _, ratio in ratios})
    if len(lengths) != 1:
        raise ValueError(f"task {info.name!r}: the models were scored on different numbers of samples: {lengths}")
    columns = np.stack([column for _, _, ratio in ratios for column in (ratio.numerator, ratio.denominator)], axis=1)
    # By the name, not the position: a task's intervals do not change when another task is added.
    name_seed = int.from_bytes(hashlib.sha256(info.name.encode()).digest()[:8])
    sums = _resampled_sums(columns, resamples, np.random.default_rng((seed, name_seed)))
    figures: dict[str, dict[str, _Figure]] = {}
    for index, (name, metric, ratio) in enumerate(ratios):
        resampled = _transformed(sums[:, 2 * index], sums[:, 2 * index + 1], ratio.transform)
        figures.setdefault(name, {})[metric] = _Figure(_value(ratio), resampled)
    return figures


def _resampled_sums(columns: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Sums of columns [n, k] over samples drawn with replacement: [resamples, k]."""
    samples = len(columns)
    rows = max(1, _CHUNK_ELEMENTS // samples)
    parts = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(samples, size=(count, samples))
        drawn += np.arange(count)[:, None] * samples
        times = np.bincount(drawn.ravel(), minlength=count * samples).reshape(count, samples)
        parts.append(times.astype(np.float64) @ columns)
    return np.concatenate(parts)


def _value(ratio: SampleRatio) -> float:
    numerator, denominator = ratio.numerator.sum(keepdims=True), ratio.denominator.sum(keepdims=True)
    return float(_transformed(numerator, denominator, ratio.transform)[0])


def _transformed(numerator: Floats, denominator: Floats, transform: str) -> Floats:
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = numerator / denominator
        return np.exp(ratio) if transform == "exp" else ratio


def _rates(merged: Floats, specialist: Floats, higher_is_better: bool) -> Floats:
    above, below = (merged, specialist) if higher_is_better else (specialist, merged)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.where(merged == specialist, 100.0, 100.0 * above / below)


def _percentiles(values: Floats, confidence: float) -> tuple[float, float]:
    # Order statistics, not interpolated: an infinite ratio stays one and makes no NaN.
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
    return float(low), float(high)


def _with_reasons(info: TaskInfo, reference: Mapping[str, _Figure], confidence: float) -> TaskInfo:
    """The task, with the reason why a metric's PR is undefined."""
    metrics = []
    for metric in info.metrics:
        interval = reference[metric.name].interval(confidence)
        better = interval.low > metric.chance if metric.higher_is_better else interval.high < metric.chance
        reason = (
            f"{info.reference!r} reaches {interval.value:.4g} (between {interval.low:.4g} and {interval.high:.4g}), "
            f"which is not clearly better than {metric.chance:.4g}, the best constant guess"
        )
        metrics.append(metric.model_copy(update={"undefined": None if better else reason}))
    return info.model_copy(update={"metrics": metrics})


def _task_result(
    info: TaskInfo, loss: float, figures: Mapping[str, _Figure], reference: Mapping[str, _Figure], confidence: float
) -> TaskResult:
    rates: dict[str, _Figure] = {}
    for metric in info.metrics:
        if metric.undefined is None:
            mine, theirs = figures[metric.name], reference[metric.name]
            rates[metric.name] = _Figure(
                preservation_rate(mine.value, theirs.value, metric.higher_is_better),
                _rates(mine.resampled, theirs.resampled, metric.higher_is_better),
            )
    mean = None
    if rates:
        mean = _Figure(
            math.fsum(rate.value for rate in rates.values()) / len(rates),
            np.mean([rate.resampled for rate in rates.values()], axis=0),
        ).interval(confidence)
    return TaskResult(
        loss=loss,
        metrics={name: figure.interval(confidence) for name, figure in figures.items()},
        metric_pr={metric.name: rates[metric.name].value if metric.name in rates else None for metric in info.metrics},
        pr=mean,
    )


def _row(name: str, role: Role, results: dict[str, TaskResult], infos: Sequence[TaskInfo]) -> ModelResult:
    complete = all(info.name in results for info in infos)
    rates = [result.pr.value for result in results.values() if result.pr is not None] if complete else []
    pd, pairwise = discrepancy(rates)
    return ModelResult(
        name=name,
        role=role,
        tasks=results,
        mean_pr=math.fsum(rates) / len(rates) if rates else None,
        worst_pr=min(rates, default=None),
        pd=pd,
        pd_pairwise=pairwise,
    )


def _weak_specialist(
    info: TaskInfo, specialist: Mapping[str, _Figure], sources: Mapping[str, Mapping[str, _Figure]], confidence: float
) -> list[str]:
    """A sentence if another source is about as good at the task's main metric: the paired difference may be 0."""
    if info.guard:
        return []
    metric = info.metrics[0]
    sign = 1.0 if metric.higher_is_better else -1.0
    mine = specialist[metric.name]
    rivals: list[tuple[float, str, float, float]] = []
    for name, figures in sources.items():
        theirs = figures[metric.name]
        low, high = _percentiles(sign * (mine.resampled - theirs.resampled), confidence)
        if name != info.reference and not low > 0:
            rivals.append((sign * theirs.value, name, low, high))
    if not rivals:
        return []
    best, name, low, high = max(rivals)
    return [
        f"task {info.name!r}: its specialist {info.reference!r} ({metric.name} {mine.value:.4g}) is not clearly "
        f"better than source {name!r} ({sign * best:.4g}): the advantage lies between {low:.4g} and {high:.4g}, "
        "so the task may not measure what the merge should keep"
    ]

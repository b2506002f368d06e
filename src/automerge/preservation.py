"""Preservation rate (PR) and preservation discrepancy (PD): what a merged model kept of its sources.

Vocabulary and formulas are those of the AutoMerge paper (arXiv 2601.22748): for one task, PR is the mean over its
metrics of metric(merged) / metric(specialist) on test data, in percent; PD is the difference of the tasks' PRs, in
points. A metric where lower is better enters by the inverted ratio. Where the specialist itself is no better than a
guess a ratio says nothing, so the metric's PR is undefined and the reason is kept.
"""

from typing import ClassVar, Literal

from pydantic import Field

from automerge.documents import Document, Model


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
    role: Literal["merged", "base", "source", "technique"]
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

"""A realistic run, made by hand: two digit specialists merged into one model by a short search."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.preservation import (
    Evaluation,
    GateVerdict,
    Interval,
    MetricInfo,
    ModelResult,
    OnnxResult,
    TaskInfo,
    TaskResult,
)
from automerge.searching.store import Cut
from automerge.searching.trial import Trial
from automerge.segmenting.segmentation import Block, Segmentation
from automerge.spec import Spec
from automerge.stages.documents import FileRecord, Input, Manifest


def file(count: int) -> FileRecord:
    return FileRecord(path="data", bytes=count, sha256="0" * 64)


@dataclass
class Run:
    """The documents of one run, by the names of write_report's arguments."""

    spec: Spec
    segmentation: Segmentation
    recipe: Recipe
    trials: list[Trial]
    cuts: list[Cut]
    evaluation: Evaluation
    manifest: Manifest

    def documents(self, **changes: Any) -> dict[str, Any]:
        return {**vars(self), **changes}


def digest(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def result(loss: float, top1: float, top5: float, pr: float | None) -> TaskResult:
    return TaskResult(
        loss=loss,
        metrics={
            "top1": Interval(value=top1, low=max(0.0, top1 - 0.021), high=min(1.0, top1 + 0.017)),
            "top5": Interval(value=top5, low=max(0.0, top5 - 0.008), high=min(1.0, top5 + 0.006)),
        },
        metric_pr={"top1": None if pr is None else pr - 1, "top5": None if pr is None else pr + 1},
        pr=None if pr is None else Interval(value=pr, low=pr - 1.9, high=pr + 1.5),
    )


def model(name: str, role: Any, low: tuple[Any, ...], high: tuple[Any, ...]) -> ModelResult:
    tasks = {"low": result(*low), "high": result(*high)}
    rates = [task.pr.value for task in tasks.values() if task.pr is not None]
    spread = max(rates) - min(rates) if len(rates) > 1 else None
    return ModelResult(
        name=name,
        role=role,
        tasks=tasks,
        mean_pr=sum(rates) / len(rates) if rates else None,
        worst_pr=min(rates, default=None),
        pd=spread,
        pd_pairwise=spread,
    )


def task(name: str) -> TaskInfo:
    metrics = [
        MetricInfo(name="top1", higher_is_better=True, chance=0.204),
        MetricInfo(name="top5", higher_is_better=True, chance=0.61),
    ]
    return TaskInfo(
        name=name,
        kind="classification",
        reference=name,
        guard=False,
        validation_samples=540,
        test_samples=361 if name == "low" else 358,
        metrics=metrics,
    )


def make_trials() -> list[Trial]:
    trials = []
    for number in range(60):
        origin = (
            ["source:low", "source:high", "average"][number] if number < 3 else "sobol" if number < 20 else "surrogate"
        )
        rise = 0.55 + 0.34 * (1 - math.exp(-number / 16))
        noise = 0.16 * math.sin(7.3 * number) * math.exp(-number / 40)
        objective = None if number == 31 else round(rise + noise, 6)
        cp = {} if objective is None else {"low": objective + 0.06 * math.cos(number), "high": objective - 0.05}
        trials.append(
            Trial(
                number=number,
                origin=origin,
                config={},
                status="failed" if objective is None else "cached" if number in (40, 47) else "ok",
                cost=9.0 if objective is None else 1 / objective,
                objective=objective,
                losses={task: 0.1 / value for task, value in cp.items()},
                cp=cp,
                seconds=0.21,
                optimiser_seconds=0.05 if number < 20 else 0.52,
                error="tensor 'head.weight' is not finite" if objective is None else None,
            )
        )
    return trials


@pytest.fixture
def run() -> Run:
    spec = Spec.model_validate(
        {
            "name": "digits",
            "model": {"kind": "factory", "target": "digits.model:cct"},
            "base": {"uri": "s3://models/digits/base"},
            "sources": [
                {"name": "low", "uri": "s3://models/digits/low"},
                {"name": "high", "uri": "s3://models/digits/high"},
            ],
            "tasks": [
                {"name": name, "kind": "classification", "specialist": name, "validation": "v.npz", "test": "t.npz"}
                for name in ("low", "high")
            ],
            "search": {"trials": 60},
            "gate": {"min_worst_pr": 85.0, "max_pd": 8.0},
        }
    )
    shapes = [
        ("0-convolutional", "convolutional", "input", 4_640, ["tokenizer.0.weight"]),
        ("1-sequence", "sequence", "4-D convolutional -> 3-D sequence at encoder.0", 201_344, ["encoder.0.weight"]),
        ("2-vector", "vector", "3-D sequence -> 2-D vector at head", 1_290, ["head.weight", "head.bias"]),
    ]
    total = sum(count for *_, count, _ in shapes)
    segmentation = Segmentation(
        granularity="transition",
        blocks=[
            Block(
                name=name,
                kind=kind,  # type: ignore[arg-type]
                transition=transition,
                shape_in=[1, 8],
                shape_out=[1, 8],
                parameters=parameters,
                buffers=[],
                parameter_count=count,
                share=count / total,
            )
            for name, kind, transition, count, parameters in shapes
        ],
        tied={},
    )
    settings: list[tuple[str, dict[str, float], dict[str, Any]]] = [
        ("linear", {"low": 0.62, "high": 0.38}, {}),
        ("ties", {"low": 0.47, "high": 0.53}, {"density": 0.71, "lambda": 1.0, "normalize": True}),
        ("dare_linear", {"low": 0.55, "high": 0.45}, {"density": 0.93, "lambda": 1.0, "rescale": "inverse_density"}),
    ]
    recipe = Recipe(
        release="0.1.0",
        base=InputDigest(name="base", digest=digest("base")),
        sources=[InputDigest(name=name, digest=digest(name)) for name in ("low", "high")],
        blocks=[
            RecipeBlock(
                name=block.name,
                technique=technique,
                weights=weights,
                hyperparameters=hyperparameters,
                parameters=block.parameters,
            )
            for block, (technique, weights, hyperparameters) in zip(segmentation.blocks, settings, strict=True)
        ],
    )
    evaluation = Evaluation(
        recipe=recipe.digest(),
        tasks=[task("low"), task("high")],
        models=[
            model("merged", "merged", (0.142, 0.953, 0.994, 96.4), (0.187, 0.932, 0.989, 93.8)),
            model("base", "base", (0.61, 0.842, 0.981, 85.2), (0.72, 0.811, 0.972, 81.9)),
            model("low", "source", (0.071, 0.988, 0.999, 100.0), (3.2, 0.213, 0.62, 21.6)),
            model("high", "source", (2.9, 0.241, 0.66, 24.4), (0.083, 0.985, 0.998, 100.0)),
            model("linear", "technique", (0.41, 0.892, 0.985, 90.1), (0.39, 0.887, 0.984, 89.4)),
            model("task_arithmetic", "technique", (0.41, 0.892, 0.985, 90.1), (0.39, 0.887, 0.984, 89.4)),
            model("ties", "technique", (0.36, 0.906, 0.987, 91.7), (0.51, 0.851, 0.979, 86.3)),
            model("dare_linear", "technique", (0.44, 0.881, 0.984, 89.0), (0.42, 0.879, 0.983, 88.8)),
            model("dare_ties", "technique", (0.58, 0.848, 0.979, 85.9), (0.55, 0.844, 0.978, 85.5)),
        ],
        warnings=["tasks 'low' and 'high' share 3 test samples with their validation data, so the rates are too good"],
        gate=GateVerdict(
            verdict="pass",
            reasons=[
                "worst task 'high': the interval's lower end 91.9 % is at least 85.0 %",
                "preservation discrepancy 2.6 points is at most 8.0",
            ],
        ),
        onnx=OnnxResult(status="exported", files={"low": "merged.onnx"}, max_abs_difference=3.1e-6),
        confidence=0.95,
        resamples=2000,
    )
    inputs = [
        Input(name=name, role=role, uri=uri, path=name, digest=digest(name), files=[file(count)])
        for name, role, uri, count in (
            ("base", "base", "s3://models/digits/base", 831_276),
            ("low", "source", "s3://models/digits/low", 831_276),
            ("high", "source", "s3://models/digits/high", 831_276),
            ("low/validation", "validation", "s3://data/digits/low/validation.npz", 142_001),
            ("low/test", "test", "s3://data/digits/low/test.npz", 93_512),
            ("high/validation", "validation", "s3://data/digits/high/validation.npz", 141_233),
            ("high/test", "test", "s3://data/digits/high/test.npz", 92_964),
        )
    ]  # fmt: skip
    manifest = Manifest(spec=spec.digest(), inputs=inputs)
    return Run(spec, segmentation, recipe, make_trials(), [], evaluation, manifest)

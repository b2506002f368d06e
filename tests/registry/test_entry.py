"""What is written beside a registered version."""

from pathlib import Path

import pytest

from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.preservation import Evaluation, GateVerdict, Interval, ModelResult, OnnxResult, TaskResult
from automerge.registry.entry import build_entry
from automerge.registry.registry import RegistryEntry
from automerge.spec import Spec


@pytest.fixture
def entry(tmp_path: Path) -> RegistryEntry:
    spec = Spec.model_validate(
        {
            "name": "digits",
            "model": {"kind": "factory", "target": "m:f"},
            "sources": [{"name": name, "uri": name} for name in ("low", "high")],
            "tasks": [
                {"name": name, "kind": "classification", "specialist": name, "validation": "v", "test": "t"}
                for name in ("low", "high")
            ],
            "registry": {"model": "digits-merged"},
        }
    )
    recipe = Recipe(
        base=InputDigest(name="base", digest="b" * 64),
        sources=[InputDigest(name="low", digest="1" * 64), InputDigest(name="high", digest="2" * 64)],
        blocks=[
            RecipeBlock(
                name="0-sequence",
                technique="ties",
                weights={"low": 0.4, "high": 0.6},
                hyperparameters={"density": 0.7, "lambda": 1.0, "normalize": True},
                parameters=["w"],
            )
        ],
    )
    tasks = {
        "low": TaskResult(
            loss=float("inf"),
            metrics={"top1": Interval(value=0.9, low=0.8, high=1.0)},
            metric_pr={"top1": 95.0},
            pr=Interval(value=95.0, low=93.0, high=97.0),
        ),
        "high": TaskResult(
            loss=0.2, metrics={"top1": Interval(value=0.5, low=0.4, high=0.6)}, metric_pr={"top1": None}, pr=None
        ),
    }
    merged = ModelResult(
        name="merged", role="merged", tasks=tasks, mean_pr=95.0, worst_pr=95.0, pd=None, pd_pairwise=None
    )
    evaluation = Evaluation(
        recipe=recipe.digest(),
        tasks=[],
        models=[merged],
        warnings=[],
        gate=GateVerdict(verdict="pass", reasons=[]),
        onnx=OnnxResult(status="failed", reason="no"),
        confidence=0.95,
        resamples=100,
    )
    found = build_entry(spec, recipe, evaluation, weights=tmp_path, documents=[tmp_path / "recipe.json"])
    assert found.model == "digits-merged"
    assert found.recipe_digest == recipe.digest()
    assert found.tags["spec.digest"] == spec.digest()
    return found


def test_tags_tell_lineage_and_verdict(entry: RegistryEntry) -> None:
    tags = {key: value for key, value in entry.tags.items() if key not in ("spec.digest", "version")}
    assert tags == {
        "spec": "digits",
        "base.digest": "b" * 64,
        "source.low.digest": "1" * 64,
        "source.high.digest": "2" * 64,
        "source.low.uri": "low",
        "source.high.uri": "high",
        "pr.low": "95.00",
        "pr.high": "undefined",
        "pr.mean": "95.00",
        "pr.worst": "95.00",
        "pd": "undefined",
        "gate": "pass",
        "onnx": "failed",
    }


def test_params_are_the_recipe(entry: RegistryEntry) -> None:
    assert entry.params == {
        "dtype": "same",
        "seed": "0",
        "blocks": "1",
        "0-sequence.technique": "ties",
        "0-sequence.weight.low": "0.4",
        "0-sequence.weight.high": "0.6",
        "0-sequence.density": "0.7",
        "0-sequence.lambda": "1",
        "0-sequence.normalize": "True",
    }


def test_metrics_are_finite_and_defined(entry: RegistryEntry) -> None:
    assert entry.metrics == {
        "pr_mean": 95.0,
        "pr_worst": 95.0,
        "pr/low": 95.0,
        "pr_low/low": 93.0,
        "pr_high/low": 97.0,
        "top1/low": 0.9,
        "loss/high": 0.2,
        "top1/high": 0.5,
    }


def test_the_description_is_a_table(entry: RegistryEntry) -> None:
    assert "| low | 95.0 % (93.0 to 97.0) |" in entry.description
    assert "| high | undefined |" in entry.description

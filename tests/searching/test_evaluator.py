"""Evaluating a recipe: merged into the live model, measured on all data or until a race stops it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automerge.errors import MergeError, TaskError
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator, mean_losses, tasks_by_form
from automerge.searching.fidelity import make_race, make_slices
from automerge.searching.objective import Measure, Objective, TaskReference
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.task import Scores, TaskData

CPU = torch.device("cpu")
SOURCES = ("a", "b")


class Plain(Architecture):
    def build(self, reference: str, arguments: Mapping[str, Any]) -> nn.Module:
        raise NotImplementedError


ARCHITECTURE = Plain(ModelSpec(kind="factory", target="nowhere:build"), {})


def build() -> nn.Module:
    """Vectors [n, 5] in, logits [n, 3] out."""
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval().requires_grad_(False)


BODY, HEAD = ["0.weight", "0.bias"], ["2.weight", "2.bias"]


def states() -> dict[str, dict[str, Tensor]]:
    """A base, and sources that have moved away from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = build().state_dict()
        return {"base": base} | {
            name: {key: tensor + torch.randn_like(tensor) for key, tensor in base.items()} for name in SOURCES
        }


def task_of(name: str, count: int, width: int = 5, reference: str | None = None) -> MeasuredTask:
    """Samples whose labels its specialist mostly gives."""
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, width, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    if width == 5:
        specialist = build()
        specialist.load_state_dict(states()[reference or name])
        labels = torch.where(torch.rand(count, generator=generator) < 0.9, specialist(inputs).argmax(1), labels)
    spec = TaskSpec(name=name, kind="classification", specialist=reference or name, validation="v", test="t")
    return MeasuredTask(Classification(spec), reference or name, TaskData({"inputs": inputs}, {"labels": labels}), 16)


def evaluator_of(
    tasks: Mapping[str, MeasuredTask] | None = None, private: Sequence[str] = (), **options: Any
) -> RecipeEvaluator:
    tensors = states()
    own = {name: {key: tensors[name][key] for key in private} for name in SOURCES}
    shared = {key: tensor for key, tensor in tensors["base"].items() if key not in private}
    recipe = Recipe(
        base=InputDigest(name="base"),
        sources=[InputDigest(name=name) for name in SOURCES],
        blocks=[],
        private={name: list(private) for name in tensors} if private else {},
    )
    merger = ResidentMerger(tensors["base"], {name: tensors[name] for name in SOURCES}, CPU)
    heads = Heads(lambda _: build(), own, shared, CPU)
    tasks = tasks or {"a": task_of("a", 96), "b": task_of("b", 160)}
    return RecipeEvaluator(recipe, merger, heads, ARCHITECTURE, tasks, CPU, **options)


def blocks_of(a: float, b: float, parameters: Sequence[str] = (*BODY, *HEAD)) -> list[RecipeBlock]:
    values = {"lambda": 1.0}
    weights = {"a": a, "b": b}
    return [
        RecipeBlock(
            name="all",
            technique="task_arithmetic",
            weights=weights,
            hyperparameters=values,
            parameters=list(parameters),
        )
    ]


def model_of(a: float, b: float, own: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model of its own with these weights of the task vectors."""
    tensors = states()
    module = build()
    merged = {
        key: base + a * (tensors["a"][key] - base) + b * (tensors["b"][key] - base)
        for key, base in tensors["base"].items()
    }
    module.load_state_dict({**merged, **(own or {})})
    return module


def expected(module: nn.Module, task: MeasuredTask) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, whether the first class is right, and the probability of the right one, by sample."""
    logits, labels = module(task.data.inputs["inputs"]), task.data.targets["labels"]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses, logits.argmax(1) == labels, (-losses).exp()


def same(scores: Scores, other: tuple[Tensor, Tensor, Tensor]) -> bool:
    return (
        np.allclose(scores.losses.numerator, other[0], rtol=1e-4, atol=1e-5)
        and np.array_equal(scores.metrics["top1"].numerator, other[1])
        and scores.soft is not None
        and np.allclose(scores.soft.numerator, other[2], rtol=1e-4, atol=1e-5)
    )


def test_it_measures_the_model_that_the_recipe_says() -> None:
    """One recipe after the other, with nothing left of the one before."""
    evaluator = evaluator_of(soft=True)
    for a, b in ((0.3, 0.6), (1.0, 0.0), (0.3, 0.6)):
        outcome = evaluator(blocks_of(a, b))
        assert (outcome.samples, outcome.fidelity) == (256, 1.0)
        for name, task in evaluator.tasks.items():
            assert same(outcome.scores[name], expected(model_of(a, b), task))


def test_each_task_runs_under_the_head_of_its_reference() -> None:
    evaluator = evaluator_of(private=HEAD, soft=True)
    outcome = evaluator(blocks_of(0.4, 0.7, BODY))
    for name, task in evaluator.tasks.items():
        own = {key: states()[name][key] for key in HEAD}
        assert same(outcome.scores[name], expected(model_of(0.4, 0.7, own), task))


def test_rows_are_measured_in_their_order() -> None:
    evaluator = evaluator_of(soft=True)
    whole = evaluator(blocks_of(0.5, 0.5)).scores
    rows = {"a": [7, 3, 90], "b": [0]}
    part = evaluator.measure(rows)
    assert part.samples == 4
    for name, scores in part.scores.items():
        assert np.allclose(scores.losses.numerator, whole[name].losses.numerator[rows[name]], rtol=1e-4)


@dataclass
class Watch:
    """Notes what is asked of a race."""

    race: Any
    steps_asked: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.race, name)

    def rows(self, step: int) -> Any:
        self.steps_asked.append(step)
        return self.race.rows(step)


def race_of(evaluator: RecipeEvaluator, incumbent: list[RecipeBlock]) -> Watch:
    scores = evaluator(incumbent).scores
    data = {name: task.data for name, task in evaluator.tasks.items()}
    references = {
        name: TaskReference(
            specialist=Measure(loss=0.1, soft=0.9), higher_is_better={"top1": True}, stand_ins={"top1": "soft"}
        )
        for name in data
    }
    objective = Objective(name="soft_metric", tasks=references)
    return Watch(make_race(make_slices(data, [0.2, 0.5, 1.0], 0), objective, scores, 0.9))


def test_a_race_to_the_end_gives_the_scores_of_the_whole() -> None:
    """In the order of the data, whatever the order of measuring; the incumbent itself is never hopeless."""
    evaluator = evaluator_of(soft=True)
    incumbent = blocks_of(0.5, 0.5)
    race = race_of(evaluator, incumbent)
    raced = evaluator(incumbent, race)
    whole = evaluator(incumbent)
    assert race.steps_asked == [0, 1, 2]
    assert (raced.samples, raced.fidelity) == (256, 1.0)
    for name, scores in whole.scores.items():
        assert np.allclose(raced.scores[name].losses.numerator, scores.losses.numerator, rtol=1e-4, atol=1e-6)
        assert np.array_equal(raced.scores[name].metrics["top1"].numerator, scores.metrics["top1"].numerator)


def test_a_hopeless_trial_is_stopped_and_says_how_much_was_measured() -> None:
    evaluator = evaluator_of(soft=True)
    race = race_of(evaluator, blocks_of(0.5, 0.5))
    bad = blocks_of(-3.0, -3.0)
    outcome = evaluator(bad, race)
    last = race.steps_asked[-1]
    assert race.steps_asked == list(range(last + 1)) and last < race.steps - 1
    ends = {name: each[last] for name, each in race.ends.items()}
    assert {name: len(scores) for name, scores in outcome.scores.items()} == ends
    assert outcome.samples == sum(ends.values()) < 256
    assert outcome.fidelity == pytest.approx(outcome.samples / 256)
    for name, task in evaluator.tasks.items():
        rows = [row for step in race.steps_asked for row in race.race.rows(step)[name]]
        losses = expected(model_of(-3.0, -3.0), task)[0][rows]
        assert np.allclose(outcome.scores[name].losses.numerator, losses, rtol=1e-4)


def test_statistics_are_recalibrated_after_each_merge_and_before_it_is_measured() -> None:
    """A race merges once: what it measures in its steps is one model."""
    happened: list[str] = []
    evaluator = evaluator_of(soft=True)
    evaluator.recalibrate = lambda: happened.append("recalibrated")
    measure = evaluator.measure

    def measuring(rows: Any) -> Any:
        happened.append("measured")
        return measure(rows)

    evaluator.measure = measuring  # type: ignore[method-assign]
    evaluator(blocks_of(0.5, 0.5))
    assert happened == ["recalibrated", "measured"]
    race = race_of(evaluator, blocks_of(0.5, 0.5))
    happened.clear()
    evaluator(blocks_of(0.5, 0.5), race)
    assert happened == ["recalibrated", *["measured"] * 3]


def test_a_merge_that_cannot_be_and_a_loss_that_is_none_are_raised_and_hurt_nothing() -> None:
    evaluator = evaluator_of(soft=True)
    fine = evaluator(blocks_of(0.5, 0.5)).scores
    with pytest.raises((MergeError, TaskError)):
        evaluator(blocks_of(1e38, 1e38))
    evaluator.tasks["a"].data.inputs["inputs"][5] = float("nan")
    with pytest.raises(TaskError, match="task 'a': the loss of sample 5 is not finite"):
        evaluator(blocks_of(0.4, 0.4))
    evaluator.tasks["a"].data.inputs["inputs"][5] = 0.0
    again = evaluator(blocks_of(0.5, 0.5)).scores
    assert np.array_equal(again["b"].losses.numerator, fine["b"].losses.numerator)


def test_what_the_objective_does_not_need_is_not_measured() -> None:
    scores = evaluator_of()(blocks_of(0.5, 0.5)).scores["a"]
    assert scores.soft is None and scores.tempered == {}
    scores = evaluator_of(temperatures=(0.5, 2.0))(blocks_of(0.5, 0.5)).scores["a"]
    assert list(scores.tempered) == [0.5, 2.0]
    assert scores.tempered[0.5].value != scores.tempered[2.0].value


def test_mean_losses_are_those_of_the_modules_given() -> None:
    tasks = {"a": task_of("a", 30), "b": task_of("b", 40)}
    modules = {"a": model_of(1.0, 0.0), "b": model_of(0.0, 1.0)}
    found = mean_losses(tasks, modules.__getitem__, ARCHITECTURE, CPU)
    for name, task in tasks.items():
        assert found[name] == pytest.approx(float(expected(modules[name], task)[0].mean()), rel=1e-5)


def test_tasks_share_a_batch_where_module_and_inputs_are_alike() -> None:
    """In the tasks' order; other widths, or heads of their own, are batches of their own."""
    tasks = {
        "a": task_of("a", 8),
        "wide": task_of("wide", 8, 7),
        "b": task_of("b", 9),
        "guard": task_of("guard", 5, reference="a"),
    }
    one, other = build(), build()
    found = tasks_by_form(lambda _: one, tasks)
    assert [(module is one, names) for module, names in found] == [(True, ["a", "b", "guard"]), (True, ["wide"])]
    modules = {"a": one, "b": other, "wide": one}
    apart = tasks_by_form(modules.__getitem__, tasks)
    assert [(module is one, names) for module, names in apart] == [
        (True, ["a", "guard"]),
        (True, ["wide"]),
        (False, ["b"]),
    ]

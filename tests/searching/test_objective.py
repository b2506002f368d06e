"""Objectives: closed forms, what they are undefined for, and that their gradients are those of the cost."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automerge.errors import SearchError
from automerge.searching.objective import (
    LARGEST_GAIN,
    SMALLEST_CP,
    Measure,
    Objective,
    TaskReference,
    harmonic_mean,
    loss_ratio,
)
from automerge.spec import TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.language_modelling import IGNORED, LanguageModelling
from automerge.tasks.task import TaskData


def measure(loss: float, top1: float = 0.9, soft: float | None = 0.8, calibrated: float | None = None) -> Measure:
    return Measure(loss=loss, metrics={"top1": top1}, soft=soft, calibrated=loss if calibrated is None else calibrated)


def objective(name: str, aggregate: str = "harmonic", **changes: object) -> Objective:
    reference = {"specialist": measure(0.2), "nothing": 1.6, "higher_is_better": {"top1": True}, "samples": 100}
    reference["stand_ins"] = {"top1": "soft"}
    return Objective.model_validate(
        {
            "name": name,
            "aggregate": aggregate,
            "tasks": {"low": {**reference, **changes}, "high": {**reference, "specialist": measure(0.4)}},
        }
    )


@pytest.mark.parametrize("name", ["loss_ratio", "gap", "metric", "soft_metric"])
def test_a_specialist_keeps_all_of_its_own_task(name: str) -> None:
    found = objective(name)
    kept = found.preservation({task: reference.specialist for task, reference in found.tasks.items()})
    assert kept == pytest.approx({"low": 1.0, "high": 1.0}, abs=0.006)  # 'metric' adds half a sample at the most
    assert found.value(kept) == pytest.approx(1.0, abs=0.006)


def test_closed_forms() -> None:
    measures = {"low": measure(0.8, top1=0.45, soft=0.4), "high": measure(0.4)}
    assert objective("loss_ratio").preservation(measures)["low"] == pytest.approx(0.25)
    # The excess loss is 0.6 of the 1.4 that the specialist is better than a guess.
    assert objective("gap").preservation(measures)["low"] == pytest.approx(1 / (1 + 0.6 / 1.4))
    assert objective("soft_metric").preservation(measures)["low"] == pytest.approx(0.5)
    assert objective("metric").preservation(measures)["low"] == pytest.approx(0.5, abs=0.005)


def test_the_harmonic_mean_s_cost_is_linear_in_the_losses() -> None:
    for name in ("loss_ratio", "gap"):
        found = objective(name)
        costs = [
            1 / found.value(found.preservation({"low": measure(loss), "high": measure(0.5)}))
            for loss in (0.3, 0.6, 0.9)
        ]
        assert costs[1] - costs[0] == pytest.approx(costs[2] - costs[1], rel=1e-9)


@given(st.floats(0.0, 0.99), st.floats(0.01, 5.0), st.floats(0.01, 5.0))
def test_what_a_sample_is_worth_is_more_than_any_loss(top1: float, one: float, other: float) -> None:
    """The calibrated loss settles ties, and nothing else."""
    found = objective("metric")
    worse = found.preservation({"low": measure(one, top1=top1), "high": measure(0.4)})["low"]
    better = found.preservation({"low": measure(other, top1=top1 + 0.01), "high": measure(0.4)})["low"]
    assert better > worse
    if one < other and top1 > 0:
        tied = found.preservation({"low": measure(other, top1=top1), "high": measure(0.4)})["low"]
        assert tied <= worse


def test_worst_is_the_worst_and_pareto_ranks_by_the_mean() -> None:
    cp = {"low": 0.5, "high": 1.0}
    assert objective("gap", "worst").value(cp) == 0.5
    assert (
        objective("gap", "pareto").value(cp) == objective("gap").value(cp) == harmonic_mean(cp) == pytest.approx(2 / 3)
    )


def test_ruin_and_gain_stay_finite() -> None:
    ruined = {"low": measure(50.0, top1=0.0, soft=0.0), "high": measure(0.4)}
    for name in ("loss_ratio", "gap", "metric", "soft_metric"):
        cp = objective(name).preservation(ruined)["low"]
        assert 0 < cp < 0.05 and math.isfinite(1 / cp)
    assert objective("soft_metric").preservation(ruined)["low"] == SMALLEST_CP
    # A weak specialist, far surpassed: its excess would be -3.
    gained = objective("gap", specialist=measure(1.5), nothing=1.6).preservation(
        {"low": measure(1.2), "high": measure(0.4)}
    )
    assert gained["low"] == 1 / (1 + LARGEST_GAIN)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("name", ["loss_ratio", "gap", "soft_metric", "metric"])
def test_a_bad_loss_is_refused(name: str, loss: float) -> None:
    with pytest.raises(SearchError, match="task 'low': the merged model's validation loss is"):
        objective(name).preservation({"low": measure(loss, calibrated=1.0), "high": measure(0.4)})


def test_a_loss_of_zero_needs_an_epsilon() -> None:
    with pytest.raises(SearchError, match=r"specialist's validation loss is 0, .*; set search.epsilon"):
        loss_ratio(0.0, 0.5, 0.0, "low")
    assert loss_ratio(0.0, 0.5, 0.1, "low") == pytest.approx(1 / 6)
    assert (
        objective("gap", specialist=measure(0.0)).preservation({"low": measure(0.0), "high": measure(0.4)})["low"] == 1
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gap", {"nothing": 0.1}, r"loss 0.2 is not below the reference loss 0.1, .*'gap' is undefined"),
        ("gap", {"nothing": None}, r"missing reference"),
        ("metric", {"higher_is_better": {}}, r"no better than a guess in any metric .*'metric' is undefined"),
        ("soft_metric", {"specialist": measure(0.2, soft=0.0)}, r"has nothing of 'top1' .*'soft_metric' is undefined"),
        ("loss_ratio", {"specialist": measure(0.0)}, r"set search.epsilon"),
    ],
)
def test_undefined_references_are_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SearchError, match=f"task 'low': .*{message}"):
        objective(name, **changes).check()


def test_what_stands_in_for_a_perplexity_is_the_loss() -> None:
    reference = {"specialist": Measure(loss=1.0, metrics={}, soft=0.5), "higher_is_better": {}}
    stand_ins = {"token_accuracy": "soft", "perplexity": "perplexity"}
    found = Objective(
        name="soft_metric", tasks={"t": TaskReference.model_validate({**reference, "stand_ins": stand_ins})}
    )
    kept = found.preservation({"t": Measure(loss=1.5, soft=0.4)})["t"]
    assert kept == pytest.approx((0.8 + math.exp(-0.5)) / 2)
    loss, soft = torch.tensor(1.5, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    cost = found.loss("t", loss, soft)
    assert cost.item() == pytest.approx(2 - kept)
    slopes = torch.autograd.grad(cost, [loss, soft])
    assert [slope.item() for slope in slopes] == pytest.approx([math.exp(-0.5) / 2, -1.0])


def test_a_lower_is_better_metric_enters_inverted() -> None:
    reference = {"specialist": Measure(loss=1.0, metrics={"perplexity": 2.0}, calibrated=1.0)}
    found = Objective(
        name="metric",
        tasks={
            "t": TaskReference.model_validate(
                {**reference, "higher_is_better": {"perplexity": False}, "samples": 10**6}
            )
        },
    )
    kept = found.preservation({"t": Measure(loss=2.0, metrics={"perplexity": 4.0}, calibrated=2.0)})
    assert kept["t"] == pytest.approx(0.5, abs=1e-5)
    assert found.validation_rates({"t": Measure(loss=2.0, metrics={"perplexity": 4.0})}) == {"t": 50.0}


# What tasks give


def classification() -> tuple[Classification, TaskData, torch.Tensor]:
    task = Classification(TaskSpec(name="low", kind="classification", guard=True, validation="v", test="t"))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5, generator=generator)
    data = TaskData({"inputs": logits}, {"labels": torch.randint(0, 5, (64,), generator=generator)})
    return task, data, logits


def test_soft_metric_and_temperatures_of_classification() -> None:
    task, data, logits = classification()
    scores = task.score(logits, data.targets, soft=True, temperatures=(0.5, 1.0, 4.0))
    expected = logits.softmax(1)[torch.arange(64), data.targets["labels"]].mean()
    assert scores.soft is not None and scores.soft.value == pytest.approx(float(expected), rel=1e-6)
    assert scores.tempered[1.0].value == scores.losses.value
    assert Measure.of(scores).calibrated == min(each.value for each in scores.tempered.values())
    part = scores.subset([3, 1])
    assert part.losses.numerator.tolist() == scores.losses.numerator[[3, 1]].tolist()
    assert part.soft is not None and len(part) == 2 and set(part.tempered) == {0.5, 1.0, 4.0}


def test_soft_metric_of_language_models_counts_tokens() -> None:
    task = LanguageModelling(TaskSpec(name="t", kind="language_modelling", guard=True, validation="v", test="t"))
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, IGNORED], [0, IGNORED, IGNORED, IGNORED], [6, 5, 4, 3]])
    scores = task.score(logits, {"labels": labels}, soft=True)
    kept = [logits.softmax(-1)[row, at, labels[row, at]] for row in range(3) for at in range(4) if labels[row, at] >= 0]
    assert scores.soft is not None and scores.soft.value == pytest.approx(float(torch.stack(kept).mean()), rel=1e-5)


def test_the_loss_of_a_guess_is_that_of_the_best_constant() -> None:
    task, data, _ = classification()
    shares = np.bincount(data.targets["labels"].numpy()) / 64
    constant = torch.from_numpy(np.log(shares)).float().expand(64, -1)
    guessed = task.score(constant, data.targets)
    assert task.guess_loss(data) == pytest.approx(guessed.mean_loss, rel=1e-6)


@pytest.mark.parametrize("name", ["loss_ratio", "gap", "soft_metric", "metric"])
def test_the_differentiable_loss_falls_where_preservation_rises(name: str) -> None:
    """Its value is 1 for the specialist, and its slope has the sign of the cost's."""
    found = objective(name)
    loss = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    soft = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    cost = found.loss("low", loss, soft)
    assert cost.item() == pytest.approx(1.0)
    slopes = torch.autograd.grad(cost, [loss, soft], allow_unused=True)
    assert [slope is not None for slope in slopes] == [name in ("loss_ratio", "gap"), name in ("soft_metric", "metric")]
    if slopes[0] is not None:
        step = 1e-6
        costs = [1 / found.preservation({"low": measure(0.2 + d), "high": measure(0.4)})["low"] for d in (-step, step)]
        assert float(slopes[0]) == pytest.approx((costs[1] - costs[0]) / (2 * step), rel=1e-4)

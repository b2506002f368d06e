"""PR, PD, their intervals and the gate, against the paper's tables and closed forms."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.preservation import (
    Interval,
    Measurement,
    MetricInfo,
    ModelResult,
    TaskInfo,
    TaskResult,
    check_gate,
    discrepancy,
    preservation,
    preservation_rate,
    shared_samples,
)
from automerge.spec import GateSpec


@dataclass
class Ratio:
    numerator: np.ndarray
    denominator: np.ndarray
    transform: str = "identity"


@dataclass
class Scores:
    losses: Ratio
    metrics: dict = field(default_factory=dict)


def _accuracy(correct, **others):
    """Scores of a model whose i-th sample is correct or not."""
    correct = np.asarray(correct, dtype=np.float64)
    ones = np.ones(len(correct))
    return Scores(Ratio(1 - correct, ones), {"top1": Ratio(correct, ones), **others})


def _info(name="t", reference="a", metrics=(("top1", True, 0.1),), guard=False):
    return TaskInfo(
        name=name,
        kind="classification",
        reference=reference,
        guard=guard,
        validation_samples=1,
        test_samples=1,
        metrics=[MetricInfo(name=n, higher_is_better=h, chance=c) for n, h, c in metrics],
    )


def _run(*measurements, roles=None, **options):
    roles = roles or {"merged": "merged", "a": "source", "b": "source"}
    return preservation(measurements, roles, **{"confidence": 0.95, "resamples": 500, "seed": 0, **options})


def _hits(n, share):
    return np.arange(n) < round(share * n)


def test_the_papers_own_tables():
    """CCT by Linear (arXiv 2601.22748): organism, inanimate, and the driving score."""

    def task(merged, specialist):
        return sum(preservation_rate(m, s, True) for m, s in zip(merged, specialist, strict=True)) / len(merged)

    organism = task((38.02, 66.73), (51.48, 78.54))
    inanimate = task((32.49, 56.88), (40.86, 66.53))
    assert round(organism, 2) == 79.41
    assert round(inanimate, 2) == 82.51
    assert round(discrepancy([organism, inanimate])[0], 2) == 3.10
    assert preservation_rate(59.73, 79.60, True) == pytest.approx(75.03, abs=0.01)


def test_a_lower_is_better_metric_inverts_the_ratio():
    assert preservation_rate(2.0, 1.0, higher_is_better=False) == 50.0
    assert preservation_rate(1.0, 2.0, higher_is_better=False) == 200.0
    assert preservation_rate(0.0, 2.0, higher_is_better=False) == math.inf
    assert preservation_rate(0.0, 0.0, higher_is_better=False) == 100.0
    assert preservation_rate(0.0, 2.0, higher_is_better=True) == 0.0


def test_discrepancy_of_three_tasks():
    assert discrepancy([90.0, 80.0, 95.0]) == (15.0, 10.0)
    assert discrepancy([90.0, 87.0]) == (3.0, 3.0)
    assert discrepancy([90.0]) == (None, None)


@given(st.lists(st.floats(0, 200), min_size=2, max_size=6))
def test_the_mean_pairwise_difference_is_never_above_pd(rates):
    pd, pairwise = discrepancy(rates)
    assert 0 <= pairwise <= pd + 1e-9


def test_rows():
    scores = {"merged": _accuracy(_hits(100, 0.6)), "a": _accuracy(_hits(100, 0.8)), "b": _accuracy(_hits(100, 0.2))}
    other = {"merged": _accuracy(_hits(50, 0.9)), "a": _accuracy(_hits(50, 0.3)), "b": _accuracy(_hits(50, 1.0))}
    found = _run(Measurement(_info("t"), scores), Measurement(_info("u", "b"), other))
    merged, first, second = found.models
    assert [row.name for row in found.models] == ["merged", "a", "b"]
    assert merged.tasks["t"].metrics["top1"].value == pytest.approx(0.6)
    assert merged.tasks["t"].loss == pytest.approx(0.4)
    assert merged.tasks["t"].pr.value == pytest.approx(75.0)
    assert merged.tasks["u"].metric_pr == {"top1": pytest.approx(90.0)}
    assert merged.mean_pr == pytest.approx(82.5)
    assert merged.worst_pr == pytest.approx(75.0)
    assert merged.pd == merged.pd_pairwise == pytest.approx(15.0)
    assert first.tasks["t"].pr == Interval(value=100.0, low=100.0, high=100.0)
    assert second.tasks["t"].pr.value == pytest.approx(25.0)
    assert found.warnings == []
    assert [metric.undefined for task in found.tasks for metric in task.metrics] == [None, None]


def test_the_interval_of_a_share_is_that_of_the_binomial():
    n, share = 400, 0.7
    row = _run(Measurement(_info(), {"a": _accuracy(_hits(n, share))}), roles={"a": "source"}, resamples=4000).models[0]
    interval = row.tasks["t"].metrics["top1"]
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert interval.low == pytest.approx(share - half, abs=0.006)
    assert interval.high == pytest.approx(share + half, abs=0.006)


def test_models_are_resampled_together():
    """A model that is right wherever the specialist is, and wrong on half the rest, varies far less than apart."""
    specialist, merged = _hits(400, 0.8), _hits(400, 0.76)
    row = _run(Measurement(_info(), {"a": _accuracy(specialist), "merged": _accuracy(merged)}), resamples=4000).models[
        0
    ]
    rate = 0.95
    # Given the specialist's hits, the merged model's are a binomial share of them.
    half = 196 * math.sqrt(rate * (1 - rate) / 320)
    assert row.tasks["t"].pr.low == pytest.approx(100 * rate - half, abs=0.4)
    assert row.tasks["t"].pr.high == pytest.approx(100 * rate + half, abs=0.4)


def test_perplexity_is_formed_from_the_sums_of_each_resample():
    tokens = np.array([1.0, 3.0, 6.0, 2.0])

    def scores(loss):
        return Scores(Ratio(loss * tokens, tokens), {"perplexity": Ratio(loss * tokens, tokens, "exp")})

    info = _info(metrics=[("perplexity", False, 50.0)])
    row = _run(Measurement(info, {"a": scores(1.0), "merged": scores(1.5)})).models[0]
    assert row.tasks["t"].metrics["perplexity"].value == pytest.approx(math.exp(1.5))
    pr = row.tasks["t"].pr
    for value in (pr.value, pr.low, pr.high):
        assert value == pytest.approx(100 * math.exp(-0.5))


def test_a_specialist_at_chance_leaves_the_metric_out_and_says_why():
    ones = np.ones(200)
    scores = {
        "a": _accuracy(_hits(200, 0.9), top5=Ratio(ones, ones)),
        "merged": _accuracy(_hits(200, 0.45), top5=Ratio(0.5 * ones, ones)),
    }
    info = _info(metrics=[("top1", True, 0.2), ("top5", True, 1.0)])
    found = _run(Measurement(info, scores))
    top1, top5 = found.tasks[0].metrics
    assert top1.undefined is None
    assert (
        "'a' reaches 1 (between 1 and 1), which is not clearly better than 1, the best constant guess" in top5.undefined
    )
    result = found.models[0].tasks["t"]
    assert result.metric_pr == {"top1": pytest.approx(50.0), "top5": None}
    assert result.pr.value == pytest.approx(50.0)


def test_better_than_chance_only_by_luck_is_not_clearly_better():
    found = _run(Measurement(_info(metrics=[("top1", True, 0.5)]), {"a": _accuracy(_hits(100, 0.55))}))
    assert found.tasks[0].metrics[0].undefined is not None
    lower = Scores(_accuracy([1]).losses, {"loss": Ratio(np.array([0.9, 1.3] * 20), np.ones(40))})
    found = _run(Measurement(_info(metrics=[("loss", False, 1.12)]), {"a": lower}))
    assert found.tasks[0].metrics[0].undefined is not None
    assert found.models[1].tasks["t"].pr is None
    assert found.models[1].mean_pr is None


def test_the_result_depends_on_the_seed_and_the_tasks_name_only():
    scores = {"a": _accuracy(_hits(60, 0.8)), "merged": _accuracy(_hits(60, 0.5))}
    alone = _run(Measurement(_info("t"), scores)).models[0].tasks["t"]
    beside = _run(Measurement(_info("u"), scores), Measurement(_info("t"), scores)).models[0].tasks["t"]
    assert alone == beside
    assert alone != _run(Measurement(_info("t"), scores), seed=1).models[0].tasks["t"]
    fewer = {"a": scores["a"], "merged": scores["merged"], "b": scores["a"]}
    assert _run(Measurement(_info("t"), fewer)).models[0].tasks["t"] == alone


def test_large_data_are_resampled_in_parts(monkeypatch):
    scores = {"a": _accuracy(_hits(60, 0.8)), "merged": _accuracy(_hits(60, 0.5))}
    whole = _run(Measurement(_info(), scores))
    monkeypatch.setattr("automerge.preservation._CHUNK_ELEMENTS", 700)
    assert _run(Measurement(_info(), scores)) == whole


def test_scores_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="different numbers of samples"):
        _run(Measurement(_info(), {"a": _accuracy(_hits(60, 0.8)), "merged": _accuracy(_hits(61, 0.5))}))


def test_a_model_that_was_not_measured_on_every_task_has_no_mean():
    both = {"a": _accuracy(_hits(60, 0.8)), "merged": _accuracy(_hits(60, 0.5))}
    found = _run(Measurement(_info("t"), both), Measurement(_info("u"), {"a": both["a"]}))
    assert found.models[0].tasks.keys() == {"t"}
    assert found.models[0].mean_pr is None
    assert found.models[0].pd is None
    assert found.models[1].mean_pr == 100.0


def test_a_specialist_that_is_not_clearly_better_than_another_source():
    scores = {"a": _accuracy(_hits(100, 0.8)), "b": _accuracy(_hits(100, 0.79))}
    (warning,) = _run(Measurement(_info(), scores)).warnings
    assert warning.startswith("task 't': its specialist 'a' (top1 0.8) is not clearly better than source 'b' (0.79)")
    assert _run(Measurement(_info(reference="a", guard=True), scores)).warnings == []
    assert _run(Measurement(_info(), {**scores, "b": _accuracy(_hits(100, 0.4))})).warnings == []
    (worse,) = _run(Measurement(_info(), {**scores, "b": _accuracy(_hits(100, 0.95))})).warnings
    assert "source 'b' (0.95)" in worse


def test_shared_samples_counts_test_samples():
    assert shared_samples(["x", "y"], ["y", "z", "y"]) == 2
    assert shared_samples([], ["y"]) == 0


def _row(**intervals):
    results = {
        name: TaskResult(loss=0.0, metrics={}, metric_pr={}, pr=pr and Interval(value=pr[1], low=pr[0], high=pr[2]))
        for name, pr in intervals.items()
    }
    rates = [pr[1] for pr in intervals.values() if pr]
    pd, pairwise = discrepancy(rates)
    return ModelResult(
        name="merged", role="merged", tasks=results, mean_pr=None, worst_pr=None, pd=pd, pd_pairwise=pairwise
    )


def test_the_gate():
    tasks = [_info("t"), _info("u")]
    row = _row(t=(88.0, 92.0, 95.0), u=(86.0, 93.0, 99.0))

    def verdict(gate, row=row, tasks=tasks):
        found = check_gate(gate, row, tasks)
        return found.verdict, " | ".join(found.reasons)

    assert verdict(GateSpec()) == ("pass", "no limits set")
    assert verdict(GateSpec(min_worst_pr=86.0))[0] == "pass"
    # The value of the other task is lower, but this interval reaches lowest.
    assert verdict(GateSpec(min_worst_pr=87)) == (
        "fail",
        "task 'u': the lower end of the preservation rate's interval is 86.00 %, below the limit of 87 %",
    )
    assert verdict(GateSpec(max_pd=1))[0] == "pass"
    state, reasons = verdict(GateSpec(max_pd=0.5, min_worst_pr=90))
    assert state == "fail"
    assert "below the limit of 90 %" in reasons
    assert "the preservation discrepancy is 1.00 points, above the limit of 0.5" in reasons


def test_a_gate_fails_where_it_cannot_be_judged():
    undefined = _info("u")
    metric = undefined.metrics[0].model_copy(update={"undefined": "at chance"})
    undefined = undefined.model_copy(update={"metrics": [metric]})
    row = _row(t=(88.0, 92.0, 95.0), u=None)
    for gate in (GateSpec(min_worst_pr=1), GateSpec(max_pd=99)):
        verdict = check_gate(gate, row, [_info("t"), undefined])
        assert verdict.verdict == "fail"
        assert verdict.reasons[0] == "task 'u': the preservation rate is undefined (top1: at chance)"
    missing = check_gate(GateSpec(min_worst_pr=1), _row(t=(88.0, 92.0, 95.0)), [_info("t"), _info("u")])
    assert missing.reasons[0] == "task 'u': the model was not measured on it"
    one = check_gate(GateSpec(max_pd=5), _row(t=(88.0, 92.0, 95.0)), [_info("t")])
    assert (one.verdict, one.reasons) == ("fail", ["the preservation discrepancy needs two tasks"])
    assert check_gate(GateSpec(), row, [_info("t"), undefined]).verdict == "pass"

"""Slices and races: even slices, a test that holds its level however it is asked, and nothing lost on the way."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from automerge.models.architecture import Architecture
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator
from automerge.searching.fidelity import (
    FEWEST,
    _Effect,
    _is_positive,
    _normal_value,
    _tuning,
    _without_skewness,
    cost_slopes,
    make_race,
    make_slices,
    stratified_order,
)
from automerge.searching.objective import Measure, Objective, TaskReference
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.task import Ratio, Scores, TaskData

SHARES = (0.125, 0.25, 0.5, 1.0)
CONFIDENCE = 0.9


def samples(count, labels=None):
    return TaskData(
        {"inputs": torch.arange(count)}, {} if labels is None else {"labels": torch.as_tensor(np.asarray(labels))}
    )


def losses(numerator, denominator=None):
    return Scores(Ratio(numerator, np.ones(len(numerator)) if denominator is None else denominator), {})


def of_rows(scores, rows):
    def pick(ratio):
        return Ratio(ratio.numerator[rows], ratio.denominator[rows], ratio.transform)

    return Scores(
        pick(scores.losses),
        {name: pick(ratio) for name, ratio in scores.metrics.items()},
        None if scores.soft is None else pick(scores.soft),
        {at: pick(ratio) for at, ratio in scores.tempered.items()},
    )


def objective(*tasks, name="loss_ratio", aggregate="harmonic", metrics=None):
    metrics = metrics or {"top1": True}
    reference = TaskReference(
        specialist=Measure(loss=0.4, soft=0.8, metrics={"top1": 0.9, "perplexity": 1.5}, calibrated=0.4),
        nothing=2.0,
        higher_is_better=metrics,
        stand_ins={metric: {"top1": "soft", "perplexity": "perplexity"}[metric] for metric in metrics},
        samples=100,
    )
    return Objective(name=name, aggregate=aggregate, tasks=dict.fromkeys(tasks or ("a",), reference))


def seen(race, trial, step):
    """The scores by the end of a step, in the order of measuring."""
    rows = {task: np.concatenate([race.rows(at)[task] for at in range(step + 1)]) for task in trial}
    return {task: of_rows(scores, rows[task]) for task, scores in trial.items()}


def stopped_at(race, trial):
    """After which step the trial is stopped; None if never."""
    return next((step for step in range(race.steps - 1) if race.is_hopeless(seen(race, trial, step))), None)


def cost(goal, scores):
    return 1 / goal.value(goal.preservation({task: Measure.of(each) for task, each in scores.items()}))


def same_total(trial, incumbent):
    return trial * (incumbent.sum() / trial.sum())


# Slices


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    key=st.integers(0, 2**64 - 1),
    shuffled=st.booleans(),
)
def test_every_prefix_has_each_label_in_its_share(counts, key, shuffled):
    labels = np.repeat(np.arange(len(counts)), counts)
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    order = stratified_order(samples(len(labels), labels), key)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(len(labels)))
    drawn = np.cumsum(labels[order][:, None] == np.arange(len(counts)), axis=0)
    expected = np.arange(1, len(labels) + 1)[:, None] * np.array(counts) / len(labels)
    # Van der Corput's order is off by up to 4.3 in an interval of 480 rows; shuffled neighbours add to it.
    assert np.abs(drawn - expected).max() < 6.5


def test_labels_are_drawn_far_more_evenly_than_at_random():
    generator = np.random.default_rng(0)
    deviations, at_random = [], []
    for key in range(100):
        labels = generator.integers(0, 10, 512)
        for order, found in (
            (stratified_order(samples(512, labels), key), deviations),
            (generator.permutation(512), at_random),
        ):
            found.append(np.bincount(labels[order[:64]], minlength=10) - np.bincount(labels, minlength=10) / 8)
    assert np.std(deviations) < 0.3 * np.std(at_random)


@pytest.mark.parametrize(
    "targets",
    [{}, {"labels": torch.zeros(400, 3, dtype=torch.int64)}, {"labels": torch.rand(400)}],
    ids=["none", "of tokens", "real"],
)
def test_without_labels_every_prefix_is_spread_over_the_data(targets):
    for key in range(50):
        order = stratified_order(TaskData({"inputs": torch.zeros(400)}, targets), key)
        drawn = np.cumsum((order // 40)[:, None] == np.arange(10), axis=0)
        assert np.abs(drawn - np.arange(1, 401)[:, None] / 10).max() < 4.5


@pytest.mark.parametrize("labels", [None, np.repeat([0, 1, 2], [45, 4, 1])], ids=["plain", "rare labels"])
def test_each_row_is_as_likely_as_any_other_in_a_prefix(labels):
    count, keys = 50, 4000
    for prefix in (6, 17):
        drawn = np.zeros(count)
        for key in range(keys):
            drawn[stratified_order(samples(count, labels), key * 0x9E3779B97F4A7C15 % 2**64)[:prefix]] += 1
        share = prefix / count
        assert np.abs(drawn / keys - share).max() < 4.5 * math.sqrt(share * (1 - share) / keys)


def test_an_alternating_pattern_is_not_met_by_the_order():
    """Rows are drawn in a regular pattern; were neighbours not shuffled, a slice could have one half of the pairs."""
    means = [(stratified_order(samples(512), key)[:64] % 2).mean() for key in range(300)]
    assert np.std(means) < 1.3 * math.sqrt(0.25 / 64)


def test_an_order_is_the_same_everywhere():
    """By the seed and the name of the task alone; pinned, since a resumed search must go on with it."""
    slices = make_slices({"a": samples(40, np.arange(40) % 3), "b": samples(40)}, SHARES, seed=3)
    again = make_slices({"b": samples(40), "a": samples(40, np.arange(40) % 3)}, SHARES, seed=3)
    assert all(np.array_equal(slices.orders[task], again.orders[task]) for task in "ab")
    assert slices.orders["a"][:8].tolist() == [10, 15, 23, 11, 18, 25, 19, 6]
    assert slices.orders["b"][:8].tolist() == [38, 30, 13, 7, 23, 0, 32, 18]
    other = make_slices({"a": samples(40, np.arange(40) % 3)}, SHARES, seed=4)
    assert not np.array_equal(slices.orders["a"], other.orders["a"])
    assert not np.array_equal(slices.orders["b"], make_slices({"c": samples(40)}, SHARES, seed=3).orders["c"])


@pytest.mark.parametrize(
    ("counts", "shares", "ends"),
    [
        ((512,), SHARES, [(64, 128, 256, 512)]),
        ((512,), (0.9, 1.0), [(461, 512)]),
        ((512,), (1.0,), [(512,)]),
        ((100,), SHARES, [(16, 50, 100)]),
        ((64,), SHARES, [(16, 32, 64)]),
        ((31,), SHARES, [(31,)]),
        ((1,), SHARES, [(1,)]),
        ((20, 512), SHARES, [(16, 17, 18, 20), (64, 128, 256, 512)]),
        ((5, 512), SHARES, [(3, 4, 5), (64, 128, 512)]),
        ((3, 512), SHARES, [(3,), (512,)]),
    ],
)
def test_small_data_have_fewer_slices(counts, shares, ends):
    data = {f"task {at}": samples(count) for at, count in enumerate(counts)}
    assert list(make_slices(data, shares, 0).ends.values()) == ends


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.001, 0.999), max_size=6, unique=True),
)
def test_steps_partition_the_rows(counts, shares):
    names = [f"task {at}" for at in range(len(counts))]
    slices = make_slices(
        {name: samples(count) for name, count in zip(names, counts, strict=True)}, [*sorted(shares), 1.0], 0
    )
    generator = np.random.default_rng(0)
    incumbent = {name: losses(generator.random(count)) for name, count in zip(names, counts, strict=True)}
    race = make_race(slices, objective(*names), incumbent, CONFIDENCE)
    steps = [race.rows(step) for step in range(race.steps)]
    for name, count in zip(names, counts, strict=True):
        assert all(type(row) is int for rows in steps for row in rows[name])
        assert all(rows[name] for rows in steps)
        assert sorted(row for rows in steps for row in rows[name]) == list(range(count))
        assert race.steps == 1 or len(steps[0][name]) >= min(FEWEST, count - race.steps + 1, 3)
    done = np.cumsum([sum(len(rows[name]) for name in names) for rows in steps])
    assert [race.share(step) for step in range(race.steps)] == pytest.approx(done / sum(counts))
    assert race.share(race.steps - 1) == 1


def test_what_the_incumbent_is_worst_at_comes_first():
    generator = np.random.default_rng(0)
    b = generator.permutation(np.arange(1.0, 513.0))
    slices = make_slices({"a": samples(512)}, SHARES, 0)
    race = make_race(slices, objective(), {"a": losses(b)}, CONFIDENCE)
    first = race.rows(0)["a"]
    assert set(first[:16]) == set(np.flatnonzero(b > 496).tolist())
    # The others stay in the order of the slices.
    assert first[16:] == [row for row in slices.orders["a"].tolist() if b[row] <= 496][:48]
    # Of a soft metric, the least sure.
    soft = Scores(Ratio(b, np.ones(512)), {}, Ratio(b / 512, np.ones(512)))
    race = make_race(slices, objective(name="soft_metric"), {"a": soft}, CONFIDENCE)
    assert set(race.rows(0)["a"][:16]) == set(np.flatnonzero(b <= 16).tolist())


def test_ties_leave_the_other_rows_random():
    """Among equals the first of the data are chosen: chosen by the order, wrong answers would be missing after them."""
    right = np.ones(512)
    right[np.random.default_rng(0).permutation(512)[:100]] = 0
    shares = []
    for seed in range(200):
        race = make_race(
            make_slices({"a": samples(512)}, SHARES, seed), objective(name="metric"), {"a": metric(right)}, CONFIDENCE
        )
        shares.append(right[race.rows(0)["a"][16:]].mean())
    assert np.mean(shares) == pytest.approx(412 / 496, abs=0.01)


def metric(right, name="top1"):
    ones = np.ones(len(right))
    return Scores(Ratio(ones, ones), {name: Ratio(right, ones)}, None, {1.0: Ratio(ones, ones)})


# Slopes and estimates


def test_slopes_are_those_of_the_cost():
    measures = {"a": Measure(loss=1.2, soft=0.5, metrics={"top1": 0.6, "perplexity": 3.0}, calibrated=0.4)}
    tie = 0.5 / 100
    for name, expected in {
        "loss_ratio": {"loss": 1 / 0.4},
        "gap": {"loss": 1 / (2.0 - 0.4)},
        "soft_metric": {"soft": -0.8 / 0.5**2},
        "metric": {"top1": -1 / 0.9 / (0.6 / 0.9 + tie) ** 2},
    }.items():
        assert cost_slopes(objective(name=name), measures)["a"] == pytest.approx(expected, rel=1e-4)
    metrics = {"top1": True, "perplexity": False}
    both = cost_slopes(objective(name="metric", metrics=metrics), measures)["a"]
    cp = (0.6 / 0.9 + 1.5 / 3.0) / 2 + tie
    assert both == pytest.approx({"top1": -0.5 / 0.9 / cp**2, "perplexity": 0.5 * 1.5 / 3.0**2 / cp**2}, rel=1e-4)
    both = cost_slopes(objective(name="soft_metric", metrics=metrics), measures)["a"]
    cp = (0.5 / 0.8 + math.exp(0.4 - 1.2)) / 2
    assert both == pytest.approx({"soft": -0.5 / 0.8 / cp**2, "loss": 0.5 * math.exp(0.4 - 1.2) / cp**2}, rel=1e-4)


def test_perplexity_is_linearised_in_its_mean_loss():
    ones = np.ones(200)
    b = np.random.default_rng(0).gamma(2.0, 0.5, 200)
    scores = Scores(Ratio(b, ones), {"perplexity": Ratio(b, ones, "exp")}, None, {1.0: Ratio(b, ones)})
    goal = objective(name="metric", metrics={"perplexity": False})
    race = make_race(make_slices({"a": samples(200)}, SHARES, 0), goal, {"a": scores}, CONFIDENCE)
    cp = 1.5 / math.exp(b.mean()) + goal.tasks["a"].samples ** -1 * 0.5 * 0.4 / (0.4 + b.mean() - 0.4)
    assert race.slopes["a"]["perplexity"] == pytest.approx(1.5 / math.exp(b.mean()) / cp**2, rel=1e-4)
    assert race.estimated_cp({"a": of_rows(scores, race.orders["a"])})["a"] == pytest.approx(cp, rel=1e-9)


@pytest.mark.parametrize("name", ["loss_ratio", "gap", "soft_metric"])
@pytest.mark.parametrize("aggregate", ["harmonic", "worst", "pareto"])
def test_on_all_samples_the_estimate_is_the_cost(name, aggregate):
    generator = np.random.default_rng(1)
    goal = objective("a", "b", name=name, aggregate=aggregate)

    def model(level):
        found = {}
        for task, count in (("a", 90), ("b", 300)):
            weights = generator.integers(1, 20, count).astype(float)
            found[task] = Scores(
                Ratio(weights * generator.gamma(2.0, level / 2, count), weights),
                {},
                Ratio(weights * generator.uniform(0, 0.9 - level / 2, count), weights),
            )
        return found

    good, bad = model(0.5), model(0.7)
    slices = make_slices({"a": samples(90), "b": samples(300)}, SHARES, 0)
    race = make_race(slices, goal, good, CONFIDENCE)
    assert race.estimate(seen(race, bad, race.steps - 1)) == pytest.approx(cost(goal, bad), rel=1e-9)
    # What is better is never told as better than the incumbent, unless it was measured.
    race = make_race(slices, goal, bad, CONFIDENCE)
    assert race.estimate(seen(race, good, race.steps - 1)) == pytest.approx(cost(goal, bad), rel=1e-12)


def test_a_difference_that_all_samples_share_is_estimated_exactly():
    """Per token: the ratio of sums, not the mean of ratios, and the incumbent's own level cancels."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 400, 300).astype(float)
    b = tokens * generator.gamma(2.0, 0.5, 300)
    goal = objective()
    race = make_race(make_slices({"a": samples(300)}, SHARES, 0), goal, {"a": losses(b, tokens)}, CONFIDENCE)
    trial = {"a": losses(b + 0.25 * tokens, tokens)}
    for step in range(race.steps):
        assert race.estimate(seen(race, trial, step)) == pytest.approx(cost(goal, trial), rel=1e-9)
    assert stopped_at(race, trial) == 0


def test_estimates_are_near_the_cost_without_bias():
    generator = np.random.default_rng(2)
    b = generator.lognormal(-1, 1, 512)
    trial = {"a": losses(b**0.8 * generator.lognormal(0.4, 0.5, 512))}
    goal = objective()
    estimates = []
    for seed in range(300):
        race = make_race(make_slices({"a": samples(512)}, SHARES, seed), goal, {"a": losses(b)}, CONFIDENCE)
        estimates.append(race.estimate(seen(race, trial, 0)))
    assert np.mean(estimates) == pytest.approx(cost(goal, trial), abs=4 * np.std(estimates) / math.sqrt(300))
    assert np.std(estimates) < 0.15 * cost(goal, trial)


def test_an_estimated_loss_stays_positive():
    """On the first slice the trial seems to gain more than there is to gain."""
    b = np.full(64, 0.1)
    goal = objective("a", "b")
    slices = make_slices({"a": samples(64), "b": samples(64)}, SHARES, 0)
    race = make_race(slices, goal, {"a": losses(b), "b": losses(b)}, CONFIDENCE)
    first = np.zeros(64)
    first[race.rows(0)["a"]] = 1
    uneven = make_race(slices, goal, {"a": losses(np.where(first == 1, 0.9, 1e-3)), "b": losses(b)}, CONFIDENCE)
    trial = {"a": losses(np.zeros(64)), "b": losses(np.full(64, 2.0))}
    assert math.isfinite(uneven.estimate(seen(uneven, trial, 0)))


# The test


@pytest.mark.parametrize("aggregate", ["harmonic", "worst", "pareto"])
def test_the_same_model_again_is_never_hopeless(aggregate):
    b = {task: losses(np.random.default_rng(0).lognormal(-1, 1.5, 400)) for task in "ab"}
    slices = make_slices({task: samples(400) for task in "ab"}, SHARES, 0)
    race = make_race(slices, objective(*"ab", aggregate=aggregate), b, CONFIDENCE)
    assert stopped_at(race, b) is None


def test_variances_and_covariances_are_as_claimed():
    """Over random orders: ratios of sums, drawn without replacement, have increments that are independent.

    With the variance of a sample with replacement the last would be twice as large; with the variance of the summed
    losses, instead of their residuals, four times.
    """
    generator = np.random.default_rng(5)
    count = 800
    tokens = np.maximum(1.0, np.round(generator.lognormal(3, 0.8, count)))
    b = tokens * generator.gamma(8.0, 0.1, count)
    trial = {"a": losses(b * generator.uniform(0.9, 1.7, count), tokens)}
    values, variances = [], []
    for seed in range(1200):
        race = make_race(make_slices({"a": samples(count)}, SHARES, seed), objective(), {"a": losses(b, tokens)}, 0.9)
        effects = [race._effect("a", seen(race, trial, step)["a"]) for step in range(3)]
        values.append([effect.value for effect in effects])
        variances.append([effect.variance for effect in effects])
    observed, claimed = np.cov(np.array(values).T), np.mean(variances, axis=0)
    # Claims are larger by three samples with the incumbent's spread.
    assert (np.diag(observed) < 1.05 * claimed).all()
    assert (np.diag(observed) > 0.75 * claimed).all()
    assert observed[0, 1] == pytest.approx(observed[1, 1], rel=0.15)
    assert observed[0, 2] == pytest.approx(observed[2, 2], rel=0.25)
    assert claimed[0] / claimed[2] == pytest.approx((1 / 84 - 1 / 784) / (1 / 384 - 1 / 784), rel=0.15)


def test_a_mean_has_the_variance_of_the_rows_that_are_drawn():
    """By hand, for losses of one part a sample: 4 of 64 rows are certain, 12 of the other 60 are drawn."""
    generator = np.random.default_rng(11)
    b, a = generator.gamma(2.0, 0.5, (2, 64))
    race = make_race(make_slices({"a": samples(64)}, SHARES, 0), objective(), {"a": losses(b)}, CONFIDENCE)
    order = np.concatenate([race.rows(step)["a"] for step in range(race.steps)])
    effect = race._effect("a", seen(race, {"a": losses(a)}, 0)["a"])
    drawn = (a - b)[order[4:16]] / 0.4
    spread = (60 / 64) ** 2 * (drawn.var(ddof=1) + 3 * (b[order[4:]] / 0.4).var(ddof=1) / 12)
    assert effect.value == pytest.approx(((a - b)[order[:4]].sum() / 0.4 + 60 * drawn.mean()) / 64)
    assert effect.variance == pytest.approx(spread * (1 / 12 - 1 / 60))
    assert effect.first == pytest.approx(effect.variance)
    assert effect.third == pytest.approx((60 / 64) ** 3 * ((drawn - drawn.mean()) ** 3).mean() / 12**2)
    later = race._effect("a", seen(race, {"a": losses(a)}, 1)["a"])
    assert later.first / later.variance == pytest.approx((1 / 12 - 1 / 60) / (1 / 28 - 1 / 60))


@pytest.mark.parametrize("level", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("time", [1.0, 7.0])
def test_the_boundary_is_where_the_mixture_of_likelihood_ratios_is_one_in_level(level, time):
    """Integrated numerically over the drifts, at the first slice of an eighth and at that of a half."""
    low, high = 0.0, 10.0
    while high - low > 1e-9:
        z = (low + high) / 2
        effect = _Effect(z / math.sqrt(time), 1 / time, 1.0, 1 / time, 0.0, 10**12)
        low, high = (low, z) if _is_positive([effect], 0.0, level) else (z, high)
    weights = stats.halfnorm(scale=math.sqrt(_tuning(level)))
    path = high * math.sqrt(time)
    mixture, _ = integrate.quad(lambda drift: weights.pdf(drift) * math.exp(drift * path - drift**2 * time / 2), 0, 30)
    assert mixture == pytest.approx(1 / level, rel=1e-5)
    assert high > stats.norm.isf(level)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.3])
def test_the_boundary_holds_however_often_it_is_asked(level):
    """Brownian motion, asked at 80 times over six orders of magnitude from the first look."""
    times = np.geomspace(1, 1e6, 80)
    steps = np.sqrt(np.diff(times, prepend=0))
    generator = np.random.default_rng(0)
    runs, crossed = 1500, 0
    for _ in range(runs):
        path = np.cumsum(steps * generator.standard_normal(80)) / times
        crossed += any(
            _is_positive([_Effect(value, 1 / time, 1.0, 1 / time, 0.0, 10**9)], 0.0, level)
            for value, time in zip(path, times, strict=True)
        )
    assert crossed / runs < level + 3 * math.sqrt(level * (1 - level) / runs)
    # It is no constant "no" either: the supremum is reached at most of the rate.
    assert crossed / runs > 0.4 * level


def test_few_samples_and_negative_skewness_need_more_evidence():
    clear = _Effect(value=3.0, variance=1.0, first=1.0, unlimited=1.2, third=0.0, freedom=10**6)
    assert _is_positive([clear], 0.0, 0.1)
    assert not _is_positive([replace(clear, freedom=3)], 0.0, 0.1)
    assert not _is_positive([replace(clear, third=-0.8)], 0.0, 0.1)
    assert _is_positive([replace(clear, third=0.8)], 0.0, 0.1)
    # What few samples add little of the variance matters little; so does a known offset, by its size.
    assert _is_positive([clear, replace(clear, value=0.0, variance=0.05, first=0.05, freedom=3)], 0.0, 0.1)
    assert not _is_positive([clear], -1.0, 0.1)
    assert not _is_positive([clear, replace(clear, value=-1.0)], 0.0, 0.1)
    # Without any spread the sign decides.
    sure = replace(clear, variance=0.0, first=0.0, unlimited=0.0)
    assert _is_positive([sure], 0.0, 0.1) and not _is_positive([sure], -3.0, 0.1)


def test_corrections_give_normal_values():
    """Wallace's against the tails themselves; Hall's on studentised means of 30 reflected exponential samples."""
    for freedom in (3, 10, 60):
        for t in (0.5, 1.5, 3.0, 5.0):
            assert _normal_value(t, freedom) == pytest.approx(stats.norm.isf(stats.t.sf(t, freedom)), rel=0.02)
            assert _normal_value(-t, freedom) == -_normal_value(t, freedom)
    x = 1 - np.random.default_rng(0).exponential(1, (40_000, 30))
    means, deviations = x.mean(axis=1), x.std(axis=1, ddof=1)
    t = means / (deviations / math.sqrt(30))
    moments = ((x - means[:, None]) ** 3).mean(axis=1) / x.std(axis=1) ** 3
    corrected = np.array(
        [_without_skewness(*pair) for pair in zip(t, np.minimum(0, moments) / math.sqrt(30), strict=True)]
    )
    assert (t > 1.645).mean() > 0.1
    assert 0.03 < (corrected > 1.645).mean() < 0.07


def nulls(generator, count):
    """Incumbent's and trial's losses, of equal sums: heavy tails, gains on a few samples, and samples unrelated."""
    b = generator.lognormal(-1, 1.5, count)
    noise = generator.lognormal(0, 0.3, count)
    solved = np.where(generator.random(count) < 0.05, 0.0, b)
    heavy = np.abs(generator.standard_t(2, count)) + 0.01
    even = generator.gamma(4.0, 0.25, count)

    def capped(share):
        found = np.minimum(b, np.quantile(b, share))
        return found + (b.mean() - found.mean())

    return {
        "near": (b, same_total(b * noise, b)),
        "slightly better": (b, 0.98 * same_total(b * noise, b)),
        "unrelated": (b, same_total(generator.permutation(b), b)),
        "less confident": (b, same_total(b**0.7 * noise, b)),
        "more confident": (b, same_total(b**1.3 * noise, b)),
        "a constant guess": (b, np.full(count, b.mean())),
        "the worst 3 % rescued": (b, capped(0.97)),
        "the worst 10 % rescued": (b, capped(0.9)),
        "any 5 % solved": (b, same_total(solved, b)),
        "any 10 % solved": (even, same_total(np.where(generator.random(count) < 0.1, 0.0, even), even)),
        "Student's t, two degrees": (heavy, same_total(np.abs(heavy + 0.3 * generator.standard_t(2, count)), heavy)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [33, 64, 128, 512, 2048])
def test_a_trial_that_is_no_worse_is_rarely_stopped(count):
    """Over all looks at most at the rate 1 - confidence; each null by itself, the hardest included."""
    generator = np.random.default_rng(count)
    runs = 100 if count > 1000 else 300
    stops = {}
    for seed in range(runs):
        slices = make_slices({"a": samples(count, generator.integers(0, 5, count))}, SHARES, seed)
        for name, (b, a) in nulls(generator, count).items():
            race = make_race(slices, objective(), {"a": losses(b)}, CONFIDENCE)
            stops[name] = stops.get(name, 0) + (stopped_at(race, {"a": losses(a)}) is not None)
    rates = {name: stop / runs for name, stop in stops.items()}
    limit = 0.1 + 2 * math.sqrt(0.1 * 0.9 / runs)
    assert all(rate <= limit for rate in rates.values()), rates
    # The level is an upper bound for all; typical trials stay far below it.
    assert np.mean(list(rates.values())) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(256, 256), (20, 512)], ids=str)
def test_what_one_task_loses_the_other_may_win_back(sizes):
    """Equal harmonic means, with a tenth moved from one task to the other."""
    generator = np.random.default_rng(3)
    goal = objective("a", "b")
    slices_of = {"a": sizes[0], "b": sizes[1]}
    runs, stops = 150, {}
    for seed in range(runs):
        slices = make_slices({task: samples(count) for task, count in slices_of.items()}, SHARES, seed)
        first, second = nulls(generator, sizes[0]), nulls(generator, sizes[1])
        for name in first:
            (b, a), (d, c) = first[name], second[name]
            race = make_race(slices, goal, {"a": losses(b), "b": losses(d)}, CONFIDENCE)
            moved = min(0.1 * b.mean(), 0.5 * c.mean())
            trial = {"a": losses(a + moved), "b": losses(c * (1 - moved / c.mean()))}
            stops[name] = stops.get(name, 0) + (stopped_at(race, trial) is not None)
    rates = {name: stop / runs for name, stop in stops.items()}
    assert all(rate <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / runs) for rate in rates.values()), rates


@pytest.mark.slow
@pytest.mark.parametrize("count", [64, 512])
def test_ratios_of_sums_hold_the_level(count):
    """Texts of very different lengths; in the last null the long ones gain what the short ones lose."""
    generator = np.random.default_rng(4)
    runs, stops = 300, {}
    for seed in range(runs):
        tokens = np.maximum(1.0, np.round(generator.lognormal(4, 1.2, count)))
        b = tokens * generator.gamma(4.0, 0.6, count)
        gained = np.where(tokens > np.quantile(tokens, 0.9), 0.8 * b, b)
        gained += (b.sum() - gained.sum()) / tokens.sum() * tokens
        race = make_race(
            make_slices({"a": samples(count)}, SHARES, seed), objective(), {"a": losses(b, tokens)}, CONFIDENCE
        )
        for name, a in {
            "near": same_total(b * generator.lognormal(0, 0.2, count), b),
            "unrelated": same_total(tokens * generator.gamma(4.0, 0.6, count), b),
            "long texts": gained,
        }.items():
            stops[name] = stops.get(name, 0) + (stopped_at(race, {"a": losses(a, tokens)}) is not None)
    rates = {name: stop / runs for name, stop in stops.items()}
    assert all(rate <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / runs) for rate in rates.values()), rates


@pytest.mark.parametrize("count", [64, 512])
def test_answers_that_change_both_ways_hold_the_level(count):
    generator = np.random.default_rng(6)
    runs, stops = 300, 0
    for seed in range(runs):
        right = (generator.random(count) < 0.8).astype(float)
        changed = max(1, count // 20)
        trial = right.copy()
        trial[generator.permutation(np.flatnonzero(right == 1))[:changed]] = 0
        trial[generator.permutation(np.flatnonzero(right == 0))[:changed]] = 1
        race = make_race(
            make_slices({"a": samples(count)}, SHARES, seed), objective(name="metric"), {"a": metric(right)}, CONFIDENCE
        )
        stops += stopped_at(race, {"a": metric(trial)}) is not None
    assert stops / runs <= 0.1


@pytest.mark.parametrize(
    ("count", "excess", "by_step", "power"),
    [(512, 1.0, 0, 0.95), (512, 0.5, 0, 0.9), (512, 0.25, 1, 0.85), (128, 0.5, 1, 0.75), (64, 0.5, 1, 0.9)],
)
def test_what_is_clearly_worse_is_stopped_early(count, excess, by_step, power):
    """Losses that follow the incumbent's with a noise of half a nat in the logarithm, and are larger by ``excess``."""
    generator = np.random.default_rng(7)
    runs, stops = 200, []
    for seed in range(runs):
        b = generator.lognormal(-1, 1.0, count)
        a = (1 + excess) * same_total(b * generator.lognormal(0, 0.5, count), b)
        race = make_race(make_slices({"a": samples(count)}, SHARES, seed), objective(), {"a": losses(b)}, CONFIDENCE)
        stops.append(stopped_at(race, {"a": losses(a)}))
    rate = sum(stop is not None and stop <= by_step for stop in stops) / runs
    assert rate >= power


@pytest.mark.parametrize("name", ["soft_metric", "metric"])
def test_lost_answers_are_noticed(name):
    generator = np.random.default_rng(8)
    stops = []
    for seed in range(100):
        ones = np.ones(512)
        p = generator.beta(6, 1.5, 512)
        q = p * np.where(generator.random(512) < 0.2, 0.1, 1.0)
        scores = {
            which: Scores(
                Ratio(-np.log(each), ones),
                {"top1": Ratio((each > 0.5).astype(float), ones)},
                Ratio(each, ones),
                {1.0: Ratio(-np.log(each), ones)},
            )
            for which, each in (("incumbent", p), ("trial", q))
        }
        slices = make_slices({"a": samples(512)}, SHARES, seed)
        race = make_race(slices, objective(name=name), {"a": scores["incumbent"]}, CONFIDENCE)
        assert (
            stopped_at(make_race(slices, race.objective, {"a": scores["trial"]}, 0.9), {"a": scores["incumbent"]})
            is None
        )
        stops.append(stopped_at(race, {"a": scores["trial"]}))
    assert sum(stop is not None and stop <= 1 for stop in stops) >= 90


def aggregates(trial, incumbent):
    """By aggregate: whether the trial is stopped."""
    generator = np.random.default_rng(9)
    noise = {task: generator.lognormal(0, 0.2, 512) for task in "ab"}
    slices = make_slices({task: samples(512) for task in "ab"}, SHARES, 0)

    def model(levels):
        return {
            task: losses(level * noise[task] / noise[task].mean()) for task, level in zip("ab", levels, strict=True)
        }

    return {
        aggregate: stopped_at(
            make_race(slices, objective(*"ab", aggregate=aggregate), model(incumbent), 0.9), model(trial)
        )
        is not None
        for aggregate in ("harmonic", "worst", "pareto")
    }


def test_worse_means_what_the_aggregate_says():
    """Losses by task; both specialists have the same."""
    assert aggregates((1.5, 1.5), (1.0, 1.0)) == {"harmonic": True, "worst": True, "pareto": True}
    # A trade: lost in the mean and in the worst, yet a point of the front.
    assert aggregates((0.9, 1.5), (1.0, 1.0)) == {"harmonic": True, "worst": True, "pareto": False}
    # Won in the mean.
    assert aggregates((0.5, 1.2), (1.0, 1.0)) == {"harmonic": False, "worst": True, "pareto": False}
    # The task that is worse is far from being the worst.
    assert aggregates((0.9, 1.8), (0.5, 2.0)) == {"harmonic": True, "worst": False, "pareto": False}
    # It becomes the worst.
    assert aggregates((2.5, 1.5), (0.5, 2.0)) == {"harmonic": True, "worst": True, "pareto": False}


def test_each_task_may_be_the_one_that_stops_so_each_needs_more_evidence():
    """Of two tasks at half the level: else twice as many trials would be stopped falsely."""
    generator = np.random.default_rng(10)
    b = generator.lognormal(-1, 0.5, 512)
    noise = generator.lognormal(0, 0.5, 512)
    noise *= b.sum() / (b * noise).sum()

    def needed(tasks):
        slices = make_slices({task: samples(512) for task in tasks}, SHARES, 0)
        goal = objective(*tasks, aggregate="worst")
        race = make_race(slices, goal, {task: losses(b) for task in tasks}, CONFIDENCE)
        for excess in np.arange(0.0, 1.0, 0.002):
            trial = {task: losses(b) for task in tasks} | {"a": losses((1 + excess) * b * noise)}
            if race.is_hopeless(seen(race, trial, 0)):
                return excess
        raise AssertionError("never stopped")

    assert needed("a") < needed("ab")


def test_a_metric_that_no_sample_counts_for_yet_stops_nothing():
    ones = np.ones(512)
    slices = make_slices({"a": samples(512)}, SHARES, 0)

    def model(right, counted):
        return {"a": Scores(Ratio(ones, ones), {"top1": Ratio(right, counted)}, None, {1.0: Ratio(ones, ones)})}

    goal = objective(name="metric")
    incumbent = model(ones, ones)
    race = make_race(slices, goal, incumbent, CONFIDENCE)
    nothing = np.zeros(512)
    assert not race.is_hopeless(seen(race, model(nothing, nothing), 0))
    assert race.estimate(seen(race, model(nothing, nothing), 0)) == cost(goal, incumbent)
    assert race.is_hopeless(seen(race, model(nothing, ones), 0))


def test_the_largest_and_smallest_losses_are_no_trouble():
    b = np.random.default_rng(0).lognormal(-1, 1, 256)
    race = make_race(make_slices({"a": samples(256)}, SHARES, 0), objective(), {"a": losses(b)}, CONFIDENCE)
    for scale in (1e-38, 1e8, 1e38):
        assert race.is_hopeless(seen(race, {"a": losses(b + scale)}, 0)) == (scale > 1)


# What goes to a worker and comes back


def test_a_race_goes_to_another_process():
    generator = np.random.default_rng(0)
    b = {task: losses(generator.lognormal(-1, 1, 200)) for task in "ab"}
    slices = make_slices({task: samples(200) for task in "ab"}, SHARES, 0)
    race = make_race(slices, objective(*"ab"), b, CONFIDENCE)
    copy = pickle.loads(pickle.dumps(race))
    assert copy.steps == race.steps
    for factor in (0.9, 1.02, 1.05, 1.1, 1.5):
        trial = {
            task: losses(factor * each.losses.numerator * generator.lognormal(0, 0.2, 200)) for task, each in b.items()
        }
        for step in range(race.steps - 1):
            scores = seen(race, trial, step)
            assert copy.rows(step) == race.rows(step)
            assert copy.is_hopeless(scores) == race.is_hopeless(scores)
            assert copy.estimate(scores) == race.estimate(scores)


class Table(nn.Module):
    """Logits that a row has whatever its batch, so that scores can be compared bit by bit."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, inputs):
        return self.logits[inputs]


class Plain(Architecture):
    def build(self, reference, arguments):
        raise NotImplementedError


class Evaluator(RecipeEvaluator):
    """Has its model already."""

    def merge(self, blocks):
        pass


class Heads:
    def __init__(self, logits):
        self.logits = logits

    def module(self, reference):
        return Table(self.logits[reference])


def evaluator(logits, labels):
    tasks = {
        name: MeasuredTask(
            Classification(
                TaskSpec(
                    name=name,
                    kind="classification",
                    specialist=name,
                    metrics=["top1", "top5"],
                    validation="v",
                    test="t",
                )
            ),
            name,
            TaskData({"inputs": torch.arange(len(each))}, {"labels": each}),
            13,
        )
        for name, each in labels.items()
    }
    return Evaluator(
        None,
        None,
        Heads(logits),
        Plain(ModelSpec(kind="factory", target="nowhere:build"), {}),
        tasks,
        torch.device("cpu"),
        soft=True,
        temperatures=(0.5, 2.0),
    )


def everything(scores):
    ratios = [scores.losses, *scores.metrics.values(), scores.soft, *scores.tempered.values()]
    assert len(ratios) == 6 and list(scores.tempered) == [0.5, 2.0]
    return [column for ratio in ratios for column in (ratio.numerator, ratio.denominator)]


def test_a_trial_that_is_measured_to_the_end_has_the_scores_of_a_direct_measurement():
    generator = torch.Generator().manual_seed(0)
    labels = {name: torch.randint(0, 8, (count,), generator=generator) for name, count in (("a", 100), ("b", 333))}
    right = {name: nn.functional.one_hot(each, 8).float() for name, each in labels.items()}
    noise = {name: torch.randn(each.shape, generator=generator) for name, each in right.items()}

    def model(sure):
        return evaluator({name: sure * right[name] + noise[name] for name in right}, labels)

    good, bad = model(3.0), model(0.0)
    direct = good([])
    slices = make_slices({name: each.data for name, each in good.tasks.items()}, SHARES, 0)
    race = make_race(slices, objective("a", "b"), direct.scores, CONFIDENCE)
    outcome = good([], race)
    assert outcome.samples == 433 and outcome.fidelity == 1
    for name in labels:
        for found, wanted in zip(everything(outcome.scores[name]), everything(direct.scores[name]), strict=True):
            assert np.array_equal(found, wanted)
    stopped = bad([], race)
    assert stopped.samples == sum(len(rows) for rows in race.rows(0).values())
    assert stopped.fidelity == stopped.samples / 433
    rows = race.rows(0)
    for name, each in bad.measure(rows).scores.items():
        assert np.array_equal(each.losses.numerator, stopped.scores[name].losses.numerator)
    assert race.estimate(stopped.scores) == pytest.approx(cost(race.objective, bad([]).scores), rel=0.2)


def test_scores_of_other_rows_are_refused():
    b = {task: losses(np.arange(1.0, 201.0)) for task in "ab"}
    slices = make_slices({task: samples(200) for task in "ab"}, SHARES, 0)
    race = make_race(slices, objective(*"ab"), b, CONFIDENCE)
    first, second = seen(race, b, 0), seen(race, b, 1)
    with pytest.raises(ValueError, match="not measured on all"):
        race.restored(second)
    for call in (race.is_hopeless, race.estimate, race.estimated_cp, race.restored):
        with pytest.raises(ValueError, match="not those of all steps"):
            call({"a": first["a"], "b": second["b"]})

"""How well an objective ranked the recipes: by hand where it can be counted, and silent where it says nothing."""

import math
from collections.abc import Mapping, Sequence

import pytest

from automerge.report.alignment import GOOD, LEAST_TRIALS, Alignment, alignment
from automerge.searching.trial import Status, Trial

TEN = list(range(1, 11))


def trial(objective: float | None, rates: Mapping[str, float], status: Status = "ok") -> Trial:
    return Trial(
        number=0,
        origin="sobol",
        status=status,
        cost=1.0,
        objective=objective,
        rates=dict(rates),
        seconds=0.0,
        optimiser_seconds=0.0,
    )


def trials(objectives: Sequence[float], left: Sequence[float], right: Sequence[float]) -> list[Trial]:
    return [
        trial(objective, {"left": one, "right": other})
        for objective, one, other in zip(objectives, left, right, strict=True)
    ]


def spearman(distances: float, count: int) -> float:
    """Spearman's own formula, for ranks without ties: 1 - 6 sum(d^2) / (n (n^2 - 1))."""
    return 1 - 6 * distances / (count * (count**2 - 1))


def test_ranks_that_are_counted_by_hand() -> None:
    """By the mean, the first two change places (1 + 1); by the worst, the first and the last (81 + 81)."""
    worst = [10, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    means = [20, 10, 30, 40, 50, 60, 70, 80, 90, 100]
    found = alignment(trials(TEN, worst, [2 * mean - low for mean, low in zip(means, worst, strict=True)]))
    assert found is not None
    assert found.mean == pytest.approx(spearman(2, 10))
    assert found.worst == pytest.approx(spearman(162, 10))
    assert found.trials == 10
    # The scale of the objective means nothing to ranks.
    scaled = alignment(
        trials([math.exp(each) for each in TEN], worst, [2 * m - low for m, low in zip(means, worst, strict=True)])
    )
    assert scaled == found


def test_equal_values_share_their_rank() -> None:
    """Nine trials at 50 and one at 60, which the objective put last but one, or at the end of the order.

    The tied ranks are 5 each, the other 10. With ranks r and their mean 5.5, Pearson's coefficient is
    sum((r_x - 5.5) (r_y - 5.5)) / sqrt(82.5 * (9 * 0.25 + 20.25)), of which the sum is 5 (r_x of the one - 5.5).
    """
    for place, expected in ((9, 5 * 4.5), (8, 5 * 3.5), (0, 5 * -4.5)):
        rates = [60.0 if index == place else 50.0 for index in range(10)]
        found = alignment(trials(TEN, rates, rates))
        assert found is not None
        assert found.mean == found.worst == pytest.approx(expected / math.sqrt(82.5 * 22.5))


def test_the_order_turned_round_is_minus_one_and_warned_of() -> None:
    found = alignment(trials(TEN, [100 - each for each in TEN], [100 - each for each in TEN]))
    assert found is not None
    assert (found.mean, found.worst) == (pytest.approx(-1), pytest.approx(-1))
    assert found.warning == (
        "the objective ranked the 10 recipes of the search poorly by what they keep (rank correlation -1.00 with the "
        "mean and -1.00 with the worst preservation rate on validation data), so another search.objective may find a "
        "better one"
    )


@pytest.mark.parametrize(
    ("mean", "worst", "warned"),
    [(1.0, 1.0, False), (GOOD, GOOD, False), (GOOD - 1e-6, 1.0, True), (1.0, GOOD - 1e-6, True)],
)
def test_it_warns_below_the_limit_by_the_mean_or_by_the_worst(mean: float, worst: float, warned: bool) -> None:
    assert (Alignment(mean, worst, 30).warning is not None) == warned


def test_the_worst_task_is_the_worst_of_each_trial() -> None:
    """Two tasks pull in opposite directions: their mean says nothing, and the worst rises to the middle and falls."""
    objectives = [1, 3, 5, 7, 9, 10, 8, 6, 4, 2]
    left = [10.0 * each for each in TEN]
    found = alignment(trials(objectives, left, [110.0 - each for each in left]))
    assert found is None, "all means are equal"
    right = [110.5 - each for each in left[:5]] + [110.0 - each for each in left[5:]]
    found = alignment(trials(objectives, left, right))
    assert found is not None
    assert found.worst > 0.95 > 0.2 > abs(found.mean)


def test_too_few_trials_say_nothing() -> None:
    rates = [float(each) for each in TEN]
    assert alignment(trials(TEN, rates, rates)[: LEAST_TRIALS - 1]) is None
    assert alignment(trials(TEN, rates, rates)[:LEAST_TRIALS]) is not None
    assert alignment([]) is None


@pytest.mark.parametrize(
    "other",
    [
        trial(None, {}, "failed"),
        trial(0.0, {"left": 100.0, "right": 100.0}, "cached"),
        trial(0.0, {"left": 100.0, "right": 100.0}, "stopped"),
        trial(0.0, {}, "ok"),
    ],
    ids=["failed", "cached", "stopped", "without a metric that is defined"],
)
def test_only_trials_that_were_measured_whole_count(other: Trial) -> None:
    rates = [float(each) for each in TEN]
    whole = trials(TEN, rates, rates)
    assert alignment([*whole, other, other]) == Alignment(pytest.approx(1.0), pytest.approx(1.0), 10)  # type: ignore[arg-type]
    assert alignment([*whole[:9], other, other, other]) is None


@pytest.mark.parametrize("alike", ["objective", "rates"])
def test_what_does_not_differ_has_no_rank(alike: str) -> None:
    rates = [50.0] * 10 if alike == "rates" else [float(each) for each in TEN]
    assert alignment(trials([1.0] * 10 if alike == "objective" else TEN, rates, rates)) is None

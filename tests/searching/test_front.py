"""The Pareto front: against its definition, and what it does with equals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.errors import SearchError
from automerge.searching.front import pareto_front

LEVELS = st.sampled_from([0.1, 0.2, 0.4, 0.8, 1.0])
"""Few values, so that ties and repetitions are frequent."""


@st.composite
def trials(draw: st.DrawFn) -> list[dict[str, float]]:
    tasks = [f"t{index}" for index in range(draw(st.integers(1, 4)))]
    return draw(st.lists(st.fixed_dictionaries(dict.fromkeys(tasks, LEVELS)), max_size=12))


def dominates(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(one[task] >= other[task] for task in one) and any(one[task] > other[task] for task in one)


@given(trials())
def test_it_holds_the_first_of_each_that_nothing_dominates(cp: list[dict[str, float]]) -> None:
    expected = [
        index
        for index, each in enumerate(cp)
        if not any(dominates(other, each) for other in cp) and each not in cp[:index]
    ]
    expected.sort(key=lambda index: [-cp[index][task] for task in cp[0]])
    assert pareto_front(cp) == expected


@given(trials())
def test_every_other_trial_is_matched_by_one_on_it(cp: list[dict[str, float]]) -> None:
    front = [cp[index] for index in pareto_front(cp)]
    assert all(any(each == other or dominates(other, each) for other in front) for each in cp)


def test_the_best_of_the_first_task_comes_first() -> None:
    cp = [
        {"low": 0.5, "high": 0.9},
        {"low": 0.9, "high": 0.2},
        {"low": 0.8, "high": 0.2},  # beaten by 1
        {"low": 0.7, "high": 0.6},
        {"low": 0.7, "high": 0.6},  # the same as 3
        {"low": 0.5, "high": 0.3},  # beaten by 0 with a tie in low
    ]
    assert pareto_front(cp) == [1, 3, 0]


def test_of_one_task_the_best_is_the_front() -> None:
    assert pareto_front([{"only": 0.3}, {"only": 0.7}, {"only": 0.7}]) == [1]


def test_the_order_of_a_trials_tasks_does_not_matter() -> None:
    assert pareto_front([{"low": 0.1, "high": 0.9}, {"high": 0.1, "low": 0.9}]) == [1, 0]


def test_of_no_trials_it_is_empty() -> None:
    assert pareto_front([]) == []


def test_trials_of_different_tasks_are_refused() -> None:
    with pytest.raises(SearchError, match=r"trial 1 of the front has the tasks \['low'\], the first \['high', 'low'\]"):
        pareto_front([{"low": 0.1, "high": 0.2}, {"low": 0.3}])


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(SearchError, match="no number"):
        pareto_front([{"low": 0.1}, {"low": float("nan")}])

"""CP and H: the arithmetic of the objective."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.errors import SearchError
from automerge.searching.objective import harmonic_mean, loss_ratio
from automerge.searching.trial import Trial

LOSSES = st.floats(1e-6, 1e6)


def test_cp_is_the_ratio_of_the_losses() -> None:
    assert loss_ratio(0.2, 0.8, 0.0, "low") == 0.25
    assert loss_ratio(0.8, 0.2, 0.0, "low") == 4.0
    assert loss_ratio(0.2, 0.8, 0.2, "low") == pytest.approx(0.4)


def test_h_is_the_harmonic_mean() -> None:
    """By hand: 3 / (1/0.5 + 1/1 + 1/0.25) = 3/7."""
    assert harmonic_mean({"a": 0.5, "b": 1.0, "c": 0.25}) == pytest.approx(3 / 7)
    assert harmonic_mean({"a": 0.3}) == pytest.approx(0.3)


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=6))
def test_one_over_h_is_the_mean_relative_loss(losses: list[tuple[float, float]]) -> None:
    """What an optimiser minimises is linear in the merged model's losses."""
    cp = {str(index): loss_ratio(own, merged, 0.0, "t") for index, (own, merged) in enumerate(losses)}
    mean = sum(merged / own for own, merged in losses) / len(losses)
    assert 1 / harmonic_mean(cp) == pytest.approx(mean, rel=1e-12)
    assert min(cp.values()) * (1 - 1e-12) <= harmonic_mean(cp) <= max(cp.values()) * (1 + 1e-12)


@given(own=LOSSES, first=LOSSES, second=LOSSES, epsilon=st.floats(0, 1))
def test_a_smaller_loss_is_never_a_smaller_cp(own: float, first: float, second: float, epsilon: float) -> None:
    low, high = sorted((first, second))
    assert loss_ratio(own, low, epsilon, "t") >= loss_ratio(own, high, epsilon, "t")


@given(loss=st.floats(0, 1e6), epsilon=st.floats(1e-9, 1))
def test_the_specialist_itself_has_cp_one(loss: float, epsilon: float) -> None:
    assert loss_ratio(loss, loss, epsilon, "t") == 1.0


def test_epsilon_keeps_zero_losses_defined() -> None:
    assert loss_ratio(0.0, 0.999, 0.001, "t") == pytest.approx(0.001)
    assert loss_ratio(0.999, 0.0, 0.001, "t") == pytest.approx(1000)
    assert loss_ratio(0.0, 0.0, 0.001, "t") == 1.0


@pytest.mark.parametrize(("own", "merged", "who"), [(0.0, 0.5, "specialist's"), (0.5, 0.0, "merged model's")])
def test_a_zero_loss_without_epsilon_is_refused(own: float, merged: float, who: str) -> None:
    with pytest.raises(SearchError, match=rf"task 'low': the {who} validation loss is 0.*search\.epsilon"):
        loss_ratio(own, merged, 0.0, "low")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -0.1])
def test_losses_that_are_none_are_refused(loss: float) -> None:
    for own, merged in ((loss, 0.5), (0.5, loss)):
        with pytest.raises(SearchError, match=r"task 'low': .* validation loss is .*; check the data and the loss"):
            loss_ratio(own, merged, 0.001, "low")


def test_a_trial_is_written_and_read_to_the_last_bit() -> None:
    trial = Trial(
        number=3,
        origin="surrogate",
        config={"b0/technique": "ties", "b0/weight/low": 0.1 + 0.2, "b0/rank": 3, "b0/centre": True},
        status="ok",
        cost=1 / 3,
        objective=3.0,
        losses={"low": 5e-324},
        cp={"low": 1 / 7},
        seconds=0.25,
        optimiser_seconds=0.0625,
    )
    again = Trial.model_validate_json(trial.model_dump_json())
    assert again == trial
    assert [type(value) for value in again.config.values()] == [str, float, int, bool]

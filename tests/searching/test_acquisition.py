"""The acquisition function: it is SMAC's log expected improvement to the last bit."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from smac.acquisition.function import EI

from automerge.searching.acquisition import LogExpectedImprovement

Array = NDArray[np.float64]


class Predictions:
    """A surrogate that predicts what it was given."""

    def __init__(self, mean: Array, variance: Array) -> None:
        self.mean, self.variance = mean, variance

    def predict_marginalized(self, points: Array) -> tuple[Array, Array]:
        return self.mean.copy(), self.variance.copy()


def values(acquisition: Any, mean: Array, variance: Array, eta: float) -> Array:
    acquisition.update(model=Predictions(mean, variance), eta=eta)
    found: Array = acquisition._compute(np.zeros((len(mean), 1)))
    return found


@pytest.mark.parametrize("eta", [-7.0, -0.3, 2.0])
def test_it_is_smacs_bit_by_bit(eta: float) -> None:
    """Also where the surrogate is certain."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(-1, 2, 5000), rng.exponential(1, 5000) * rng.integers(0, 2, 5000)
    ours = values(LogExpectedImprovement(), mean, variance, eta)
    assert np.array_equal(ours, values(EI(log=True), mean, variance, eta))
    assert ours.shape == (5000, 1)
    assert (ours == 0).any() and (ours > 0).any()


def test_what_rounding_leaves_below_zero_is_zero() -> None:
    """Where SMAC's raises an error, and a search would end: the trees differ by a rounding."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(1, 5e-15, 1000), np.full(1000, 1e-30)
    with pytest.raises(ValueError, match="smaller than 0"):
        values(EI(log=True), mean, variance, 1.0)
    assert values(LogExpectedImprovement(), mean, variance, 1.0).min() == 0.0

"""The surrogate: it is SMAC's forest to the last bit."""

import numpy as np
import pytest
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace, EqualsCondition, Float, InCondition, Integer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from smac.model.random_forest import RandomForest

from automerge.searching.surrogate import MAX_LEAVES, TREES, Forest

Array = NDArray[np.float64]


def make_space() -> ConfigurationSpace:
    """Every kind of hyperparameter, each also under a condition."""
    space = ConfigurationSpace(seed=0)
    kind = CategoricalHyperparameter("kind", ["a", "b", "c"])
    sub = CategoricalHyperparameter("sub", ["x", "y"])
    density, rank = Float("density", (0.2, 1.0)), Integer("rank", (1, 9))
    space.add(kind, sub, density, rank, Float("weight", (-0.5, 1.5)), Integer("steps", (0, 3)))
    space.add(EqualsCondition(sub, kind, "a"), EqualsCondition(density, kind, "b"), InCondition(rank, kind, ["a", "c"]))
    return space


def theirs(space: ConfigurationSpace, seed: int) -> RandomForest:
    """SMAC's, with the settings of its facade, and as many leaves as ours."""
    return RandomForest(
        space,
        log_y=True,
        n_trees=TREES,
        ratio_features=1.0,
        min_samples_split=2,
        min_samples_leaf=1,
        max_leaf_nodes=MAX_LEAVES,
        n_jobs=1,
        seed=seed,
    )


def encoded(space: ConfigurationSpace, count: int) -> Array:
    return np.array([config.get_array() for config in space.sample_configuration(count)])


def nearly_equal_costs(rng: np.random.Generator, count: int) -> Array:
    """Costs that differ by less than what a split must gain: a tree is one leaf that holds all of them."""
    return np.log(0.3 + 1e-6 * rng.random((count, 1)))


@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 60), levels=st.sampled_from([0, 1, 2, 5, 1000]))
@settings(max_examples=30, deadline=None)
def test_its_predictions_are_smacs_bit_by_bit(seed: int, count: int, levels: int) -> None:
    """With few levels of cost, leaves hold many points: more than NumPy adds one after the other."""
    space = make_space()
    space.seed(seed)
    rng = np.random.default_rng(seed)
    points = encoded(space, count + 50)
    costs = np.log(rng.integers(1, levels + 1, (count, 1)) / levels) if levels else nearly_equal_costs(rng, count)
    ours, reference = Forest(space, seed % 1000), theirs(space, seed % 1000)
    for model in (ours, reference):
        model.train(points[:count].copy(), costs.copy())
    for mine, other in zip(ours.predict_marginalized(points), reference.predict_marginalized(points), strict=True):
        assert np.array_equal(mine, other)
    for mine, other in zip(ours._rf, reference._rf.estimators_, strict=True):
        assert np.array_equal(mine.value, other.tree_.value)


def test_a_leaf_of_many_points_is_among_what_is_compared() -> None:
    space = make_space()
    model = Forest(space, 0).train(encoded(space, 60), nearly_equal_costs(np.random.default_rng(0), 60))
    assert [tree.node_count for tree in model._rf] == [1] * TREES


def test_predicting_leaves_the_points_as_they_are() -> None:
    space = make_space()
    points = encoded(space, 20)
    before = points.copy()
    model = Forest(space, 0).train(points, np.zeros((20, 1)))
    model.predict_marginalized(points)
    assert np.array_equal(points, before, equal_nan=True) and np.isnan(points).any()


def test_points_of_another_width_are_refused() -> None:
    space = make_space()
    model = Forest(space, 0).train(np.zeros((4, 6)), np.arange(4.0)[:, np.newaxis])
    with pytest.raises(ValueError, match="mismatch"):
        model.predict_marginalized(np.zeros((1, 5)))

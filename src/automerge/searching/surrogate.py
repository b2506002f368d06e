"""The surrogate: SMAC's random forest, with the same trees and predictions to the last bit, at less cost a call.

SMAC (Lindauer et al., JMLR 2022) replaces the value of each leaf of scikit-learn's trees by the logarithm of the mean
cost in it, since costs are log-transformed. It does so leaf by leaf, and trains and predicts through scikit-learn's
machinery for parallel jobs, which for trees as small as a search's costs more than the trees themselves.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace
from sklearn import config_context
from sklearn.tree import DecisionTreeRegressor
from smac.model.random_forest.random_forest import RandomForest

Array = npt.NDArray[np.float64]

TREES = 10
"""Trees of the forest: SMAC's default for its facade of hyperparameter optimisation."""

MAX_LEAVES = 1024
"""Leaves a tree may have: more than the observations of any search we run, so that no split is lost. (SMAC's default
preallocates 2^21 nodes a tree, which costs a second a training and changes no prediction.)"""

_PAIRWISE = 8
"""From so many numbers on, NumPy sums in another order than one after the other."""

_LARGEST_SEED = np.iinfo(np.int32).max

_OF_A_TREE = (
    "criterion",
    "max_depth",
    "min_samples_split",
    "min_samples_leaf",
    "min_weight_fraction_leaf",
    "max_features",
    "max_leaf_nodes",
    "min_impurity_decrease",
    "ccp_alpha",
    "monotonic_cst",
)
"""The options of a forest that are those of its trees."""


class Forest(RandomForest):  # type: ignore[misc]
    """A random forest on encoded points, with the settings of SMAC's facade of hyperparameter optimisation.

    Args:
        space: the search space; an inactive hyperparameter's place in a point is NaN.
        seed: of the samples that the trees are trained on.
    """

    def __init__(self, space: ConfigurationSpace, seed: int) -> None:
        super().__init__(
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
        self._inactive = np.array(
            [len(each.choices) if isinstance(each, CategoricalHyperparameter) else -1.0 for each in space.values()]
        )

    def _impute_inactive(self, X: Array) -> Array:  # noqa: N803 - SMAC's name
        return np.where(np.isfinite(X), X, self._inactive)

    def _train(self, X: Array, y: Array) -> "Forest":  # noqa: N803
        self._rf = _grown(self._impute_inactive(X), y.flatten(), self._rf_opts)
        return self

    def _predict(self, X: Array, covariance_type: str | None = "diagonal") -> tuple[Array, Array]:  # noqa: N803
        points = self._impute_inactive(X).astype(np.float32)
        values = np.empty((len(points), TREES))
        for index, tree in enumerate(self._rf):
            values[:, index] = tree.predict(points)[:, 0]
        return values.mean(axis=1), values.var(axis=1)


def _grown(points: Array, costs: Array, options: Mapping[str, Any]) -> list[Any]:
    """The trees of scikit-learn's forest on log-transformed costs, whose leaves hold means of the costs themselves.

    A forest of scikit-learn copies, checks and schedules its trees anew for each training, which takes longer than to
    grow them. So they are grown one by one, from the seeds and samples that a forest of 1.9 draws.

    Args:
        points: float64 [n, hyperparameters].
        costs: float64 [n], their logarithms.
        options: of SMAC's forest.
    """
    inputs, targets = points.astype(np.float32), costs[:, None].copy()
    plain = np.exp(costs)
    seeds = np.random.RandomState(options["random_state"])
    trees = []
    with config_context(skip_parameter_validation=True, assume_finite=True):
        for _ in range(TREES):
            seed = seeds.randint(_LARGEST_SEED)
            samples = np.random.RandomState(seed).randint(0, len(inputs), len(inputs))
            grown = DecisionTreeRegressor(**{key: options[key] for key in _OF_A_TREE}, random_state=seed)
            grown.fit(inputs, targets, np.bincount(samples, minlength=len(inputs)), check_input=False)
            _fill(grown.tree_, grown.tree_.apply(inputs)[samples], plain[samples])
            trees.append(grown.tree_)
    return trees


def _fill(tree: Any, leaves: npt.NDArray[np.intp], costs: Array) -> None:
    """Give each leaf the logarithm of the mean of its samples' costs; ``leaves`` and ``costs`` are by sample."""
    counts = np.bincount(leaves)
    (used,) = np.nonzero(counts)
    means = np.bincount(leaves, costs)[used] / counts[used]
    for index in np.nonzero(counts[used] >= _PAIRWISE)[0]:
        means[index] = costs[leaves == used[index]].mean()
    tree.value[used, 0, 0] = np.log(means)

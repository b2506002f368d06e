"""The surrogate: SMAC's random forest, with the same trees and predictions to the last bit, at less cost a call.

SMAC (Lindauer et al., JMLR 2022) replaces the value of each leaf of scikit-learn's trees by the logarithm of the mean
cost in it, since costs are log-transformed. It does so leaf by leaf, and predicts through scikit-learn's machinery for
parallel jobs, which for trees as small as a search's costs more than the trees themselves.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace
from smac.model.random_forest.random_forest import EPMRandomForest, RandomForest

Array = npt.NDArray[np.float64]

TREES = 10
"""Trees of the forest: SMAC's default for its facade of hyperparameter optimisation."""

MAX_LEAVES = 1024
"""Leaves a tree may have: more than the observations of any search we run, so that no split is lost. (SMAC's default
preallocates 2^21 nodes a tree, which costs a second a training and changes no prediction.)"""

_PAIRWISE = 8
"""From so many numbers on, NumPy sums in another order than one after the other."""


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
        self._rf = _Trees(**self._rf_opts).fit(self._impute_inactive(X), y.flatten())
        return self

    def _predict(self, X: Array, covariance_type: str | None = "diagonal") -> tuple[Array, Array]:  # noqa: N803
        points = self._impute_inactive(X).astype(np.float32)
        values = np.empty((len(points), TREES))
        for index, tree in enumerate(self._rf.estimators_):
            values[:, index] = tree.tree_.predict(points)[:, 0]
        return values.mean(axis=1), values.var(axis=1)


class _Trees(EPMRandomForest):  # type: ignore[misc]
    """SMAC's forest, whose leaves get their values all at once."""

    def fit(self, X: Array, y: Array, sample_weight: Any = None) -> "_Trees":  # noqa: N803 - scikit-learn's names
        super(EPMRandomForest, self).fit(X, y)  # scikit-learn's
        points = X.astype(np.float32)
        costs = np.exp(y)
        for tree, samples in zip(self.estimators_, self.estimators_samples_, strict=True):
            leaves = tree.tree_.apply(points)[samples]
            counts = np.bincount(leaves)
            (used,) = np.nonzero(counts)
            means = np.bincount(leaves, costs[samples])[used] / counts[used]
            for index in np.nonzero(counts[used] >= _PAIRWISE)[0]:
                means[index] = costs[samples[leaves == used[index]]].mean()
            tree.tree_.value[used, 0, 0] = np.log(means)
        return self

"""The surrogate: SMAC's random forest, with the same trees and predictions to the last bit, at less cost a call.

SMAC (Lindauer et al., JMLR 2022) replaces the value of each leaf of scikit-learn's trees by the logarithm of the mean
cost in it, since costs are log-transformed. It does so leaf by leaf, and trains and predicts through scikit-learn's
machinery for parallel jobs, which for trees as small as a search's costs more than the trees themselves.
"""

import numpy as np
import numpy.typing as npt
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace
from sklearn.tree._criterion import MSE
from sklearn.tree._splitter import BestSplitter
from sklearn.tree._tree import BestFirstTreeBuilder, Tree
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

SPLIT, LEAF = 2, 1
"""Fewest samples that are split, and fewest in a leaf: those of SMAC's facade."""

_DEEPEST = 2**20
_LEAST_DECREASE = 1e-8
"""Levels a tree may have, and by how much a split must lower the mean squared error: SMAC's."""


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
            min_samples_split=SPLIT,
            min_samples_leaf=LEAF,
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
        self._rf = _grown(self._impute_inactive(X), y.flatten(), self._rf_opts["random_state"])
        return self

    def _predict(self, X: Array, covariance_type: str | None = "diagonal") -> tuple[Array, Array]:  # noqa: N803
        points = self._impute_inactive(X).astype(np.float32)
        values = np.empty((len(points), TREES))
        for index, tree in enumerate(self._rf):
            values[:, index] = tree.predict(points)[:, 0]
        return values.mean(axis=1), values.var(axis=1)


def _grown(points: Array, costs: Array, seed: int) -> list[Tree]:
    """The trees of scikit-learn's forest on log-transformed costs, whose leaves hold means of the costs themselves.

    A forest of scikit-learn copies, checks and schedules its trees anew for each training, and each tree its arguments,
    which takes several times as long as to grow them. So they are grown by what scikit-learn grows them with, from the
    seeds and samples that a forest of 1.9 draws.

    Args:
        points: float64 [n, hyperparameters].
        costs: float64 [n], their logarithms.
        seed: of the forest.
    """
    inputs, targets = points.astype(np.float32), costs[:, None].copy()
    plain = np.exp(costs)
    count, features = inputs.shape
    one_output = np.ones(1, dtype=np.intp)
    # To make a generator costs a hundred times what it costs to set its seed.
    generator = np.random.RandomState(seed)
    trees = []
    for seed_of_tree in [generator.randint(_LARGEST_SEED) for _ in range(TREES)]:
        generator.seed(seed_of_tree)
        samples = generator.randint(0, count, count)
        generator.seed(seed_of_tree)
        tree = Tree(features, one_output, 1)
        splitter = BestSplitter(MSE(1, count), features, LEAF, 0.0, generator, None)
        BestFirstTreeBuilder(splitter, SPLIT, LEAF, 0.0, _DEEPEST, MAX_LEAVES, _LEAST_DECREASE).build(
            tree, inputs, targets, np.bincount(samples, minlength=count).astype(np.float64), None
        )
        _fill(tree, tree.apply(inputs)[samples], plain[samples])
        trees.append(tree)
    return trees


def _fill(tree: Tree, leaves: npt.NDArray[np.intp], costs: Array) -> None:
    """Give each leaf the logarithm of the mean of its samples' costs; ``leaves`` and ``costs`` are by sample."""
    counts = np.bincount(leaves)
    (used,) = np.nonzero(counts)
    means = np.bincount(leaves, costs)[used] / counts[used]
    for index in np.nonzero(counts[used] >= _PAIRWISE)[0]:
        means[index] = costs[leaves == used[index]].mean()
    tree.value[used, 0, 0] = np.log(means)

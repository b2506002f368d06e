"""Maximising the acquisition function on arrays of points.

SMAC's own maximiser walks from neighbour to neighbour one configuration object at a time, which costs more than half a
second a trial. Here a generation of candidates is one array and its acquisition values one call of the forest: random
points over the whole space, and one-exchange neighbours (Hutter, Hoos and Leyton-Brown, LION 2011) of the best points,
from which the search climbs for as long as a generation brings a better one. Only the winners become configurations.

Points are encoded as ConfigSpace encodes them: a float or an integer as its place in [0, 1] of its range, a categorical
as its choice's index, and an inactive conditional as NaN.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt
from ConfigSpace import CategoricalHyperparameter, Configuration, ConfigurationSpace
from ConfigSpace.conditions import Condition, EqualsCondition, InCondition
from ConfigSpace.hyperparameters import UniformFloatHyperparameter, UniformIntegerHyperparameter
from smac.acquisition.maximizer.abstract_acquisition_maximizer import AbstractAcquisitionMaximizer

from automerge.errors import SearchError

Array = npt.NDArray[np.float64]

RANDOM_POINTS = 2048
"""Random points of a generation: enough that every choice of three blocks' techniques is seen several times."""

STARTS = 10
"""Points that each generation climbs from, as many as SMAC's local search starts."""

GENERATIONS = 20
"""Most steps of a climb; almost all end by themselves before."""

STEPS = (0.2, 0.05, 0.01)
"""Standard deviations of a float's neighbours, in parts of its range: far, near (SMAC's is 0.05), and fine."""

NEIGHBOURS = 2
"""Neighbours of a float for each of the steps."""

POOL = 64
"""Points kept from one generation to the next; those of them that are new are handed to SMAC, which takes the first."""


_MOVE = np.dtype([("index", np.intp), ("step", np.int64), ("deviation", np.float64)])
"""The hyperparameter that is changed; by how many choices, or the standard deviation of the distance."""


@dataclass(frozen=True)
class _Conditional:
    """A hyperparameter that is active only under some choices of another."""

    child: int
    parent: int
    choices: npt.NDArray[np.bool_]


class _Proposal(Configuration):  # type: ignore[misc]
    """Makes its hash once, which is that of a text of all values, and which SMAC asks for ten times."""

    @cached_property
    def _hash(self) -> int:
        value: int = super().__hash__()
        return value

    def __hash__(self) -> int:
        return self._hash


class VectorisedMaximiser(AbstractAcquisitionMaximizer):  # type: ignore[misc]
    """An acquisition maximiser for spaces of floats, integers and categoricals, with conditions on categoricals.

    Args:
        configspace: the space.
        seed: of the random points.

    Raises:
        SearchError: the space has a hyperparameter or condition of another kind.
    """

    def __init__(self, configspace: ConfigurationSpace, seed: int) -> None:
        super().__init__(configspace, seed=seed)
        hyperparameters = list(configspace.values())
        self._index = {hyperparameter.name: index for index, hyperparameter in enumerate(hyperparameters)}
        self._choices = np.zeros(len(hyperparameters), dtype=np.int64)  # 0: not categorical
        self._integers: dict[int, UniformIntegerHyperparameter] = {}
        for index, hyperparameter in enumerate(hyperparameters):
            if isinstance(hyperparameter, CategoricalHyperparameter):
                self._choices[index] = len(hyperparameter.choices)
            elif isinstance(hyperparameter, UniformIntegerHyperparameter):
                self._integers[index] = hyperparameter
            elif not isinstance(hyperparameter, UniformFloatHyperparameter):
                raise SearchError(
                    f"the space's {hyperparameter.name!r} is of no kind that can be searched", "report it"
                )
        self._conditionals = [self._conditional(condition) for condition in configspace.conditions]
        self._moves = np.array([move for index in range(len(hyperparameters)) for move in self._moves_of(index)], _MOVE)

    def _moves_of(self, index: int) -> list[tuple[int, int, float]]:
        """How a hyperparameter's value becomes a neighbour's: to each other choice, or by a random distance."""
        if self._choices[index]:
            return [(index, step, 0.0) for step in range(1, self._choices[index])]
        # To the next integer, where it is farther than a float would go.
        least = 1 / (self._integers[index].size - 1) if index in self._integers else 0.0
        return [(index, 0, max(deviation, least)) for deviation in STEPS for _ in range(NEIGHBOURS)]

    def _conditional(self, condition: Condition) -> _Conditional:
        parent = condition.parent if isinstance(condition, EqualsCondition | InCondition) else None
        if not isinstance(parent, CategoricalHyperparameter):
            raise SearchError(f"the space's condition {condition} is of no kind that can be searched", "report it")
        values = [condition.value] if isinstance(condition, EqualsCondition) else list(condition.values)
        choices = np.array([choice in values for choice in parent.choices])
        return _Conditional(self._index[condition.child.name], self._index[parent.name], choices)

    def _maximize(self, previous_configs: list[Configuration], n_points: int) -> list[tuple[float, Configuration]]:
        """The best points found that are not among the previous ones, best first, with their acquisition values."""
        seen = np.array([config.get_array() for config in previous_configs]).reshape(-1, len(self._choices))
        points = np.concatenate([self._random(RANDOM_POINTS), seen])
        values = self._acquisition(points)
        points, values = _best(points, values, POOL)
        for _ in range(GENERATIONS):
            candidates = self._neighbours(points[:STARTS])
            before = values[:STARTS].copy()
            points, values = _best(
                np.concatenate([points, candidates]),
                np.concatenate([values, self._acquisition(candidates)]),
                POOL,
            )
            if np.array_equal(values[:STARTS], before):
                break
        # A point that SMAC has to pass over would cost another chance of a random proposal. Where none is new, the
        # space is a small one that is exhausted, which SMAC finds out from the old ones.
        known = set(_keys(seen))
        new = np.array([key not in known for key in _keys(points)])
        kept = new if new.any() else ~new
        found = []
        for point, value in zip(points[kept], values[kept], strict=True):
            config = _Proposal(self._configspace, vector=point)
            config.origin = "Acquisition Function Maximizer: Vectorised Search"
            found.append((float(value), config))
        return found

    def _acquisition(self, points: Array) -> Array:
        assert self._acquisition_function is not None  # noqa: S101 - SMAC sets it before the first call
        values: Array = np.asarray(self._acquisition_function._compute(points), dtype=np.float64).reshape(-1)
        return np.where(np.isnan(values), -np.inf, values)

    def _random(self, count: int) -> Array:
        """Points drawn uniformly: [count, hyperparameters]."""
        return self._legal(self._random_values(count))

    def _neighbours(self, starts: Array) -> Array:
        """All points that differ from a start in one active hyperparameter (and what it activates)."""
        # What a changed choice activates needs a value; all are drawn, and the inactive ones dropped again.
        fill = self._random_values(len(starts))
        filled = np.where(np.isnan(starts), fill, starts)
        moves, rows = (each.reshape(-1) for each in np.indices((len(self._moves), len(starts))))
        active = ~np.isnan(starts[rows, self._moves["index"][moves]])
        moves, rows = self._moves[moves[active]], rows[active]
        points = filled[rows]
        moved = (np.arange(len(rows)), moves["index"])
        values, choices = points[moved], self._choices[moves["index"]]
        chosen = choices > 0
        values[chosen] = (values[chosen] + moves["step"][chosen]) % choices[chosen]
        values[~chosen] = np.clip(values[~chosen] + self._rng.normal(0, moves["deviation"][~chosen]), 0, 1)
        points[moved] = values
        return self._legal(points)

    def _random_values(self, count: int) -> Array:
        values: Array = self._rng.random_sample((count, len(self._choices)))
        categorical = self._choices > 0
        values[:, categorical] = np.floor(values[:, categorical] * self._choices[categorical])
        return values

    def _legal(self, points: Array) -> Array:
        """The points with integers where they can be, and with NaN where a conditional's condition does not hold."""
        for index, integer in self._integers.items():
            points[:, index] = integer.to_vector(integer.to_value(points[:, index]))
        for each in self._conditionals:
            parent = points[:, each.parent]
            holds = ~np.isnan(parent)
            holds[holds] = each.choices[parent[holds].astype(np.int64)]
            points[~holds, each.child] = np.nan
        return points


def _best(points: Array, values: Array, count: int) -> tuple[Array, Array]:
    """The points of highest value without repetitions, best first; of equals, the earliest."""
    order = np.argsort(-values, kind="stable")
    # Few are repeated, so that the first ones almost always are enough.
    for enough in (2 * count, len(order)):
        first: dict[bytes, int] = {}
        for key, index in zip(_keys(points[order[:enough]]), order[:enough].tolist(), strict=True):
            first.setdefault(key, index)
        if len(first) >= count:
            break
    indices = list(first.values())[:count]
    return points[indices], values[indices]


def _keys(points: Array) -> list[bytes]:
    """What equal points have in common."""
    rows = np.where(np.isnan(points), -1.0, points)
    return cast(list[bytes], rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel().tolist())

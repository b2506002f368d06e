"""The optimiser: SMAC's hyperparameter optimisation facade, driven by ask and tell.

A random-forest surrogate on log-transformed costs, log expected improvement, retrained after every observation, after
an initial design of Sobol points: the protocol of arXiv 2601.22748. SMAC (Lindauer et al., JMLR 2022) also proposes
about one point in five at random, which the paper leaves open; we keep SMAC's share.

We differ from SMAC's defaults in three places, none of which the paper fixes. The forest's trees are bounded (its
default preallocates 2^21 nodes a tree, which costs a second a trial and changes no proposal). The acquisition function
is maximised on arrays (:mod:`automerge.searching.maximiser`), which also frees a search from the order of a set that
makes SMAC's own diverge between processes. And the best predicted cost, the threshold of the expected improvement, is
one call of the forest instead of one for each observation.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ConfigSpace import Configuration, ConfigurationSpace
from smac import HyperparameterOptimizationFacade, Scenario
from smac.initial_design import AbstractInitialDesign
from smac.main.config_selector import ConfigSelector
from smac.main.exceptions import ConfigurationSpaceExhaustedException
from smac.model.random_forest import RandomForest
from smac.runhistory import StatusType, TrialInfo, TrialValue

from automerge.errors import SearchError
from automerge.searching.maximiser import VectorisedMaximiser

TREES = 10
"""Trees of the forest: SMAC's default for this facade."""

MAX_LEAVES = 1024
"""Leaves a tree may have: more than the observations of any search we run, so that no split is lost."""


class Optimiser:
    """Proposes points by ``ask`` and learns from ``tell``.

    The same space, seed, warm starts and sequence of calls give the same points, in any process.

    Args:
        space: the search space.
        trials: how many points will be asked for.
        initial: Sobol points before the surrogate is used.
        warm_starts: points with their origin, asked for before the Sobol points.
        seed: of everything random.
    """

    def __init__(
        self,
        space: ConfigurationSpace,
        *,
        trials: int,
        initial: int,
        warm_starts: Sequence[tuple[str, Mapping[str, Any]]],
        seed: int,
    ) -> None:
        for name in ("smac", "ConfigSpace"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._space = space
        self._infos: dict[int, TrialInfo] = {}
        self._asked = 0
        self._warm = [(origin, Configuration(space, values=dict(values))) for origin, values in warm_starts]
        # SMAC insists on a folder; nothing of value is kept there: our trial store is the record.
        self._folder = tempfile.TemporaryDirectory(prefix="automerge-optimiser-")
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=max(trials, 1),
            seed=seed,
            output_directory=Path(self._folder.name),
            crash_cost=1.0,
        )
        design = HyperparameterOptimizationFacade.get_initial_design(scenario, n_configs=initial, max_ratio=1.0)
        self._smac = HyperparameterOptimizationFacade(
            scenario,
            _never_called,
            initial_design=_WarmDesign(scenario, [config for _, config in self._warm], design),
            model=RandomForest(
                space,
                log_y=True,
                n_trees=TREES,
                ratio_features=1.0,
                min_samples_split=2,
                min_samples_leaf=1,
                max_leaf_nodes=MAX_LEAVES,
                n_jobs=1,
                seed=seed,
            ),
            acquisition_maximizer=VectorisedMaximiser(space, seed),
            config_selector=_Selector(scenario, retrain_after=1),
            logging_level=False,
            overwrite=True,
        )

    def ask(self) -> tuple[int, str, dict[str, Any]]:
        """The next point: its number from 0, its origin, and its values by hyperparameter.

        Raises:
            SearchError: the space has no point left that was not asked for.
        """
        try:
            info = self._smac.ask()
        except (StopIteration, ConfigurationSpaceExhaustedException):
            raise SearchError("the search space is exhausted", "set search.trials to fewer trials") from None
        number, self._asked = self._asked, self._asked + 1
        self._infos[number] = info
        return number, self._origin(info.config), {key: _plain(value) for key, value in dict(info.config).items()}

    def tell(self, number: int, cost: float, *, failed: bool = False) -> None:
        """Report the cost of a point that was asked for; a failed one is not proposed again."""
        status = StatusType.CRASHED if failed else StatusType.SUCCESS
        self._smac.tell(self._infos.pop(number), TrialValue(cost=cost, status=status), save=False)

    def close(self) -> None:
        """Remove what SMAC wrote."""
        self._folder.cleanup()

    def _origin(self, config: Configuration) -> str:
        for origin, warm in self._warm:
            if warm == config:
                return origin
        text = (config.origin or "").lower()
        if text.startswith("initial design"):
            return "sobol"
        return "random" if text.startswith("random search") else "surrogate"


class _WarmDesign(AbstractInitialDesign):  # type: ignore[misc]
    """Chosen points first, then those of another design that are not among them."""

    def __init__(self, scenario: Scenario, warm: list[Configuration], then: AbstractInitialDesign) -> None:
        super().__init__(scenario, n_configs=0)
        self._warm = warm
        self._then = then

    def _select_configurations(self) -> list[Configuration]:
        return []

    def select_configurations(self) -> list[Configuration]:
        configs = list(self._warm)
        for config in self._then.select_configurations():
            if config not in configs:
                configs.append(config)
        return configs


class _Selector(ConfigSelector):  # type: ignore[misc]
    """SMAC's selector of configurations, with the best predicted cost found by one call of the forest."""

    def _get_x_best(self, X: Any) -> tuple[Any, float]:  # noqa: N803 - SMAC's name
        costs = self._model.predict_marginalized(X)[0].reshape(-1)
        best = int(np.argmin(costs))
        return X[best], float(costs[best])


def _never_called(config: Configuration, seed: int = 0) -> float:
    raise AssertionError("the loop is driven by ask and tell")


def _plain(value: Any) -> Any:
    """A NumPy scalar as the Python value that JSON writes and reads back exactly."""
    return value.item() if isinstance(value, np.generic) else value

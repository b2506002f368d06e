"""The optimiser: SMAC's hyperparameter optimisation facade, driven by ask and tell.

A random-forest surrogate on log-transformed costs, log expected improvement, retrained after every observation, after
an initial design of Sobol points: the protocol of arXiv 2601.22748. SMAC (Lindauer et al., JMLR 2022) also proposes
about one point in five at random, which the paper leaves open; we keep SMAC's share.

We differ from SMAC's defaults in what the paper does not fix. The acquisition function is maximised on arrays
(:mod:`automerge.searching.maximiser`), which also frees a search from the order of a set that makes SMAC's own diverge
between processes. Forest and acquisition function are SMAC's, at less cost (:mod:`automerge.searching.surrogate`,
:mod:`automerge.searching.acquisition`). SMAC's races between configurations, for which costs that are measured once
have no use, are left out.

**Several points at once.** A point that was asked for and not yet told is pending. The surrogate is told a lie about
it, the same for all: the *constant liar* of Ginsbourger, Le Riche and Carraro (Kriging is well-suited to parallelize
optimization, 2010). So the expected improvement falls around pending points, and proposals spread. The lie is the
largest cost of a point that did not fail: the larger a lie, the farther proposals keep from pending points. Of that
paper's other two lies the mean does as well, and the smallest is no better than none (``benchmarks/search/lies.py``).

**Several objectives.** ParEGO (Knowles, IEEE Transactions on Evolutionary Computation 10(1), 2006) as SMAC has it:
before each proposal the objectives, each scaled to [0, 1], become one by the augmented Tchebycheff function, with
weights drawn at random.
"""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ConfigSpace import Configuration, ConfigurationSpace
from smac import HyperparameterOptimizationFacade, Scenario
from smac.acquisition.maximizer.helpers import ChallengerList
from smac.initial_design import AbstractInitialDesign
from smac.intensifier.abstract_intensifier import AbstractIntensifier
from smac.main.config_selector import ConfigSelector
from smac.main.exceptions import ConfigurationSpaceExhaustedException
from smac.multi_objective.parego import ParEGO
from smac.runhistory import StatusType, TrialInfo, TrialValue
from smac.runhistory.encoder import RunHistoryLogScaledEncoder

from automerge.errors import SearchError
from automerge.searching.acquisition import LogExpectedImprovement
from automerge.searching.maximiser import VectorisedMaximiser
from automerge.searching.surrogate import Forest

TRIES = 16
"""Proposals looked at for one that is new, and random points after them, before a space counts as exhausted: SMAC's."""


class Optimiser:
    """Proposes points by ``ask`` and learns from ``tell``.

    The same space, seed, warm starts and sequence of calls give the same points, in any process. Any number of points
    may be pending, and they may be told in any order.

    Args:
        space: the search space.
        trials: how many points will be asked for.
        initial: Sobol points before the surrogate is used.
        warm_starts: points with their origin, asked for before the Sobol points.
        seed: of everything random.
        objectives: the names of two or more objectives, each of which has a cost; none for a single cost.
    """

    def __init__(
        self,
        space: ConfigurationSpace,
        *,
        trials: int,
        initial: int,
        warm_starts: Sequence[tuple[str, Mapping[str, Any]]],
        seed: int,
        objectives: Sequence[str] = (),
    ) -> None:
        for name in ("smac", "ConfigSpace"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._objectives = tuple(objectives)
        self._infos: dict[int, TrialInfo] = {}
        self._asked = 0
        self._warm = [(origin, Configuration(space, values=dict(values))) for origin, values in warm_starts]
        # SMAC insists on a folder; nothing of value is kept there: our trial store is the record.
        self._folder = tempfile.TemporaryDirectory(prefix="automerge-optimiser-")
        several = len(self._objectives) > 1
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=max(trials, 1),
            seed=seed,
            output_directory=Path(self._folder.name),
            objectives=list(self._objectives) if several else "cost",
            crash_cost=[1.0] * len(self._objectives) if several else 1.0,  # SMAC asks for it; what is told counts
        )
        design = HyperparameterOptimizationFacade.get_initial_design(scenario, n_configs=initial, max_ratio=1.0)
        self._smac = HyperparameterOptimizationFacade(
            scenario,
            initial_design=_WarmDesign(scenario, [config for _, config in self._warm], design),
            model=Forest(space, seed),
            acquisition_function=LogExpectedImprovement(),
            acquisition_maximizer=VectorisedMaximiser(space, seed),
            runhistory_encoder=_Encoder(scenario),
            config_selector=_Selector(scenario, retrain_after=1, max_new_config_tries=TRIES),
            intensifier=_OnceEach(scenario),
            multi_objective_algorithm=ParEGO(scenario) if several else None,
            logging_level=False,
            overwrite=True,
        )
        if not several:
            # At each cost that is added it looks at all of them for their bounds, which serve several objectives.
            self._smac.runhistory._update_objective_bounds = lambda: None

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

    def tell(self, number: int, cost: float | Sequence[float], *, failed: bool = False) -> None:
        """Report the cost of a point that was asked for; a failed one is not proposed again.

        Args:
            number: the point's.
            cost: the cost, or one for each of several objectives, in their order. A failed point may have one for all.
            failed: whether the point could not be evaluated, so that its cost is a penalty.

        Raises:
            SearchError: the point is not pending, or the cost is not finite or not one for each objective.
        """
        costs = [float(each) for each in cost] if isinstance(cost, Sequence) else [float(cost)]
        expected = max(1, len(self._objectives))
        if failed and len(costs) == 1:
            costs *= expected
        if len(costs) != expected or not all(math.isfinite(each) for each in costs):
            raise SearchError(
                f"trial {number} is told with the cost {cost}, which is not {expected} finite numbers", "report it"
            )
        if number not in self._infos:
            raise SearchError(f"trial {number} is told, but it is not pending", "report it")
        status = StatusType.CRASHED if failed else StatusType.SUCCESS
        value = TrialValue(cost=costs if expected > 1 else costs[0], status=status)
        self._smac.tell(self._infos.pop(number), value, save=False)

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
    """What SMAC's selector does when it retrains after every configuration, with a lie for each pending trial."""

    def __iter__(self) -> Iterator[Configuration]:
        known: set[Configuration] = set()
        for config in self._initial_design_configs:
            if config not in known:
                known.add(config)
                yield config
        while True:
            if (scalarisation := self._runhistory_encoder.multi_objective_algorithm) is not None:
                scalarisation.update_on_iteration_start()
            config = self._next(known)
            known.add(config)
            yield config

    def _retrain(self) -> None:
        """Train the surrogate on the costs that were told and on the lies."""
        told, costs = self._runhistory_encoder.transform(budget_subset=[None])
        points = told
        pending = self._runhistory.get_running_trials()
        if pending:
            points = np.concatenate([told, [trial.config.get_array() for trial in pending]])
            costs = np.concatenate([costs, np.full((len(pending), 1), self._lie(costs))])
        self._model.train(points, costs)
        # The best predicted cost is the threshold of the expected improvement; a lie can be no threshold.
        threshold = self._model.predict_marginalized(told if len(told) else points)[0].min()
        self._acquisition_function.update(model=self._model, eta=float(threshold))

    def _lie(self, costs: npt.NDArray[np.float64]) -> float:
        """The largest of the costs that are no penalties, as the surrogate sees them; 0 where nothing was told."""
        statuses = [value.status for value in self._runhistory.values() if value.status != StatusType.RUNNING]
        succeeded = costs[np.array(statuses, dtype=np.int64) == StatusType.SUCCESS]
        return float((succeeded if len(succeeded) else costs).max()) if len(costs) else 0.0

    def _next(self, known: set[Configuration]) -> Configuration:
        """The first of the proposals that is new; some proposals are random ones."""
        maximiser = self._acquisition_maximizer

        def by_surrogate() -> list[Configuration]:
            self._retrain()
            return list(maximiser.maximize(self._runhistory.get_configs(), random_design=None))

        # SMAC trains before each proposal, also before the random ones, which ask no surrogate.
        proposals = ChallengerList(maximiser._configspace, by_surrogate, self._random_design)
        self._random_design.next_iteration()
        for config in islice(proposals, TRIES):
            if config not in known:
                return config
        for _ in range(TRIES):
            config = self._scenario.configspace.sample_configuration()
            if config not in known:
                config.origin = "Random Search"
                return config
        raise ConfigurationSpaceExhaustedException


class _Encoder(RunHistoryLogScaledEncoder):  # type: ignore[misc]
    """SMAC's, which looks at one trial at a time, for the sake of budgets and instances that we do not have."""

    def transform(
        self, budget_subset: list[Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        history = self.runhistory
        # Not by items(), which looks each of them up.
        trials = history._data.items()
        told = [(key.config_id, trial.cost) for key, trial in trials if trial.status != StatusType.RUNNING]
        if self._n_objectives > 1 or not told:
            points, costs = super().transform(budget_subset)
            return points, costs.reshape(-1, 1)  # where none is told SMAC has a column for each objective
        points = np.array([history.get_config(number).get_array() for number, _ in told])
        costs = np.array([[cost] for _, cost in told])
        self._percentile = np.percentile(costs, self._scale_percentage, axis=0)
        self._min_y, self._max_y = np.min(costs, axis=0), np.max(costs, axis=0)
        return points, self.transform_response_values(costs)


class _OnceEach(AbstractIntensifier):  # type: ignore[misc]
    """One trial for each configuration."""

    uses_seeds = True
    uses_budgets = False
    uses_instances = False
    uses_cutoffs = False

    def __iter__(self) -> Iterator[TrialInfo]:
        for config in self.config_generator:
            yield TrialInfo(config, seed=self._seed)

    def update_incumbents(self, config: Configuration) -> None:
        """Nothing: SMAC's incumbents are not used, the search knows its best trial itself."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("a search is resumed from its own log")


def _plain(value: Any) -> Any:
    """A NumPy scalar as the Python value that JSON writes and reads back exactly."""
    return value.item() if isinstance(value, np.generic) else value

"""The optimiser: what it asks for first, several points at once, several objectives, replay, and a space's end."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ConfigSpace import CategoricalHyperparameter, Configuration, ConfigurationSpace, Float, Integer
from smac import HyperparameterOptimizationFacade, Scenario
from smac.model.random_forest import RandomForest
from smac.runhistory import StatusType, TrialValue

from automerge.errors import SearchError
from automerge.searching.front import pareto_front
from automerge.searching.maximiser import VectorisedMaximiser
from automerge.searching.optimiser import Optimiser
from automerge.searching.surrogate import MAX_LEAVES
from automerge.spec import SearchSpec
from tests.searching.synthetic import make_space

ROOT = Path(__file__).parents[2]

PAPER = SearchSpec(preset="paper")

Asked = tuple[int, str, dict[str, Any]]


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes optimisers of the usual space and closes them."""
    made: list[Optimiser] = []

    def build(space: ConfigurationSpace | None = None, **changes: Any) -> Optimiser:
        arguments: dict[str, Any] = {"trials": 40, "initial": 8, "warm_starts": [], "seed": 3, **changes}
        seed = arguments["seed"]
        made.append(Optimiser(space or make_space(PAPER).configuration_space(seed), **arguments))
        return made[-1]

    yield build
    for optimiser in made:
        optimiser.close()


def cost_of(config: Mapping[str, Any]) -> float:
    """Any smooth cost, positive as all are that we tell."""
    return 1.0 + sum((float(value) - 0.3) ** 2 for value in config.values() if not isinstance(value, str))


def drive(optimiser: Optimiser, count: int) -> list[Asked]:
    asked = []
    for _ in range(count):
        number, origin, config = optimiser.ask()
        asked.append((number, origin, config))
        optimiser.tell(number, cost_of(config))
    return asked


def test_the_initial_design_is_smacs_own(make: Any, tmp_path: Path) -> None:
    """Asked point by point, the same as SMAC's facade with its Sobol design and nothing of ours."""
    space = make_space(PAPER).configuration_space(3)
    scenario = Scenario(space, deterministic=True, n_trials=40, seed=3, output_directory=tmp_path)
    smac = HyperparameterOptimizationFacade(
        scenario,
        lambda config, seed=0: 0.0,
        initial_design=HyperparameterOptimizationFacade.get_initial_design(scenario, n_configs=20, max_ratio=1.0),
        overwrite=True,
        logging_level=False,
    )
    for number, origin, config in drive(make(space, initial=20), 20):
        theirs = dict(smac.ask().config)
        assert (origin, config) == ("sobol", theirs), f"point {number}"


def test_point_by_point_it_is_smac_with_our_maximiser(make: Any, tmp_path: Path) -> None:
    """SMAC's own selector, intensifier and forest propose the same, where no two points are pending at once."""
    space = make_space(PAPER).configuration_space(3)
    scenario = Scenario(space, deterministic=True, n_trials=45, seed=3, output_directory=tmp_path)
    smac = HyperparameterOptimizationFacade(
        scenario,
        model=RandomForest(
            space,
            log_y=True,
            ratio_features=1.0,
            min_samples_split=2,
            min_samples_leaf=1,
            max_leaf_nodes=MAX_LEAVES,
            n_jobs=1,
            seed=3,
        ),
        acquisition_maximizer=VectorisedMaximiser(space, 3),
        initial_design=HyperparameterOptimizationFacade.get_initial_design(scenario, n_configs=10, max_ratio=1.0),
        config_selector=HyperparameterOptimizationFacade.get_config_selector(scenario, retrain_after=1),
        overwrite=True,
        logging_level=False,
    )
    ours = make(make_space(PAPER).configuration_space(3), initial=10)
    origins = set()
    for number in range(45):
        _, origin, config = ours.ask()
        info = smac.ask()
        assert config == dict(info.config), f"point {number}"
        failed = number % 7 == 3
        ours.tell(number, cost_of(config), failed=failed)
        status = StatusType.CRASHED if failed else StatusType.SUCCESS
        smac.tell(info, TrialValue(cost=cost_of(config), status=status), save=False)
        origins.add(origin)
    assert origins == {"sobol", "surrogate", "random"}


@pytest.mark.parametrize("initial", [1, 5, 20])
def test_the_surrogate_takes_over_after_the_initial_points(make: Any, initial: int) -> None:
    origins = [origin for _, origin, _ in drive(make(initial=initial), initial + 6)]
    assert origins[:initial] == ["sobol"] * initial
    assert set(origins[initial:]) <= {"surrogate", "random"}
    assert "surrogate" in origins[initial:]


def test_numbers_count_from_zero_and_no_point_is_asked_twice(make: Any) -> None:
    asked = drive(make(warm_starts=make_space(PAPER).warm_starts()), 25)
    assert [number for number, _, _ in asked] == list(range(25))
    assert len({json.dumps(config, sort_keys=True) for _, _, config in asked}) == 25


def test_points_are_plain_values_that_json_keeps(make: Any) -> None:
    space = make_space(PAPER).configuration_space(3)
    space.add(Integer("rank", (1, 5)), CategoricalHyperparameter("centre", [False, True]))
    for _, _, config in drive(make(space), 12):
        assert json.loads(json.dumps(config)) == config
        assert {type(value) for value in config.values()} <= {str, float, int, bool}
        assert type(config["rank"]) is int and type(config["centre"]) is bool


def test_warm_starts_come_first_and_once(make: Any) -> None:
    """Also where the Sobol design holds one of them itself."""
    plain = [config for _, _, config in drive(make(), 8)]
    warm = [*make_space(PAPER).warm_starts(), ("chosen", plain[2])]
    asked = drive(make(warm_starts=warm), 12)
    assert [(origin, config) for _, origin, config in asked[:4]] == warm
    assert [config for _, _, config in asked[4:11]] == plain[:2] + plain[3:]
    assert [origin for _, origin, _ in asked[4:11]] == ["sobol"] * 7
    assert asked[11][1] in ("surrogate", "random")


def test_a_warm_start_outside_the_space_is_an_error(make: Any) -> None:
    point = {**make_space(PAPER).warm_starts()[0][1], "b0/weight/low": 1.5}
    with pytest.raises(ValueError, match="b0/weight/low"):
        make(warm_starts=[("chosen", point)])


@pytest.mark.parametrize("told", [0, 5, 8, 9, 20])
def test_replaying_asks_and_tells_leads_to_the_same_points(make: Any, told: int) -> None:
    whole = drive(make(), 24)
    again = make()
    for number, origin, config in whole[:told]:
        assert again.ask() == (number, origin, config)
        again.tell(number, cost_of(config))
    assert drive(again, 24 - told) == whole[told:]


def test_the_number_of_trials_changes_no_point(make: Any) -> None:
    """A search can be made longer when it has ended."""
    assert drive(make(trials=12), 12) == drive(make(trials=500), 12)


def test_the_costs_and_the_seed_change_the_points(make: Any) -> None:
    first = drive(make(), 14)
    other = make()
    points = []
    for _ in range(14):
        number, _, config = other.ask()
        points.append(config)
        other.tell(number, 3.0 - cost_of(config) / 10)
    assert points[:8] == [config for _, _, config in first[:8]], "the initial design knows of no costs"
    assert points[8:] != [config for _, _, config in first[8:]]
    assert [config for _, _, config in drive(make(seed=4), 3)] != [config for _, _, config in first[:3]]


def test_failed_points_are_not_asked_for_again_and_are_avoided(make: Any) -> None:
    """Everything with ties in the first block fails: the surrogate learns to leave it."""
    optimiser = make(trials=60, initial=10)
    asked: list[Asked] = []
    for _ in range(40):
        number, origin, config = optimiser.ask()
        failed = config["b0/technique"] == "ties"
        optimiser.tell(number, 20.0 if failed else cost_of(config), failed=failed)
        asked.append((number, origin, config))
    failures = [config for _, _, config in asked if config["b0/technique"] == "ties"]
    assert failures, "the case is in it"
    assert all(sum(config == other for _, _, other in asked) == 1 for config in failures)
    late = [config["b0/technique"] for _, origin, config in asked[20:] if origin == "surrogate"]
    assert late and late.count("ties") <= len(late) / 5


def test_it_learns(make: Any) -> None:
    asked = drive(make(initial=10), 30)
    costs = [cost_of(config) for _, _, config in asked]
    assert min(costs[10:]) < min(costs[:10])


def ask_many(optimiser: Optimiser, count: int) -> list[Asked]:
    return [optimiser.ask() for _ in range(count)]


def tell_all(optimiser: Optimiser, asked: list[Asked]) -> None:
    for number, _, config in asked:
        optimiser.tell(number, cost_of(config))


def test_pending_points_change_nothing_of_the_initial_design(make: Any) -> None:
    assert ask_many(make(initial=8), 8) == drive(make(initial=8), 8)


def distance(space: ConfigurationSpace, asked: list[Asked]) -> float:
    """Mean distance between the points that the surrogate proposed, as they are encoded; inactive is -1."""
    points = [Configuration(space, values=config).get_array() for _, origin, config in asked if origin == "surrogate"]
    points = np.nan_to_num(np.array(points), nan=-1.0)
    pairs = np.triu_indices(len(points), 1)
    return float(np.linalg.norm(points[:, np.newaxis] - points, axis=2)[pairs].mean())


def test_proposals_of_a_batch_spread(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lies a batch is one point several times over, but for the last digits of its weights."""
    lying, blind = [], []
    for seed in range(3):
        for distances in (lying, blind):
            space = make_space(PAPER).configuration_space(seed)
            optimiser = make(space, seed=seed)
            drive(optimiser, 20)
            if distances is blind:
                monkeypatch.setattr(optimiser._smac.runhistory, "get_running_trials", list)
            distances.append(distance(space, ask_many(optimiser, 8)))
    assert min(lying) > 0.5
    assert np.mean(lying) > 1.5 * np.mean(blind)


def test_a_batch_is_of_new_points(make: Any) -> None:
    optimiser = make()
    asked = drive(optimiser, 10)
    for _ in range(3):
        batch = ask_many(optimiser, 6)
        asked += batch
        tell_all(optimiser, batch)
    assert [number for number, _, _ in asked] == list(range(28))
    assert len({json.dumps(config, sort_keys=True) for _, _, config in asked}) == 28


def test_points_may_be_told_in_any_order(make: Any) -> None:
    """What is known counts, not when it was learned."""
    forwards, backwards, shuffled = make(), make(), make()
    batches = [ask_many(optimiser, 14) for optimiser in (forwards, backwards, shuffled)]
    tell_all(forwards, batches[0])
    tell_all(backwards, batches[1][::-1])
    tell_all(shuffled, batches[2][::2] + batches[2][1::2])
    expected = drive(forwards, 4)
    assert drive(backwards, 4) == expected
    assert drive(shuffled, 4) == expected


def interleaved(optimiser: Optimiser, count: int, capacity: int = 3) -> list[Asked]:
    """Keep some points pending; now the oldest, now the newest is told first, and one point has failed."""
    asked: list[Asked] = []
    pending: list[Asked] = []
    while len(asked) < count:
        while len(pending) < capacity:
            asked.append(optimiser.ask())
            pending.append(asked[-1])
        number, _, config = pending.pop(0 if len(asked) % 2 else -1)
        optimiser.tell(number, 20.0 if number == 7 else cost_of(config), failed=number == 7)
    return asked


def test_the_lie_is_the_worst_of_what_did_not_fail(make: Any) -> None:
    """As the surrogate sees the costs; a penalty has no part in it."""
    optimiser = make()
    failed = []
    for number, _, config in ask_many(optimiser, 8):
        failed.append(number in (2, 5))
        optimiser.tell(number, 20.0 if failed[-1] else cost_of(config), failed=failed[-1])
    optimiser.ask()
    selector = optimiser._smac._config_selector
    costs = selector._runhistory_encoder.transform(budget_subset=[None])[1]
    assert len(costs) == 8, "what is pending is not among the costs"
    assert selector._lie(costs) == costs[~np.array(failed)].max() < costs.max()


def test_points_that_nothing_is_known_about_are_all_different(make: Any) -> None:
    """More workers than initial points: the surrogate has lies only."""
    asked = ask_many(make(initial=3), 9)
    assert len({json.dumps(config, sort_keys=True) for _, _, config in asked}) == 9


def test_where_all_failed_the_search_goes_on(make: Any) -> None:
    optimiser = make(initial=4)
    for number, _, _ in ask_many(optimiser, 4):
        optimiser.tell(number, 20.0, failed=True)
    assert len({json.dumps(config, sort_keys=True) for _, _, config in ask_many(optimiser, 3)}) == 3


def test_telling_what_is_not_pending_is_refused(make: Any) -> None:
    optimiser = make()
    number, _, _ = optimiser.ask()
    optimiser.tell(number, 1.0)
    for wrong in (number, 5):
        with pytest.raises(SearchError, match=f"trial {wrong} is told, but it is not pending"):
            optimiser.tell(wrong, 1.0)


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), [1.0, 2.0], []])
def test_costs_that_are_none_are_refused_and_leave_the_point_pending(make: Any, cost: Any) -> None:
    optimiser = make()
    number, _, _ = optimiser.ask()
    with pytest.raises(SearchError, match=r"trial 0 is told with the cost .*, which is not 1 finite numbers"):
        optimiser.tell(number, cost)
    optimiser.tell(number, 1.0)


TASKS = ("low", "high")


def costs_of(config: Mapping[str, Any]) -> list[float]:
    """Two costs that pull every number in opposite directions."""
    values = np.array([float(value) for value in config.values() if not isinstance(value, str)])
    return [1.0 + float(((values - target) ** 2).sum()) for target in (0.1, 0.9)]


def drive_several(optimiser: Optimiser, count: int) -> list[Asked]:
    asked = []
    for _ in range(count):
        number, origin, config = optimiser.ask()
        asked.append((number, origin, config))
        failed = config["b0/technique"] == "dare_ties"
        optimiser.tell(number, 20.0 if failed else costs_of(config), failed=failed)
    return asked


def test_of_several_objectives_the_surrogate_moves_the_front(make: Any) -> None:
    """Most of the front after 40 points is the surrogate's, and it reaches farther than Sobol points to both ends."""
    asked = drive_several(make(objectives=TASKS, initial=12), 40)
    told = [(origin, costs_of(config)) for _, origin, config in asked if config["b0/technique"] != "dare_ties"]
    front = pareto_front([{task: 1 / cost for task, cost in zip(TASKS, costs, strict=True)} for _, costs in told])
    origins = [told[index][0] for index in front]
    assert origins.count("surrogate") > len(front) / 2
    for task in range(2):
        best = {origin: min(costs[task] for each, costs in told if each == origin) for origin in ("sobol", "surrogate")}
        assert best["surrogate"] < best["sobol"]


def test_several_objectives_are_none_of_them_alone(make: Any) -> None:
    several = drive_several(make(objectives=TASKS), 16)
    for task in range(2):
        optimiser = make()
        alone = []
        for _ in range(16):
            number, _, config = optimiser.ask()
            alone.append(config)
            failed = config["b0/technique"] == "dare_ties"
            optimiser.tell(number, 20.0 if failed else costs_of(config)[task], failed=failed)
        assert [config for _, _, config in several[:8]] == alone[:8], "the initial design knows of no costs"
        assert [config for _, _, config in several[8:]] != alone[8:]


def test_a_failed_point_has_the_penalty_for_all_objectives(make: Any) -> None:
    """One number, or one for each, is the same; another number of them is refused."""
    one, each = make(objectives=TASKS, initial=3), make(objectives=TASKS, initial=3)
    for optimiser, penalty in ((one, 20.0), (each, [20.0, 20.0])):
        for number, _, config in ask_many(optimiser, 3):
            optimiser.tell(number, penalty if number == 1 else costs_of(config), failed=number == 1)
    assert drive_several(one, 6) == drive_several(each, 6)
    number, _, _ = one.ask()
    for wrong in (1.0, [1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]):
        with pytest.raises(SearchError, match="which is not 2 finite numbers"):
            one.tell(number, wrong)


def test_several_pending_points_and_several_objectives_go_together(make: Any) -> None:
    first, again = make(objectives=TASKS, initial=5), make(objectives=TASKS, initial=5)
    points = []
    for optimiser in (first, again):
        asked = ask_many(optimiser, 9)
        for number, _, config in asked[::-1]:
            optimiser.tell(number, costs_of(config))
        points.append(asked + ask_many(optimiser, 4))
    assert points[0] == points[1]
    assert len({json.dumps(config, sort_keys=True) for _, _, config in points[0]}) == 13


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from tests.searching.test_optimiser import digest_of_runs
print(digest_of_runs())
"""


def digest_of_runs() -> str:
    """A digest of the points of a search with pending ones, and of one with several objectives."""
    runs = []
    for objectives in ((), TASKS):
        space = make_space(PAPER).configuration_space(5)
        optimiser = Optimiser(space, trials=30, initial=8, warm_starts=[], seed=5, objectives=objectives)
        runs.append(drive_several(optimiser, 20) if objectives else interleaved(optimiser, 20))
        optimiser.close()
    return hashlib.sha256(json.dumps(runs).encode()).hexdigest()


def test_the_hash_seed_has_no_part_in_it() -> None:
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == digest_of_runs()


def test_a_small_space_with_all_points_pending_is_exhausted(make: Any) -> None:
    space = ConfigurationSpace(seed=0)
    space.add(CategoricalHyperparameter("technique", ["linear", "ties"]), Integer("level", (1, 3)))
    optimiser = make(space, initial=2, trials=100)
    assert len({tuple(config.values()) for _, _, config in ask_many(optimiser, 6)}) == 6
    with pytest.raises(SearchError, match="the search space is exhausted"):
        optimiser.ask()


def test_a_small_space_is_asked_for_whole_and_then_exhausted(make: Any) -> None:
    space = ConfigurationSpace(seed=0)
    space.add(
        CategoricalHyperparameter("technique", ["linear", "ties"]), CategoricalHyperparameter("level", ["1", "2", "3"])
    )
    optimiser = make(space, initial=3, trials=100)
    seen = []
    with pytest.raises(SearchError, match=r"the search space is exhausted; set search\.trials to fewer trials"):
        for _ in range(7):
            number, _, config = optimiser.ask()
            seen.append(tuple(config.values()))
            optimiser.tell(number, float(config["level"]))
    assert len(set(seen)) == len(seen) == 6


def test_it_leaves_no_files(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    space = ConfigurationSpace(seed=0)
    space.add(Float("weight", (0.0, 1.0)))
    optimiser = make(space, initial=2)
    drive(optimiser, 4)
    optimiser.close()
    assert list(tmp_path.iterdir()) == []

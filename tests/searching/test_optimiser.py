"""The optimiser: what it asks for first, that replay leads to the same state, and how a space comes to its end."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace, Float, Integer
from smac import HyperparameterOptimizationFacade, Scenario

from automerge.errors import SearchError
from automerge.searching.optimiser import Optimiser
from automerge.spec import SearchSpec
from tests.searching.synthetic import make_space

Asked = tuple[int, str, dict[str, Any]]


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes optimisers of the usual space and closes them."""
    made: list[Optimiser] = []

    def build(space: ConfigurationSpace | None = None, **changes: Any) -> Optimiser:
        arguments: dict[str, Any] = {"trials": 40, "initial": 8, "warm_starts": [], "seed": 3, **changes}
        seed = arguments["seed"]
        made.append(Optimiser(space or make_space(SearchSpec()).configuration_space(seed), **arguments))
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
    space = make_space(SearchSpec()).configuration_space(3)
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


@pytest.mark.parametrize("initial", [1, 5, 20])
def test_the_surrogate_takes_over_after_the_initial_points(make: Any, initial: int) -> None:
    origins = [origin for _, origin, _ in drive(make(initial=initial), initial + 6)]
    assert origins[:initial] == ["sobol"] * initial
    assert set(origins[initial:]) <= {"surrogate", "random"}
    assert "surrogate" in origins[initial:]


def test_numbers_count_from_zero_and_no_point_is_asked_twice(make: Any) -> None:
    asked = drive(make(warm_starts=make_space(SearchSpec()).warm_starts()), 25)
    assert [number for number, _, _ in asked] == list(range(25))
    assert len({json.dumps(config, sort_keys=True) for _, _, config in asked}) == 25


def test_points_are_plain_values_that_json_keeps(make: Any) -> None:
    space = make_space(SearchSpec()).configuration_space(3)
    space.add(Integer("rank", (1, 5)), CategoricalHyperparameter("centre", [False, True]))
    for _, _, config in drive(make(space), 12):
        assert json.loads(json.dumps(config)) == config
        assert {type(value) for value in config.values()} <= {str, float, int, bool}
        assert type(config["rank"]) is int and type(config["centre"]) is bool


def test_warm_starts_come_first_and_once(make: Any) -> None:
    """Also where the Sobol design holds one of them itself."""
    plain = [config for _, _, config in drive(make(), 8)]
    warm = [*make_space(SearchSpec()).warm_starts(), ("chosen", plain[2])]
    asked = drive(make(warm_starts=warm), 12)
    assert [(origin, config) for _, origin, config in asked[:4]] == warm
    assert [config for _, _, config in asked[4:11]] == plain[:2] + plain[3:]
    assert [origin for _, origin, _ in asked[4:11]] == ["sobol"] * 7
    assert asked[11][1] in ("surrogate", "random")


def test_a_warm_start_outside_the_space_is_an_error(make: Any) -> None:
    point = {**make_space(SearchSpec()).warm_starts()[0][1], "b0/weight/low": 1.5}
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

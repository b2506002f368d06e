"""The acquisition maximiser: its points are points of the space, and as good as those of SMAC's own."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ConfigSpace import (
    AndConjunction,
    CategoricalHyperparameter,
    Configuration,
    ConfigurationSpace,
    Constant,
    EqualsCondition,
    Float,
    GreaterThanCondition,
    InCondition,
    Integer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from smac import HyperparameterOptimizationFacade, Scenario
from smac.acquisition.function import EI
from smac.acquisition.function.abstract_acquisition_function import AbstractAcquisitionFunction

from automerge.errors import SearchError
from automerge.searching.maximiser import POOL, VectorisedMaximiser, _best
from automerge.searching.objective import harmonic_mean
from automerge.searching.surrogate import Forest
from automerge.spec import SearchSpec
from tests.searching.synthetic import landscape, make_space

ROOT = Path(__file__).parents[2]


class Known(AbstractAcquisitionFunction):  # type: ignore[misc]
    """An acquisition function in closed form, on encoded points; counts what it is asked for."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.points: list[Any] = []

    @property
    def name(self) -> str:
        return "known"

    def _update(self, **kwargs: Any) -> None:
        pass

    def _compute(self, X: Any) -> Any:
        self.points.append(np.array(X))
        return self.function(np.array(X))[:, np.newaxis]


def maximiser(space: ConfigurationSpace, function: Any, seed: int = 0) -> tuple[VectorisedMaximiser, Known]:
    known = Known(function)
    made = VectorisedMaximiser(space, seed)
    made.acquisition_function = known
    return made, known


def mixed_space() -> ConfigurationSpace:
    """A choice; a float and an integer under some of its values; one of each that are always there."""
    space = ConfigurationSpace(seed=0)
    kind = CategoricalHyperparameter("kind", ["a", "b", "c"])
    depth, rate = Integer("depth", (1, 9)), Float("rate", (-2.0, 3.0))
    space.add(kind, depth, rate, Float("weight", (0.0, 1.0)), Integer("rank", (0, 4)))
    space.add(EqualsCondition(depth, kind, "b"), InCondition(rate, kind, ["a", "c"]))
    return space


def active_parts(space: ConfigurationSpace) -> Any:
    """An acquisition function for any space: prefers high values of everything that is active."""
    return lambda points: np.nansum(points, axis=1) / (1 + np.isnan(points).sum(axis=1))


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15)
def test_every_point_is_legal_best_first_and_unique(seed: int) -> None:
    space = mixed_space()
    search, known = maximiser(space, active_parts(space), seed)
    previous = space.sample_configuration(5)
    found = search._maximize(previous, 5000)
    values = [value for value, _ in found]
    assert 1 < len(found) <= POOL
    assert values == sorted(values, reverse=True)
    assert len({config.get_array().tobytes() for _, config in found}) == len(found)
    for value, config in found:
        config.check_valid_configuration()
        assert config["kind"] in ("a", "b", "c")
        assert ("depth" in config) == (config["kind"] == "b")
        assert ("rate" in config) == (config["kind"] != "b")
        assert value == pytest.approx(known.function(config.get_array()[np.newaxis])[0])
    for points in known.points:
        assert np.nanmin(points) >= 0
        kinds = points[:, list(space).index("kind")]
        assert np.isin(kinds, [0, 1, 2]).all()
        assert np.isin(8 * points[kinds == 1, list(space).index("depth")], np.arange(9)).all(), "integers from 1 to 9"
        assert np.isin(4 * points[:, list(space).index("rank")], np.arange(5)).all(), "integers from 0 to 4"
        numbers = np.delete(points, list(space).index("kind"), axis=1)
        assert np.nanmax(numbers) <= 1
        assert (np.isnan(points[:, list(space).index("depth")]) == (kinds != 1)).all()
        assert (np.isnan(points[:, list(space).index("rate")]) == (kinds == 1)).all()


def test_it_finds_the_maximum_of_a_known_function() -> None:
    """A narrow peak under one of three choices, at depth 7 of 9; elsewhere a wide hill of half the height."""
    space = mixed_space()
    at = {name: index for index, name in enumerate(space)}

    def function(points: Any) -> Any:
        weight, kind = points[:, at["weight"]], points[:, at["kind"]]
        depth = np.nan_to_num(points[:, at["depth"]])
        peak = np.exp(-(((weight - 0.3) / 0.05) ** 2)) * np.exp(-(((depth - 0.75) / 0.1) ** 2))
        hill = 0.5 * np.exp(-((weight - 0.8) ** 2))
        return np.where(kind == 1, peak, hill)

    for seed in range(3):
        value, best = maximiser(space, function, seed)[0]._maximize([], 1)[0]
        assert value > 0.99
        assert best["kind"] == "b"
        assert best["depth"] in (6, 7)
        assert best["weight"] == pytest.approx(0.3, abs=0.01)


def test_a_known_good_point_is_climbed_from() -> None:
    """A needle that no random point hits: the climb starts from what was evaluated before."""
    space = ConfigurationSpace(seed=0)
    space.add(*(Float(f"x{index}", (0.0, 1.0)) for index in range(10)))
    centre = np.full(10, 0.37)
    search, known = maximiser(space, lambda points: -np.linalg.norm(points - centre, axis=1))
    near = Configuration(space, vector=centre + 0.03)
    start = float(known.function(near.get_array()[np.newaxis])[0])
    value, _ = search._maximize([near], 1)[0]
    assert value > start / 3


def test_integers_are_climbed() -> None:
    """Twelve integers of three values and one of a thousand: random points alone would not find the best."""
    space = ConfigurationSpace(seed=0)
    space.add(*(Integer(f"x{index:02}", (0, 2)) for index in range(12)), Integer("x12", (1, 1000)))
    target = np.array([0.5] * 12 + [0.3])
    _, best = maximiser(space, lambda points: -np.abs(points - target).sum(axis=1))[0]._maximize([], 1)[0]
    assert [best[f"x{index:02}"] for index in range(12)] == [1] * 12
    assert best["x12"] == pytest.approx(300, abs=10)


def test_all_points_of_a_small_space_of_integers_are_found_and_no_old_one_is_handed_over() -> None:
    space = ConfigurationSpace(seed=0)
    space.add(Integer("rank", (1, 3)), Integer("depth", (0, 4)))
    search, _ = maximiser(space, active_parts(space))
    known = [Configuration(space, values={"rank": rank, "depth": depth}) for rank in (1, 2) for depth in range(5)]
    found = [dict(config) for _, config in search._maximize(known, 1)]
    assert sorted(config["depth"] for config in found) == [0, 1, 2, 3, 4]
    assert {config["rank"] for config in found} == {3}


def test_undefined_values_lose() -> None:
    space = mixed_space()
    at = list(space).index("weight")

    def function(points: Any) -> Any:
        return np.where(points[:, at] > 0.5, np.nan, points[:, at])

    value, best = maximiser(space, function)[0]._maximize([], 1)[0]
    assert 0.49 < value <= 0.5
    assert best["weight"] <= 0.5


def test_a_flat_function_still_gives_points() -> None:
    found = maximiser(mixed_space(), lambda points: np.zeros(len(points)))[0]._maximize([], 1)
    assert len(found) == POOL


def test_of_equal_points_the_earliest_is_kept() -> None:
    points = np.array([[0.1, np.nan], [0.9, 0.2], [0.1, np.nan], [0.5, 0.5]])
    kept, values = _best(points, np.array([1.0, 1.0, 1.0, 3.0]), 3)
    assert np.array_equal(kept, [[0.5, 0.5], [0.1, np.nan], [0.9, 0.2]], equal_nan=True)
    assert values.tolist() == [3.0, 1.0, 1.0]


def test_spaces_of_another_kind_are_refused() -> None:
    space = ConfigurationSpace()
    space.add(Constant("fixed", 1))
    with pytest.raises(SearchError, match="'fixed' is of no kind that can be searched"):
        VectorisedMaximiser(space, 0)
    space = ConfigurationSpace()
    parent, child = Float("parent", (0.0, 1.0)), Float("child", (0.0, 1.0))
    space.add(parent, child)
    space.add(GreaterThanCondition(child, parent, 0.5))
    with pytest.raises(SearchError, match=r"condition .* is of no kind that can be searched"):
        VectorisedMaximiser(space, 0)
    space = ConfigurationSpace()
    first, second, third = (CategoricalHyperparameter(name, ["a", "b"]) for name in ("first", "second", "third"))
    space.add(first, second, third)
    space.add(AndConjunction(EqualsCondition(third, first, "a"), EqualsCondition(third, second, "a")))
    with pytest.raises(SearchError, match=r"condition .* is of no kind that can be searched"):
        VectorisedMaximiser(space, 0)


def trained_acquisition(seed: int) -> tuple[ConfigurationSpace, EI, list[Configuration]]:
    """Log expected improvement over a forest on 80 points of a search of three blocks and five techniques."""
    search_space = make_space(SearchSpec(preset="paper"))
    space = search_space.configuration_space(seed)
    points = space.sample_configuration(80)
    costs = []
    for point in points:
        losses = landscape(search_space.recipe_blocks(dict(point)))
        costs.append(1 / harmonic_mean({task: 0.1 / loss for task, loss in losses.items()}))
    arrays = np.array([point.get_array() for point in points])
    forest = Forest(space, seed)
    forest.train(arrays, np.log(costs)[:, np.newaxis])
    acquisition = EI(log=True)
    acquisition.update(model=forest, eta=float(forest.predict_marginalized(arrays)[0].min()))
    return space, acquisition, points


def test_it_reaches_what_smacs_own_maximiser_reaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the same forests; SMAC's default maximiser is the reference, and the ratios are printed."""
    ratios, ours_seconds, smac_seconds = [], 0.0, 0.0
    for seed in range(5):
        space, acquisition, points = trained_acquisition(seed)
        scenario = Scenario(space, n_trials=100, seed=seed, output_directory=tmp_path)
        smac = HyperparameterOptimizationFacade.get_acquisition_maximizer(scenario)
        smac.acquisition_function = acquisition
        start = time.perf_counter()
        reference = max(float(np.asarray(value).item()) for value, _ in smac._maximize(points, 1000))
        smac_seconds += time.perf_counter() - start
        ours = VectorisedMaximiser(space, seed)
        ours.acquisition_function = acquisition
        start = time.perf_counter()
        reached, config = ours._maximize(points, 1000)[0]
        ours_seconds += time.perf_counter() - start
        assert reached == pytest.approx(float(acquisition([config])[0, 0])), "the value belongs to the point"
        ratios.append(reached / reference)
    with capsys.disabled():
        text = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"\nacquisition reached, ours / SMAC's: {text}; seconds, ours / SMAC's: {ours_seconds / smac_seconds:.3f}"
        )
    assert np.exp(np.mean(np.log(ratios))) >= 1.0
    assert min(ratios) > 0.9


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
import hashlib
from automerge.searching.maximiser import VectorisedMaximiser
from tests.searching.test_maximiser import active_parts, maximiser, mixed_space
space = mixed_space()
print(hashlib.sha256(repr([(v, dict(c)) for v, c in maximiser(space, active_parts(space), 3)[0]._maximize(
    space.sample_configuration(20), 1)]).encode()).hexdigest())
"""


def test_the_hash_seed_has_no_part_in_it() -> None:
    space = mixed_space()
    found = maximiser(space, active_parts(space), 3)[0]._maximize(space.sample_configuration(20), 1)
    expected = hashlib.sha256(repr([(value, dict(config)) for value, config in found]).encode()).hexdigest()
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == expected

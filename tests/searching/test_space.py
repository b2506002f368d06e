"""The space: what is in it, how weights are spread over the sources, and that every point is a mergeable recipe."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
from ConfigSpace import Configuration
from hypothesis import given
from hypothesis import strategies as st

from automerge.checkpoint.info import TensorInfo
from automerge.errors import SearchError
from automerge.merging.plan import plan_merge
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock, block_key
from automerge.merging.technique import Declaration, Hyperparameter, load_technique, usable_techniques
from automerge.searching.space import SearchSpace, _fractions, _simplex
from automerge.spec import SearchSpec
from tests.searching.synthetic import TECHNIQUES, make_block, make_space

WITHOUT_DENSITY = {"linear", "task_arithmetic"}

MANY = [*TECHNIQUES, "breadcrumbs", "della", "della_linear", "iso_c", "consensus_ta", "sce"]

Mode = Literal["simplex", "independent"]


def spec_of(weights: Mode, **changes: Any) -> SearchSpec:
    """A spec with simplex weights as published, or independent ones beyond them."""
    return SearchSpec(preset="paper" if weights == "simplex" else "best", weights=weights, **changes)


def usable_space(
    spec: SearchSpec, sources: Sequence[str] = ("low", "high"), *, blocks: int = 3, has_base: bool = True
) -> SearchSpace:
    """A space of the techniques that fit, as a search has it."""
    unnormalised = spec.weights == "independent" and has_base
    techniques, _ = usable_techniques(
        spec.techniques, sources=len(sources), has_base=has_base, unnormalised=unnormalised
    )
    return SearchSpace([make_block(f"b{index}") for index in range(blocks)], list(sources), techniques, spec, has_base)


def sampled(space: SearchSpace, count: int, seed: int = 0) -> list[dict[str, object]]:
    """Points in the form in which the optimiser proposes them: plain Python values."""
    configs = space.configuration_space(seed).sample_configuration(count)
    return [{key: np.asarray(value).item() for key, value in dict(config).items()} for config in configs]


def plan(space: SearchSpace, blocks: list[RecipeBlock]) -> None:
    """The merging package's own check of a recipe against its inputs; raises MergeError."""
    names = {name: TensorInfo("float32", (2, 2)) for block in space.blocks for name in block.parameters}
    names |= {name: TensorInfo("float32", (2,)) for block in space.blocks for name in block.buffers}
    recipe = Recipe(
        base=InputDigest(name="base", digest="b"),
        sources=[InputDigest(name=source, digest=source) for source in space.sources],
        blocks=blocks,
    )
    plan_merge(recipe, names, dict.fromkeys(space.sources, names))


# Weights on the simplex


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_stick_breaking_stays_on_the_simplex(fractions: list[float]) -> None:
    weights = _simplex(fractions)
    assert len(weights) == len(fractions) + 1
    assert all(0 <= weight <= 1 for weight in weights)
    assert sum(weights) == pytest.approx(1, abs=1e-12)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=7))
def test_stick_breaking_is_inverted(parts: list[float]) -> None:
    weights = [part / sum(parts) for part in parts]
    fractions = _fractions(weights)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert _simplex(fractions) == pytest.approx(weights, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_corners_and_centre_are_reached_exactly(count: int) -> None:
    """Warm starts are corners and the centre: an unmerged source must be that source, not almost."""
    for index in range(count):
        corner = [float(index == other) for other in range(count)]
        assert _simplex(_fractions(corner)) == corner
    assert _simplex(_fractions([1 / count] * count)) == pytest.approx([1 / count] * count, abs=1e-15)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_uniform_fractions_are_uniform_on_the_simplex(count: int) -> None:
    """Each weight of a uniform point on the simplex has the distribution function 1 - (1 - w)^(n - 1), and no order
    of the sources is preferred; 1.63 / sqrt(samples) is the Kolmogorov-Smirnov bound at the 1 % level.
    """
    samples = 4000
    random = np.random.default_rng(3)
    weights = np.array([_simplex(fractions) for fractions in random.random((samples, count - 1)).tolist()])
    steps = np.arange(1, samples + 1) / samples
    for index in range(count):
        expected = 1 - (1 - np.sort(weights[:, index])) ** (count - 1)
        assert np.abs(expected - steps).max() < 1.63 / np.sqrt(samples)
    # Any two weights of a uniform point are correlated by -1 / (n - 1).
    correlations = np.corrcoef(weights.T)[~np.eye(count, dtype=bool)]
    assert correlations == pytest.approx(np.full(len(correlations), -1 / (count - 1)), abs=0.06)


@given(st.floats(0, 1))
def test_two_sources_have_the_published_weight(weight: float) -> None:
    space = make_space(SearchSpec(preset="paper", techniques=["linear"]), blocks=1)
    assert list(space.configuration_space(0)) == ["b0/weight/low"]
    (block,) = space.recipe_blocks({"b0/weight/low": weight})
    assert block.weights == {"low": weight, "high": 1 - weight}


def test_the_range_bounds_the_published_weight() -> None:
    space = make_space(SearchSpec(weights="simplex", weight_range=[0.2, 0.6], techniques=["linear"]), blocks=1)
    drawn = [config["b0/weight/low"] for config in sampled(space, 300)]
    assert min(drawn) >= 0.2 and max(drawn) <= 0.6
    assert min(drawn) < 0.22 and max(drawn) > 0.58


# Independent weights


def test_independent_weights_are_one_number_a_source_and_unnormalised() -> None:
    space = make_space(SearchSpec(weights="independent", weight_range=[-0.5, 1.5]), sources=("a", "b", "c"), blocks=1)
    keys = [key for key in space.configuration_space(0) if "/weight/" in key]
    assert sorted(keys) == ["b0/weight/a", "b0/weight/b", "b0/weight/c"]
    point = {"b0/technique": "ties", "b0/density": 0.7, "b0/weight/a": -0.5, "b0/weight/b": 1.5, "b0/weight/c": 1.25}
    (block,) = space.recipe_blocks(point)
    assert block.weights == {"a": -0.5, "b": 1.5, "c": 1.25}
    assert block.hyperparameters["normalize"] is False
    drawn = np.array([[config[key] for key in keys] for config in sampled(space, 300)], dtype=float)
    assert drawn.min() >= -0.5 and drawn.max() <= 1.5
    assert np.ptp(drawn.sum(axis=1)) > 2, "the weights share nothing"


def test_simplex_weights_leave_ties_normalised() -> None:
    space = make_space(SearchSpec(preset="paper"), blocks=1)
    (block,) = space.recipe_blocks({"b0/technique": "ties", "b0/density": 0.7, "b0/weight/low": 0.25})
    assert block.hyperparameters == {"density": 0.7, "lambda": 1.0, "normalize": True}


# Conditional hyperparameters


def test_density_exists_only_under_the_techniques_that_have_it() -> None:
    configs = sampled(make_space(SearchSpec()), 200)
    seen = set()
    for config in configs:
        for block in ("b0", "b1", "b2"):
            technique = config[f"{block}/technique"]
            seen.add(technique)
            assert (f"{block}/density" in config) == (technique not in WITHOUT_DENSITY)
            if f"{block}/density" in config:
                assert 0.5 <= float(str(config[f"{block}/density"])) <= 1.0
    assert seen == set(TECHNIQUES)


def test_a_hyperparameter_of_all_techniques_is_unconditional() -> None:
    space = make_space(SearchSpec(preset="paper", techniques=["ties", "dare_ties"]), blocks=1).configuration_space(0)
    assert sorted(space) == ["b0/density", "b0/technique", "b0/weight/low"]
    assert space.conditions == []


def test_one_technique_leaves_no_choice() -> None:
    ties = make_space(SearchSpec(preset="paper", techniques=["ties"], density_range=[0.3, 0.4]), blocks=2)
    space = ties.configuration_space(0)
    assert sorted(space) == ["b0/density", "b0/weight/low", "b1/density", "b1/weight/low"]
    assert space.conditions == []
    blocks = ties.recipe_blocks(dict(space.sample_configuration()))
    assert [block.technique for block in blocks] == ["ties", "ties"]
    assert all(0.3 <= float(block.hyperparameters["density"]) <= 0.4 for block in blocks)
    linear = make_space(SearchSpec(preset="paper", techniques=["linear"]), blocks=1)
    assert sorted(linear.configuration_space(0)) == ["b0/weight/low"]


def declared(name: str, *hyperparameters: Hyperparameter) -> Declaration:
    return Declaration(name=name, source="", hyperparameters=hyperparameters)


def test_every_kind_of_hyperparameter_can_be_searched() -> None:
    plugin = declared(
        "linear",
        Hyperparameter("rank", "int", default=4, low=1, high=8, searched=True),
        Hyperparameter("mode", "choice", default="a", choices=("a", "b"), searched=True),
        Hyperparameter("centre", "bool", default=True, searched=True),
        Hyperparameter("strength", "float", default=1.0, low=0.0, high=2.0, searched=True),
        Hyperparameter("fixed", "float", default=0.25),
    )
    space = SearchSpace([make_block("b0")], ["low", "high"], {"linear": plugin}, SearchSpec(preset="paper"))
    found: dict[str, set[object]] = {}
    for config in sampled(space, 100):
        (block,) = space.recipe_blocks(config)
        for key, value in block.hyperparameters.items():
            found.setdefault(key, set()).add(value)
    assert found["rank"] == set(range(1, 9)) and {type(value) for value in found["rank"]} == {int}
    assert found["mode"] == {"a", "b"}
    assert found["centre"] == {True, False} and {type(value) for value in found["centre"]} == {bool}
    assert all(0 <= float(str(value)) <= 2 for value in found["strength"])
    assert found["fixed"] == {0.25}


def test_a_searched_hyperparameter_without_a_range_is_refused() -> None:
    plugin = declared("linear", Hyperparameter("strength", "float", default=1.0, searched=True))
    space = SearchSpace([make_block("b0")], ["low", "high"], {"linear": plugin}, SearchSpec(preset="paper"))
    with pytest.raises(SearchError, match="'strength' is searched but declares no range"):
        space.configuration_space(0)


def test_hyperparameters_of_one_name_and_other_meanings_stay_apart() -> None:
    """Two techniques may call different things 'strength': each keeps its own range and default."""
    near = declared("near", Hyperparameter("strength", "float", default=0.5, low=0.0, high=1.0, searched=True))
    far = declared("far", Hyperparameter("strength", "int", default=40, low=10, high=90, searched=True))
    space = SearchSpace([make_block("b0")], ["low", "high"], {"near": near, "far": far}, SearchSpec())
    values: dict[str, list[float]] = {"near": [], "far": []}
    for config in sampled(space, 60):
        (block,) = space.recipe_blocks(config)
        values[block.technique].append(float(block.hyperparameters["strength"]))
    assert 0 <= min(values["near"]) < max(values["near"]) <= 1
    assert 10 <= min(values["far"]) < max(values["far"]) <= 90
    for technique, default in (("near", 0.5), ("far", 40)):
        (block,) = space.recipe_blocks(space._point([0.5, 0.5], [technique]))
        assert block.hyperparameters == {"strength": default}


# Blocks that have only buffers


def test_a_block_with_only_buffers_is_not_searched_and_is_averaged() -> None:
    techniques, _ = usable_techniques(TECHNIQUES, sources=2, has_base=True)
    blocks = [make_block("b0"), make_block("rest", parameters=(), buffers=("mean", "variance"))]
    space = SearchSpace(blocks, ["low", "high"], techniques, SearchSpec())
    assert not [key for key in space.configuration_space(0) if key.startswith("rest/")]
    for point in (space.average(), *(point for _, point in space.warm_starts()), *sampled(space, 2)):
        rest = space.recipe_blocks(point)[1]
        assert rest.weights == {"low": 0.5, "high": 0.5}
        assert rest.parameters == [] and rest.buffers == ["rest.mean", "rest.variance"]
        plan(space, space.recipe_blocks(point))


# Warm starts


@pytest.mark.parametrize("weights", ["simplex", "independent"])
@pytest.mark.parametrize("sources", [("low", "high"), ("a", "b", "c")])
def test_warm_starts_are_the_average_each_source_and_the_base(weights: Mode, sources: tuple[str, ...]) -> None:
    space = usable_space(spec_of(weights), sources, blocks=2)
    starts = dict(space.warm_starts())
    base = ["base"] if weights == "independent" else []
    assert list(starts) == ["average", *(f"source:{name}" for name in sources), *base]
    for origin, point in starts.items():
        Configuration(space.configuration_space(0), values=point).check_valid_configuration()
        plan(space, space.recipe_blocks(point))
        for block in space.recipe_blocks(point):
            assert block.technique == ("linear" if weights == "simplex" else "task_arithmetic")
            wanted = {name: float(origin == f"source:{name}") for name in sources}
            if origin == "average":
                wanted = dict.fromkeys(sources, 1 / len(sources))
            assert block.weights == pytest.approx(wanted, abs=1e-15)


def test_independent_weights_never_start_from_linear() -> None:
    """It divides by the weights' sum, so of the base it would make an error, and of others what they are not."""
    space = make_space(SearchSpec(weights="independent", techniques=["linear", "task_arithmetic"]))
    points = dict(space.warm_starts())
    assert {block.technique for block in space.recipe_blocks(points["base"])} == {"task_arithmetic"}
    assert [origin for origin, _ in make_space(SearchSpec(techniques=["linear"])).warm_starts()] == ["average"]


def test_warm_starts_outside_the_range_are_left_out() -> None:
    space = make_space(SearchSpec(weights="simplex", weight_range=[0.3, 0.7]))
    assert [origin for origin, _ in space.warm_starts()] == ["average"]
    space = make_space(SearchSpec(weights="independent", weight_range=[0.6, 2.0]))
    assert space.warm_starts() == []
    space = make_space(SearchSpec(weights="independent", weight_range=[0.2, 2.0]))
    assert [origin for origin, _ in space.warm_starts()] == ["average"]
    space = make_space(SearchSpec(weights="independent", weight_range=[-0.5, 0.8]))
    assert [origin for origin, _ in space.warm_starts()] == ["average", "base"]


def test_a_default_outside_the_range_is_moved_into_it() -> None:
    space = make_space(SearchSpec(techniques=["ties"], density_range=[0.8, 0.9]))
    assert {value for key, value in space.average().items() if key.endswith("density")} == {0.8}
    Configuration(space.configuration_space(0), values=space.average()).check_valid_configuration()


def test_unmerged_sources_need_a_technique_that_leaves_a_source_as_it_is() -> None:
    starts = make_space(SearchSpec(techniques=["ties", "dare_linear"])).warm_starts()
    assert [origin for origin, _ in starts] == ["average"]
    starts = make_space(SearchSpec(techniques=["ties", "task_arithmetic"])).warm_starts()
    assert {value for _, point in starts for key, value in point.items() if key.endswith("technique")} == {
        "task_arithmetic"
    }


# Without a base


def test_without_a_base_weights_are_on_the_simplex() -> None:
    spec = SearchSpec(weights="independent", weight_range=[-0.5, 1.5])
    space = usable_space(spec, has_base=False, blocks=2)
    assert list(space.techniques) == ["linear"]
    configuration_space = space.configuration_space(0)
    assert list(configuration_space) == ["b0/weight/low", "b1/weight/low"]
    assert all((each.lower, each.upper) == (0, 1) for each in configuration_space.values())
    assert [origin for origin, _ in space.warm_starts()] == ["average", "source:low", "source:high"]
    for config in sampled(space, 20):
        for block in space.recipe_blocks(config):
            assert sum(block.weights.values()) == pytest.approx(1)
            assert min(block.weights.values()) >= 0


def test_a_simplex_range_holds_without_a_base_too() -> None:
    spec = SearchSpec(weights="simplex", weight_range=[0.3, 0.6])
    (weight,) = usable_space(spec, has_base=False, blocks=1).configuration_space(0).values()
    assert (weight.lower, weight.upper) == (0.3, 0.6)


# The published space


def test_the_published_space_has_the_published_dimensions() -> None:
    """Names, order, ranges and conditions; a log of a search is replayed over them."""
    blocks = [make_block("0-convolutional"), make_block("1-sequence", buffers=("mean",))]
    techniques, _ = usable_techniques(TECHNIQUES, sources=2, has_base=True)
    space = SearchSpace(blocks, ["low", "high"], techniques, SearchSpec(preset="paper")).configuration_space(0)
    assert sorted(space) == sorted(
        f"{block}/{name}"
        for block in ("0-convolutional", "1-sequence")
        for name in ("density", "technique", "weight/low")
    )
    assert list(space) == [
        "0-convolutional/technique",
        "0-convolutional/weight/low",
        "1-sequence/technique",
        "1-sequence/weight/low",
        "0-convolutional/density",
        "1-sequence/density",
    ]
    assert space["1-sequence/technique"].choices == tuple(TECHNIQUES)
    assert (space["1-sequence/weight/low"].lower, space["1-sequence/weight/low"].upper) == (0.0, 1.0)
    assert (space["1-sequence/density"].lower, space["1-sequence/density"].upper) == (0.5, 1.0)
    assert [(each.child.name, each.parent.name, list(each.values)) for each in space.conditions] == [
        (f"{block}/density", f"{block}/technique", ["ties", "dare_linear", "dare_ties"])
        for block in ("0-convolutional", "1-sequence")
    ]


# From a recipe back to a point


Points = st.tuples(st.integers(0, 2**31 - 1), st.integers(2, 4), st.sampled_from(["simplex", "independent"]))


@given(
    Points,
    st.lists(st.sampled_from(MANY), min_size=1, unique=True),
    st.integers(1, 3),
    st.floats(0.05, 0.9),
    st.booleans(),
)
def test_a_recipe_of_the_space_leads_back_to_its_point(
    drawn: tuple[int, int, Mode], techniques: list[str], blocks: int, low: float, has_base: bool
) -> None:
    seed, sources, weights = drawn
    names = list(dict.fromkeys(["linear", "task_arithmetic", *techniques]))  # so that some fit in every mode
    spec = spec_of(weights, techniques=names, density_range=[low, 1.0])
    space = usable_space(spec, [f"s{index}" for index in range(sources)], blocks=blocks, has_base=has_base)
    for config in sampled(space, 3, seed):
        recipe = space.recipe_blocks(config)
        point = space.from_recipe(recipe)
        assert space.recipe_blocks(point) == recipe, "it is the very same recipe"
        Configuration(space.configuration_space(0), values=point).check_valid_configuration()
        if space.mode == "independent" or sources == 2:
            assert point == config
        else:  # N - 1 fractions are weights to within their last digits
            assert {key: value for key, value in point.items() if "/weight/" not in key} == {
                key: value for key, value in config.items() if "/weight/" not in key
            }
            assert point == {
                key: pytest.approx(value, abs=1e-9) if "/weight/" in key else value for key, value in config.items()
            }
    for _, point in space.warm_starts():
        assert space.recipe_blocks(space.from_recipe(space.recipe_blocks(point))) == space.recipe_blocks(point)


@given(
    st.integers(2, 6).flatmap(lambda count: st.lists(st.floats(0, 1), min_size=count, max_size=count)),
)
def test_weights_on_the_simplex_survive_the_way_there_and_back(fractions: list[float]) -> None:
    weights = _simplex(fractions)
    assert _simplex(_fractions(weights)) == pytest.approx(weights, abs=1e-12)


def one(technique: str, weights: Mapping[str, float], name: str = "x", **hyperparameters: Any) -> RecipeBlock:
    """A recipe's block with the parameters of ``b0``."""
    defaults = load_technique(technique).declaration.defaults()
    return RecipeBlock(
        name=name,
        technique=technique,
        weights=dict(weights),
        hyperparameters=defaults | hyperparameters,
        parameters=["b0.w"],
    )


def nearest_to(block: RecipeBlock, spec: SearchSpec, sources: tuple[str, ...] = ("low", "high")) -> RecipeBlock:
    space = usable_space(spec, sources, blocks=1)
    point = space.from_recipe([block])
    Configuration(space.configuration_space(0), values=point).check_valid_configuration()
    return space.recipe_blocks(point)[0]


def test_a_published_recipe_is_a_point_of_the_wider_space() -> None:
    """Linear has no form with independent weights, but is task arithmetic."""
    found = nearest_to(one("linear", {"low": 0.25, "high": 0.75}), spec_of("independent"))
    assert (found.technique, found.weights) == ("task_arithmetic", {"low": 0.25, "high": 0.75})
    assert block_key(found) == block_key(one("linear", {"low": 0.25, "high": 0.75}))
    found = nearest_to(one("linear", {"low": 3.0, "high": 1.0}), spec_of("independent"))
    assert found.weights == {"low": 0.75, "high": 0.25}


def test_what_lambda_and_normalising_do_goes_into_the_weights() -> None:
    found = nearest_to(one("task_arithmetic", {"low": 2.0, "high": 3.0}, **{"lambda": 0.3}), spec_of("independent"))
    assert (found.technique, found.hyperparameters) == ("task_arithmetic", {"lambda": 1.0})
    assert found.weights == pytest.approx({"low": 0.6, "high": 0.9})
    ties = one("ties", {"low": 2.0, "high": 6.0}, density=0.6, **{"lambda": 1.2})
    found = nearest_to(ties, spec_of("independent"))
    assert found.hyperparameters == {"density": 0.6, "lambda": 1.0, "normalize": False}
    assert found.weights == pytest.approx({"low": 0.3, "high": 0.9})


def test_values_outside_their_ranges_are_moved_to_the_ends() -> None:
    found = nearest_to(one("ties", {"low": -2.0, "high": 9.0}, density=0.1, normalize=False), spec_of("independent"))
    assert found.weights == {"low": -0.5, "high": 1.5}
    assert found.hyperparameters["density"] == 0.5
    found = nearest_to(one("ties", {"low": 0.9, "high": 0.1}), SearchSpec(weights="simplex", weight_range=[0.2, 0.7]))
    assert found.weights == {"low": 0.7, "high": pytest.approx(0.3)}
    found = nearest_to(one("consensus_ta", {"low": 1, "high": 1}), spec_of("simplex", techniques=["consensus_ta"]))
    assert found.weights == {"low": 0.5, "high": 0.5} and found.hyperparameters["agreement"] == 2


def test_weights_off_the_simplex_are_scaled_onto_it() -> None:
    sources = ("low", "mid", "high")
    found = nearest_to(one("linear", {"low": 1.0, "mid": 1.0, "high": 2.0}), spec_of("simplex"), sources)
    assert found.weights == pytest.approx({"low": 0.25, "mid": 0.25, "high": 0.5})
    task_vectors = one("task_arithmetic", {"low": -0.5, "mid": 0.3, "high": 0.1})
    found = nearest_to(task_vectors, spec_of("simplex"), sources)
    assert found.weights == pytest.approx({"low": 0.0, "mid": 0.75, "high": 0.25})
    nothing = one("task_arithmetic", {"low": 0.0, "mid": 0.0, "high": 0.0})
    assert nearest_to(nothing, spec_of("simplex"), sources).weights == pytest.approx(dict.fromkeys(sources, 1 / 3))


def test_a_simpler_form_is_taken_where_the_space_has_only_that() -> None:
    """DARE that keeps everything is task arithmetic, and task arithmetic with weights that sum to 1 is linear."""
    everything = one("dare_linear", {"low": 0.25, "high": 0.75}, density=1.0)
    assert nearest_to(everything, spec_of("independent", techniques=["task_arithmetic"])).technique == "task_arithmetic"
    found = nearest_to(everything, spec_of("simplex", techniques=["linear", "ties"]))
    assert (found.technique, found.weights) == ("linear", {"low": 0.25, "high": 0.75})


def test_a_block_takes_what_holds_most_of_its_parameters() -> None:
    techniques, _ = usable_techniques(["linear"], sources=2, has_base=True)
    block = make_block("b", parameters=("1", "2", "3", "4"))
    space = SearchSpace([block], ["low", "high"], techniques, spec_of("simplex", techniques=["linear"]))

    def part(weight: float, *names: str) -> RecipeBlock:
        update = {"parameters": [f"b.{name}" for name in names]}
        return one("linear", {"low": weight, "high": 1 - weight}).model_copy(update=update)

    assert space.from_recipe([part(0.1, "1"), part(0.2, "2", "3"), part(0.3, "4")]) == {"b/weight/low": 0.2}
    assert space.from_recipe([part(0.2, "2", "3"), part(0.3, "1", "4")]) == {"b/weight/low": 0.2}, "the first of equals"
    assert space.from_recipe([part(0.2), part(0.3, "1")]) == {"b/weight/low": 0.3}


def test_an_earlier_recipe_of_fewer_sources_leaves_the_new_one_out() -> None:
    sources = ("low", "high", "new")
    found = nearest_to(one("ties", {"low": 0.5, "high": 1.0}, normalize=False), spec_of("independent"), sources)
    assert found.weights == {"low": 0.5, "high": 1.0, "new": 0.0}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            one("sce", {"low": 1, "high": 1}),
            r"block 'b0': the recipe merges it by 'sce', .*; its techniques are: task_ar",
        ),
        (one("ties", {"low": 1, "hihg": 1}), r"block 'b0': the recipe merges the source 'hihg'; the sources are: low"),
        (
            one("ties", {"low": 1, "high": 1}, density=7.0),
            r"block 'b0': hyperparameter 'density' is 7.0; choose a value",
        ),
        (
            one("ties", {"low": 1, "high": 1}, densty=0.5),
            r"block 'b0': .* no hyperparameter 'densty'; did you mean 'densi",
        ),
        (one("linear", {"low": 1, "high": -1}), r"block 'b0': .*sum of the weights, which is zero"),
        (
            one("ties", {"low": 1, "high": 1}).model_copy(update={"parameters": ["other"]}),
            r"block 'b0': the recipe has none of its parameters",
        ),
    ],
)
def test_recipes_that_are_no_point_are_refused(block: RecipeBlock, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        usable_space(spec_of("independent"), blocks=1).from_recipe([block])


# All of it


@given(
    seed=st.integers(0, 2**31 - 1),
    sources=st.integers(2, 4),
    weights=st.sampled_from(["simplex", "independent"]),
    techniques=st.lists(st.sampled_from(TECHNIQUES), min_size=1, unique=True),
    blocks=st.integers(1, 3),
    low=st.floats(0.05, 0.9),
)
def test_any_point_is_a_mergeable_recipe_and_stays_what_it_was(
    seed: int, sources: int, weights: Mode, techniques: list[str], blocks: int, low: float
) -> None:
    spec = spec_of(weights, techniques=techniques, density_range=[low, 1.0])
    space = make_space(spec, sources=[f"s{index}" for index in range(sources)], blocks=blocks)
    for config in [*sampled(space, 3, seed), *(point for _, point in space.warm_starts())]:
        recipe_blocks = space.recipe_blocks(config)
        plan(space, recipe_blocks)
        assert [block.name for block in recipe_blocks] == [block.name for block in space.blocks]
        for block in recipe_blocks:
            assert list(block.weights) == list(space.sources)
            if weights == "simplex":
                assert sum(block.weights.values()) == pytest.approx(1)
        again = [RecipeBlock.model_validate_json(block.model_dump_json()) for block in recipe_blocks]
        assert again == recipe_blocks
        assert [block_key(block) for block in again] == [block_key(block) for block in recipe_blocks]


def test_the_same_arguments_give_the_same_space() -> None:
    first, second = (make_space(SearchSpec()).configuration_space(7) for _ in range(2))
    assert first == second
    assert list(first) == list(second)
    assert first.sample_configuration(5) == second.sample_configuration(5)

"""Constraints: what they fix, forbid and share in the space, and that what cannot be followed is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from ConfigSpace import Configuration
from hypothesis import given
from hypothesis import strategies as st

from automerge.errors import SearchError
from automerge.merging.recipe import RecipeBlock
from automerge.merging.technique import usable_techniques
from automerge.searching.space import SearchSpace
from automerge.spec import SearchSpec
from tests.searching.synthetic import TECHNIQUES, make_block

NAMES = ("0-convolutional", "1-sequence/layers.0", "1-sequence/layers.1", "2-vector")


def space_of(
    *constraints: Mapping[str, Any],
    weights: str = "simplex",
    sources: Sequence[str] = ("low", "high"),
    techniques: Sequence[str] = TECHNIQUES,
    names: Sequence[str] = NAMES,
) -> SearchSpace:
    """The space of four blocks, and a fifth that has only buffers."""
    spec = SearchSpec(
        preset="paper" if weights == "simplex" else "best",
        weights=weights,  # type: ignore[arg-type]
        techniques=list(techniques),
        constraints=list(constraints),  # type: ignore[arg-type]
    )
    found, _ = usable_techniques(
        spec.techniques, sources=len(sources), has_base=True, unnormalised=weights == "independent"
    )
    blocks = [*map(make_block, names), make_block("statistics", parameters=(), buffers=("mean",))]
    return SearchSpace(blocks, list(sources), found, spec)


def keys(space: SearchSpace) -> list[str]:
    return sorted(space.configuration_space(0))


def drawn(space: SearchSpace, count: int = 60) -> list[dict[str, RecipeBlock]]:
    """Recipes of random points, by block."""
    configs = space.configuration_space(0).sample_configuration(count)
    points = [{key: np.asarray(value).item() for key, value in dict(config).items()} for config in configs]
    return [{block.name: block for block in space.recipe_blocks(point)} for point in points]


def test_one_technique_is_no_dimension_and_the_others_keep_theirs() -> None:
    free, space = space_of(), space_of({"blocks": "2-*", "techniques": ["ties"]})
    assert set(keys(free)) - set(keys(space)) == {"2-vector/technique"}
    # A density that is always there has no condition.
    assert "2-vector/density" not in {condition.child.name for condition in space.configuration_space(0).conditions}
    for blocks in drawn(space):
        assert blocks["2-vector"].technique == "ties"
    assert {blocks["0-convolutional"].technique for blocks in drawn(space)} == set(TECHNIQUES)


def test_techniques_and_forbidden_ones_of_all_constraints_add_up() -> None:
    space = space_of(
        {"blocks": "*", "forbid": ["dare_ties"]},
        {"blocks": "1-*", "techniques": ["dare_ties", "ties", "linear"]},
        {"blocks": "*layers.1", "forbid": ["ties"]},
    )
    seen: dict[str, set[str]] = {}
    for blocks in drawn(space, 150):
        for name, block in blocks.items():
            seen.setdefault(name, set()).add(block.technique)
    assert seen["0-convolutional"] == set(TECHNIQUES) - {"dare_ties"}
    assert seen["1-sequence/layers.0"] == {"linear", "ties"}
    assert seen["1-sequence/layers.1"] == {"linear"}
    assert space.configuration_space(0)["1-sequence/layers.0/technique"].choices == ("linear", "ties"), "spec's order"


def test_what_is_said_of_a_block_holds_for_its_parts() -> None:
    space = space_of({"blocks": "1-sequence", "techniques": ["linear"]})
    for blocks in drawn(space, 20):
        assert {blocks["1-sequence/layers.0"].technique, blocks["1-sequence/layers.1"].technique} == {"linear"}
    assert {blocks["0-convolutional"].technique for blocks in drawn(space)} == set(TECHNIQUES)


def test_fixed_simplex_weights_are_no_dimension_and_the_last_one_may_be_left_out() -> None:
    for weights in ({"low": 0.3, "high": 0.7}, {"low": 0.3}, {"high": 0.7}):
        space = space_of({"blocks": "0-*", "weights": weights})
        assert "0-convolutional/weight/low" not in keys(space)
        assert "2-vector/weight/low" in keys(space)
        for blocks in drawn(space, 10):
            assert blocks["0-convolutional"].weights == pytest.approx({"low": 0.3, "high": 0.7})
            assert list(blocks["0-convolutional"].weights) == ["low", "high"]


def test_independent_weights_are_fixed_one_by_one_and_beyond_the_range() -> None:
    space = space_of({"blocks": "0-*", "weights": {"high": 2.5}}, weights="independent")
    assert [key for key in keys(space) if key.startswith("0-") and "weight" in key] == ["0-convolutional/weight/low"]
    seen = [blocks["0-convolutional"].weights for blocks in drawn(space)]
    assert {weights["high"] for weights in seen} == {2.5}
    assert len({weights["low"] for weights in seen}) > 50


def test_fixed_hyperparameters_hold_where_the_technique_has_them() -> None:
    space = space_of(
        {"blocks": "*", "hyperparameters": {"density": 1}}, {"blocks": "2-*", "hyperparameters": {"lambda": 2}}
    )
    assert not [key for key in keys(space) if key.endswith("density")]
    for blocks in drawn(space):
        for name, block in blocks.items():
            if "density" in block.hyperparameters:
                assert block.hyperparameters["density"] == 1.0 and type(block.hyperparameters["density"]) is float
            if "lambda" in block.hyperparameters:
                assert block.hyperparameters["lambda"] == (2.0 if name == "2-vector" else 1.0)


def test_ties_need_not_normalise_on_the_simplex() -> None:
    space = space_of({"blocks": "*", "techniques": ["ties"], "hyperparameters": {"normalize": False}})
    assert all(block.hyperparameters["normalize"] is False for block in drawn(space, 2)[0].values())


def test_shared_blocks_have_one_choice_of_everything() -> None:
    space = space_of({"blocks": "1-*", "share": True})
    own = [key for key in keys(space) if key.startswith("1-")]
    assert own == [f"1-sequence/layers.0/{name}" for name in ("density", "technique", "weight/low")]
    seen = set()
    for blocks in drawn(space):
        first, second = blocks["1-sequence/layers.0"], blocks["1-sequence/layers.1"]
        assert first.settings == second.settings
        assert first.parameters == ["1-sequence/layers.0.w"] and second.parameters == ["1-sequence/layers.1.w"]
        seen.add(blocks["2-vector"].settings == first.settings)
    assert seen == {False}


def test_shares_that_overlap_are_one_and_take_all_that_is_said_of_any() -> None:
    space = space_of(
        {"blocks": "*layers.1", "techniques": ["ties"]},
        {"blocks": "1-*", "share": True},
        {"blocks": "[02]-*", "share": True},
        {"blocks": "*[.-][1v]*", "share": True},
        weights="independent",
    )
    assert {key.rpartition("/weight/")[0] for key in keys(space) if "/weight/" in key} == {"0-convolutional"}
    for blocks in drawn(space, 10):
        assert {block.technique for name, block in blocks.items() if name != "statistics"} == {"ties"}


def test_buffers_go_with_the_blocks_that_they_are_shared_with() -> None:
    alone, together = space_of(), space_of({"blocks": "*", "share": True})
    assert drawn(alone, 2)[0]["statistics"].weights == {"low": 0.5, "high": 0.5}
    for blocks in drawn(together, 10):
        assert blocks["statistics"].weights == blocks["0-convolutional"].weights != {"low": 0.5, "high": 0.5}
    fixed = space_of({"blocks": "statistics", "weights": {"low": 1.0}})
    assert drawn(fixed, 2)[0]["statistics"].weights == {"low": 1.0, "high": 0.0}


def test_parts_of_shared_blocks_are_not_to_be_cut_nor_what_is_fixed() -> None:
    space = space_of(
        {"blocks": "1-*", "share": True},
        {"blocks": "0-*", "techniques": ["ties"], "weights": {"low": 0.5}, "hyperparameters": {"density": 0.7}},
    )
    assert [block.name for block in space.separable()] == ["2-vector"]
    assert [block.name for block in space_of().separable()] == list(NAMES)
    # Even a block that shares with none: its parts would.
    assert [block.name for block in space_of({"blocks": "0-*", "share": True}).separable()] == list(NAMES[1:])


def test_warm_starts_are_as_near_as_the_constraints_let_them() -> None:
    space = space_of(
        {"blocks": "0-*", "techniques": ["ties"]},
        {"blocks": "2-*", "weights": {"low": 0.25, "high": 0.5}},
        weights="independent",
    )
    starts = dict(space.warm_starts())
    assert list(starts) == ["average", "source:low", "source:high", "base"]
    for point in starts.values():
        Configuration(space.configuration_space(0), values=point).check_valid_configuration()
    blocks = {block.name: block for block in space.recipe_blocks(starts["source:high"])}
    assert (blocks["0-convolutional"].technique, blocks["0-convolutional"].weights) == (
        "ties",
        {"low": 0.0, "high": 1.0},
    )
    assert blocks["1-sequence/layers.0"].technique == "task_arithmetic"
    assert blocks["2-vector"].weights == {"low": 0.25, "high": 0.5}


def test_where_no_block_can_be_a_source_only_the_average_is_tried() -> None:
    assert [origin for origin, _ in space_of({"blocks": "*", "techniques": ["ties"]}).warm_starts()] == ["average"]
    assert [origin for origin, _ in space_of({"blocks": "*", "weights": {"low": 0.5}}).warm_starts()] == ["average"]


@pytest.mark.parametrize("weights", ["simplex", "independent"])
def test_a_recipe_leads_back_to_its_point(weights: str) -> None:
    fixed = {"low": 0.2} if weights == "independent" else {"low": 0.2, "high": 0.8}
    space = space_of(
        {"blocks": "1-*", "share": True, "forbid": ["ties"]},
        {"blocks": "0-*", "weights": fixed},
        {"blocks": "2-*", "hyperparameters": {"density": 0.9, "lambda": 0.5}},
        weights=weights,
    )
    for config in space.configuration_space(0).sample_configuration(50):
        point = {key: np.asarray(value).item() for key, value in dict(config).items()}
        assert space.from_recipe(space.recipe_blocks(point)) == point


def test_a_recipe_is_brought_to_what_is_fixed() -> None:
    free = space_of(weights="independent", techniques=["task_arithmetic"])
    space = space_of(
        {"blocks": "0-*", "hyperparameters": {"lambda": 0.5}},
        {"blocks": "2-*", "weights": {"low": 0.25}},
        weights="independent",
        techniques=["task_arithmetic"],
    )
    weights = {f"{name}/weight/{source}": 0.6 for name in NAMES for source in ("low", "high")}
    point = space.from_recipe(free.recipe_blocks(weights))
    found = {block.name: block for block in space.recipe_blocks(point)}
    # Half a lambda needs twice the weights for the same merge.
    assert found["0-convolutional"].weights == {"low": 1.2, "high": 1.2}
    assert found["2-vector"].weights == {"low": 0.25, "high": 0.6}


@pytest.mark.parametrize(
    ("constraints", "weights", "message"),
    [
        (
            [{"blocks": "9-*"}],
            "simplex",
            r"^search.constraints.0.blocks: the pattern '9-\*' matches no block; the blocks are: 0-convolu",
        ),
        (
            [{"blocks": "*"}, {"blocks": "*", "techniques": ["linear", "tise"]}],
            "simplex",
            r"^search.constraints.1.techniques.1: the technique 'tise' is not among .*; did you mean 'ties'\?$",
        ),
        (
            [{"blocks": "*", "forbid": ["sce"]}],
            "simplex",
            r"^search.constraints.0.forbid.0: the technique 'sce' is not among .*; choose one of: linear, ",
        ),
        (
            [{"blocks": "*", "weights": {"lwo": 1.0}}],
            "simplex",
            r"^search.constraints.0.weights: no source is called 'lwo'; did you mean 'low'\?$",
        ),
        (
            [{"blocks": "*", "weights": {"low": 1.2}}],
            "simplex",
            r"^search.constraints.0.weights.low: simplex weights lie between 0 and 1, got 1.2; ",
        ),
        (
            [{"blocks": "*", "weights": {"low": float("nan")}}],
            "independent",
            r"^search.constraints.0.weights.low: the weight is nan; give a finite number$",
        ),
        (
            [{"blocks": "*", "weights": {"low": 0.3}}, {"blocks": "2-*", "weights": {"high": 0.3}}],
            "simplex",
            r"^search.constraints.1.weights: simplex weights sum to 1, and those of block '2-vector' to 0.6; scale",
        ),
        (
            [{"blocks": "*", "weights": {"low": 0.3}}, {"blocks": "2-*", "weights": {"low": 0.4}}],
            "independent",
            r"^search.constraints.1.weights.low: fixes 0.4 in block '2-vector', and search.constraints.0 fixes 0.3; ",
        ),
        (
            [
                {"blocks": "*", "hyperparameters": {"density": 0.5}},
                {"blocks": "0-*", "hyperparameters": {"density": 1}},
            ],
            "simplex",
            r"^search.constraints.1.hyperparameters.density: fixes 1 in block '0-.*, and search.constraints.0 fixes 0",
        ),
        (
            [{"blocks": "*", "hyperparameters": {"densty": 0.5}}],
            "simplex",
            r"^search.constraints.0.hyperparameters: no technique .* has the hyperparameter 'densty'; did you mean",
        ),
        (
            [{"blocks": "*", "hyperparameters": {"density": 1.5}}],
            "simplex",
            r"^search.constraints.0.hyperparameters: technique 'ties': hyperparameter 'density' is 1.5; choose a value",
        ),
        (
            [{"blocks": "*", "hyperparameters": {"normalize": True}}],
            "independent",
            r"^search.constraints.0.hyperparameters.normalize: independent weights are never normalised; leave it out",
        ),
        (
            [{"blocks": "*", "techniques": ["ties", "linear"]}, {"blocks": "2-*", "forbid": ["linear", "ties"]}],
            "simplex",
            r"^search.constraints.1: leaves no technique for block '2-vector'; allow one of: linear, ties$",
        ),
        (
            # Linear is in the spec, but does not go with independent weights.
            [{"blocks": "2-*", "techniques": ["linear"]}],
            "independent",
            r"^search.constraints.0: leaves no technique for block '2-vector'; allow one of: task_arithmetic, ties",
        ),
        (
            [
                {"blocks": "0-*", "techniques": ["ties"]},
                {"blocks": "2-*", "techniques": ["linear"]},
                {"blocks": "[02]-*", "share": True},
            ],
            "simplex",
            r"^search.constraints.1: leaves no technique for block '0-convolutional'; allow one of: ties$",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(constraints: list[dict[str, Any]], weights: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        space_of(*constraints, weights=weights)


def test_simplex_weights_of_three_sources_are_fixed_all_or_not_at_all() -> None:
    sources = ("a", "b", "c")
    with pytest.raises(
        SearchError, match=r"constraints.0.weights: .* 'b', 'c' are free, and simplex weights are fixed all"
    ):
        space_of({"blocks": "*", "weights": {"a": 0.2}}, sources=sources)
    space = space_of({"blocks": "0-*", "weights": {"a": 0.2, "c": 0.3}}, sources=sources)
    assert drawn(space, 2)[0]["0-convolutional"].weights == pytest.approx({"a": 0.2, "b": 0.5, "c": 0.3})
    with pytest.raises(SearchError, match=r"those of block '0-convolutional' to 1.1"):
        space_of({"blocks": "0-*", "weights": {"a": 0.6, "c": 0.5}}, sources=sources)


def test_forbidding_what_is_not_in_the_space_anyhow_is_no_mistake() -> None:
    assert keys(space_of({"blocks": "*", "forbid": ["linear"]}, weights="independent")) == keys(
        space_of(weights="independent")
    )


def test_a_space_of_which_all_is_fixed_is_refused() -> None:
    space = space_of(
        {"blocks": "*", "techniques": ["ties"], "weights": {"low": 0.4}},
        {"blocks": "*", "hyperparameters": {"density": 0.8}},
    )
    with pytest.raises(SearchError, match="the search space is empty: no block has anything left to choose; leave"):
        space.configuration_space(0)
    assert {block.technique for block in space.recipe_blocks(space.average())} == {"ties"}


MATCHED = {
    "*": NAMES,
    "0-*": NAMES[:1],
    "1-*": NAMES[1:3],
    "1-sequence": NAMES[1:3],
    "*layers.1": NAMES[2:3],
    "2-vector": NAMES[3:],
    "[12]-*": NAMES[1:],
}
"""Patterns, and the blocks that they match."""


@given(
    st.lists(
        st.fixed_dictionaries(
            {"blocks": st.sampled_from(list(MATCHED))},
            optional={
                "forbid": st.lists(st.sampled_from(TECHNIQUES), max_size=2, unique=True),
                "weights": st.fixed_dictionaries({"low": st.sampled_from([0.0, 0.25, 1.0])}),
                "hyperparameters": st.fixed_dictionaries({"density": st.sampled_from([0.25, 0.75])}),
                "share": st.booleans(),
            },
        ),
        max_size=4,
    ),
    st.sampled_from(["simplex", "independent"]),
)
def test_any_constraints_are_followed_or_refused(constraints: list[dict[str, Any]], weights: str) -> None:
    """And where they are followed, points are recipes, and these lead back to them."""
    try:
        space = space_of(*constraints, weights=weights)
        configuration_space = space.configuration_space(0)
    except SearchError as error:
        assert str(error).startswith(("search.constraints.", "the search space is empty"))
        return
    matched = [MATCHED[constraint["blocks"]] for constraint in constraints]
    for config in configuration_space.sample_configuration(3):
        point = {key: np.asarray(value).item() for key, value in dict(config).items()}
        blocks = {block.name: block for block in space.recipe_blocks(point)}
        assert space.from_recipe(list(blocks.values())) == point
        for constraint, names in zip(constraints, matched, strict=True):
            for name in names:
                assert blocks[name].technique not in constraint.get("forbid", [])
                for source, weight in constraint.get("weights", {}).items():
                    assert blocks[name].weights[source] == weight
                if "density" in blocks[name].hyperparameters and "hyperparameters" in constraint:
                    assert blocks[name].hyperparameters["density"] == constraint["hyperparameters"]["density"]
            if constraint.get("share"):
                assert all(blocks[name].settings == blocks[names[0]].settings for name in names)
    for _, point in space.warm_starts():
        Configuration(configuration_space, values=point).check_valid_configuration()

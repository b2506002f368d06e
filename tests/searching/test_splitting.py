"""Coarse to fine: parts of blocks, that a cut changes no merge, and what makes a block important."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from automerge.errors import SearchError
from automerge.merging.technique import usable_techniques
from automerge.searching.space import SearchSpace
from automerge.searching.splitting import (
    gradient_importance,
    most_important,
    split_blocks,
    surrogate_importance,
)
from automerge.segmenting.segment import segment
from automerge.segmenting.segmentation import Block, Segmentation
from automerge.spec import SearchSpec
from tests.searching.synthetic import TECHNIQUES, make_block, make_space

# A model


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mix(self.norm(tokens))


class Model(nn.Module):
    """Images -> feature map (with BatchNorm) -> tokens through three layers -> classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.layers = nn.ModuleList(Layer(8) for _ in range(3))
        self.out = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.out(tokens).mean(1))


@pytest.fixture(scope="module")
def cuts() -> tuple[Segmentation, Segmentation]:
    """The model by transitions and by layers."""
    inputs = [torch.zeros(1, 1, 4, 4)]
    return segment(Model(), inputs), segment(Model(), inputs, granularity="layer")


def elements() -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in Model().named_parameters()}


def check_counts(blocks: Sequence[Block]) -> None:
    total = sum(elements().values())
    for block in blocks:
        assert block.parameter_count == sum(elements()[name] for name in block.parameters)
        assert block.share == pytest.approx(block.parameter_count / total)


def test_a_block_of_a_model_becomes_its_layers(cuts: tuple[Segmentation, Segmentation]) -> None:
    coarse, layers = cuts
    assert [block.name for block in coarse.blocks] == ["0-convolutional", "1-sequence", "2-vector"]
    blocks = split_blocks(coarse.blocks, ["1-sequence"], layers)
    assert [block.name for block in blocks] == [
        "0-convolutional",
        "1-sequence/layers.0",
        "1-sequence/layers.1",
        "1-sequence/layers.2",
        "1-sequence/out",
        "2-vector",
    ]
    assert blocks[0] == coarse.blocks[0] and blocks[-1] == coarse.blocks[-1]
    assert blocks[2].parameters == [name for name in elements() if name.startswith("layers.1.")]
    assert blocks[2].transition == "inside 1-sequence at layers.1"
    check_counts(blocks)


def test_a_block_with_one_layer_stays_as_it_is(cuts: tuple[Segmentation, Segmentation]) -> None:
    coarse, layers = cuts
    assert split_blocks(coarse.blocks, ["2-vector"], layers) == coarse.blocks
    once = split_blocks(coarse.blocks, ["1-sequence"], layers)
    assert split_blocks(once, [block.name for block in once if block.kind == "sequence"], layers) == once


def test_the_whole_model_becomes_all_its_layers(cuts: tuple[Segmentation, Segmentation]) -> None:
    whole = segment(Model(), [torch.zeros(1, 1, 4, 4)], granularity="whole").blocks
    blocks = split_blocks(whole, ["whole"], cuts[1])
    # What is said of the block is said of its parts, by their names.
    assert [block.name for block in blocks] == [f"whole/{layer.name}" for layer in cuts[1].blocks]
    assert Segmentation(granularity="layer", blocks=blocks, tied={})
    check_counts(blocks)


def test_private_tensors_are_in_no_part(cuts: tuple[Segmentation, Segmentation]) -> None:
    coarse, layers = cuts
    private = {name for name in elements() if name.startswith("layers.1.")} | {"layers.0.norm.bias"}
    blocks = [
        block.model_copy(update={"parameters": [name for name in block.parameters if name not in private]})
        for block in coarse.blocks
    ]
    found = split_blocks(blocks, ["1-sequence"], layers)
    assert [block.name for block in found[1:-1]] == ["1-sequence/layers.0", "1-sequence/layers.2", "1-sequence/out"]
    assert found[1].parameters == ["layers.0.norm.weight", "layers.0.mix.weight", "layers.0.mix.bias"]


def test_what_no_layer_holds_is_the_last_part(cuts: tuple[Segmentation, Segmentation]) -> None:
    coarse, layers = cuts
    known = [layer for layer in layers.blocks if layer.name in ("1-sequence/layers.0", "1-sequence/layers.2")]
    found = split_blocks(coarse.blocks, ["1-sequence"], layers.model_copy(update={"blocks": known}))
    assert [block.name for block in found[1:-1]] == [
        "1-sequence/layers.0",
        "1-sequence/layers.2",
        "1-sequence/(remainder)",
    ]
    assert found[3].parameters == [name for name in elements() if name.startswith(("layers.1.", "out."))]
    check_counts(found)


def test_what_cannot_be_cut_is_refused(cuts: tuple[Segmentation, Segmentation]) -> None:
    coarse, layers = cuts
    with pytest.raises(
        SearchError, match="there is no block '3-vector' to cut; the blocks are: 0-convolutional, 1-seq"
    ):
        split_blocks(coarse.blocks, ["3-vector"], layers)
    ends = [make_block("a", parameters=()), make_block("b", parameters=())]
    ends[0] = ends[0].model_copy(update={"parameters": ["x", "y"]})
    ends[1] = ends[1].model_copy(update={"parameters": ["z"]})
    other = [make_block("l").model_copy(update={"parameters": names}) for names in (["x"], ["y", "z"])]
    other[1] = other[1].model_copy(update={"name": "m"})
    with pytest.raises(SearchError, match="layer 'm' lies in the blocks 'a' and 'b'"):
        split_blocks(ends, ["a"], Segmentation(granularity="layer", blocks=other, tied={}))


# Any model


@st.composite
def segmentations(draw: st.DrawFn) -> tuple[list[Block], Segmentation]:
    """Blocks of layers, some with buffers only, some tensors private, and some in no layer."""
    blocks, layers = [], []
    for number in range(draw(st.integers(1, 3))):
        name = f"{number}-sequence"
        parameters, buffers, count, known = [], [], 0, 0.0
        for index in range(draw(st.integers(1, 4))):
            layer = make_block(
                f"{name}/layers.{index}",
                [f"p{each}" for each in range(draw(st.integers(0, 3)))],
                [f"m{each}" for each in range(draw(st.integers(0, 2)))],
            )
            if not [*layer.tensors()]:
                continue
            layer = layer.model_copy(update={"share": layer.parameter_count / 1000})
            count, known = count + layer.parameter_count, known + layer.share
            if draw(st.integers(0, 5)):  # else no layer holds them
                layers.append(layer)
            private = draw(st.integers(0, 7))
            parameters += [each for each in layer.parameters if private or not each.endswith("0")]
            buffers += layer.buffers
        if not parameters and not buffers:
            continue
        # In a state dict the tensors of modules are mixed in some order.
        update = {
            "parameters": draw(st.permutations(parameters)),
            "buffers": draw(st.permutations(buffers)),
            "parameter_count": count,
            "share": known,
        }
        blocks.append(make_block(name).model_copy(update=update))
    return blocks, Segmentation(granularity="layer", blocks=layers, tied={})


@given(segmentations(), st.data())
def test_parts_are_a_partition_in_order(drawn: tuple[list[Block], Segmentation], data: st.DataObject) -> None:
    blocks, layers = drawn
    chosen = data.draw(st.sets(st.sampled_from([block.name for block in blocks]))) if blocks else set()
    found = split_blocks(blocks, chosen, layers)
    assert len({block.name for block in found}) == len(found)
    layer_of = {name: layer.name for layer in layers.blocks for name in layer.tensors()}
    for block in blocks:
        parts = [part for part in found if part.name == block.name or part.name.startswith(f"{block.name}/")]
        held = {layer_of.get(name) for name in block.parameters}
        assert len(parts) == (len(held) if block.name in chosen and len(held) > 1 else 1)
        for key in ("parameters", "buffers"):
            names = [name for part in parts for name in getattr(part, key)]
            assert sorted(names) == sorted(getattr(block, key))
            for part in parts:  # a part has its block's order
                assert getattr(part, key) == [name for name in getattr(block, key) if name in getattr(part, key)]
        if len(parts) > 1:
            assert all(part.parameters for part in parts), "buffers alone would be averaged otherwise"
            for part in parts:
                assert len({layer_of.get(name) for name in part.parameters}) == 1
            order = [layer.name for layer in layers.blocks]
            places = [order.index(part.name) for part in parts if part.name in order]
            assert places == sorted(places)
            assert [part.name for part in parts][len(places) :] in ([], [f"{block.name}/(remainder)"])
    order_of = [next(block.name for block in blocks if f"{part.name}/".startswith(f"{block.name}/")) for part in found]
    assert list(dict.fromkeys(order_of)) == [block.name for block in blocks]


@given(
    segmentations(),
    st.sampled_from(["simplex", "independent"]),
    st.integers(2, 4),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_a_cut_changes_no_merge(
    drawn: tuple[list[Block], Segmentation], weights: str, count: int, seed: int, constrained: bool
) -> None:
    """A point carried over is a recipe that merges every tensor as before, and constraints go on to hold."""
    blocks, layers = drawn
    if not any(block.parameters for block in blocks):
        return
    constraints = [{"blocks": blocks[0].name, "forbid": ["ties"], "hyperparameters": {"density": 0.75}}]
    spec = SearchSpec(
        preset="paper" if weights == "simplex" else "best",
        weights=weights,  # type: ignore[arg-type]
        constraints=constraints if constrained else [],  # type: ignore[arg-type]
    )
    techniques, _ = usable_techniques(TECHNIQUES, sources=count, has_base=True, unnormalised=weights == "independent")
    space = SearchSpace(blocks, [f"s{index}" for index in range(count)], techniques, spec)
    finer = SearchSpace(split_blocks(blocks, [block.name for block in blocks], layers), space.sources, techniques, spec)
    for config in space.configuration_space(seed).sample_configuration(2):
        recipe = space.recipe_blocks({key: np.asarray(value).item() for key, value in dict(config).items()})
        parts = finer.recipe_blocks(finer.from_recipe(recipe))
        before = {name: block.settings for block in recipe for name in (*block.parameters, *block.buffers)}
        after = {name: block.settings for block in parts for name in (*block.parameters, *block.buffers)}
        assert after == before


# Which blocks to cut


def test_the_most_important_blocks_that_can_be_cut(cuts: tuple[Segmentation, Segmentation]) -> None:
    coarse, layers = cuts
    blocks = coarse.blocks
    several = [
        block.name
        for block in blocks
        if sum(set(layer.parameters) <= set(block.parameters) for layer in layers.blocks) > 1
    ]
    assert several == ["0-convolutional", "1-sequence"]
    assert most_important({"2-vector": 0.7, "1-sequence": 0.2, "0-convolutional": 0.1}, blocks, layers, 2) == [
        "1-sequence",
        "0-convolutional",
    ]
    assert most_important({"0-convolutional": 0.5, "1-sequence": 0.5}, blocks, layers, 1) == ["0-convolutional"]
    assert most_important({}, blocks, layers, 5) == several
    assert most_important({"0-convolutional": 1.0}, blocks[1:], layers, 5) == ["1-sequence"]
    assert most_important({"2-vector": 1.0}, blocks[2:], layers, 5) == []


# The gradient


def blocks_of_layers(*counts: int) -> tuple[list[Block], Segmentation]:
    """Blocks b0, b1, ... of so many layers with two tensors each."""
    layers = [
        [make_block(f"b{number}/{index}", parameters=("u", "v")) for index in range(count)]
        for number, count in enumerate(counts)
    ]
    blocks = [
        make_block(f"b{number}", ()).model_copy(
            update={"parameters": [name for layer in own for name in layer.parameters]}
        )
        for number, own in enumerate(layers)
    ]
    return blocks, Segmentation(granularity="layer", blocks=[layer for own in layers for layer in own], tied={})


Slopes = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=2, max_size=5)


def gradients_of(*blocks: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Gradients whose sums over the two tensors of each layer are the rows."""
    sources = ("a", "b", "c")
    found = {}
    for number, rows in enumerate(blocks):
        for index, row in enumerate(rows):
            found[f"b{number}/{index}.u"] = {name: 0.25 * value for name, value in zip(sources, row, strict=False)}
            found[f"b{number}/{index}.v"] = {name: 0.75 * value for name, value in zip(sources, row, strict=False)}
    return found


@given(Slopes, Slopes, st.booleans())
def test_importance_is_what_steps_of_length_one_gain_by_weights_of_their_own(
    first: list[list[float]], second: list[list[float]], simplex: bool
) -> None:
    """By least squares on the steps that are allowed, which knows nothing of the formula."""

    def longest(slopes: list[list[float]], common: bool) -> float:
        """The length of the gradient's projection on the allowed steps [layer, source]."""
        count = len(slopes)
        steps = np.kron(np.ones((count, 1)), np.eye(3)) if common else np.eye(3 * count)
        if simplex:
            tangent = np.eye(3) - 1 / 3
            steps = np.kron(np.eye(count), tangent) @ steps
        gradient = np.array(slopes).reshape(-1)
        solution, *_ = np.linalg.lstsq(steps, gradient, rcond=None)
        return float(np.linalg.norm(steps @ solution))

    blocks, layers = blocks_of_layers(len(first), len(second))
    found = gradient_importance(gradients_of(first, second), blocks, layers, simplex=simplex)
    gains = [longest(slopes, common=False) - longest(slopes, common=True) for slopes in (first, second)]
    if sum(gains) < 1e-3:  # least squares' own errors
        return
    assert found == {f"b{index}": pytest.approx(gain / sum(gains), abs=1e-6) for index, gain in enumerate(gains)}


def test_layers_that_agree_need_no_weights_of_their_own() -> None:
    blocks, layers = blocks_of_layers(3, 2, 1)
    agree = [[5.0, -2.0, 1.0]] * 3
    differ = [[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]]
    alone = [[100.0, -100.0, 3.0]]
    assert gradient_importance(gradients_of(agree, differ, alone), blocks, layers) == {"b0": 0.0, "b1": 1.0, "b2": 0.0}
    nothing = dict.fromkeys(("b0", "b1", "b2"), 0.0)
    assert gradient_importance(gradients_of(agree, [[0.0] * 3] * 2, alone), blocks, layers) == nothing
    assert gradient_importance({}, blocks, layers) == nothing


def test_a_hundredth_of_the_gradient_is_the_same_importance() -> None:
    blocks, layers = blocks_of_layers(2, 3)
    slopes = [[[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    found = gradient_importance(gradients_of(*slopes), blocks, layers)
    for scale in (1e-2, 1e-200, 1e150):
        scaled = [[[scale * value for value in row] for row in rows] for rows in slopes]
        assert gradient_importance(gradients_of(*scaled), blocks, layers) == pytest.approx(found)


def test_on_the_simplex_a_step_of_the_sum_is_no_gain() -> None:
    blocks, layers = blocks_of_layers(2, 2)
    sums = [[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
    shares = [[0.1, -0.1, 0.0], [-0.1, 0.1, 0.0]]
    assert gradient_importance(gradients_of(sums, shares), blocks, layers)["b0"] > 0.9
    assert gradient_importance(gradients_of(sums, shares), blocks, layers, simplex=True) == {"b0": 0.0, "b1": 1.0}


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    blocks, layers = blocks_of_layers(2)
    with pytest.raises(SearchError, match=r"tensor 'b0/1.u': the gradient of source 'b' is nan; measure"):
        gradient_importance(gradients_of([[1.0, 2.0], [0.0, math.nan]]), blocks, layers)


# The surrogate

PAPER = SearchSpec(preset="paper", techniques=TECHNIQUES)


def trials(
    space: SearchSpace, count: int, cost: Callable[[Mapping[str, Any]], float]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Random points and their costs."""
    configs = space.configuration_space(11).sample_configuration(count)
    points = [{key: np.asarray(value).item() for key, value in dict(config).items()} for config in configs]
    return points, [cost(point) for point in points]


def test_importance_is_the_share_of_the_variance() -> None:
    """The logarithm of the cost is a sum over the blocks whose variances are known."""
    space = make_space(PAPER)

    def numbers(point: Mapping[str, Any]) -> float:  # variances 9/12 and 4/12
        return math.exp(3 * point["b0/weight/low"] - 2 * point["b1/weight/low"])

    found = surrogate_importance(*trials(space, 200, numbers), space)
    assert found == {
        "b0": pytest.approx(9 / 13, abs=0.1),
        "b1": pytest.approx(4 / 13, abs=0.1),
        "b2": pytest.approx(0, abs=0.02),
    }
    assert sum(found.values()) == pytest.approx(1)

    def choices(point: Mapping[str, Any]) -> float:  # variances 4/25 and 1/12
        return math.exp((point["b1/technique"] == "ties") + point["b2/weight/low"])

    found = surrogate_importance(*trials(space, 200, choices), space)
    assert found == {
        "b0": pytest.approx(0, abs=0.02),
        "b1": pytest.approx(48 / 73, abs=0.1),
        "b2": pytest.approx(25 / 73, abs=0.1),
    }


def test_what_is_active_under_some_techniques_only_counts_as_often_as_it_is() -> None:
    space = make_space(PAPER)

    def cost(point: Mapping[str, Any]) -> float:
        return math.exp(20 * (point.get("b0/density", 0.75) - 0.75) + 2 * point["b1/weight/low"])

    found = surrogate_importance(*trials(space, 300, cost), space)
    density, weight = 0.6 * 400 * 0.25 / 12, 4 / 12  # three of five techniques have a density
    assert found["b0"] == pytest.approx(density / (density + weight), abs=0.1)


def test_blocks_that_interact_explain_what_they_do_alone() -> None:
    """A product of two centred numbers has no marginals; beside it a third block explains all that one alone does."""
    space = make_space(SearchSpec(preset="paper", techniques=["linear"]))

    def cost(point: Mapping[str, Any]) -> float:
        first, second = (point[f"b{index}/weight/low"] - 0.5 for index in (0, 1))
        return math.exp(8 * first * second + 1.5 * point["b2/weight/low"])

    found = surrogate_importance(*trials(space, 400, cost), space)
    assert found["b2"] > 0.9


def test_without_differences_nothing_is_important() -> None:
    space = make_space(PAPER)
    nothing = {"b0": 0.0, "b1": 0.0, "b2": 0.0}
    assert surrogate_importance(*trials(space, 40, lambda point: 1.7), space) == nothing
    assert surrogate_importance(*trials(space, 4, lambda point: point["b0/weight/low"] + 1), space) == nothing
    assert surrogate_importance([], [], space) == nothing


def test_blocks_that_share_a_choice_have_equal_parts_and_buffers_none() -> None:
    spec = PAPER.model_copy(update={"constraints": make_shared()})
    techniques, _ = usable_techniques(TECHNIQUES, sources=2, has_base=True)
    # A block whose name begins with another's, and one that has only buffers.
    blocks = [make_block("a"), make_block("a/b"), make_block("c"), make_block("d"), make_block("e", (), ("mean",))]
    space = SearchSpace(blocks, ["low", "high"], techniques, spec)
    found = surrogate_importance(*trials(space, 150, lambda point: math.exp(point["c/weight/low"])), space)
    assert found["c"] == found["d"] > 0.45
    assert found["e"] == 0.0 and list(found) == ["a", "a/b", "c", "d", "e"]
    found = surrogate_importance(*trials(space, 150, lambda point: math.exp(point["a/b/weight/low"])), space)
    assert found["a/b"] > 0.9


def make_shared() -> list[Any]:
    return SearchSpec(constraints=[{"blocks": "[cd]", "share": True}]).constraints  # type: ignore[list-item]


def test_a_cost_without_a_logarithm_is_refused() -> None:
    space = make_space(PAPER)
    points, costs = trials(space, 10, lambda point: 1.0)
    for cost in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SearchError, match="a trial's cost is"):
            surrogate_importance(points, [*costs[1:], cost], space)


PROGRAM = """
import json, math
from automerge.searching.splitting import surrogate_importance
from automerge.spec import SearchSpec
from tests.searching.synthetic import make_space

space = make_space(SearchSpec(preset="paper"))
points = [dict(config) for config in space.configuration_space(11).sample_configuration(40)]
costs = [math.exp(point["b0/weight/low"] + (point["b1/technique"] == "ties")) for point in points]
print(json.dumps(surrogate_importance(points, costs, space)))
"""


def test_importance_is_the_same_in_any_process() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    ]
    assert found[0] == found[1]
    assert sum(json.loads(found[0]).values()) == pytest.approx(1)

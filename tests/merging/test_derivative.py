"""The derivative in a recipe's scalars: that of finite differences, for every technique that declares one."""

from importlib.metadata import entry_points

import pytest
import torch

from automerge.errors import MergeError
from automerge.merging.derivative import refinable, scalar_gradient, scalar_values, scalars_of, with_scalars
from automerge.merging.recipe import RecipeBlock
from automerge.merging.technique import TensorInputs, load_technique, technique
from automerge.testing.techniques import NonConformingError, check_technique

TECHNIQUES = sorted(each.name for each in entry_points(group="automerge.techniques"))
DIFFERENTIABLE = [name for name in TECHNIQUES if load_technique(name).declaration.differentiable]


def block_of(name: str, weights: dict[str, float] | None = None, **values: float | bool | str) -> RecipeBlock:
    defaults = load_technique(name).declaration.defaults()
    if "density" in defaults:
        defaults["density"] = 0.5
    return RecipeBlock(
        name="block",
        technique=name,
        weights=weights or {"a": 0.4, "b": 0.7},
        hyperparameters={**defaults, **values},
        parameters=["w"],
    )


def inputs_of(seed: int = 0) -> TensorInputs:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, 30, dtype=torch.float64, generator=generator)
    sources = [base + 0.1 * torch.randn(40, 30, dtype=torch.float64, generator=generator) for _ in range(2)]
    return TensorInputs("w", ["a", "b"], base, sources, seed=3)


def variants() -> list[RecipeBlock]:
    found = [block_of(name) for name in DIFFERENTIABLE]
    found += [block_of("ties", normalize=False), block_of("della", normalize=False)]
    found += [
        block_of("ties", weights={"a": 0.8, "b": -0.3}, normalize=False),
        block_of("task_arithmetic", **{"lambda": 0.3}),
    ]
    return found


def test_the_paper_s_techniques_have_a_derivative() -> None:
    assert {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"} <= set(DIFFERENTIABLE)


@pytest.mark.parametrize("block", variants(), ids=lambda block: f"{block.technique}-{block.weights['b']}")
def test_it_is_that_of_finite_differences(block: RecipeBlock) -> None:
    inputs = inputs_of()
    gradient = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, step = scalar_values(block), 1e-6
    expected = []
    for index in range(len(values)):
        costs = []
        for sign in (1, -1):
            moved = list(values)
            moved[index] += sign * step
            merged = load_technique(block.technique).merge(inputs, with_scalars(block, moved).settings)
            costs.append(float((merged * gradient).sum()))
        expected.append((costs[0] - costs[1]) / (2 * step))
    assert scalar_gradient(load_technique(block.technique), block, inputs, gradient) == pytest.approx(
        expected, rel=1e-5, abs=1e-6
    )


def test_a_normalised_technique_has_its_scale_as_a_scalar_of_its_own() -> None:
    assert scalars_of(block_of("ties", normalize=True)) == ["a", "b", "lambda"]
    assert scalars_of(block_of("ties", normalize=False)) == ["a", "b"]
    moved = with_scalars(block_of("ties", normalize=True), [0.1, 0.2, 0.9])
    assert (moved.weights, moved.hyperparameters["lambda"]) == ({"a": 0.1, "b": 0.2}, 0.9)
    assert scalar_values(moved) == [0.1, 0.2, 0.9]


def test_an_average_becomes_task_arithmetic_where_there_is_a_base() -> None:
    """Its weights are then free; the merge is the same."""
    average = block_of("linear", weights={"a": 1.0, "b": 3.0})
    free = refinable(average, has_base=True)
    assert free is not None
    assert (free.technique, free.weights) == ("task_arithmetic", {"a": 0.25, "b": 0.75})
    inputs = inputs_of()
    merged = [load_technique(each.technique).merge(inputs, each.settings) for each in (average, free)]
    assert torch.allclose(merged[0], merged[1], atol=1e-12)
    alone = refinable(average, has_base=False)
    assert alone is not None and alone.technique == "linear"


def test_a_technique_without_derivative_is_left_alone() -> None:
    assert refinable(block_of("slerp", weights={"a": 0.5, "b": 0.5}), has_base=True) is None


def test_a_false_declaration_is_found_out() -> None:
    @technique(name="constant", source="nobody", differentiable=True)
    def constant(inputs: TensorInputs, weights: list[float]) -> torch.Tensor:
        return inputs.sources[0] * 1.0

    block = RecipeBlock(name="b", technique="constant", weights={"a": 1.0, "b": 1.0}, parameters=["w"])
    with pytest.raises(MergeError, match="does not depend on its weights"):
        scalar_gradient(constant, block, inputs_of(), torch.ones(40, 30, dtype=torch.float64))


def test_the_conformance_suite_finds_a_wrong_derivative() -> None:
    """A weight that is turned into a float on the way is not differentiated."""

    @technique(name="half", source="nobody", differentiable=True)
    def half(inputs: TensorInputs, weights: list[float]) -> torch.Tensor:
        first, *others = [source * weight for source, weight in zip(inputs.sources, weights, strict=True)]
        return first + sum(each.detach() for each in others)

    with pytest.raises(NonConformingError, match=r"declared differentiable, and its derivative in"):
        check_technique(half)

"""Fisher-weighted averaging against its definition, element by element in Python's floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.errors import MergeError
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique
from tests.merging.techniques.inputs import make_inputs

fisher = load_technique("fisher")
linear = load_technique("linear")
shapes = st.lists(st.integers(1, 6), max_size=3).map(tuple)


def with_fisher(inputs, diagonals):
    return TensorInputs("w", inputs.source_names, None, inputs.sources, statistics={"fisher": diagonals})


def draw(inputs, seed):
    """Diagonals over many orders of magnitude, a fifth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in inputs.sources]
    return [torch.where(each.abs() < 0.25, 0.0, each**10) for each in drawn]


def reference(inputs, weights, diagonals):
    columns = list(zip(*(each.reshape(-1).tolist() for each in inputs.sources), strict=True))
    information = list(zip(*(each.reshape(-1).tolist() for each in diagonals), strict=True))
    everything = [value for column in information for value in column]
    floor = 1e-6 * math.fsum(everything) / len(everything)
    merged = []
    for column, own in zip(columns, information, strict=True):
        factors = [w * (max(f, floor) if floor else 1.0) for w, f in zip(weights, own, strict=True)]
        merged.append(math.fsum(f * t for f, t in zip(factors, column, strict=True)) / math.fsum(factors))
    return torch.tensor(merged).reshape(inputs.sources[0].shape)


def test_it_keeps_the_contract():
    check_technique(fisher)


@given(shapes, st.integers(0, 99), st.lists(st.floats(0.01, 2), min_size=1, max_size=4), st.floats(-20, 3))
@settings(deadline=None, max_examples=150)
def test_closed_form(shape, seed, weights, power):
    inputs = make_inputs(len(weights), shape, seed)
    diagonals = [each * 10**power for each in draw(inputs, seed)]
    merged = fisher(with_fisher(inputs, diagonals), weights)
    torch.testing.assert_close(merged, reference(inputs, weights, diagonals), rtol=1e-5, atol=1e-5)


def test_by_hand():
    inputs = TensorInputs(
        "w",
        ["a", "b"],
        None,
        [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])],
        statistics={"fisher": [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])]},
    )
    # 3 : 1; the second source alone, but for the floor; nobody's, so the average.
    merged = fisher(inputs, [0.5, 0.5])
    assert merged[0].item() == 1.5
    assert merged[1].item() == pytest.approx(3.0, abs=2e-6)
    assert merged[2].item() == 2.0


@pytest.mark.parametrize("diagonals", [None, 0.0], ids=["no statistics", "zeros"])
def test_what_has_no_information_is_averaged(diagonals):
    inputs = make_inputs(3, (4, 5))
    found = inputs if diagonals is None else with_fisher(inputs, [torch.zeros(4, 5)] * 3)
    assert torch.equal(fisher(found, [0.2, 0.3, 0.9]), linear(inputs, [0.2, 0.3, 0.9]))


def test_equal_information_gives_the_average():
    inputs = make_inputs(2, (6, 7))
    merged = fisher(with_fisher(inputs, [torch.ones(6, 7)] * 2), [0.25, 0.5])
    torch.testing.assert_close(merged, linear(inputs, [0.25, 0.5]), rtol=1e-6, atol=1e-6)


def test_one_source_alone_is_linear():
    assert canonical_settings(Settings("fisher", {"a": 3.0, "b": 0.0})) == Settings("linear", {"a": 1.0, "b": 0.0})
    both = canonical_settings(Settings("fisher", {"a": 3.0, "b": 1.0}))
    assert both == Settings("fisher", {"a": 0.75, "b": 0.25})


def test_negative_weights_are_refused():
    inputs = make_inputs(2, (3,))
    with pytest.raises(MergeError, match=r"'fisher' takes no negative weight, and that of source 's1' is -0\.5"):
        fisher(inputs, [1.0, -0.5])

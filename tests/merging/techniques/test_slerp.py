"""SLERP against its definition in float64, and what an arc promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.errors import MergeError
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique, validate_settings
from automerge.testing.techniques import check_technique

slerp = load_technique("slerp")
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(*sources):
    return TensorInputs("block.weight", ["a", "b"], None, list(sources))


def reference(one, other, weights):
    """By element, in Python's floats."""
    t = weights[1] / sum(weights)
    a, b = one.reshape(-1).tolist(), other.reshape(-1).tolist()
    norms = math.hypot(*a) * math.hypot(*b)
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        first, second = 1 - t, t
    else:
        angle = math.acos(cosine)
        first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return torch.tensor([first * x + second * y for x, y in zip(a, b, strict=True)]).reshape(one.shape)


def test_it_keeps_the_contract():
    check_technique(slerp)


@given(shapes, st.integers(0, 99), st.tuples(st.integers(-3, 8), st.integers(1, 8)), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_closed_form(shape, seed, eighths, mix):
    weights = [each / 8 for each in eighths]
    if sum(weights) == 0:
        weights[0] += 1
    one = draw(shape, seed)
    other = one * mix + draw(shape, seed + 100) * (1 - mix)  # every angle, zero too
    torch.testing.assert_close(
        slerp(inputs_of(one, other), weights), reference(one, other, weights), rtol=2e-5, atol=2e-5
    )


def test_a_right_angle_by_hand():
    merged = slerp(inputs_of(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])), [0.5, 0.5])
    torch.testing.assert_close(merged, torch.tensor([3.0, 3.0]) / math.sqrt(2))


def test_lengths_differ_directions_follow_the_arc():
    """Only the angle is taken of unit vectors: the sources themselves are scaled, as in mergekit."""
    merged = slerp(inputs_of(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])), [2.0, 1.0])
    torch.testing.assert_close(merged, torch.tensor([math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)]))


@given(st.integers(2, 40), st.integers(0, 99), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_length_of_equally_long_sources_is_kept(count, seed, t):
    one, other = (draw((count,), seed + shift) for shift in (0, 100))
    one, other = one / one.norm(), other / other.norm()
    if abs(float(one @ other)) < 0.999:
        assert float(slerp(inputs_of(one, other), [1 - t, t]).norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1.0, 2.0], [2.0, 4.0]),
        ([1.0, 2.0], [-2.0, -4.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 0.0], [1.0, 0.03]),
    ],
)
def test_without_an_arc_it_is_linear(one, other):
    inputs = inputs_of(torch.tensor(one), torch.tensor(other))
    torch.testing.assert_close(slerp(inputs, [0.75, 0.25]), load_technique("linear")(inputs, [0.75, 0.25]))


def test_either_end_is_that_source_and_canonically_linear():
    inputs = inputs_of(draw((5, 7), 1), draw((5, 7), 2))
    assert torch.equal(slerp(inputs, [2.0, 0.0]), inputs.sources[0])
    assert torch.equal(slerp(inputs, [0.0, 2.0]), inputs.sources[1])
    end = canonical_settings(Settings("slerp", {"a": 2.0, "b": 0.0}))
    assert end == Settings("linear", {"a": 1.0, "b": 0.0})
    assert torch.equal(load_technique("linear").merge(inputs, end), inputs.sources[0])
    assert canonical_settings(Settings("slerp", {"a": 3.0, "b": 1.0})) == Settings("slerp", {"a": 0.75, "b": 0.25})


def test_two_sources_exactly_and_no_zero_sum():
    for names in (["a"], ["a", "b", "c"]):
        with pytest.raises(MergeError, match="takes 2 to 2 sources"):
            validate_settings(Settings("slerp", dict.fromkeys(names, 1.0)), sources=names, has_base=True, where="x")
    with pytest.raises(MergeError, match="sum of the weights, which is zero"):
        validate_settings(Settings("slerp", {"a": 1.0, "b": -1.0}), sources=["a", "b"], has_base=True, where="x")

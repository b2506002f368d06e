"""Trimming by magnitude, and the norm that does not depend on threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging.sparsify import drop, inner_product, l1_norm, trim


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0.001, 1.0))
@settings(deadline=None)
def test_trim_equals_a_stable_sort(values, density):
    """Few distinct magnitudes: nearly every cut lies between equal ones."""
    delta = torch.tensor(values, dtype=torch.float32)
    keep = max(1, int(density * len(values)))
    kept = torch.argsort(delta.abs(), descending=True, stable=True)[:keep]
    expected = torch.zeros_like(delta)
    expected[kept] = delta[kept]
    assert torch.equal(trim(delta, density), expected)


def test_trim_of_a_view_goes_by_logical_index():
    delta = torch.ones(2, 3).t()  # non-contiguous, 3 x 2
    assert trim(delta, 0.5).tolist() == [[1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_trim_of_nothing_and_of_one_element(shape):
    delta = torch.ones(shape)
    assert torch.equal(trim(delta, 0.01), delta)


def test_l1_rescaling_of_a_tensor_whose_kept_elements_are_zero():
    delta = torch.zeros(9)
    dropped = drop(delta, 0.5, "l1", seed=0, source="a", tensor="t")
    assert torch.equal(dropped, delta)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, (1 << 20) + 17])
def test_l1_norm(count):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count))
    assert l1_norm(tensor) == pytest.approx(tensor.double().abs().sum().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (7, 11), (1025, 1031)])
def test_inner_product(shape):
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    expected = (one.double() * other.double()).sum().item()
    assert inner_product(one, other) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if one.dim() == 2:
        assert inner_product(one.t(), other.t()) == pytest.approx(expected, rel=1e-9)

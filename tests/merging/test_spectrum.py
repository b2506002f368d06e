"""Singular vectors by the Gram matrix, against numpy's SVD in float64."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging import spectrum
from automerge.merging.spectrum import as_matrix, is_matrix, orthogonal_factor, top_components

SHAPES = [(1, 1), (1, 9), (9, 1), (8, 5), (5, 8), (16, 16), (60, 7)]


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_are_those_of_numpy(shape, dtype):
    matrix = normal(shape, dtype=dtype)
    left, values, right = top_components(matrix, 3)
    u, s, vt = numpy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    count = min(3, *shape)
    assert left.dtype == values.dtype == right.dtype == dtype
    assert left.shape == (shape[0], count)
    assert right.shape == (shape[1], count)
    numpy.testing.assert_allclose(values, s[:count], rtol=1e-6)
    # Signs are arbitrary: compare what the components add up to.
    expected = (u[:, :count] * s[:count]) @ vt[:count]
    numpy.testing.assert_allclose((left * values) @ right.T, expected, atol=2e-6 * s[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_orthogonal_factor_is_that_of_numpy(shape):
    matrix = normal(shape, seed=1)
    factor, values = orthogonal_factor(matrix)
    u, s, vt = numpy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    numpy.testing.assert_allclose(factor, u @ vt, atol=2e-6)
    numpy.testing.assert_allclose(values, s, rtol=1e-6)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_orthogonal_factor_is_the_nearest_orthogonal_matrix(rows, columns, seed):
    matrix = normal((rows, columns), seed)
    factor, values = orthogonal_factor(matrix)
    gram = factor.T @ factor if rows >= columns else factor @ factor.T
    if values[-1] > 1e-3 * values[0]:
        torch.testing.assert_close(gram, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)
        # At the nearest one, M' Q is symmetric and has the singular values as eigenvalues.
        torch.testing.assert_close(float((matrix * factor).sum()), float(values.sum()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_without_a_value_are_left_out(rank, scale):
    matrix = normal((20, rank), 2) @ normal((rank, 11), 3) * scale
    left, values, right = top_components(matrix, 8)
    assert left.shape == (20, rank)
    assert values.shape == (rank,)
    assert right.shape == (11, rank)
    factor, values = orthogonal_factor(matrix)
    assert len(values) == rank
    singular = numpy.linalg.svd(factor.double().numpy(), compute_uv=False)
    numpy.testing.assert_allclose(singular, [1.0] * rank + [0.0] * (11 - rank), atol=1e-5)


def test_chunks_of_rows_add_up_to_the_whole(monkeypatch):
    matrix = normal((101, 6), 4)
    whole, _ = orthogonal_factor(matrix)
    monkeypatch.setattr(spectrum, "_CHUNK", 60)
    chunked, _ = orthogonal_factor(matrix)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)


def test_small_singular_values_are_true_to_float32():
    """Squaring must not lose them: four digits of a value that is 1e-4 of the largest."""
    left, _ = orthogonal_factor(normal((50, 4), 5, torch.float64))
    right, _ = orthogonal_factor(normal((4, 4), 6, torch.float64))
    values = torch.tensor([1.0, 1e-1, 1e-3, 1e-4], dtype=torch.float64)
    _, found, _ = top_components((left * values @ right.T).float(), 4)
    torch.testing.assert_close(found.double(), values, rtol=2e-3, atol=0)


def test_what_is_a_matrix():
    shapes = [(), (3,), (0, 4), (4, 0), (2, 3), (8, 4, 3, 3)]
    assert [is_matrix(torch.zeros(shape)) for shape in shapes] == [False] * 4 + [True] * 2
    kernel = normal((8, 4, 3, 3))
    assert torch.equal(as_matrix(kernel)[5], kernel[5].reshape(-1))

"""Iso-C against numpy's SVD, and what holds whatever the inputs."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique
from tests.merging.techniques.inputs import make_inputs

iso_c = load_technique("iso_c")
task_arithmetic = load_technique("task_arithmetic")


def reference(inputs, weights, lambda_):
    base = inputs.base.double().numpy()
    deltas = [source.double().numpy() - base for source in inputs.sources]
    total = sum(w * d for w, d in zip(weights, deltas, strict=True)).reshape(base.shape[0], -1)
    u, s, vt = numpy.linalg.svd(total, full_matrices=False)
    return base + lambda_ * (numpy.mean(s) * u @ vt).reshape(base.shape)


def test_it_keeps_the_contract():
    check_technique(iso_c)


@pytest.mark.parametrize("shape", [(12, 11), (30, 9), (9, 30), (8, 3, 3, 3), (1, 6), (6, 1), (4, 5, 2)], ids=str)
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (1.0, -0.25), (0.125, 1.0, 0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form(shape, weights, dtype):
    inputs = make_inputs(len(weights), shape, seed=len(weights), dtype=dtype)
    for scale in (1.0, 1.5):
        merged = iso_c(inputs, weights, lambda_=scale)
        assert merged.dtype == dtype
        numpy.testing.assert_allclose(merged, reference(inputs, weights, scale), rtol=0, atol=1e-5)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_all_singular_values_are_the_mean(rows, columns, count, seed):
    inputs = make_inputs(count, (rows, columns), seed)
    inputs = TensorInputs("w", inputs.source_names, torch.zeros(rows, columns), list(inputs.deltas))
    weights = [0.5] * count
    plain = task_arithmetic(inputs, weights, lambda_=1.0).double().numpy()
    before = numpy.linalg.svd(plain, compute_uv=False)
    if before[-1] < 1e-3 * before[0]:
        return
    after = numpy.linalg.svd(iso_c(inputs, weights, lambda_=1.0).double().numpy(), compute_uv=False)
    numpy.testing.assert_allclose(after, before.mean(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (3, 0)], ids=str)
def test_without_a_matrix_it_is_task_arithmetic(shape):
    inputs = make_inputs(2, shape)
    merged = iso_c(inputs, [0.5, 0.25], lambda_=2.0)
    assert torch.equal(merged, task_arithmetic(inputs, [0.5, 0.25], lambda_=2.0))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 3, 4)], ids=str)
def test_a_single_row_is_its_own_direction(shape):
    inputs = make_inputs(2, shape)
    plain = task_arithmetic(inputs, [0.5, 0.25], lambda_=1.0)
    torch.testing.assert_close(iso_c(inputs, [0.5, 0.25], lambda_=1.0), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_that_no_source_uses_stay_unused(rank):
    generator = torch.Generator().manual_seed(rank)
    delta = torch.randn(10, rank, generator=generator) @ torch.randn(rank, 8, generator=generator)
    inputs = TensorInputs("w", ["a"], torch.zeros(10, 8), [delta])
    found = numpy.linalg.svd(iso_c(inputs, [1.0], lambda_=1.0).double().numpy(), compute_uv=False)
    mean = numpy.linalg.svd(delta.double().numpy(), compute_uv=False)[:rank].mean() if rank else 0.0
    numpy.testing.assert_allclose(found, [mean] * rank + [0.0] * (8 - rank), atol=2e-5)


def test_sources_that_cancel_leave_the_base():
    inputs = make_inputs(1, (6, 5))
    delta = inputs.deltas[0]
    base = torch.zeros(6, 5)
    merged = iso_c(TensorInputs("w", ["a", "b"], base, [delta, -delta]), [1.0, 1.0], lambda_=1.0)
    assert torch.equal(merged, base)


@given(st.permutations(range(3)), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_sources_has_no_effect(order, seed):
    inputs = make_inputs(3, (9, 14), seed)
    weights = [0.25, 0.5, 1.0]
    shuffled = TensorInputs(
        "w", [inputs.source_names[i] for i in order], inputs.base, [inputs.sources[i] for i in order]
    )
    again = iso_c(shuffled, [weights[i] for i in order], lambda_=1.0)
    torch.testing.assert_close(iso_c(inputs, weights, lambda_=1.0), again, rtol=0, atol=1e-5)


def test_identical_sources_merge_as_one():
    inputs = make_inputs(1, (10, 8))
    twins = TensorInputs("w", ["a", "b"], inputs.base, inputs.sources * 2)
    one = iso_c(inputs, [1.0], lambda_=1.0)
    torch.testing.assert_close(iso_c(twins, [0.75, 0.25], lambda_=1.0), one, rtol=0, atol=1e-6)


def test_lambda_is_a_factor_of_the_weights():
    inputs = make_inputs(2, (7, 9))
    settings = Settings("iso_c", {"s0": 0.5, "s1": 0.25}, {"lambda": 2.0})
    simple = canonical_settings(settings)
    assert simple == Settings("iso_c", {"s0": 1.0, "s1": 0.5}, {"lambda": 1.0})
    torch.testing.assert_close(iso_c.merge(inputs, settings), iso_c.merge(inputs, simple), rtol=0, atol=1e-6)

"""TSV-Merge against a slow numpy reference, and what holds whatever the inputs."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging.spectrum import as_matrix
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique
from tests.merging.techniques.inputs import make_inputs

tsv_merge = load_technique("tsv_merge")
task_arithmetic = load_technique("task_arithmetic")


def reference(inputs, weights, lambda_):
    """As the paper says it: SVDs, concatenation, and the SVD of what was concatenated for the Procrustes problem."""
    base = inputs.base.double().numpy()
    matrices = [(t.double().numpy() - base).reshape(base.shape[0], -1) for t in inputs.sources]
    share = min(matrices[0].shape) // len(matrices)
    lefts, values, rights = [], [], []
    for matrix, weight in zip(matrices, weights, strict=True):
        u, s, vt = numpy.linalg.svd(matrix, full_matrices=False)
        lefts.append(u[:, :share])
        values.append(weight * s[:share])
        rights.append(vt[:share])
    p, _, qt = numpy.linalg.svd(numpy.hstack(lefts), full_matrices=False)
    r, _, tt = numpy.linalg.svd(numpy.vstack(rights), full_matrices=False)
    merged = p @ qt @ numpy.diag(numpy.concatenate(values)) @ r @ tt
    return base + lambda_ * merged.reshape(base.shape)


def test_it_keeps_the_contract():
    check_technique(tsv_merge)


@pytest.mark.parametrize("shape", [(12, 12), (30, 9), (9, 30), (8, 3, 3, 3), (5, 7), (16, 4, 5)], ids=str)
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (1.0, -0.25), (0.125, 1.0, 0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form(shape, weights, dtype):
    inputs = make_inputs(len(weights), shape, seed=len(weights), dtype=dtype)
    for scale in (1.0, 1.5):
        merged = tsv_merge(inputs, weights, lambda_=scale)
        assert merged.dtype == dtype
        numpy.testing.assert_allclose(merged, reference(inputs, weights, scale), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (9, 1), (2, 8), (0, 4), (1, 1, 12)], ids=str)
def test_what_has_no_room_for_shares_is_task_arithmetic(shape):
    inputs = make_inputs(3, shape)
    weights = [0.5, 0.25, 1.0]
    merged = tsv_merge(inputs, weights, lambda_=2.0)
    assert torch.equal(merged, task_arithmetic(inputs, weights, lambda_=2.0))


def test_sources_in_orthogonal_directions_do_not_disturb_each_other():
    """Rank-2 changes in separate rows and columns: their sum, untouched."""
    base = torch.zeros(8, 8)
    one, other = base.clone(), base.clone()
    one[:2, :2] = torch.tensor([[3.0, 1.0], [0.5, 2.0]])
    other[4:6, 5:7] = torch.tensor([[1.0, -1.0], [4.0, 0.25]])
    merged = tsv_merge(TensorInputs("w", ["a", "b"], base, [one, other]), [1.0, 0.5], lambda_=1.0)
    torch.testing.assert_close(merged, one + 0.5 * other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_the_singular_values_of_the_merge_are_those_of_the_sources(count):
    """After whitening all kept directions are orthonormal: the values stay as they were."""
    inputs = make_inputs(count, (15, 12), seed=3)
    merged = (tsv_merge(inputs, [1.0] * count, lambda_=1.0) - inputs.base).double().numpy()
    share = 12 // count
    kept = [numpy.linalg.svd(d.double().numpy(), compute_uv=False)[:share] for d in inputs.deltas]
    expected = numpy.sort(numpy.concatenate(kept))[::-1]
    found = numpy.linalg.svd(merged, compute_uv=False)
    numpy.testing.assert_allclose(found[: count * share], expected, rtol=1e-5)
    numpy.testing.assert_allclose(found[count * share :], 0, atol=1e-5)


def test_identical_sources_give_their_largest_components():
    inputs = make_inputs(1, (10, 8), seed=5)
    twins = TensorInputs("w", ["a", "b"], inputs.base, inputs.sources * 2)
    u, s, vt = numpy.linalg.svd(inputs.deltas[0].double().numpy(), full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vt[:4]
    merged = tsv_merge(twins, [1.0, 1.0], lambda_=1.0) - inputs.base
    numpy.testing.assert_allclose(merged, expected, atol=2e-6)


@given(st.permutations(range(3)), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_sources_has_no_effect(order, seed):
    inputs = make_inputs(3, (9, 14), seed)
    weights = [0.25, 0.5, 1.0]
    shuffled = TensorInputs(
        "w", [inputs.source_names[i] for i in order], inputs.base, [inputs.sources[i] for i in order]
    )
    again = tsv_merge(shuffled, [weights[i] for i in order], lambda_=1.0)
    torch.testing.assert_close(tsv_merge(inputs, weights, lambda_=1.0), again, rtol=0, atol=1e-5)


@given(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=1, max_size=4),
    st.integers(0, 2),
)
@settings(deadline=None, max_examples=80)
def test_finite_whatever_the_shape_and_rank(shape, weights, rank):
    inputs = make_inputs(len(weights), shape, seed=rank)
    sources = list(inputs.sources)
    sources[0] = inputs.base.clone()  # a task vector of zero
    if len(shape) >= 2 and inputs.base.numel():  # and one of low rank
        columns = as_matrix(inputs.base).shape[1]
        low = torch.ones(shape[0], rank) @ torch.ones(rank, columns)
        sources[-1] = inputs.base + low.reshape(shape)
    merged = tsv_merge(TensorInputs("w", inputs.source_names, inputs.base, sources), weights, lambda_=1.0)
    assert merged.shape == shape
    assert torch.isfinite(merged).all()


def test_an_unused_source_takes_no_share():
    inputs = make_inputs(3, (8, 8), seed=6)
    two = TensorInputs("w", inputs.source_names[:2], inputs.base, inputs.sources[:2])
    merged = tsv_merge(inputs, [0.5, 0.25, 0.0], lambda_=1.0)
    assert torch.equal(merged, tsv_merge(two, [0.5, 0.25], lambda_=1.0))


def test_a_source_alone_is_task_arithmetic():
    inputs = make_inputs(2, (8, 6), seed=7)
    settings = Settings("tsv_merge", {"s0": 0.0, "s1": 0.25}, {"lambda": 2.0})
    simple = canonical_settings(settings)
    assert simple == Settings("task_arithmetic", {"s0": 0.0, "s1": 0.5}, {"lambda": 1.0})
    merged = task_arithmetic.merge(inputs, simple)
    torch.testing.assert_close(tsv_merge.merge(inputs, settings), merged, rtol=0, atol=1e-6)


def test_lambda_is_a_factor_of_the_weights():
    settings = Settings("tsv_merge", {"s0": 0.5, "s1": 0.25}, {"lambda": 2.0})
    assert canonical_settings(settings) == Settings("tsv_merge", {"s0": 1.0, "s1": 0.5}, {"lambda": 1.0})

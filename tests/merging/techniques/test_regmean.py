"""RegMean against numpy's least squares on the inputs themselves, not on their Gram matrices."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.errors import MergeError
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique
from tests.merging.techniques.inputs import make_inputs

regmean = load_technique("regmean")
linear = load_technique("linear")


def with_grams(inputs, samples):
    """``samples``: [rows, n] for each source."""
    grams = [each.T @ each / len(each) for each in samples]
    return TensorInputs("w", inputs.source_names, None, inputs.sources, statistics={"gram": grams})


def draw(inputs, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = inputs.sources[0][0].numel()
    mixing = torch.randn(size, size, generator=generator) + 2 * torch.eye(size)
    dtype = inputs.sources[0].dtype
    return [
        (torch.randn(rows, size, generator=generator) @ mixing + at).to(dtype) for at, _ in enumerate(inputs.sources)
    ]


def least_squares(inputs, weights, samples, alpha):
    """argmin of sum(w_i |X_i t' - X_i t_i'|^2 / rows), alpha by rows that see one input each."""
    equations, answers = [], []
    for source, weight, rows in zip(inputs.sources, weights, samples, strict=True):
        x, t = rows.double().numpy(), source.reshape(len(source), -1).double().numpy()
        alone = numpy.diag(numpy.sqrt((x**2).mean(0)))
        for part, factor in ((x / len(x) ** 0.5, alpha), (alone, 1 - alpha)):
            equations.append((weight * factor) ** 0.5 * part)
            answers.append((weight * factor) ** 0.5 * part @ t.T)
    solution, *_ = numpy.linalg.lstsq(numpy.concatenate(equations), numpy.concatenate(answers), rcond=None)
    return solution.T.reshape(inputs.sources[0].shape)


def test_it_keeps_the_contract():
    check_technique(regmean)


@pytest.mark.parametrize("shape", [(12, 11), (3, 20), (20, 3), (4, 3, 2, 2), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.25), (0.125, 1.0, 0.5)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form(shape, weights, alpha, dtype):
    inputs = make_inputs(len(weights), shape, seed=len(weights), dtype=dtype)
    samples = draw(inputs, rows=50)
    merged = regmean(with_grams(inputs, samples), weights, alpha=alpha)
    assert merged.dtype == dtype
    assert merged.shape == shape
    expected = least_squares(inputs, weights, samples, alpha)
    numpy.testing.assert_allclose(merged.double().numpy(), expected, rtol=0, atol=2e-4)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_sources_that_agree_stay_as_they_are(rows, columns, seed):
    one = make_inputs(1, (rows, columns), seed)
    inputs = TensorInputs("w", ["a", "b"], None, one.sources * 2)
    merged = regmean(with_grams(inputs, draw(inputs, 3, seed)), [0.3, 0.7], alpha=0.9)
    torch.testing.assert_close(merged, one.sources[0], rtol=1e-5, atol=1e-5)


def test_an_input_that_one_source_alone_has_takes_that_source_s_column():
    inputs = TensorInputs("w", ["a", "b"], None, [torch.full((2, 3), 1.0), torch.full((2, 3), 5.0)])
    grams = [torch.diag(torch.tensor([1.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0, 0.0]))]
    inputs = TensorInputs("w", ["a", "b"], None, inputs.sources, statistics={"gram": grams})
    merged = regmean(inputs, [0.5, 0.5], alpha=0.9)
    expected = torch.tensor([[1.0, 5.0, 3.0]] * 2)  # the last input is always zero: the average
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (3, 0)], ids=str)
def test_without_gram_matrices_it_is_the_average(shape):
    inputs = make_inputs(2, shape)
    assert torch.equal(regmean(inputs, [0.5, 0.25], alpha=0.9), linear(inputs, [0.5, 0.25]))


def test_layers_that_saw_zeros_only_are_averaged():
    inputs = make_inputs(2, (3, 4))
    found = TensorInputs("w", inputs.source_names, None, inputs.sources, statistics={"gram": [torch.zeros(4, 4)] * 2})
    assert torch.equal(regmean(found, [0.5, 0.25], alpha=0.9), linear(inputs, [0.5, 0.25]))


def test_fewer_samples_than_inputs_are_no_trouble():
    inputs = make_inputs(2, (4, 200))
    merged = regmean(with_grams(inputs, draw(inputs, rows=5)), [0.5, 0.5], alpha=0.99)
    assert bool(torch.isfinite(merged).all())
    assert float(merged.abs().max()) < 20 * max(float(each.abs().max()) for each in inputs.sources)


def test_the_scale_of_the_inputs_has_no_effect():
    inputs = make_inputs(2, (4, 6))
    samples = draw(inputs, rows=30)
    once = regmean(with_grams(inputs, samples), [0.5, 0.5], alpha=0.9)
    tiny = regmean(with_grams(inputs, [1e-12 * each for each in samples]), [0.5, 0.5], alpha=0.9)
    torch.testing.assert_close(once, tiny, rtol=1e-4, atol=1e-4)


def test_one_source_alone_is_linear():
    settings = Settings("regmean", {"a": 3.0, "b": 0.0}, {"alpha": 0.5})
    assert canonical_settings(settings) == Settings("linear", {"a": 1.0, "b": 0.0})


def test_wrong_matrices_are_one_sentence():
    inputs = make_inputs(2, (2, 2))
    wrong = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    found = TensorInputs("w", inputs.source_names, None, inputs.sources, statistics={"gram": [wrong, wrong]})
    with pytest.raises(MergeError, match="the Gram matrices have no positive definite sum"):
        regmean(found, [0.5, 0.5], alpha=0.9)
    with pytest.raises(MergeError, match="'regmean' takes no negative weight"):
        regmean(inputs, [1.0, -0.5], alpha=0.9)

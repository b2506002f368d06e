"""One tensor: dtypes, refusals, shapes."""

import numpy as np
import pytest
import torch

from automerge.errors import MergeError
from automerge.merging.apply import convert, merge_tensor, refuse_non_finite
from automerge.merging.recipe import RecipeBlock


def block(technique="linear", a=0.5, b=0.5, buffers=(), **hyperparameters):
    return RecipeBlock(
        name="trunk",
        technique=technique,
        weights={"a": a, "b": b},
        hyperparameters=hyperparameters,
        parameters=["w"],
        buffers=list(buffers),
    )


ARITHMETIC = {"technique": "task_arithmetic", "a": 1.0, "b": 1.0, "lambda": 1.0}


def merge(a, b, base=None, how=None, **options):
    return merge_tensor("w", block(**(how or {})), base, {"a": a, "b": b}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_same_keeps_the_dtype_and_accumulates_wider(dtype):
    a, b = torch.tensor([1.0, 3.0]).to(dtype), torch.tensor([1.0 + 2**-7, 5.0]).to(dtype)
    merged = merge(a, b)
    assert merged.dtype == dtype
    assert torch.equal(merged, ((a.double() + b.double()) / 2).to(dtype))


def test_float64_is_accumulated_in_float64():
    a, b = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    assert merge(a, b).item() == np.mean([1.0, 1.0 + 1e-12])
    # A float64 base counts too.
    base = torch.tensor([1 + 1e-12], dtype=torch.float64)
    merged = merge(torch.ones(1), torch.ones(1), base, ARITHMETIC, dtype="float32")
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_asked_dtype(dtype):
    merged = merge(torch.tensor([1.0]), torch.tensor([2.0]).bfloat16(), dtype=dtype)
    assert merged.dtype == getattr(torch, dtype)
    assert merged.item() == 1.5


def test_same_needs_one_dtype():
    with pytest.raises(MergeError, match=r"'w' is float32 in 'a', bfloat16 in 'b'; say which"):
        merge(torch.ones(1), torch.ones(1).bfloat16())


def test_integer_and_floating_point_do_not_mix():
    with pytest.raises(MergeError, match="float32 in 'a', int64 in 'b'"):
        merge(torch.ones(1), torch.ones(1).long(), dtype="float16")
    with pytest.raises(MergeError, match=r"base, tensor 'w' is torch\.int64"):
        merge(torch.ones(1), torch.ones(1), torch.ones(1).long(), ARITHMETIC)
    with pytest.raises(MergeError, match="complex"):
        merge(torch.ones(1).to(torch.complex64), torch.ones(1).to(torch.complex64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_non_finite_inputs_are_refused_by_name(dtype):
    bad = torch.tensor([float("nan"), 1.0, float("nan"), float("nan")]).to(dtype)
    with pytest.raises(MergeError, match="source 'b', tensor 'w': 3 NaN and 0 infinite values"):
        merge(torch.ones(4).to(dtype), bad)
    with pytest.raises(MergeError, match="base, tensor 'w': 3 NaN"):
        merge(torch.ones(4).to(dtype), torch.ones(4).to(dtype), bad, ARITHMETIC)


def test_infinite_values_are_counted():
    with pytest.raises(MergeError, match="base, tensor 't': 1 NaN and 2 infinite values"):
        refuse_non_finite("base", "t", torch.tensor([float("nan"), float("inf"), -float("inf"), 0]))
    refuse_non_finite("base", "t", torch.arange(3))


def test_a_result_beyond_the_output_dtype_is_refused_by_name():
    big = torch.tensor([60000.0, 1.0]).half()
    with pytest.raises(MergeError, match=r"tensor 'w': 1 of 2 values do not fit float16 \(largest magnitude 120000\)"):
        merge(big, big, torch.zeros(2).half(), ARITHMETIC)
    assert merge(big, big, torch.zeros(2).half(), ARITHMETIC, dtype="bfloat16").isfinite().all()
    with pytest.raises(MergeError, match="do not fit float32"):
        merge(torch.tensor([3e38]), torch.tensor([3e38]), torch.zeros(1), ARITHMETIC)


def test_integers_among_the_parameters_follow_the_buffer_policy():
    table = torch.tensor([1, 2])
    assert torch.equal(merge(table, table), table)
    with pytest.raises(MergeError, match="buffer 'w'"):
        merge(table, table + 1)
    assert torch.equal(merge(table, table + 1, table + 5, integer_buffers="base"), table + 5)


def test_buffers_are_never_task_vectors():
    block_ = RecipeBlock(
        name="n",
        technique="task_arithmetic",
        weights={"a": 1.0, "b": 1.0},
        hyperparameters={"lambda": 1.0},
        buffers=["running_var"],
    )
    sources = {"a": torch.tensor([0.1]).half(), "b": torch.tensor([0.3]).half()}
    merged = merge_tensor("running_var", block_, torch.tensor([1.0]).half(), sources)
    assert merged.dtype == torch.float16
    assert merged.item() == pytest.approx(0.2, rel=1e-3)
    with pytest.raises(MergeError, match="source 'a', tensor 'running_var': 1 NaN"):
        merge_tensor("running_var", block_, None, sources | {"a": torch.tensor([float("nan")])}, dtype="float32")


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_tensors(shape):
    assert merge(torch.ones(shape), torch.ones(shape)).shape == shape


def test_non_contiguous_tensors():
    a, b = torch.randn(5, 3).t(), torch.randn(3, 5)
    how = {"technique": "ties", "density": 0.4, "lambda": 1.0, "normalize": True}
    base = torch.randn(5, 3).t()
    expected = merge(a.contiguous(), b, base.contiguous(), how)
    assert torch.equal(merge(a, b, base, how), expected)


def test_private_tensors_are_converted_and_checked():
    assert convert("h", "source 'a'", torch.tensor([1.5]), "bfloat16").dtype == torch.bfloat16
    assert convert("h", "source 'a'", torch.tensor([1]), "bfloat16").dtype == torch.int64
    with pytest.raises(MergeError, match="source 'a', tensor 'h': 1 NaN"):
        convert("h", "source 'a'", torch.tensor([float("nan")]), "same")
    with pytest.raises(MergeError, match=r"tensor 'h'.*float16"):
        convert("h", "source 'a'", torch.tensor([1e6]), "float16")

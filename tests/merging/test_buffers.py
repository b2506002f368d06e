"""Buffers: counters, index tables, running statistics."""

import pytest
import torch

from automerge.errors import MergeError
from automerge.merging.buffers import merge_buffer

WEIGHTS = {"a": 0.25, "b": 0.75}


def merge(name, base, a, b, rule="error", weights=WEIGHTS):
    return merge_buffer(name, base, {"a": a, "b": b}, weights, rule)


def test_counters_take_the_maximum():
    merged = merge("bn.num_batches_tracked", torch.tensor(100), torch.tensor(7), torch.tensor(9))
    assert merged.item() == 9
    assert merged.dtype == torch.int64
    assert merged.shape == ()


def test_equal_integers_are_kept():
    index = torch.arange(6).reshape(2, 3)
    assert torch.equal(merge("relative_position_index", None, index, index.clone()), index)


def test_differing_integers_are_refused_or_the_bases():
    base, a, b = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1, 0])
    with pytest.raises(
        MergeError, match=r"buffer 'table' \(int64\) differs between the sources; set merge.integer_buffers"
    ):
        merge("table", base, a, b)
    assert torch.equal(merge("table", base, a, b, "base"), base)
    with pytest.raises(MergeError, match="there is no base that has it"):
        merge("table", None, a, b, "base")
    with pytest.raises(MergeError, match=r"the base's is torch\.int32"):
        merge("table", base.int(), a, b, "base")


def test_booleans_follow_the_rule_of_integers():
    yes, no = torch.tensor(True), torch.tensor(False)
    assert merge("mask", None, yes, yes).item() is True
    with pytest.raises(MergeError, match="'mask'"):
        merge("mask", None, yes, no)
    with pytest.raises(MergeError, match="num_batches_tracked"):
        merge("num_batches_tracked", None, yes, no)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 0.25, "b": 0.75}, 3.5),
        ({"a": 1, "b": 3}, 3.5),
        ({"a": 1, "b": 0}, 2.0),
        ({"a": -1, "b": 3}, 3.0),
        ({"a": 0, "b": 0}, 3.0),
    ],
)
def test_statistics_are_averaged_and_never_negative(weights, expected):
    merged = merge("bn.running_var", torch.tensor([50.0]), torch.tensor([2.0]), torch.tensor([4.0]), weights=weights)
    assert merged.item() == expected

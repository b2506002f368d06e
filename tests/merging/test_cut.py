"""The exact cut: whatever the distribution, it is where a full stable sort would make it."""

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging import cut as module
from automerge.merging.cut import Sample, find_cuts
from automerge.merging.kernels import DTYPES, Delta, load_kernels
from automerge.merging.sparsify import largest
from automerge.merging.workers import Workers

KERNELS = load_kernels()
TILE = 4096


def cut_mask(delta: torch.Tensor, keep: int, samples: list[Sample] | None = None) -> torch.Tensor:
    """The mask that the cut of a task vector means, applied tile by tile as the kernels do."""
    base = torch.zeros_like(delta)
    count = delta.numel()
    tiles = [(first, min(TILE, count - first)) for first in range(0, count, TILE)]
    code = DTYPES[str(delta.dtype).removeprefix("torch.")]
    item = delta.element_size()

    def deltas(first: int, number: int) -> list[Delta]:
        at = first * item
        return [Delta(base.data_ptr() + at, code, delta.data_ptr() + at, code, number)]

    with Workers(2) as workers:
        (cut,) = find_cuts(KERNELS, workers, deltas, tiles, 1, keep, samples)
    bits = delta.float().view(torch.int32) & 0x7FFFFFFF
    mask = bits > cut.value
    for index, (first, number) in enumerate(tiles):
        equal = (bits[first : first + number] == cut.value).nonzero().squeeze(1)
        mask[first + equal[: cut.ties[index]]] = True
    return mask


def draw(kind: str, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "bfloat16 steps": (normal * 0.01 + 1).bfloat16().float() - 1,
        "mostly zero": normal * (torch.rand(count, generator=generator) < 0.2),
        "all zero": torch.zeros(count),
        "one value": torch.full((count,), -3.5),
        "sorted": torch.linspace(-1, 2, count),
        "rows of different scale": normal * (1 + 100 * (torch.arange(count) // 700 % 7 == 0)),
        "two values": torch.where(normal > 0.2, 2.0, -1.0),
        "one value among many": torch.where(torch.rand(count, generator=generator) < 0.1, -0.67, normal),
        "few outliers": torch.where(torch.arange(count) % 997 == 0, 1e6 * normal, 1e-3 * normal),
    }[kind]


KINDS = [
    "normal",
    "bfloat16 steps",
    "mostly zero",
    "all zero",
    "one value",
    "sorted",
    "rows of different scale",
    "two values",
    "one value among many",
    "few outliers",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 5000, 50_001])
def test_the_cut_keeps_what_a_stable_sort_keeps(kind, count):
    delta = draw(kind, count, seed=count)
    for keep in sorted({1, 2, count // 10, count // 2, count - count // 5, count - 1}):
        if 0 < keep < count:
            assert torch.equal(cut_mask(delta, keep), largest(delta.abs(), keep)), keep


@given(st.sampled_from(KINDS), st.integers(2, 20_000), st.floats(0.0, 1.0), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_any_share_of_any_distribution(kind, count, share, seed):
    delta = draw(kind, count, seed)
    keep = min(count - 1, max(1, int(share * count)))
    assert torch.equal(cut_mask(delta, keep), largest(delta.abs(), keep))


def test_a_frequent_value_above_below_and_at_the_cut():
    delta = draw("one value among many", 50_000, seed=2)
    first = int((delta.abs() > 0.67).sum())  # of magnitudes above it; some 5000 are equal
    samples: list[Sample] = []
    for keep in (first - 1500, first - 3, first, first + 1, first + 2500, first + 5001, first + 6500):
        assert torch.equal(cut_mask(delta, keep, samples), largest(delta.abs(), keep)), keep - first
    assert module._window(samples[0], first + 100, 50_000).frequent is not None


@pytest.mark.parametrize("kind", ["normal", "two values", "bfloat16 steps"])
def test_a_misleading_sample_costs_time_and_no_exactness(kind):
    delta = draw(kind, 20_000, seed=3)
    wrong = [Sample(array("I", [1, 2, 3] * 1000 + [0x7F000000]))]
    assert torch.equal(cut_mask(delta, 7000, wrong), largest(delta.abs(), 7000))


def test_a_sample_is_taken_once():
    delta = draw("normal", 50_000, seed=1)
    samples: list[Sample] = []
    first = cut_mask(delta, 20_000, samples)
    (sample,) = samples
    assert torch.equal(cut_mask(delta, 20_000, samples), first)
    assert samples == [sample]
    assert torch.equal(cut_mask(delta, 30_000, samples), largest(delta.abs(), 30_000))


def test_a_window_is_narrow_and_holds_the_cut():
    values = array("I", sorted(range(10_000)))
    window = module._window(Sample(values), keep=500_000, total=1_000_000)
    assert 4_000 < window.low < 5_000 < window.high < 6_000
    assert not window.values


def test_a_window_of_few_values_is_counted():
    values = array("I", sorted([7, 8, 9, 400] * 1000))
    window = module._window(Sample(values), keep=500_000, total=1_000_000)
    assert (window.low, window.high, window.values) == (8, 9, [8, 9])


def test_half_precision_task_vectors_are_cut_in_float32():
    delta = draw("normal", 9_000, seed=5).half()
    assert torch.equal(cut_mask(delta, 3_000), largest(delta.float().abs(), 3_000))

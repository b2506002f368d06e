"""The compiled kernels give the bytes of the torch functions, at every level of the instruction set that there is."""

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging import kernels
from automerge.merging.consensus import sum_of_agreeing, weighted_sum
from automerge.merging.kernels import (
    ALL_TIES,
    CHUNK,
    DTYPES,
    MAX_SOURCES,
    NO_OUTLIERS,
    Delta,
    Kernels,
    Program,
    Source,
    kernels_of,
    load_kernels,
    supported_levels,
)
from automerge.merging.random import keep_threshold, lanes, mask_key
from automerge.merging.sparsify import largest, trim, trim_outliers

TORCH = {name: getattr(torch, name) for name in DTYPES}
LEVELS = [kernels_of(level) for level in supported_levels()]
SIZES = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37)
ALL, LARGEST, RANDOM = 0, 1, 2
SUM, AGREEING, NORMALISED = 0, 1, 2

names = st.sampled_from(sorted(DTYPES))
levels = pytest.mark.parametrize("level", LEVELS, ids=[level.level for level in LEVELS])


class Memory:
    """A tensor's elements at an address that may be any."""

    def __init__(self, tensor: torch.Tensor, offset: int) -> None:
        content = tensor.contiguous().view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        self._buffer = np.full(content.size + 128, 0xA5, np.uint8)
        self._begin = 64 - self._buffer.ctypes.data % 64 + offset
        self._end = self._begin + content.size
        self._buffer[self._begin : self._end] = content
        self._dtype, self._shape = tensor.dtype, tensor.shape

    @property
    def address(self) -> int:
        return self._buffer.ctypes.data + self._begin

    def tensor(self) -> torch.Tensor:
        """What is there now; nothing around it has changed."""
        assert (self._buffer[: self._begin] == 0xA5).all()
        assert (self._buffer[self._end :] == 0xA5).all()
        found = torch.empty(self._shape, dtype=self._dtype)
        ctypes.memmove(found.data_ptr(), self.address, self._end - self._begin)
        return found


@dataclass(frozen=True)
class Case:
    """One tensor's merge."""

    base: torch.Tensor | None
    sources: list[torch.Tensor]
    output: str
    weights: list[float]
    keep: int = ALL
    combine: int = SUM
    density: float = 1.0
    gamma: float = 0.0
    divisor: float = 1.0
    scale: float = 1.0
    index: int = 0
    splits: tuple[int, ...] = ()
    offset: int = 0


def by_torch(case: Case) -> torch.Tensor:
    """The merged tensor in the output dtype, by the functions that the techniques are made of."""
    base = None if case.base is None else case.base.float()
    values = [source.float() if base is None else source.float() - base for source in case.sources]
    if case.keep == LARGEST:
        values = [
            trim_outliers(value, case.density, case.gamma) if case.gamma else trim(value, case.density)
            for value in values
        ]
    if case.keep == RANDOM:
        threshold = keep_threshold(case.density)
        for source, value in enumerate(values):
            bits = lanes(mask_key(7, str(source), "t"), case.index, case.index + value.numel())
            values[source] = torch.where(bits < threshold, value, 0) / case.density
    if case.combine == SUM:
        merged = weighted_sum(values, case.weights)
    else:
        merged = sum_of_agreeing(values, case.weights, normalize=case.combine == NORMALISED)
    merged = merged / case.divisor * case.scale
    return (merged if base is None else base + merged).to(TORCH[case.output])


def cut_of(value: torch.Tensor, keep: int) -> tuple[int, int]:
    """Bits of the smallest of the ``keep`` largest magnitudes, and how many of those equal to it are among them."""
    magnitudes = value.abs()
    cut = magnitudes.sort(descending=True).values[keep - 1]
    assert int(largest(magnitudes, keep).sum()) == keep
    return int(cut.view(torch.int32)), keep - int((magnitudes > cut).sum())


def sources_of(case: Case) -> "ctypes.Array[Source]":
    """What the kernels are told of each source."""
    found = (Source * len(case.sources))()
    for index, (source, weight) in enumerate(zip(case.sources, case.weights, strict=True)):
        found[index] = Source(
            dtype=DTYPES[dtype_of(source)],
            weight=weight,
            key=mask_key(7, str(index), "t"),
            cut=0,
            outlier_cut=NO_OUTLIERS,
            ties=ALL_TIES,
            outlier_ties=0,
        )
        count = source.numel()
        keep = max(1, int(case.density * count))
        if case.keep == LARGEST and case.base is not None and keep < count:
            outliers = min(int(case.gamma * count), count - keep)
            delta = source.float() - case.base.float()
            found[index].cut, found[index].ties = cut_of(delta, keep + outliers)
            if outliers:
                found[index].outlier_cut, found[index].outlier_ties = cut_of(delta, outliers)
    return found


def dtype_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def by_kernels(level: Kernels, case: Case) -> tuple[torch.Tensor, list[int], bool, "ctypes.Array[Source]"]:
    """The merged tensor (in several calls if the case is split), which inputs are not finite, and whether all fits."""
    count = case.sources[0].numel()
    program = Program(
        sources=len(case.sources),
        base_dtype=-1 if case.base is None else DTYPES[dtype_of(case.base)],
        output_dtype=DTYPES[case.output],
        keep=case.keep,
        combine=case.combine,
        threshold=keep_threshold(case.density),
        rescale=case.density,
        divisor=case.divisor,
        scale=case.scale,
    )
    sources = sources_of(case)
    data = [Memory(source, case.offset + index) for index, source in enumerate(case.sources)]
    base = None if case.base is None else Memory(case.base, case.offset)
    output = Memory(torch.zeros(count, dtype=TORCH[case.output]), case.offset + 3)
    bad: set[int] = set()
    overflow = False
    places = [0, *[place for place in case.splits if place < count], count]
    for first, stop in itertools.pairwise(places):
        inputs, narrow = level.merge(
            program,
            sources,
            0 if base is None or case.base is None else base.address + first * case.base.element_size(),
            [memory.address + first * each.element_size() for memory, each in zip(data, case.sources, strict=True)],
            case.index + first,
            stop - first,
            output.address + first * TORCH[case.output].itemsize,
        )
        bad.update(inputs)
        overflow |= narrow
    return output.tensor(), sorted(bad), overflow, sources


def check(case: Case) -> None:
    """Every level gives torch's bytes."""
    expected = by_torch(case)
    fits = bool(torch.isfinite(expected).all())
    for level in LEVELS:
        merged, bad, overflow, _ = by_kernels(level, case)
        assert bad == [], level.level
        assert overflow is not fits, level.level
        if fits:
            assert torch.equal(merged.view(torch.uint8), expected.view(torch.uint8)), level.level


@st.composite
def tensors(draw: st.DrawFn, dtype: str, count: int) -> torch.Tensor:
    """Finite elements: normal ones, few distinct ones (ties), zeros of both signs, denormals, at times the largest."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal(count).astype(np.float32)
    if draw(st.booleans()):
        values = np.round(values * 2) / 4
    special = torch.finfo(TORCH[dtype])
    for number in (0.0, -0.0, special.smallest_normal / 2, -special.smallest_normal / 4):
        values[rng.random(count) < 0.05] = number
    if draw(st.integers(0, 9)) == 0:
        values[rng.random(count) < 0.02] = special.max
        values[rng.random(count) < 0.02] = special.min
    return torch.from_numpy(values).to(TORCH[dtype])


@st.composite
def cases(
    draw: st.DrawFn, keep: int, *, with_base: bool = True, combines: Sequence[int] = (SUM, AGREEING, NORMALISED)
) -> Case:
    count = draw(st.sampled_from(SIZES))
    number = draw(st.integers(1, 5))
    uniform = draw(st.one_of(st.none(), names))  # loops of their own
    dtypes = [uniform or draw(names) for _ in range(number + 2)]
    weight = st.sampled_from([1.0, 0.5, 0.3, 0.0, -0.0, -0.7, -1.0, 1e-3, 2.5])
    return Case(
        base=draw(tensors(dtypes[-1], count)) if with_base else None,
        sources=[draw(tensors(dtype, count)) for dtype in dtypes[:number]],
        output=dtypes[-2],
        weights=[draw(weight) for _ in range(number)],
        keep=keep,
        combine=draw(st.sampled_from(combines)),
        density=draw(st.sampled_from([0.5, 0.25, 0.6, 1 / 3, 0.9, 0.99999, 2**-16])) if keep != ALL else 1.0,
        gamma=draw(st.sampled_from([0.0, 0.01, 0.2, 1.0])) if keep == LARGEST else 0.0,
        divisor=draw(st.sampled_from([1.0, 0.5, 1.7, -0.3, 1e-3])) if keep == ALL else 1.0,
        scale=draw(st.sampled_from([1.0, 0.7, -1.0, 0.0])),
        index=4 * draw(st.sampled_from([0, 1, 1023, 2**40])) if keep == RANDOM else 0,
        splits=tuple(sorted({4 * each for each in draw(st.lists(st.integers(1, 600), max_size=3))})),
        offset=draw(st.integers(0, 9)),
    )


@settings(max_examples=150, deadline=None)
@given(cases(ALL, with_base=False))
def test_sums_of_sources(case: Case) -> None:
    check(case)


@settings(max_examples=150, deadline=None)
@given(cases(ALL))
def test_task_vectors(case: Case) -> None:
    check(case)


@settings(max_examples=300, deadline=None)
@given(cases(LARGEST))
def test_task_vectors_of_which_the_largest_are_kept(case: Case) -> None:
    check(case)


@settings(max_examples=200, deadline=None)
@given(cases(RANDOM))
def test_task_vectors_of_which_random_ones_are_kept(case: Case) -> None:
    check(case)


@levels
def test_as_many_sources_as_there_may_be(level: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *sources = [torch.randn(CHUNK + 5, generator=generator) for _ in range(MAX_SOURCES + 1)]
    case = Case(base, sources, "float32", [0.1] * MAX_SOURCES, LARGEST, NORMALISED, density=0.4)
    assert torch.equal(by_kernels(level, case)[0], by_torch(case))


@levels
def test_a_threshold_of_zero_keeps_nothing(level: Kernels) -> None:
    base, source = torch.full((40,), 2.0), torch.full((40,), 3.0)
    case = Case(base, [source], "float32", [1.0], RANDOM, density=2**-18)
    assert torch.equal(by_kernels(level, case)[0], base)


@levels
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("step", [4, 8, 100, CHUNK, 3000])
def test_ties_are_kept_by_index_and_used_up_from_call_to_call(level: Kernels, dtype: str, step: int) -> None:
    count, keep = 5 * CHUNK + 3, 1234
    base = torch.zeros(count, dtype=TORCH[dtype])
    source = torch.ones(count, dtype=TORCH[dtype])
    source[::7] = 0.5
    case = Case(
        base, [source], dtype, [1.0], LARGEST, density=(keep + 0.5) / count, splits=tuple(range(step, count, step))
    )
    merged, _, _, sources = by_kernels(level, case)
    kept = merged.nonzero().squeeze(1)
    assert kept.tolist() == (source == 1).nonzero().squeeze(1)[:keep].tolist()
    assert sources[0].ties == 0
    # What is not used up is left over; and where all are kept, nothing is counted.
    for ties, left in ((10 * count, 10 * count - int((source == 1).sum())), (ALL_TIES, ALL_TIES)):
        assert leftover(level, case, ties) == left


def leftover(level: Kernels, case: Case, ties: int) -> int:
    assert case.base is not None
    sources = sources_of(case)
    sources[0].ties = ties
    dtype = DTYPES[case.output]
    output = torch.empty_like(case.base)
    program = Program(1, dtype, dtype, LARGEST, SUM, 0, 1.0, 1.0, 1.0)
    level.merge(
        program, sources, case.base.data_ptr(), [case.sources[0].data_ptr()], 0, output.numel(), output.data_ptr()
    )
    return int(sources[0].ties)


@levels
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_inputs_that_are_not_finite_are_named(level: Kernels, data: st.DataObject) -> None:
    keep = data.draw(st.sampled_from([ALL, LARGEST, RANDOM]))
    case = data.draw(cases(keep, with_base=data.draw(st.booleans()) or keep != ALL))
    count = case.sources[0].numel()
    inputs = [*case.sources, *([] if case.base is None else [case.base])]
    worst = data.draw(st.sets(st.integers(0, len(inputs) - 1))) if count else set()
    changed = list(inputs)
    for index in worst:
        wide = TORCH[dtype_of(inputs[index])].itemsize == 4
        bits = changed[index].clone().view(torch.int32 if wide else torch.int16)
        infinity = int(torch.tensor(math.inf, dtype=inputs[index].dtype).view(bits.dtype))
        # Infinities, and NaNs with the least and the largest payload.
        number = data.draw(st.sampled_from([infinity, infinity + 1, torch.iinfo(bits.dtype).max, -1]))
        bits[data.draw(st.integers(0, count - 1))] = number
        changed[index] = bits.view(inputs[index].dtype)
    faulty = replace(
        case,
        sources=changed[: len(case.sources)],
        base=None if case.base is None else changed[-1],
        keep=RANDOM if keep == LARGEST else keep,  # there are no cuts where there are NaNs
    )
    assert by_kernels(level, faulty)[1] == sorted(worst)


@levels
@pytest.mark.parametrize(
    ("output", "fits", "too_large"),
    [
        ("float16", 65519.99609375, 65520.0),
        ("bfloat16", 3.3961773292304957e38, 3.3961775292304957e38),
    ],
)
@pytest.mark.parametrize("place", [0, 31, 40])
def test_what_does_not_fit_is_told(level: Kernels, output: str, fits: float, too_large: float, place: int) -> None:
    for sign in (1, -1):
        for number, overflows in ((fits, False), (too_large, True)):
            source = torch.zeros(41)
            source[place] = sign * number
            case = Case(None, [source], output, [1.0])
            merged, bad, overflow, _ = by_kernels(level, case)
            assert (bad, overflow) == ([], overflows)
            assert torch.equal(merged, source.to(TORCH[output]))


@levels
def test_a_sum_that_leaves_float32_is_told(level: Kernels) -> None:
    huge = torch.full((9,), 3e38)
    case = Case(None, [huge, huge], "float32", [1.0, 1.0])
    assert by_kernels(level, case)[1:3] == ([], True)


@st.composite
def pairs_of_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    count = draw(st.sampled_from(SIZES))
    return draw(tensors(draw(names), count)), draw(tensors(draw(names), count)), draw(st.integers(0, 9))


def magnitudes_of(base: torch.Tensor, source: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    return (source.float() - base.float()).abs().view(torch.int32).numpy().astype(np.uint32)


@levels
@settings(max_examples=60, deadline=None)
@given(pair=pairs_of_tensors(), data=st.data())
def test_magnitudes_are_collected_and_counted(
    level: Kernels, pair: tuple[torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    base, source, offset = pair
    values = magnitudes_of(base, source)
    bound = st.sampled_from([0, 0x3F800000, 0x7FFFFFFF, *values[:20].tolist()])
    low, high = sorted((data.draw(bound), data.draw(bound)))
    of_base, of_source = Memory(base, offset), Memory(source, offset + 1)
    delta = Delta(of_base.address, DTYPES[dtype_of(base)], of_source.address, DTYPES[dtype_of(source)], values.size)
    expected = values[(values >= low) & (values <= high)]
    found = np.full(expected.size + CHUNK + 1, 0xFFFFFFFF, np.uint32)

    above, used = level.collect(delta, low, high, found.ctypes.data, expected.size + CHUNK)
    assert (above, used) == (int((values > high).sum()), expected.size)
    assert (found[:used] == expected).all()
    assert found[-1] == 0xFFFFFFFF
    if values.size:
        assert level.collect(delta, low, high, found.ctypes.data, CHUNK - 1)[1] == -1

    assert level.count(delta, low) == (int((values > low).sum()), int((values == low).sum()))
    assert level.count_equal(delta, low) == int((values == low).sum())

    bins = np.zeros(65536, np.int64)
    level.histogram(delta, -1, bins.ctypes.data)
    assert (bins == np.bincount(values >> 16, minlength=65536)).all()
    upper = low >> 16
    bins[:] = 0
    level.histogram(delta, upper, bins.ctypes.data)
    assert (bins == np.bincount(values[values >> 16 == upper] & 0xFFFF, minlength=65536)).all()


@levels
@settings(max_examples=60, deadline=None)
@given(
    values=st.one_of(
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300),
        st.lists(st.integers(0x3F800000, 0x3F800FFF), min_size=1, max_size=300),
        st.lists(st.sampled_from([0, 5, 2**32 - 1]), min_size=1, max_size=300),
    ),
    data=st.data(),
)
def test_values_are_selected_tallied_and_sorted(level: Kernels, values: list[int], data: st.DataObject) -> None:
    array = np.array(values, np.uint32)
    rank = data.draw(st.integers(0, len(values) - 1))
    selected = level.select(array.ctypes.data, array.size, rank)
    assert selected == sorted(values, reverse=True)[rank]
    assert array.tolist() == values
    assert level.tally(array.ctypes.data, array.size, selected) == (
        sum(value > selected for value in values),
        values.count(selected),
    )
    spare = array.copy()
    left = level.without(spare.ctypes.data, spare.size, selected)
    assert spare[:left].tolist() == [value for value in values if value != selected]
    level.sort(array.ctypes.data, spare.ctypes.data, array.size)
    assert array.tolist() == sorted(values)


def test_many_values_are_tallied() -> None:
    array = np.arange(3 * CHUNK + 1, dtype=np.uint32)
    for level in LEVELS:
        assert level.tally(array.ctypes.data, array.size, 100) == (3 * CHUNK - 100, 1)
        assert level.select(array.ctypes.data, array.size, 100) == 3 * CHUNK - 100


def test_the_best_level_is_loaded() -> None:
    found = load_kernels()
    assert found is not None and found.level == supported_levels()[0]
    assert supported_levels()[-1] == "v1"


def test_without_the_library_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", f"{tmp_path}/none.so")
    assert load_kernels.__wrapped__() is None
    assert "slower path through torch" in caplog.text


def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_VERSION", 99)
    assert load_kernels.__wrapped__() is None
    assert "was built from other sources: install the package again" in caplog.text

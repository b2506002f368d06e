"""The exact cut between the k largest magnitudes of a task vector and the others, without sorting them.

A sorted sample says between which two magnitudes the cut must lie, but for bad luck. One pass over all elements counts
those above this window and collects those inside it, from which the cut is selected; that the cut is in the window is
checked by counting, so the result is exact. Where the sample shows that a few values make up the window (the task
vectors of bfloat16 models have few distinct magnitudes), these are counted instead of collected. Where the window turns
out to miss the cut, or to hold too much, two histograms of 16 bits each find it in any case.

Magnitudes are compared by their bits, as unsigned integers: for floating-point numbers that are not negative the order
is the same.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from automerge.merging.kernels import ALL_TIES, CHUNK, Delta, Kernels
from automerge.merging.workers import Workers

Deltas = Callable[[int, int], Iterable[Delta]]
"""(first element, count) -> that range of the task vector of each source, read into the calling thread's scratch."""

_RUN = 512
"""Neighbouring elements that are sampled together: a read costs the same for one element as for these."""

_SAMPLED = 1 / 128
_LEAST, _MOST = 1 << 13, 1 << 18
"""A sample is this share of the elements, within these bounds; larger samples make narrower windows."""

_MARGIN = 8.0
"""Half the width of the window, in standard deviations of the rank of a random sample. Neighbouring elements are alike
(a row of a matrix shares its scale), so a sample of runs scatters more than a random one; with 8 it rarely misses."""

_FREQUENT = 8
"""A value that makes up 1 / 8 of a window is counted: it would fill the memory for what is collected."""

_FEW = 32
"""A window of so few values is counted, not collected."""

_DENSE = 4
"""A window with more than 1 / 4 of all elements is not collected: memory is bounded."""


@dataclass(frozen=True)
class Cut:
    """Where the k largest magnitudes end.

    Attributes:
        value: bits of the smallest magnitude that is kept.
        ties: by tile, how many elements of this magnitude are kept in it, the first ones; ALL_TIES spares the counting.
    """

    value: int
    ties: Sequence[int]


@dataclass(frozen=True)
class Sample:
    """Sorted magnitudes of some elements of a task vector, as bits."""

    magnitudes: array[int]

    def value(self, share: float) -> int:
        """The magnitude that this share of the elements exceeds."""
        last = len(self.magnitudes) - 1
        return self.magnitudes[max(0, min(last, last - round(share * last)))]

    def multiplicity(self, low: int, high: int) -> int:
        """How many sampled magnitudes lie from low to high."""
        return bisect_right(self.magnitudes, high) - bisect_left(self.magnitudes, low)


def find_cuts(
    kernels: Kernels,
    workers: Workers,
    deltas: Deltas,
    tiles: Sequence[tuple[int, int]],
    sources: int,
    keep: int,
    samples: list[Sample] | None = None,
) -> list[Cut]:
    """The cut of each source's task vector.

    Args:
        kernels: the compiled kernels.
        workers: the threads.
        deltas: gives any range of the task vectors.
        tiles: (first element, count) of all elements.
        sources: how many task vectors there are.
        keep: how many elements to keep, at least 1 and less than there are.
        samples: of these task vectors, from an earlier call; filled if it is empty.

    Returns:
        one for each source.
    """
    total = sum(count for _, count in tiles)
    taken = samples if samples is not None else []
    if not taken:
        taken.extend(_sample(kernels, workers, deltas, tiles, sources))
    windows = [_window(sample, keep, total) for sample in taken]
    passes = workers.map(lambda tile: _search_tile(kernels, workers, deltas, tile, windows), tiles)
    cuts = []
    for source, window in enumerate(windows):
        found = [of_tile[source] for of_tile in passes]
        values = window.values or ([window.low] if window.low == window.high else [])
        cut = _from_values(values, found, keep) if values else _from_window(kernels, window, found, keep)
        cuts.append(cut or _by_histogram(kernels, workers, deltas, tiles, source, keep))
    return cuts


@dataclass(frozen=True)
class _Count:
    """What one tile holds: how many magnitudes are above a value, and how many equal it."""

    above: int
    equal: int


@dataclass(frozen=True)
class _Window:
    """Where the cut must be, but for bad luck.

    Attributes:
        low, high: its lowest and highest magnitude.
        values: the values that make it up, where they are few; else none.
        frequent: the most frequent value, counted and not collected, if it is a large part of the window.
    """

    low: int
    high: int
    values: Sequence[int]
    frequent: int | None


@dataclass(frozen=True)
class _Inside:
    """What one tile holds of a window.

    Attributes:
        above: how many magnitudes are above the window.
        frequent: how many are the window's frequent value, and how many of those inside are above that.
        others: the others, as bytes; None where they are too many.
    """

    above: int
    frequent: _Count
    others: bytes | None


def _sample(
    kernels: Kernels, workers: Workers, deltas: Deltas, tiles: Sequence[tuple[int, int]], sources: int
) -> list[Sample]:
    total = sum(count for _, count in tiles)
    wanted = min(total, max(_LEAST, min(_MOST, int(total * _SAMPLED))))
    runs = tiles if total <= wanted else _runs(total, wanted)
    collected = [bytearray() for _ in range(sources)]
    scratch = workers.scratch()
    for first, count in runs:
        for source, delta in enumerate(deltas(first, count)):
            _, used = kernels.collect(delta, 0, 0x7FFFFFFF, scratch.found.address, count + CHUNK)
            collected[source] += memoryview(scratch.found.memory)[: 4 * used]
    samples = []
    for magnitudes in collected:
        values = array("I", bytes(magnitudes))
        spare = array("I", bytes(len(magnitudes)))
        kernels.sort(values.buffer_info()[0], spare.buffer_info()[0], len(values))
        samples.append(Sample(values))
    return samples


def _runs(total: int, wanted: int) -> Sequence[tuple[int, int]]:
    """Evenly spread runs of neighbouring elements."""
    number = wanted // _RUN
    return [((index * (total - _RUN)) // (number - 1), _RUN) for index in range(number)]


def _window(sample: Sample, keep: int, total: int) -> _Window:
    size = len(sample.magnitudes)
    share = keep / total
    margin = 0.0 if size == total else (_MARGIN * math.sqrt(size * share * (1 - share)) + 2) / size
    low = sample.value(min(1.0, share + margin + 1 / size)) if share + margin < 1 else 0
    high = sample.value(max(0.0, share - margin - 1 / size)) if share - margin > 0 else 0x7FFFFFFF
    begin, end = bisect_left(sample.magnitudes, low), bisect_right(sample.magnitudes, high)
    middle = sample.value(share)
    # A look at one value spares the look at all of them where they are many.
    few = sample.multiplicity(middle, middle) * _FEW >= end - begin
    values = sorted(set(sample.magnitudes[begin:end])) if few else []
    often, frequent = max((sample.multiplicity(value, value), value) for value in (low, middle, high))
    return _Window(
        low, high, values if len(values) <= _FEW else [], frequent if often * _FREQUENT >= end - begin else None
    )


def _search_tile(
    kernels: Kernels, workers: Workers, deltas: Deltas, tile: tuple[int, int], windows: Sequence[_Window]
) -> list[_Inside | list[_Count]]:
    """Per source what is above the window and (unless it is too much) in it, or the counts of its few values."""
    first, count = tile
    found = workers.scratch().found
    results: list[_Inside | list[_Count]] = []
    for delta, window in zip(deltas(first, count), windows, strict=True):
        if window.low == window.high:
            results.append([_Count(*kernels.count(delta, window.low))])
            continue
        above, used = kernels.collect(delta, window.low, window.high, found.address, count + CHUNK)
        if window.values:
            inside = [kernels.tally(found.address, used, value) for value in window.values]
            results.append([_Count(above + larger, equal) for larger, equal in inside])
            continue
        frequent = _Count(0, 0)
        if window.frequent is not None:
            frequent = _Count(*kernels.tally(found.address, used, window.frequent))
            used = kernels.without(found.address, used, window.frequent)
        others = ctypes.string_at(found.address, 4 * used) if used * _DENSE <= count or count <= _LEAST else None
        results.append(_Inside(above, frequent, others))
    return results


def _from_values(values: Sequence[int], found: Sequence[object], keep: int) -> Cut | None:
    """The value that is the cut, if one is."""
    for index, value in enumerate(values):
        counts = [of_tile[index] for of_tile in found if isinstance(of_tile, list)]
        above, equal = sum(each.above for each in counts), sum(each.equal for each in counts)
        if above < keep <= above + equal:
            return _cut(value, keep - above, [each.equal for each in counts])
    return None


def _from_window(kernels: Kernels, window: _Window, found: Sequence[object], keep: int) -> Cut | None:
    """The cut among the magnitudes of the window, if it is there."""
    tiles = [of_tile for of_tile in found if isinstance(of_tile, _Inside)]
    parts = [of_tile.others for of_tile in tiles if of_tile.others is not None]
    if len(parts) < len(tiles):
        return None
    above = sum(of_tile.above for of_tile in tiles)
    larger = sum(of_tile.frequent.above for of_tile in tiles)
    frequent = sum(of_tile.frequent.equal for of_tile in tiles)
    rank = keep - above
    if window.frequent is not None and larger < rank <= larger + frequent:
        return _cut(window.frequent, rank - larger, [of_tile.frequent.equal for of_tile in tiles])
    others = b"".join(parts)
    count = len(others) // 4
    if not 0 < rank <= count + frequent:
        return None
    below = rank > larger  # then the frequent value is kept whole
    address = _address(others)
    cut = kernels.select(address, count, rank - 1 - (frequent if below else 0))
    ties = rank - (frequent if below else 0)
    equal = []
    at = address
    for part in parts:
        more, same = kernels.tally(at, len(part) // 4, cut)
        ties -= more
        equal.append(same)
        at += len(part)
    return _cut(cut, ties, equal)


def _by_histogram(
    kernels: Kernels,
    workers: Workers,
    deltas: Deltas,
    tiles: Sequence[tuple[int, int]],
    source: int,
    keep: int,
) -> Cut:
    """The cut by its upper and then its lower 16 bits: three passes, always right, in fixed memory."""
    found = 0
    remaining = keep
    for upper in (-1, None):
        bins = array("q", bytes(8 << 16))
        for first, count in tiles:
            delta = list(deltas(first, count))[source]
            kernels.histogram(delta, -1 if upper == -1 else found, bins.buffer_info()[0])
        bin_ = len(bins) - 1
        while remaining > bins[bin_]:
            remaining -= bins[bin_]
            bin_ -= 1
        found = bin_ if upper == -1 else found << 16 | bin_

    def equal(tile: tuple[int, int]) -> int:
        return kernels.count_equal(list(deltas(*tile))[source], found)

    return _cut(found, remaining, workers.map(equal, tiles))


def _cut(value: int, ties: int, equal: Sequence[int]) -> Cut:
    """Of the elements equal to the cut, ``ties`` are kept: those of the lowest index. ``equal``: how many, by tile."""
    left = [ties - met for met in accumulate(equal[:-1], initial=0)]
    return Cut(value, [ALL_TIES if here <= kept else max(0, kept) for here, kept in zip(equal, left, strict=True)])


def _address(content: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value or 0

"""Threads that work on tiles of a tensor, the memory that each of them has for it, and where tensors' elements are."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from automerge.checkpoint.info import ITEM_BYTES
from automerge.errors import CheckpointError
from automerge.merging.kernels import CHUNK

T = TypeVar("T")
R = TypeVar("R")

TILE = 1 << 18
"""Elements that a thread works on at a time: few enough for the cache, and enough to make Python's share small."""

_MOST_THREADS = 16
"""More of them wait for memory and disk, and each has scratch memory of its own."""


def tiles_of(count: int) -> list[tuple[int, int]]:
    """The tiles of a tensor of ``count`` elements: first element and number of each."""
    return [(first, min(TILE, count - first)) for first in range(0, count, TILE)]


class Operand(Protocol):
    """A tensor's elements, wherever they are; safe to call from several threads."""

    @property
    def dtype(self) -> str:
        """By torch's name."""
        ...

    def address(self, first: int, count: int, buffer: Buffer) -> int:
        """The address of ``count`` elements from ``first``, which were perhaps read into the buffer.

        Raises:
            CheckpointError: they cannot be read.
        """
        ...


@dataclass(frozen=True)
class InMemory:
    """Elements at an address; whoever made this keeps the memory alive."""

    start: int
    dtype: str

    def address(self, first: int, count: int, buffer: Buffer) -> int:
        """See `Operand`."""
        return self.start + first * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class InFile:
    """Elements in a file, from a byte on; ``name`` is for errors."""

    descriptor: int
    begin: int
    dtype: str
    name: str

    def address(self, first: int, count: int, buffer: Buffer) -> int:
        """See `Operand`."""
        item = ITEM_BYTES[self.dtype]
        wanted = buffer.view(count * item)
        at = self.begin + first * item
        while wanted:
            try:
                got = os.preadv(self.descriptor, [wanted], at)
            except OSError as error:
                raise CheckpointError(f"{self.name}: cannot be read ({error.strerror or error})", _AGAIN) from None
            if got == 0:
                raise CheckpointError(f"{self.name}: the file has become shorter", _AGAIN)
            wanted, at = wanted[got:], at + got
        return buffer.address


_AGAIN = "run again when nothing writes to it"


class Buffer:
    """Memory of a fixed size, page-aligned; taken from the system only as far as it is used, and then reused."""

    def __init__(self, nbytes: int) -> None:
        self.memory: mmap.mmap | memoryview = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def view(self, nbytes: int) -> memoryview:
        """The first bytes.

        Raises:
            ValueError: there are not so many; a slice would silently be shorter.
        """
        if nbytes > len(self.memory):
            raise ValueError(f"{nbytes} bytes asked of a buffer of {len(self.memory)}")
        return memoryview(self.memory)[:nbytes]


class Scratch:
    """The buffers of one thread: a tile of each input, one of the output, and room for a tile's magnitudes."""

    def __init__(self) -> None:
        self._inputs: list[Buffer] = []
        self.output = Buffer(TILE * 4)
        self.found = Buffer((TILE + CHUNK) * 4)

    def input(self, index: int) -> Buffer:
        """The buffer of an input."""
        while len(self._inputs) <= index:
            self._inputs.append(Buffer(TILE * 4))
        return self._inputs[index]


def processors() -> int:
    """How many processors this process may use: by its affinity, and by its control group's quota (a pod's limit)."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return allowed


class Workers:
    """Threads that work on tiles, each with its own scratch memory. A context manager.

    Args:
        threads: how many; by default one for each processor that this process may use, but not more than 16.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or min(_MOST_THREADS, processors())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge") if self._threads > 1 else None
        self._local = threading.local()

    def scratch(self) -> Scratch:
        """The calling thread's scratch memory."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        found: Scratch = self._local.scratch
        return found

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The results of a function, in the order of the items; the first error, once all threads have ended."""
        if self._pool is None or len(items) == 1:
            return [function(item) for item in items]
        results: dict[int, R] = {}
        turns = iter(range(len(items)))  # the next of a range is one step for the interpreter

        def work() -> None:
            try:
                for index in turns:
                    results[index] = function(items[index])
            finally:
                _end(turns)

        futures = [self._pool.submit(work) for _ in range(min(self._threads, len(items)))]
        try:
            for future in futures:
                future.result()
        finally:
            _end(turns)
            wait(futures)  # nothing may still write to memory that the caller is about to give back
        return [results[index] for index in range(len(items))]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _end(turns: Iterator[int]) -> None:
    """Leave nothing for the others to do."""
    for _ in turns:
        pass

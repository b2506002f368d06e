"""The compiled kernels of the elementwise techniques, called through ctypes, without torch.

The library is one file of plain C (``kernels.c``), built when the package is installed or its wheel is made, by a C
compiler that itself comes as a package; a user's machine needs none. All functions take memory addresses and release
the interpreter's lock while they run; whoever calls them keeps that memory alive and of the right size.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libkernels.so")

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""The dtypes of tensors that the kernels read and write, and their numbers in C."""

MAX_SOURCES = 32

_VERSION = 2  # ``VERSION`` in kernels.c

CHUNK = 1024
"""Elements that are worked on at a time; `Kernels.collect` needs this much more room than it finds."""

NO_OUTLIERS = 0xFFFFFFFF
ALL_TIES = 2**63 - 1
"""Of a source's ties: all are kept. They need not be counted then, which saves a pass, and this stays as it is."""

_LEVELS = {"v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "f16c"}, "v3": {"avx2", "f16c"}}
"""Instruction sets of x86-64, the best first, and the processor flags that they need."""


class Program(ctypes.Structure):
    """What is done to one tensor; ``program`` in kernels.c."""

    _fields_ = (
        ("sources", ctypes.c_int32),
        ("base_dtype", ctypes.c_int32),
        ("output_dtype", ctypes.c_int32),
        ("keep", ctypes.c_int32),
        ("combine", ctypes.c_int32),
        ("threshold", ctypes.c_uint32),
        ("rescale", ctypes.c_float),
        ("divisor", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class Source(ctypes.Structure):
    """What differs between the sources of a tensor; ``source`` in kernels.c."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("weight", ctypes.c_float),
        ("key", ctypes.c_uint64),
        ("cut", ctypes.c_uint32),
        ("outlier_cut", ctypes.c_uint32),
        ("ties", ctypes.c_int64),
        ("outlier_ties", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Delta:
    """A range of a task vector in memory: addresses of the base's and the source's elements, and their dtypes."""

    base: int
    base_dtype: int
    source: int
    source_dtype: int
    count: int


class Kernels:
    """The functions of the library at one level of the instruction set; see ``elementwise.h`` for what each does."""

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.level = level
        address, i32, i64, u32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
        delta = (address, i32, address, i32, i64)
        pointer = ctypes.POINTER

        def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            found = getattr(library, f"{name}_{level}")
            found.restype = result
            found.argtypes = arguments
            return found  # type: ignore[no-any-return]

        self._merge = function(
            "merge",
            ctypes.c_int,
            pointer(Program),
            pointer(Source),
            address,
            pointer(address),
            i64,
            i64,
            address,
            pointer(ctypes.c_uint8),
        )
        self._collect = function("collect", i64, *delta, u32, u32, pointer(i64), address, i64)
        self._histogram = function("histogram", None, *delta, i32, address)
        self._count = function("count", None, *delta, u32, pointer(i64), pointer(i64))
        self._select = function("select", u32, address, i64, i64)
        self._without = library.without
        self._without.restype = i64
        self._without.argtypes = (address, i64, u32)
        self._sort = library.sort
        self._sort.restype = None
        self._sort.argtypes = (address, address, i64)
        self._tally = function("tally", None, address, i64, u32, pointer(i64), pointer(i64))

    def merge(
        self,
        program: Program,
        sources: "ctypes.Array[Source]",
        base: int,
        data: Sequence[int],
        index: int,
        count: int,
        output: int,
    ) -> tuple[list[int], bool]:
        """Merge ``count`` elements, of which the first has the given index (a multiple of 4) in its tensor.

        Args:
            program, sources: what to do; the ties of the sources are used up (but for `ALL_TIES`).
            base, data: addresses of the first element of the base (0: none) and of each source.
            index, count: which elements.
            output: address of the first merged element; may be that of no input.

        Returns:
            which inputs have NaN or infinite elements (a source's index; the base's is the number of sources), and
            whether a merged element does not fit the output dtype.
        """
        pointers = (ctypes.c_void_p * len(data))(*data)
        not_finite = (ctypes.c_uint8 * (len(data) + 1))()
        overflow = self._merge(program, sources, base, pointers, index, count, output, not_finite)
        return [input for input, flag in enumerate(not_finite) if flag], bool(overflow)

    def collect(self, delta: Delta, low: int, high: int, found: int, room: int) -> tuple[int, int]:
        """How many magnitudes lie above ``high``; and how many, put at the address ``found``, from low to high.

        The second number is -1 where ``room``, in elements of 4 bytes, is not enough.
        """
        above = ctypes.c_int64(0)
        used = self._collect(
            delta.base, delta.base_dtype, delta.source, delta.source_dtype, delta.count, low, high, above, found, room
        )
        return above.value, used

    def histogram(self, delta: Delta, upper: int, bins: int) -> None:
        """Count the magnitudes by 16 of their bits, into 65536 int64 at the address ``bins``."""
        self._histogram(delta.base, delta.base_dtype, delta.source, delta.source_dtype, delta.count, upper, bins)

    def count(self, delta: Delta, value: int) -> tuple[int, int]:
        """How many magnitudes are above a value, and how many equal it."""
        above, equal = ctypes.c_int64(0), ctypes.c_int64(0)
        self._count(delta.base, delta.base_dtype, delta.source, delta.source_dtype, delta.count, value, above, equal)
        return above.value, equal.value

    def count_equal(self, delta: Delta, value: int) -> int:
        """How many magnitudes have these bits."""
        return self.count(delta, value)[1]

    def select(self, values: int, count: int, rank: int) -> int:
        """The uint32 of that rank (0: the largest) among ``count`` at the address ``values``."""
        return int(self._select(values, count, rank))

    def without(self, values: int, count: int, value: int) -> int:
        """Drop one value from ``count`` uint32 in place, the others keep their order; returns how many are left."""
        return int(self._without(values, count, value))

    def sort(self, values: int, spare: int, count: int) -> None:
        """Sort ``count`` uint32 in place; ``spare`` is the address of room for as many."""
        self._sort(values, spare, count)

    def tally(self, values: int, count: int, value: int) -> tuple[int, int]:
        """How many of ``count`` uint32 at the address ``values`` are above a value, and how many equal it."""
        above, equal = ctypes.c_int64(0), ctypes.c_int64(0)
        self._tally(values, count, value, above, equal)
        return above.value, equal.value


def kernels_of(level: str) -> Kernels:
    """The kernels at one level of the instruction set: ``v4`` or ``v3`` (x86-64 only), or ``v1``, which is everywhere.

    Raises:
        OSError: the library is not there, or was built from other sources than these.
    """
    library = ctypes.CDLL(str(LIBRARY))
    try:
        library.interface.restype = ctypes.c_int64
        found = library.interface()
    except AttributeError:
        found = None
    if found != _VERSION << 48 | ctypes.sizeof(Program) << 24 | ctypes.sizeof(Source):
        raise OSError(f"{LIBRARY} was built from other sources: install the package again")
    return Kernels(library, level)


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels at the best level of this processor; None, with a warning, where the library was not built."""
    try:
        return kernels_of(_best_level())
    except OSError as error:
        log.warning("the compiled kernels are not there (%s): merging takes the slower path through torch", error)
        return None


def supported_levels() -> list[str]:
    """The levels that this processor has, the best first."""
    flags = _processor_flags() if os.uname().machine == "x86_64" else set()
    return [level for level, needed in _LEVELS.items() if needed <= flags] + ["v1"]


def _best_level() -> str:
    return supported_levels()[0]


def _processor_flags() -> set[str]:
    try:
        with Path("/proc/cpuinfo").open() as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return set()
    return set(line.partition(":")[2].split())

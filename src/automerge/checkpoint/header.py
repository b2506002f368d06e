"""The safetensors header, read and validated before a byte of tensor data is touched.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the little-endian length N of the header; N
bytes of JSON that map each tensor's name to dtype, shape and a pair of offsets into the data; the data, without holes.
The bytes come from a reader of ranges, so that the same check serves a local file and an object in a remote store.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from automerge.checkpoint.info import DTYPE_OF_TAG, ITEM_BYTES, TensorInfo
from automerge.errors import CheckpointError

#: Reads the bytes ``start`` (inclusive) to ``stop`` (exclusive) of a file; fewer only at its end.
RangeReader = Callable[[int, int], bytes]

# The limit of the reference implementation: a longer header is an attack or not a safetensors file.
MAX_HEADER_BYTES = 100_000_000
_REMEDY = "get the file again from where it came"


@dataclass(frozen=True)
class Header:
    """A valid safetensors header.

    Attributes:
        tensors: dtype and shape by name, in sorted name order.
        offsets: first byte and the one after the last, counted from the start of the file, by name.
        metadata: the free strings under ``__metadata__``.
        size: the file's size in bytes.
    """

    tensors: dict[str, TensorInfo]
    offsets: dict[str, tuple[int, int]]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read and validate the header of a local safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or is not a whole and consistent safetensors file.
    """
    try:
        with path.open("rb") as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return parse_header(read, path.stat().st_size, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})", "check the path") from None


def parse_header(read: RangeReader, size: int, where: str) -> Header:
    """Read and strictly validate a header.

    Args:
        read: reader of byte ranges; called at most twice, for the length and the header.
        size: size in bytes of the whole file.
        where: names the file in errors.

    Raises:
        CheckpointError: the file is truncated or longer than its header says, the header is no valid JSON or too long,
            a key is there twice, or dtype, shape and offsets contradict each other, overlap or leave a hole.
    """
    if size < 8:
        _fail(where, f"truncated: a safetensors file has at least 8 bytes, this one has {size}")
    prefix = read(0, 8)
    if len(prefix) != 8:
        _fail(where, f"truncated: only {len(prefix)} of the first 8 bytes can be read")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        _fail(
            where,
            f"not a safetensors file: its header would have {length} bytes, the limit is {MAX_HEADER_BYTES}",
            "pass a .safetensors, .pt or .bin file",
        )
    start = 8 + length
    if start > size:
        _fail(where, f"truncated: the header promises {start} bytes, the file has {size}")
    text = read(8, start)
    if len(text) != length:
        _fail(where, f"truncated: only {len(text)} of the header's {length} bytes can be read")
    entries = _decode(text, where)
    metadata = _metadata(entries.pop("__metadata__", {}), where)

    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for name in sorted(entries):
        info, begin, end = _tensor(entries[name], f"tensor {name!r}", where)
        tensors[name] = info
        offsets[name] = (start + begin, start + end)

    position = start
    for name in sorted(offsets, key=lambda name: (*offsets[name], name)):
        begin, end = offsets[name]
        if begin < position:
            _fail(where, f"tensor {name!r} overlaps the one before it in the file")
        if begin > position:
            _fail(where, f"{begin - position} bytes before tensor {name!r} belong to no tensor")
        position = end
    if position > size:
        _fail(where, f"truncated: the header promises {position} bytes, the file has {size}")
    if position < size:
        _fail(where, f"too long: the header promises {position} bytes, the file has {size}")
    return Header(tensors, offsets, metadata, size)


def _fail(where: str, problem: str, remedy: str = _REMEDY) -> NoReturn:
    raise CheckpointError(f"{where}: {problem}", remedy)


def decode_object(text: bytes) -> dict[str, Any]:
    """Decode a JSON object from an untrusted source.

    Raises:
        ValueError: it is not UTF-8, not JSON, no object, nested too deeply, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} is there twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _decode(text: bytes, where: str) -> dict[str, Any]:
    # The format wants the object first and allows only spaces after it.
    if not text.startswith(b"{"):
        _fail(where, "not a safetensors file: its header is not a JSON object", "pass a .safetensors, .pt or .bin file")
    try:
        entries = decode_object(text.rstrip(b" "))
    except ValueError as error:
        _fail(where, f"the header cannot be decoded: {error}")
    for name in entries:
        # Names go to terminals and logs; no real model has such a name. Lone surrogates are not printable either.
        if not name.isprintable():
            _fail(where, f"the tensor name {_shown(name)} has characters that cannot be printed")
    return entries


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _fail(where, "__metadata__ is not a map of strings")
    return value


def _tensor(entry: Any, what: str, where: str) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        _fail(where, f"{what} does not have exactly dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or tag not in DTYPE_OF_TAG:
        _fail(where, f"{what} has the dtype {_shown(tag)}", f"supported are {', '.join(DTYPE_OF_TAG)}")
    if not _are_sizes(shape):
        _fail(where, f"{what} has the shape {_shown(shape)}, which is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(where, f"{what} has the data offsets {_shown(offsets)}, which are not a first and a last byte")
    begin, end = offsets
    dtype = DTYPE_OF_TAG[tag]
    expected = _bytes_of(shape, ITEM_BYTES[dtype], end - begin)
    if expected != end - begin:
        _fail(where, f"{what} has {end - begin} bytes of data, which does not fit {tag} of shape {_shown(shape)}")
    return TensorInfo(dtype, tuple(shape)), begin, end


def _are_sizes(value: Any) -> bool:
    # bool is an int in Python, and true is not a size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _bytes_of(shape: list[int], item_bytes: int, limit: int) -> int:
    """Bytes of a shape, or some number above ``limit``: the product of a hostile shape is never multiplied out."""
    if 0 in shape:
        return 0
    total = item_bytes
    for length in shape:
        total *= length
        if total > limit:
            break
    return total


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

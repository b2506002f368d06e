"""The header parser: what the safetensors library writes it reads, and nothing else gets through."""

import contextlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from automerge.checkpoint.header import Header, parse_header, read_header
from automerge.checkpoint.info import DTYPE_OF_TAG, ITEM_BYTES, TAG_OF_DTYPE, TensorInfo
from automerge.errors import CheckpointError


def parse(content: bytes) -> Header:
    return parse_header(lambda start, stop: content[start:stop], len(content), "weights")


def content_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
infos = st.builds(TensorInfo, st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=4).map(tuple))


@given(st.dictionaries(names, infos, max_size=6), st.dictionaries(st.text(max_size=5), names, max_size=3))
def test_reads_what_the_safetensors_library_writes(tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
    values = {name: torch.zeros(info.shape, dtype=info.torch_dtype) for name, info in tensors.items()}
    # With no tensors and an empty map, safetensors 0.8.0 writes a header that it cannot read itself.
    content = safetensors.torch.save(values, metadata or None)
    header = parse(content)
    assert header.tensors == tensors
    assert list(header.tensors) == sorted(tensors)
    assert header.metadata == metadata
    assert header.size == len(content)
    for name, (start, stop) in header.offsets.items():
        assert stop - start == tensors[name].nbytes


@given(st.binary(max_size=200))
def test_random_bytes_give_a_header_or_a_checkpoint_error(content: bytes) -> None:
    try:
        parse(content)
    except CheckpointError as error:
        assert str(error).startswith("weights: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_OF_TAG, "F4", "float32", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(names | st.just("__metadata__"), entries | json_values, max_size=4), st.binary(max_size=40))
@example({}, b"")
def test_what_is_accepted_is_accepted_by_the_safetensors_library_too(header: object, data: bytes) -> None:
    content = content_of(header, data)
    try:
        parsed = parse(content)
    except CheckpointError:
        return
    read = safetensors.torch.load(content)
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in read.items()} == {
        name: (f"torch.{info.dtype}", info.shape) for name, info in parsed.tensors.items()
    }


@given(st.data())
def test_a_flipped_byte_of_the_header_never_gives_anything_but_a_checkpoint_error(data: st.DataObject) -> None:
    content = bytearray(safetensors.torch.save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int8)}))
    length = int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, 7 + length))
    content[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CheckpointError):
        parse(bytes(content))


@given(st.data())
def test_every_truncation_is_refused(data: st.DataObject) -> None:
    content = safetensors.torch.save({"a": torch.zeros(2, 3)})
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(CheckpointError, match="truncated"):
        parse(content[:cut])


def test_the_sentence_for_a_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(100)}, path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(error.value) == (
        f"{path}: truncated: the header promises {size} bytes, the file has {size - 1}; "
        "get the file again from where it came"
    )


def test_a_range_reader_that_returns_too_little_is_noticed() -> None:
    with pytest.raises(CheckpointError, match="only 3 of the first 8 bytes"):
        parse_header(lambda start, stop: b"abc", 100, "s3://b/k")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "absent.safetensors")


def test_all_tags_of_the_library_that_torch_has_are_known() -> None:
    assert set(safetensors.torch._TYPES) <= set(DTYPE_OF_TAG)
    for name, tag in TAG_OF_DTYPE.items():
        assert TensorInfo(name, ()).torch_dtype.itemsize == ITEM_BYTES[name]
        assert DTYPE_OF_TAG[tag] == name

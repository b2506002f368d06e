"""A corpus of hostile and damaged checkpoints, made here, with a line each on what it tries.

Each must be refused with one CheckpointError: nothing run, nothing hung, no memory filled, no other file read.
"""

import io
import json
import os
import pickle
import resource
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from automerge.checkpoint import open_checkpoint
from automerge.errors import CheckpointError

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def content(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


SAFETENSORS: dict[str, bytes] = {
    "an empty file": b"",
    "a file cut off inside the length": b"\x10\0\0",
    "a length of 2^64 - 1, so that adding 8 wraps around": b"\xff" * 8 + b"{}",
    "a length just above the limit, so that the reader allocates it": content({}, length=100_000_001),
    "a length within the limit, but longer than the file": content({"a": GOOD}, b"\0" * 8, length=99_000_000),
    "another format (ELF)": b"\x7fELF\x02\x01\x01\0" + b"\0" * 100,
    "another format (a zip file)": b"PK\x03\x04" + b"\0" * 100,
    "a header that is a list": content([GOOD], b"\0" * 8),
    "a header that is no JSON": content(b"{'a': 1}"),
    "a header of two objects": content(b"{}{}"),
    "a header with spaces before the object, which other readers take differently": content(b"  {}"),
    "a header that is not UTF-8": content(b'{"\xff": 1}'),
    "a byte order mark": content(b"\xef\xbb\xbf{}"),
    "nesting that exhausts the stack": content(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "one name twice, so that two readers see different tensors": content(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b"\0" * 16,
    ),
    "one key of an entry twice": content(
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "two tensors over the same bytes": content({"a": GOOD, "b": GOOD}, b"\0" * 8),
    "two tensors that overlap in part": content({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12),
    "hidden bytes before the first tensor": content({"a": {**GOOD, "data_offsets": [8, 16]}}, b"\0" * 16),
    "hidden bytes after the last tensor": content({"a": GOOD}, b"\0" * 9),
    "offsets beyond the file": content({"a": {**GOOD, "data_offsets": [0, 2**40], "shape": [2**38]}}, b"\0" * 8),
    "offsets in the wrong order": content({"a": {**GOOD, "data_offsets": [8, 0]}}, b"\0" * 8),
    "a negative offset": content({"a": {**GOOD, "data_offsets": [-8, 0]}}, b"\0" * 8),
    "three offsets": content({"a": {**GOOD, "data_offsets": [0, 4, 8]}}, b"\0" * 8),
    "a negative length": content({"a": {**GOOD, "shape": [-1, -2]}}, b"\0" * 8),
    "a shape whose product is 8 modulo 2^64": content({"a": {**GOOD, "shape": [2**62 + 1, 2]}}, b"\0" * 8),
    "a shape whose product takes minutes to multiply out": content(
        {"a": {**GOOD, "shape": [2**62] * 300_000}}, b"\0" * 8
    ),
    "a length with more digits than Python reads": content(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "true as a length": content({"a": {**GOOD, "shape": [2, True]}}, b"\0" * 8),
    "2.0 as a length": content({"a": {**GOOD, "shape": [2.0]}}, b"\0" * 8),
    "NaN as a length": content(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"\0" * 8),
    "data that does not fit the dtype": content({"a": {**GOOD, "dtype": "F64"}}, b"\0" * 8),
    "a dtype that torch cannot calculate with": content({"a": {**GOOD, "dtype": "F4", "shape": [16]}}, b"\0" * 8),
    "a dtype that is a list": content({"a": {**GOOD, "dtype": ["F32"]}}, b"\0" * 8),
    "an entry with an unknown key": content({"a": {**GOOD, "strides": [1]}}, b"\0" * 8),
    "an entry without a shape": content({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "an entry that is a number": content({"a": 8}, b"\0" * 8),
    "metadata that is no map of strings": content({"__metadata__": {"format": 1}, "a": GOOD}, b"\0" * 8),
    "a name that clears the terminal": content({"\x1b[2J": GOOD}, b"\0" * 8),
    "a name that forges a line of the log": content({"a\n2026-01-01 all is well": GOOD}, b"\0" * 8),
    "a name that cannot be encoded": content(
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "no tensors at all": content({}),
}


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_safetensors(attack: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[attack])
    assert_refused(tmp_path / "model.safetensors")
    assert_refused(tmp_path)


INDEXES: dict[str, bytes | Any] = {
    "a shard in the folder above": {"weight_map": {"a": "../outside.safetensors"}},
    "a shard by absolute path": {"weight_map": {"a": "/dev/zero.safetensors"}},
    "a detour through the folder above": {"weight_map": {"a": "x/../../outside.safetensors"}},
    "a path for another system": {"weight_map": {"a": "..\\outside.safetensors"}},
    "a shard without a name": {"weight_map": {"a": ""}},
    "a NUL in the name of a shard": {"weight_map": {"a": "shard.safetensors\0.txt"}},
    "a pickle among the shards": {"weight_map": {"a": "shard.bin"}},
    "the index as its own shard": {"weight_map": {"a": "model.safetensors.index.json"}},
    "a shard that is a number": {"weight_map": {"a": 1}},
    "a shard that is not there": {"weight_map": {"a": "absent.safetensors"}},
    "a shard that is a folder": {"weight_map": {"a": "folder.safetensors"}},
    "a tensor that is not in its shard": {"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}},
    "a tensor that the index hides": {"weight_map": {"b": "shard.safetensors"}},
    "a weight_map that is a list": {"weight_map": ["shard.safetensors"]},
    "an empty weight_map": {"weight_map": {}},
    "no weight_map": {"metadata": {}},
    "one tensor in two shards": b'{"weight_map": {"a": "shard.safetensors", "a": "other.safetensors"}}',
    "nesting that exhausts the stack": b'{"weight_map": ' + b"[" * 200_000,
    "an index that is not UTF-8": b"\xff\xfe",
    "an index cut off": b'{"weight_map": {"a": "shard.safe',
}


@pytest.mark.parametrize("attack", INDEXES)
def test_index(attack: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "folder.safetensors").mkdir(parents=True)
    for path in (tmp_path / "outside.safetensors", folder / "shard.safetensors", folder / "other.safetensors"):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    index = INDEXES[attack]
    (folder / "model.safetensors.index.json").write_bytes(
        index if isinstance(index, bytes) else json.dumps(index).encode()
    )
    assert_refused(folder)


class Payload:
    """Unpickled, it makes the file that the tests look for."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file again with changed records."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records:
            archive.writestr(name, change(name, record))


def code(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": Payload(os.system, f"touch {mark}")}, path)


def code_legacy(path: Path, mark: Path) -> None:
    torch.save({"b": Payload(os.system, f"touch {mark}")}, path, _use_new_zipfile_serialization=False)


def code_bare(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(os.system, f"touch {mark}")))


def code_eval(path: Path, mark: Path) -> None:
    torch.save({"b": Payload(eval, f"open({str(mark)!r}, 'w')")}, path)


def code_key(path: Path, mark: Path) -> None:
    torch.save({Payload(open, str(mark), "w"): torch.zeros(1)}, path)


def code_wrapped(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper": Payload(open, str(mark), "w")}, path)


def code_in_torch(path: Path, mark: Path) -> None:
    torch.save({"b": Payload(torch.save, torch.zeros(1), str(mark))}, path)


def code_tar(path: Path, mark: Path) -> None:
    payload = pickle.dumps(Payload(os.system, f"touch {mark}"))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))


def torchscript(path: Path, mark: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


def whole_module(path: Path, mark: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), path)


def zip_bomb(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(2_000_000)}, path)
    rezip(path, lambda name, record: record, zipfile.ZIP_DEFLATED)


def zip_of_text(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def expanded(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)


def out_of_bounds(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(300)}, path)
    # BININT2 300 -> 65535, in the size of the storage and the shape of the tensor.
    rezip(
        path, lambda name, record: record.replace(b"M\x2c\x01", b"M\xff\xff") if name.endswith("data.pkl") else record
    )


def without_storage(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(300)}, path)
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records:
            if "/data/" not in name:
                archive.writestr(name, record)


def cut_off(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(300)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def cut_off_legacy(path: Path, mark: Path) -> None:
    torch.save({"a": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])


def long_string(path: Path, mark: Path) -> None:
    path.write_bytes(b"\x80\x02X\xff\xff\xff\x7f")


def contains_itself(path: Path, mark: Path) -> None:
    state: dict[str, Any] = {}
    state["a"] = state
    torch.save(state, path)


def laughs(path: Path, mark: Path) -> None:
    value: Any = "ha"
    for _ in range(60):
        value = [value, value]
    torch.save({"a": value}, path)


def escape_in_name(path: Path, mark: Path) -> None:
    torch.save({"\x1b[2J": torch.zeros(1)}, path)


def empty(path: Path, mark: Path) -> None:
    path.write_bytes(b"")


def text(path: Path, mark: Path) -> None:
    path.write_text("<html>404 not found</html>")


PICKLES: dict[str, Callable[[Path, Path], None]] = {
    "runs a shell command": code,
    "runs a shell command, in the format before zip": code_legacy,
    "runs a shell command, as a bare pickle": code_bare,
    "runs a shell command, in the oldest format, a tar file": code_tar,
    "evaluates Python": code_eval,
    "opens a file for writing, as a key": code_key,
    "opens a file for writing, beside the state dict": code_wrapped,
    "calls a harmless-looking function of torch that writes a file": code_in_torch,
    "has TorchScript, which is a program": torchscript,
    "has a whole module, whose class would be imported": whole_module,
    "unpacks to much more than the file": zip_bomb,
    "is a zip file of something else": zip_of_text,
    "claims 4 TB by strides of zero": expanded,
    "claims a storage larger than the file, to read beyond it": out_of_bounds,
    "lacks the data of a tensor": without_storage,
    "is cut off": cut_off,
    "is cut off, in the format before zip": cut_off_legacy,
    "announces a string of 2 GB": long_string,
    "contains itself": contains_itself,
    "has a list whose text has 2^60 words": laughs,
    "has a name that clears the terminal": escape_in_name,
    "is empty": empty,
    "is the error page of a download": text,
}


@pytest.mark.parametrize("attack", PICKLES)
@pytest.mark.filterwarnings("ignore")
def test_pickle(attack: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "model.pt"
    PICKLES[attack](path, mark)
    assert not mark.exists()
    assert_refused(path)
    assert not mark.exists(), "the pickle's code was run"


def test_the_payload_would_work(tmp_path: Path) -> None:
    """The test above means something only if an unsafe reader would have been caught."""
    code(tmp_path / "model.pt", tmp_path / "mark")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_the_sentence_names_what_the_pickle_wanted(tmp_path: Path) -> None:
    code(tmp_path / "model.pt", tmp_path / "mark")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "model.pt")
    assert str(error.value) == (
        f"{tmp_path}/model.pt: refused: its pickle asks for posix.system, which is more than tensors and could run "
        "code; save the plain state dict as safetensors where you trust it"
    )


def assert_refused(path: Path) -> None:
    before, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000, "took more than 300 MB"
    assert time.monotonic() - before < 10
    sentence = str(error.value)
    assert sentence.isprintable(), "an error is one line that is safe to print"
    assert len(sentence) < 1000

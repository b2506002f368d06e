"""The streamed writer: any order, all or nothing."""

import json
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.checkpoint import CheckpointWriter, TensorInfo, info_of, open_checkpoint
from automerge.checkpoint.info import ITEM_BYTES
from automerge.errors import CheckpointError, StorageError

STATE = {f"layer.{i}.weight": torch.arange(i * 10.0).reshape(i, 10) for i in range(1, 6)}
INFOS = {name: info_of(tensor) for name, tensor in STATE.items()}


def write(folder: Path, state: dict[str, torch.Tensor], **options: object) -> list[Path]:
    with CheckpointWriter(folder, {name: info_of(t) for name, t in state.items()}, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in state.items():
            writer.write(name, tensor)
        return writer.commit()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir())}


def test_one_file_when_it_fits(tmp_path: Path) -> None:
    assert write(tmp_path, STATE, metadata={"recipe": "abc"}) == [tmp_path / "model.safetensors"]
    assert names(tmp_path) == ["model.safetensors"]
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "abc"}
        assert set(file.keys()) == set(STATE)
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


def test_shards_when_it_does_not(tmp_path: Path) -> None:
    files = write(tmp_path, STATE, max_shard_bytes=130)
    assert [file.name for file in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in STATE.values())}
    for name, tensor in STATE.items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / index["weight_map"][name])[name], tensor)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors == INFOS


@settings(max_examples=20)  # every file is flushed to the disk
@given(st.permutations(sorted(STATE)), st.integers(1, 700))
def test_bytes_do_not_depend_on_the_order_of_arrival(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], max_shard_bytes: int
) -> None:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    write(first, STATE, max_shard_bytes=max_shard_bytes)
    write(second, {name: STATE[name] for name in order}, max_shard_bytes=max_shard_bytes)
    assert contents(first) == contents(second)


def test_many_threads_write_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one", STATE, max_shard_bytes=300)
    with CheckpointWriter(tmp_path / "many", INFOS, max_shard_bytes=300) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: writer.write(name, STATE[name]), reversed(STATE)))
        writer.commit()
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=5),
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_every_dtype_and_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    state = {}
    for name, (dtype, shape) in tensors.items():
        info = TensorInfo(dtype, tuple(shape))
        raw = torch.randint(0, 2, (info.nbytes,), dtype=torch.uint8)
        state[name] = raw.view(info.torch_dtype).reshape(shape)
    write(folder, state)
    with open_checkpoint(folder) as checkpoint:
        for name, tensor in state.items():
            read = checkpoint.read(name)
            assert info_of(read) == info_of(tensor)
            assert read.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        assert info_of(tensor) == info_of(state[name])


def test_strides_gradients_and_conjugates_are_resolved(tmp_path: Path) -> None:
    state = {
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "p": torch.nn.Parameter(torch.ones(3)),
        "c": torch.tensor([1 + 2j]).conj(),
    }
    write(tmp_path, state)
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_nothing_is_left_of_a_writer_that_is_not_committed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, INFOS) as writer:
        writer.write("layer.1.weight", STATE["layer.1.weight"])
    assert not names(tmp_path)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, INFOS) as writer:
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, INFOS) as writer:
        with pytest.raises(CheckpointError, match="'other' was not announced"):
            writer.write("other", torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"is float64 \[1, 10\], expected float32 \[1, 10\]"):
            writer.write("layer.1.weight", torch.zeros(1, 10, dtype=torch.float64))
        writer.write("layer.1.weight", STATE["layer.1.weight"])
        with pytest.raises(CheckpointError, match="written twice"):
            writer.write("layer.1.weight", STATE["layer.1.weight"])
        with pytest.raises(CheckpointError, match=r"4 tensors were never written: layer.2.weight"):
            writer.commit()
        with pytest.raises(CheckpointError, match="closed"):
            writer.commit()
    assert not names(tmp_path)
    with pytest.raises(CheckpointError, match="without tensors"):
        CheckpointWriter(tmp_path, {})
    with pytest.raises(CheckpointError, match="dtype complex128"):
        CheckpointWriter(tmp_path, {"a": TensorInfo("complex128", (1,))})


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the size of files fails in the same system call as a disk without room.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"the checkpoint cannot be written \(.*\); it needs \d+ bytes"):
            CheckpointWriter(tmp_path / "out", {"a": TensorInfo("float32", (10_000,))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not names(tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", INFOS)


@pytest.mark.parametrize("before", [130, 300, 10_000])
@pytest.mark.parametrize("after", [130, 300, 10_000])
def test_a_new_checkpoint_replaces_the_old_one(before: int, after: int, tmp_path: Path) -> None:
    write(tmp_path / "old", {name: tensor + 1 for name, tensor in STATE.items()}, max_shard_bytes=before)
    (tmp_path / "old" / "config.json").write_text("{}")
    write(tmp_path / "old", STATE, max_shard_bytes=after)
    write(tmp_path / "new", STATE, max_shard_bytes=after)
    assert contents(tmp_path / "old") == contents(tmp_path / "new") | {"config.json": b"{}"}


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from automerge.checkpoint import CheckpointWriter, TensorInfo
writer = CheckpointWriter(Path(sys.argv[1]), {"a": TensorInfo("float32", (10,)), "b": TensorInfo("float32", (10,))})
writer.write("a", torch.zeros(10))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_spared(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".model.safetensors.") and left.endswith(".tmp")
    with CheckpointWriter(tmp_path, INFOS) as first, CheckpointWriter(tmp_path, INFOS) as second:
        assert left not in names(tmp_path)
        for name, tensor in STATE.items():
            first.write(name, tensor)
            second.write(name, tensor)
        first.commit()
        second.commit()
    assert names(tmp_path) == ["model.safetensors"]

"""Opening checkpoints of every form, and reading them lazily."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from automerge.checkpoint import TensorInfo, open_checkpoint, peek_tensors
from automerge.errors import CheckpointError

STATE = {
    "head.weight": torch.arange(6.0).reshape(2, 3),
    "head.bias": torch.ones(2, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
}
INFOS = {
    "head.bias": TensorInfo("bfloat16", (2,)),
    "head.weight": TensorInfo("float32", (2, 3)),
    "steps": TensorInfo("int64", ()),
}


def save_sharded(folder: Path) -> None:
    safetensors.torch.save_file({"head.weight": STATE["head.weight"]}, folder / "model-00001-of-00002.safetensors")
    rest = {name: STATE[name] for name in ("head.bias", "steps")}
    safetensors.torch.save_file(rest, folder / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name == 'head.weight' else 2}-of-00002.safetensors" for name in STATE}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_sharded_torch(folder: Path) -> None:
    torch.save({"head.weight": STATE["head.weight"]}, folder / "a.bin")
    torch.save({name: STATE[name] for name in ("head.bias", "steps")}, folder / "b.bin")
    weight_map = {name: "a.bin" if name == "head.weight" else "b.bin" for name in STATE}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


FORMS = {
    "one safetensors file": lambda folder: safetensors.torch.save_file(STATE, folder / "model.safetensors"),
    "safetensors of another name": lambda folder: safetensors.torch.save_file(STATE, folder / "low.safetensors"),
    "shards": save_sharded,
    "shards of pickles": save_sharded_torch,
    "pytorch_model.bin": lambda folder: torch.save(STATE, folder / "pytorch_model.bin"),
    "pt": lambda folder: torch.save(STATE, folder / "low.pt"),
    "pth, legacy format": lambda folder: torch.save(STATE, folder / "l.pth", _use_new_zipfile_serialization=False),
    "under state_dict": lambda folder: torch.save({"state_dict": STATE, "epoch": 3, "lr": 0.1}, folder / "low.pt"),
    "under model": lambda folder: torch.save({"model": STATE, "args": {"width": 4}}, folder / "low.pt"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors == INFOS
        assert list(checkpoint.tensors) == sorted(INFOS)
        assert checkpoint.aliases == {}
        for name, expected in STATE.items():
            tensor = checkpoint.read(name)
            assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype
            assert tensor.is_contiguous() and tensor.device.type == "cpu"


def test_a_single_file_has_its_own_digest_whether_opened_by_file_or_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(STATE, file)
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert open_checkpoint(file).digest() == open_checkpoint(tmp_path).digest() == expected


def test_the_digest_of_shards_is_that_of_the_listing_sha256sum_prints(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    listing = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in checkpoint.files)
    assert [file.name for file in checkpoint.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert checkpoint.digest() == hashlib.sha256(listing.encode()).hexdigest()


def test_a_file_that_changes_after_opening_gets_no_digest(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(STATE, file)
    checkpoint = open_checkpoint(file)
    safetensors.torch.save_file({"other": torch.zeros(9)}, file)
    with pytest.raises(CheckpointError, match="changed while it was open"):
        checkpoint.digest()


def test_tied_weights_of_a_pickle_are_aliases_and_views_are_not(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    state = {
        "out.weight": weight,
        "embed.weight": weight,
        "first.rows": weight[:2],
        "turned": weight.t(),
        "z": torch.empty(0),
    }
    torch.save(state, tmp_path / "tied.pt")
    with open_checkpoint(tmp_path / "tied.pt") as checkpoint:
        assert checkpoint.aliases == {"out.weight": "embed.weight"}
        assert set(checkpoint.tensors) == set(state)
        for name, expected in state.items():
            assert torch.equal(checkpoint.read(name), expected)
        assert checkpoint.read("turned").is_contiguous()


def test_tensors_outlive_the_checkpoint_and_a_closed_one_reads_nothing(tmp_path: Path) -> None:
    for save, name in ((safetensors.torch.save_file, "m.safetensors"), (torch.save, "m.pt")):
        save(STATE, tmp_path / name)
        with open_checkpoint(tmp_path / name) as checkpoint:
            tensor = checkpoint.read("head.weight")
        assert torch.equal(tensor, STATE["head.weight"])
        with pytest.raises(ValueError, match="closed"):
            checkpoint.read("head.weight")


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    for save, name in ((safetensors.torch.save_file, "m.safetensors"), (torch.save, "m.pt")):
        save(STATE, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        open_checkpoint(tmp_path / name).read("head.weight").zero_()
        assert (tmp_path / name).read_bytes() == before


def test_reading_from_many_threads(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((100,), float(i)) for i in range(50)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    barrier = threading.Barrier(8)
    with open_checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(8) as pool:

        def check(_: int) -> bool:
            barrier.wait()
            return all(torch.equal(checkpoint.read(name), state[name]) for name in state)

        assert all(pool.map(check, range(8)))


def test_model_parameters_and_module_state_dicts_open(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    torch.save(dict(module.named_parameters()), tmp_path / "b.pt")
    with open_checkpoint(tmp_path / "a.pt") as a, open_checkpoint(tmp_path / "b.pt") as b:
        assert "1.num_batches_tracked" in a.tensors
        assert not b.read("0.weight").requires_grad


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, r"1 entries of the state dict are not named tensors: epoch \(int\)"),
        ({"encoder": {"a": torch.zeros(1)}}, r"encoder \(dict\)"),
        ({3: torch.zeros(1)}, r"3 \(Tensor\)"),
        ([torch.zeros(1)], "holds a list, not a state dict"),
        (torch.zeros(1), "holds a Tensor"),
        ({}, "holds no tensors"),
        ({"model": {"a": torch.zeros(1)}, "state_dict": {"a": torch.zeros(1)}}, "not clear"),
        ({"model": {"a": torch.zeros(1), "n": 1}, "lr": 0.1}, r"n \(int\)"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "tensor a is sparse"),
        ({"a": torch.zeros(2, device="meta")}, "has no data"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "dtype complex128"),
    ],
)
def test_what_is_no_state_dict_is_refused(state: object, sentence: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path / "model.pt")


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        open_checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file(STATE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no index.*\(a.safetensors, b.safetensors\)"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a weight file"):
        open_checkpoint(tmp_path / "weights.h5")
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        open_checkpoint(tmp_path / "a.safetensors").read("absent")


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    safetensors.torch.save_file({"steps": torch.tensor(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"promises tensor 'head.bias', which is not in model-00002"):
        open_checkpoint(tmp_path)
    safetensors.torch.save_file({**STATE}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"has tensor 'head.weight', which the index does not list there"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["one safetensors file", "shards", "safetensors of another name"])
def test_peeking_reads_headers_only_and_sees_what_opening_sees(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    files = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    read = 0

    def reader(name: str, start: int, stop: int) -> bytes:
        nonlocal read
        read += stop - start
        return files[name][start:stop]

    sizes = {name: len(content) for name, content in files.items()}
    assert peek_tensors(sizes, reader, "s3://models/low") == INFOS
    assert read == sum(sizes.values()) - sum(info.nbytes for info in INFOS.values())


def test_peeking_at_a_pickle_says_that_it_cannot(tmp_path: Path) -> None:
    assert peek_tensors({"model.pt": 10}, lambda name, start, stop: b"", "s3://models/low") is None

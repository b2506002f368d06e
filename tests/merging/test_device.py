"""The merge by torch, tile by tile, on every device that is there: the bytes of the reference and of the kernels."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.checkpoint.info import info_of
from automerge.errors import CheckpointError, MergeError
from automerge.merging import device as device_module
from automerge.merging.apply import merge_tensor
from automerge.merging.device import DeviceMerge, OnDevice, Outbox, Room, Transfers, memory_explained
from automerge.merging.elementwise import fused_of
from automerge.merging.recipe import RecipeBlock, canonical, torch_dtype
from automerge.merging.technique import load_technique
from automerge.merging.workers import InFile, InMemory, Workers
from tests.devices import DEVICES

FUSED = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last of them not full, from tensors that a test can afford."""
    monkeypatch.setattr(device_module, "TILE", 1000)


def make_block(technique, weights, **changes):
    declared = {each.name for each in load_technique(technique).declaration.hyperparameters}
    values = load_technique(technique).declaration.defaults()
    values |= {name: value for name, value in changes.items() if name in declared}
    return RecipeBlock(name="b", technique=technique, weights=weights, hyperparameters=values, parameters=["w"])


def draw(count, sources, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    # Differences of bfloat16 numbers near each other: many equal magnitudes, and zeros.
    return base.to(dtype), {
        f"s{index}": (base + 0.01 * torch.randn(count, generator=generator)).to(dtype) for index in range(sources)
    }


def merge_of(transfers, block, base, sources, place, *, seed=0, output="float32"):
    """The merge of inputs that lie on the device, in memory or in files, as ``place`` makes them."""
    infos = {name: info_of(tensor) for name, tensor in sources.items()}
    fused = fused_of("w", canonical(block), info_of(base), infos, info_of(base.to(torch_dtype(output))))
    return DeviceMerge(
        transfers,
        "w",
        *fused,
        seed=seed,
        base=place(base),
        sources={name: place(tensor) for name, tensor in sources.items()},
        output_dtype=torch_dtype(output),
        count=base.numel(),
    )


def by_torch(device, block, base, sources, *, staged, seed=0, output="float32"):
    """The merged tensor, back on the CPU; None where the inputs or the result are refused."""

    def place(tensor):
        if staged:
            return InMemory(tensor.data_ptr(), info_of(tensor).dtype)
        return OnDevice(tensor.to(device))

    merged = torch.empty(base.shape, dtype=torch_dtype(output))
    with Workers(2) as workers:
        transfers = Transfers(torch.device(device), workers)

        def deliver(first, content):
            part = merged[first:].view(torch.uint8)[: content.nbytes]
            part.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))

        outbox = Outbox(transfers, deliver)
        if not merge_of(transfers, block, base, sources, place, seed=seed, output=output).run(outbox.put):
            return None
        outbox.flush()
    return merged


def assert_same_bytes(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@given(
    st.sampled_from(FUSED),
    st.sampled_from(DTYPES),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=5),
    st.floats(0.05, 1.0),
    st.floats(-2.0, 2.0),
    st.integers(1, 3_500),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=120)
def test_the_bytes_are_those_of_the_reference(
    device, technique, dtype, output, weights, density, scale, count, normalize, staged
):
    if technique == "linear" and abs(sum(weights)) < 1e-3:
        return
    base, sources = draw(count, len(weights), dtype, seed=count)
    named = dict(zip(sources, weights, strict=True))
    changes = {"density": density, "lambda": scale, "gamma": density / 7, "normalize": normalize}
    block = make_block(technique, named, **changes)
    found = by_torch(device, block, base, sources, staged=staged, seed=7, output=output)
    assert_same_bytes(found, merge_tensor("w", block, base, sources, seed=7, dtype=output))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("held", [0, 1 << 29])
def test_ties_at_the_cut_go_to_the_lowest_index_across_tiles(device, held, monkeypatch):
    monkeypatch.setattr(device_module, "HELD_BYTES", held)
    base = torch.zeros(5_000)
    # Three magnitudes in all, so that both cuts fall among equal ones.
    magnitudes = torch.randint(0, 3, (5_000,), generator=torch.Generator().manual_seed(1))
    sources = {"s0": magnitudes.float(), "s1": -magnitudes.flip(0).float()}
    for density, gamma in ((0.1, 0.05), (0.5, 0.2), (0.9, 0.0), (1 / 5_000, 0.3)):
        block = make_block("breadcrumbs", {"s0": 0.75, "s1": 0.5}, density=density, gamma=gamma)
        found = by_torch(device, block, base, sources, staged=True)
        assert_same_bytes(found, merge_tensor("w", block, base, sources))


@pytest.mark.parametrize("device", DEVICES)
def test_subnormal_numbers_and_inputs_of_different_dtypes(device):
    base, sources = draw(2_500, 3, torch.float32)
    base[::3] *= 1e-38
    sources = {"s0": sources["s0"].half(), "s1": sources["s1"] * 1e-38, "s2": sources["s2"].bfloat16()}
    for technique in FUSED:
        block = make_block(technique, {"s0": 0.2, "s1": 0.9, "s2": -0.3}, density=0.4)
        for output in ("float32", "bfloat16"):
            found = by_torch(device, block, base, sources, staged=True, output=output)
            assert_same_bytes(found, merge_tensor("w", block, base, sources, dtype=output))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "s0", "s1"])
@pytest.mark.parametrize("technique", ["ties", "dare_linear"])
def test_an_input_that_is_not_finite_gives_no_result(device, technique, where, value):
    base, sources = draw(2_500, 2, torch.float16)
    ({"base": base} | sources)[where][2_499] = value
    block = make_block(technique, {"s0": 0.5, "s1": 0.5})
    assert by_torch(device, block, base, sources, staged=True) is None


@pytest.mark.parametrize("device", DEVICES)
def test_a_result_beyond_the_output_dtype_gives_no_result(device):
    base, sources = draw(2_500, 2, torch.float32)
    sources["s0"][1_500] = 70_000
    block = make_block("linear", {"s0": 1.0, "s1": 0.0})
    assert by_torch(device, block, base, sources, staged=False, output="float16") is None
    assert by_torch(device, block, base, sources, staged=False, output="bfloat16") is not None


@pytest.mark.parametrize("device", DEVICES)
def test_what_lies_on_the_device_is_left_as_it_is(device):
    base, sources = draw(2_500, 2, torch.float32)
    lying = [tensor.to(device) for tensor in (base, *sources.values())]
    before = copy.deepcopy(lying)
    named = iter(lying)
    for technique in FUSED:
        named = iter(lying)
        with Workers(1) as workers:
            transfers = Transfers(torch.device(device), workers)
            block = make_block(technique, {"s0": 0.5, "s1": 0.7})
            merge = merge_of(transfers, block, base, sources, lambda _, named=named: OnDevice(next(named)))
            assert merge.run(lambda first, tile: None)
    assert all(torch.equal(*pair) for pair in zip(lying, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_elements_come_from_files(device, tmp_path):
    base, sources = draw(2_500, 2, torch.bfloat16)
    content = torch.cat([base, *sources.values()]).view(torch.uint8).numpy().tobytes()
    (tmp_path / "weights").write_bytes(b"head" + content)
    descriptor = os.open(tmp_path / "weights", os.O_RDONLY)
    try:
        at = {id(tensor): 4 + index * 5_000 for index, tensor in enumerate((base, *sources.values()))}

        def place(tensor):
            return InFile(descriptor, at[id(tensor)], "bfloat16", "weights")

        block = make_block("ties", {"s0": 0.5, "s1": 0.7}, density=0.3)
        with Workers(2) as workers:
            transfers = Transfers(torch.device(device), workers)
            tiles = []
            assert merge_of(transfers, block, base, sources, place).run(lambda first, tile: tiles.append(tile.cpu()))
            assert_same_bytes(torch.cat(tiles), merge_tensor("w", block, base, sources, dtype="float32"))

            os.truncate(tmp_path / "weights", 14_000)
            with pytest.raises(CheckpointError, match="weights: the file has become shorter"):
                merge_of(transfers, block, base, sources, place).run(lambda first, tile: None)
    finally:
        os.close(descriptor)


class _Late:
    """A device that copies as late as it may: only when the event after the copy is waited for, or a sum needs it."""

    def __init__(self):
        self.queue = []

    def done(self, _device):
        jobs, self.queue = self.queue, []
        return _Event(jobs)


class _Event:
    def __init__(self, jobs):
        self.jobs = jobs

    def synchronize(self):
        while self.jobs:
            self.jobs.pop(0)()


def test_a_buffer_is_used_again_only_when_the_device_is_done_with_it(monkeypatch):
    """Without a GPU: every copy is put off until its event is waited for, as a slow device would."""
    late = _Late()
    monkeypatch.setattr(device_module, "done", late.done)
    plain_copy = torch.Tensor.copy_

    def copy_(self, source, non_blocking=False):
        if non_blocking:
            late.queue.append(lambda: plain_copy(self, source))
            return self
        return plain_copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    delivered = {}
    with Workers(1) as workers:
        outbox = Outbox(Transfers(torch.device("cpu"), workers), lambda first, part: delivered.update({first: [*part]}))
        for first in range(5):
            outbox.put(first, torch.full((3,), first, dtype=torch.uint8))
            # The last one is still on its way, and the one before has arrived.
            assert sorted(delivered) == list(range(first))
        outbox.flush()
        outbox.flush()
    assert delivered == {first: [first] * 3 for first in range(5)}


def test_the_host_waits_before_it_fills_a_buffer_that_is_being_read(monkeypatch):
    log = []

    class Event:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            log.append(f"wait {self.number}")

    numbers = iter(range(100))
    monkeypatch.setattr(device_module, "done", lambda _device: Event(next(numbers)))
    data = torch.arange(5_000, dtype=torch.float32)

    class Logged:
        dtype = "float32"

        def address(self, first, count, buffer):
            log.append(f"read {first}")
            return InMemory(data.data_ptr(), "float32").address(first, count, buffer)

    with Workers(1) as workers:
        transfers = Transfers(torch.device("cpu"), workers)
        for first in (0, 1_000, 2_000, 3_000):
            (tile,) = transfers.upload([Logged()], first, 1_000)
            assert tile.tolist() == data[first : first + 1_000].tolist()
    # The third tile takes the buffer of the first, when that has been copied; the second is still on its way.
    assert log == ["read 0", "read 1000", "wait 0", "read 2000", "wait 1", "read 3000"]


@pytest.mark.parametrize(
    ("inputs", "model", "free", "total", "suffices"),
    [
        (42, 14, 66, 80, True),  # three of 7 B parameters in bfloat16 on 80 GB, the merged model on it already
        (42, 14, 63, 80, False),
        (10, 5, 22, 24, True),
        (42, 14, 10, 24, False),
        (0, 0, 2, 20, True),
        (0, 0, 1, 20, False),
    ],
)
def test_whether_the_inputs_fit_on_the_device(inputs, model, free, total, suffices):
    giga = 10**9
    assert Room(inputs * giga, model * giga, free * giga, total * giga).suffices is suffices


def test_what_the_user_is_told_where_they_do_not_fit():
    told = Room(42_000_000_000, 14_000_000_000, 10_120_000_000, 24_000_000_000).shortage(torch.device("cuda", 1))
    assert told == (
        "the base and the sources (42.0 GB) do not fit on cuda:1 (10.1 GB of 24.0 GB free, of which 16.4 GB are kept "
        "back for a model and its activations): they stay in host memory and go to the device tile by tile for every "
        "merge, which is slower"
    )


def test_too_little_memory_is_said_in_one_sentence():
    told = "tensor 'w': cuda:0 has not enough free memory to merge it; set compute"
    with pytest.raises(MergeError, match=told), memory_explained("w", torch.device("cuda", 0)):
        raise torch.OutOfMemoryError("CUDA out of memory")

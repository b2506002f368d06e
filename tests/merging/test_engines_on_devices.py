"""Both engines where the kernels do not merge: on every device that is there, by torch, with the same bytes."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.errors import MergeError
from automerge.merging import device as device_module
from automerge.merging import resident, streamed
from automerge.merging.apply import merge_tensor
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique
from tests.devices import DEVICES

ELEMENTWISE = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"]
OTHERS = ["della", "sce", "consensus_ta", "tsv_merge"]
WEIGHTS = {"a": 0.3, "b": 0.6}


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """No kernels, so that on the CPU as well torch merges, in small tiles."""
    for engine in (resident, streamed):
        monkeypatch.setattr(engine, "load_kernels", lambda: None)
    monkeypatch.setattr(device_module, "TILE", 1000)


def draw(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(99)
    shapes = {"conv.weight": (13, 10, 3, 3), "conv.bias": (10,), "fc.weight": (40, 70), "scale": (), "empty": (0, 4)}
    state = {
        name: torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    state["bn.running_var"] = torch.rand(10, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in state.items()} | {"bn.num_batches_tracked": torch.tensor(seed)}


def make_block(technique, name="trunk", parameters=None, weights=WEIGHTS, **changes):
    declared = {each.name for each in load_technique(technique).declaration.hyperparameters}
    values = load_technique(technique).declaration.defaults()
    return RecipeBlock(
        name=name,
        technique=technique,
        weights=weights,
        hyperparameters=values | {each: value for each, value in changes.items() if each in declared},
        parameters=parameters or ["conv.bias", "conv.weight", "empty", "fc.weight", "scale"],
        buffers=[] if parameters else ["bn.num_batches_tracked", "bn.running_var"],
    )


def make_recipe(blocks, digests=None, **fields):
    inputs = {name: InputDigest(name=name, digest=(digests or {}).get(name, "0")) for name in ("base", "a", "b")}
    return Recipe(base=inputs.pop("base"), sources=list(inputs.values()), blocks=blocks, **fields)


def save(folder: Path, states, *, pickled=False):
    folder.mkdir(parents=True, exist_ok=True)
    opened = {}
    for name, state in states.items():
        path = folder / (f"{name}.pt" if pickled else f"{name}.safetensors")
        torch.save(state, path) if pickled else save_file(state, path)
        opened[name] = open_checkpoint(path)
    return opened


def written(recipe, checkpoints, folder, device):
    """What the streamed engine writes; the recipe gets the digests of the checkpoints."""
    found = {name: each.digest() for name, each in checkpoints.items()}
    recipe = make_recipe(recipe.blocks, found, seed=recipe.seed, dtype=recipe.dtype, private=recipe.private)
    sources = {name: each for name, each in checkpoints.items() if name != "base"}
    files = merge_checkpoints(recipe, checkpoints["base"], sources, folder, max_shard_bytes=1 << 40, device=device)
    return load_file(files[0])


def live_on(device, recipe, states, *, keep_on_device):
    base, sources = states["base"], {name: state for name, state in states.items() if name != "base"}
    names = [name for block in recipe.blocks for name in (*block.parameters, *block.buffers)]
    output = {name: base[name].to(torch.float32) if recipe.dtype == "float32" else base[name] for name in names}
    live = {name: torch.full_like(base[name] if "num" in name else output[name], 9, device=device) for name in names}
    ResidentMerger(base, sources, device, keep_on_device=keep_on_device).apply(recipe, live)
    return {name: tensor.cpu() for name, tensor in live.items()}


def expected(recipe, states):
    sources = {name: state for name, state in states.items() if name != "base"}
    return {
        name: merge_tensor(
            name,
            block,
            states["base"][name],
            {each: state[name] for each, state in sources.items()},
            seed=recipe.seed,
            dtype=recipe.dtype,
        )
        for block in recipe.blocks
        for name in (*block.parameters, *block.buffers)
    }


def assert_same_bytes(one, other):
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other[name])]
        assert torch.equal(*flat), name


@pytest.mark.parametrize("device", DEVICES)
@given(
    st.sampled_from(ELEMENTWISE),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["same", "float32"]),
    st.floats(0.05, 1.0),
    st.integers(0, 5),
    st.booleans(),
)
@settings(max_examples=25)
def test_both_engines_give_the_bytes_of_the_reference(
    tmp_path_factory, device, technique, dtype, output, density, seed, pickled
):
    folder = tmp_path_factory.mktemp("merge")
    states = {name: draw(10 * seed + at, dtype) for at, name in enumerate(["base", "a", "b"])}
    recipe = make_recipe([make_block(technique, density=density, gamma=density / 5)], seed=seed, dtype=output)
    reference = expected(recipe, states)
    checkpoints = save(folder / "in", states, pickled=pickled)
    assert_same_bytes(written(recipe, checkpoints, folder / "out", device), reference)
    for keep_on_device in (True, False):
        assert_same_bytes(live_on(device, recipe, states, keep_on_device=keep_on_device), reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("technique", [*OTHERS, "ties"])
def test_what_is_not_merged_in_tiles_goes_through_the_device_as_a_whole(tmp_path, device, dtype, technique):
    states = {name: draw(at, dtype) for at, name in enumerate(["base", "a", "b"])}
    recipe = make_recipe([make_block(technique)])
    merged = written(recipe, save(tmp_path / "in", states), tmp_path / "out", device)
    for keep_on_device in (True, False):
        live = live_on(device, recipe, states, keep_on_device=keep_on_device)
        for name, tensor in expected(recipe, states).items():
            # A device may sum in another order.
            torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(live[name], merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep_on_device", [True, False])
@pytest.mark.parametrize("technique", ["linear", "ties", "dare_ties"])
def test_a_search_step_merges_only_what_changed_straight_into_the_live_model(device, keep_on_device, technique):
    """Two of fourteen blocks."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{index}" for index in range(14)]
    states = {
        owner: {f"{name}.w": torch.randn(50, 41, generator=generator) for name in names} for owner in ("base", "a", "b")
    }
    base = states["base"]
    sources = {name: state for name, state in states.items() if name != "base"}

    def recipe(changed):
        even, other = {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.4}
        weights = {name: other if name in changed else even for name in names}
        return make_recipe([make_block(technique, name, [f"{name}.w"], weights[name], density=0.5) for name in names])

    merger = ResidentMerger(base, sources, device, keep_on_device=keep_on_device)
    model = {name: torch.nn.Parameter(torch.zeros_like(tensor, device=device)) for name, tensor in base.items()}
    places = {name: parameter.data_ptr() for name, parameter in model.items()}
    assert merger.apply(recipe([]), model) == names
    changed = ["layer3", "layer11"]
    assert merger.apply(recipe(changed), model) == changed
    assert {name: parameter.data_ptr() for name, parameter in model.items()} == places
    assert_same_bytes({name: each.detach().cpu() for name, each in model.items()}, expected(recipe(changed), states))
    assert merger.apply(recipe(changed), model) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep_on_device", [True, False])
def test_a_live_tensor_of_another_form_gets_the_same_values(device, keep_on_device):
    states = {name: draw(at, torch.bfloat16) for at, name in enumerate(["base", "a", "b"])}
    base = states.pop("base")
    recipe = make_recipe([make_block("linear")])
    wanted = expected(recipe, {"base": base, **states})
    live = {name: torch.zeros_like(tensor, dtype=torch.float64, device=device) for name, tensor in wanted.items()}
    live["fc.weight"] = torch.zeros(70, 40, device=device).t()  # not contiguous
    live["conv.bias"] = torch.zeros(10)  # on the CPU
    live["bn.num_batches_tracked"] = torch.tensor(0, device=device)
    ResidentMerger(base, states, device, keep_on_device=keep_on_device).apply(recipe, live)
    for name, tensor in wanted.items():
        assert torch.equal(live[name].cpu().double(), tensor.double()), name


@pytest.mark.parametrize("device", DEVICES)
def test_refusals_are_those_of_the_reference(tmp_path, device):
    states = {name: draw(at, torch.float32) for at, name in enumerate(["base", "a", "b"])}
    states["b"]["fc.weight"][39, 69] = float("nan")
    recipe = make_recipe([make_block("ties")])
    with pytest.raises(MergeError, match=r"source 'b', tensor 'fc\.weight': 1 NaN and 0 infinite values"):
        written(recipe, save(tmp_path / "in", states), tmp_path / "out", device)
    assert not (tmp_path / "out").exists()
    for keep_on_device in (True, False):
        with pytest.raises(MergeError, match=r"source 'b', tensor 'fc\.weight': 1 NaN and 0 infinite values"):
            live_on(device, recipe, states, keep_on_device=keep_on_device)
    states["b"]["fc.weight"][39, 69] = 1e6
    recipe = make_recipe([make_block("linear")], dtype="float16")
    message = r"tensor 'fc\.weight': 1 of 2800 values do not fit float16"
    with pytest.raises(MergeError, match=message):
        written(recipe, save(tmp_path / "again", states), tmp_path / "out", device)
    with pytest.raises(MergeError, match=message):
        live_on(device, recipe, states, keep_on_device=True)


@pytest.mark.parametrize(
    ("technique", "where", "tensor"),
    [
        ("ties", "automerge.merging.device.DeviceMerge.run", r"bn\.running_var"),
        ("sce", "automerge.merging.apply.merge_tensor", r"bn\.num_batches_tracked"),
    ],
)
def test_a_device_that_is_too_small_is_said_with_the_tensors_name(tmp_path, monkeypatch, technique, where, tensor):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    states = {name: draw(at, torch.float32) for at, name in enumerate(["base", "a", "b"])}
    checkpoints = save(tmp_path / "in", states)
    monkeypatch.setattr(where, full)
    with pytest.raises(MergeError, match=f"tensor '{tensor}': cpu has not enough free memory"):
        written(make_recipe([make_block(technique)]), checkpoints, tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


class TestWhereTheInputsAre:
    """The choice itself, with made-up figures: no GPU is needed for it."""

    @pytest.fixture
    def states(self):
        shared = torch.ones(1000)
        return {
            "base": {"w": shared, "tied": shared, "v": torch.ones(500)},
            "a": {"w": shared, "v": torch.ones(500)},  # an adapter leaves w as it is
        }

    @pytest.mark.parametrize(("free", "kept"), [(17_000, True), (13_999, False)])
    def test_they_are_kept_on_the_device_if_they_fit(self, states, free, kept, monkeypatch, caplog):
        # 8000 bytes in all, 6000 of the largest, 0 for activations.
        monkeypatch.setattr(resident, "memory_of", lambda device: (free, 9))
        with caplog.at_level(logging.WARNING):
            assert resident._fits(list(states.values()), torch.device("cuda", 0)) is kept
        assert len(caplog.messages) == (not kept)
        assert kept or "stay in host memory" in caplog.messages[0]

    def test_the_cpu_is_not_asked(self, states, monkeypatch):
        monkeypatch.setattr(resident, "memory_of", lambda device: pytest.fail("asked"))
        assert resident._fits(list(states.values()), torch.device("cpu"))

    @pytest.mark.parametrize("device", DEVICES)
    def test_what_inputs_share_is_taken_to_the_device_once(self, states, device):
        merger = ResidentMerger(states["base"], {"a": states["a"]}, device, keep_on_device=True)
        assert merger._base["w"] is merger._base["tied"] is merger._sources["a"]["w"]
        assert merger._base["v"] is not merger._sources["a"]["v"]
        assert merger._base["w"].device.type == device

"""Real checkpoints: every dtype, mixtures, shards of any name, odd tensors; through both engines."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from automerge.checkpoint.checkpoint import Checkpoint
from automerge.checkpoint.info import TAG_OF_DTYPE, TensorInfo
from automerge.checkpoint.open import open_checkpoint
from automerge.checkpoint.write import CheckpointWriter
from automerge.errors import MergeError
from automerge.merging.recipe import BASE, InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8]
TECHNIQUES = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "iso_c"]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.float")


def save(folder: Path, states: dict[str, dict[str, Tensor]]) -> dict[str, Checkpoint]:
    """One safetensors file per state, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        save_file({key: value.clone() for key, value in state.items()}, folder / f"{name}.safetensors")
    return {name: open_checkpoint(folder / f"{name}.safetensors") for name in states}


def recipe_of(
    checkpoints: dict[str, Checkpoint], technique: str = "linear", names: list[str] | None = None, **fields: object
) -> Recipe:
    """One block over all tensors (or those named), equal weights."""
    digests = {name: InputDigest(name=name, digest=each.digest()) for name, each in checkpoints.items()}
    base = digests.pop(BASE, None)
    block = RecipeBlock(
        name="all",
        technique=technique,
        weights=dict.fromkeys(digests, 1 / len(digests)),
        hyperparameters=load_technique(technique).declaration.defaults(),
        parameters=list(next(iter(checkpoints.values())).tensors) if names is None else names,
    )
    return Recipe.model_validate({"base": base, "sources": list(digests.values()), "blocks": [block], **fields})


def streamed(
    recipe: Recipe, checkpoints: dict[str, Checkpoint], folder: Path, shard: int = 1 << 40
) -> dict[str, Tensor]:
    sources = {name: each for name, each in checkpoints.items() if name != BASE}
    files = merge_checkpoints(recipe, checkpoints.get(BASE), sources, folder, max_shard_bytes=shard)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def resident(recipe: Recipe, checkpoints: dict[str, Checkpoint], like: dict[str, Tensor]) -> dict[str, Tensor]:
    states = {name: {key: each.read(key) for key in each.tensors} for name, each in checkpoints.items()}
    live = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    ResidentMerger(states.pop(BASE, None), states, "cpu").apply(recipe, live)
    return live


def both(recipe: Recipe, checkpoints: dict[str, Checkpoint], folder: Path) -> dict[str, Tensor]:
    """The merged tensors, after both engines agreed on every byte."""
    merged = streamed(recipe, checkpoints, folder)
    live = resident(recipe, checkpoints, merged)
    for name, tensor in merged.items():
        assert (live[name].dtype, live[name].shape) == (tensor.dtype, tensor.shape), name
        mine, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, live[name]))
        assert torch.equal(mine, other), name
    return merged


def draw(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_dtype_under_every_kind_of_technique(tmp_path: Path, dtype: torch.dtype, technique: str) -> None:
    """`same` gives the sources' own dtype, float8 included: computed wide, rounded once."""
    states = {name: {"w": draw(at, dtype, 16, 12)} for at, name in enumerate((BASE, "a", "b"))}
    checkpoints = save(tmp_path / "in", states)
    merged = both(recipe_of(checkpoints, technique), checkpoints, tmp_path / "out")["w"]
    assert merged.dtype == dtype
    if technique == "linear":
        wide = (states["a"]["w"].double() + states["b"]["w"].double()) / 2
        assert torch.equal(merged.double(), wide.to(dtype).double())


@given(
    st.lists(st.sampled_from(FLOATS), min_size=3, max_size=3),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.sampled_from(TECHNIQUES),
)
def test_mixed_dtypes_need_and_get_an_output_dtype(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[torch.dtype], output: str, technique: str
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    states = {
        name: {"w": draw(at, dtype, 5, 7)}
        for at, (name, dtype) in enumerate(zip((BASE, "a", "b"), dtypes, strict=True))
    }
    checkpoints = save(folder / "in", states)
    merged = both(recipe_of(checkpoints, technique, dtype=output), checkpoints, folder / "out")["w"]
    assert str(merged.dtype) == f"torch.{output}"
    if dtypes[1] != dtypes[2]:
        with pytest.raises(MergeError, match=r"tensor 'w' is .* in 'a', .* in 'b'; say which with the output dtype"):
            streamed(recipe_of(checkpoints, technique), checkpoints, folder / "refused")


@pytest.mark.parametrize("dtype", [torch.float16, *FLOAT8], ids=ids)
def test_what_leaves_the_range_is_refused_and_not_cut_to_it(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where torch's own conversion would quietly write the largest value."""
    largest = torch.finfo(dtype).max
    states = {
        BASE: {"w": torch.zeros(3).to(dtype)},
        "a": {"w": torch.tensor([1.0, largest, -largest]).to(dtype)},
        "b": {"w": torch.tensor([1.0, largest, largest]).to(dtype)},
    }
    checkpoints = save(tmp_path / "in", states)
    fits = recipe_of(checkpoints, "task_arithmetic")
    assert both(fits, checkpoints, tmp_path / "fits")["w"].double().tolist() == [1, largest, 0]
    (block,) = fits.blocks
    doubled = fits.model_copy(update={"blocks": [block.model_copy(update={"weights": {"a": 1.0, "b": 1.0}})]})
    message = rf"'w': 1 of 3 values do not fit {str(dtype)[6:]} \(largest magnitude {2 * largest:g}\)"
    with pytest.raises(MergeError, match=message):
        streamed(doubled, checkpoints, tmp_path / "refused")
    with pytest.raises(MergeError, match=message):
        resident(doubled, checkpoints, {"w": states["a"]["w"]})
    wide = doubled.model_copy(update={"dtype": "float32"})
    assert both(wide, checkpoints, tmp_path / "wide")["w"].tolist() == [2, 2 * largest, 0]


@pytest.mark.parametrize("dtype", FLOAT8, ids=ids)
def test_float8_that_is_not_finite_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoints = save(
        tmp_path, {"a": {"w": torch.tensor([float("nan"), 1]).to(dtype)}, "b": {"w": torch.ones(2).to(dtype)}}
    )
    with pytest.raises(MergeError, match="source 'a', tensor 'w': 1 NaN and 0 infinite values"):
        streamed(recipe_of(checkpoints), checkpoints, tmp_path / "out")


@pytest.mark.parametrize("scale", ["w_scale", "w_scale_inv", "scale_w"])
def test_float8_with_scales_of_its_own_is_refused(tmp_path: Path, scale: str) -> None:
    """Its numbers mean nothing by themselves, and an average of both parts is not the average of the weights."""
    state = {"layer.w": torch.ones(2, 2).to(torch.float8_e4m3fn), f"layer.{scale}": torch.ones(1)}
    checkpoints = save(tmp_path, {"a": state, "b": state})
    with pytest.raises(MergeError, match=rf"'layer\.w' is float8_e4m3fn with the scales 'layer\.{scale}'"):
        streamed(recipe_of(checkpoints), checkpoints, tmp_path / "out")


@pytest.mark.parametrize("dtype", FLOAT8, ids=ids)
def test_tied_float8(tmp_path: Path, dtype: torch.dtype) -> None:
    """Both names in one file are compared by value."""
    states = {name: {"emb": draw(at, dtype, 4, 3)} for at, name in enumerate("ab")}
    states["a"]["out"] = states["a"]["emb"]
    checkpoints = save(tmp_path / "in", states)
    recipe = recipe_of(checkpoints, names=["emb"], tied={"out": "emb"})
    assert list(both(recipe, checkpoints, tmp_path / "out")) == ["emb"]
    states["a"]["out"] = draw(7, dtype, 4, 3)
    checkpoints = save(tmp_path / "apart", states)
    recipe = recipe_of(checkpoints, names=["emb"], tied={"out": "emb"})
    with pytest.raises(MergeError, match="are tied in the model, and their values differ"):
        streamed(recipe, checkpoints, tmp_path / "refused")


def test_odd_shapes(tmp_path: Path) -> None:
    shapes = {"scalar": (), "empty": (0, 4), "one": (1,), "prime": (101,), "deep": (2, 1, 3, 1, 2)}
    states = {
        name: {key: draw(at, torch.float32, *shape) for key, shape in shapes.items()}
        for at, name in enumerate((BASE, "a", "b"))
    }
    checkpoints = save(tmp_path / "in", states)
    for technique in ("linear", "ties", "dare_ties"):
        merged = both(recipe_of(checkpoints, technique), checkpoints, tmp_path / technique)
        assert {key: tuple(tensor.shape) for key, tensor in merged.items()} == shapes
    torch.testing.assert_close(
        streamed(recipe_of(checkpoints), checkpoints, tmp_path / "again")["scalar"],
        (states["a"]["scalar"] + states["b"]["scalar"]) / 2,
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str)
def test_integer_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Equal ones are kept; of others the base's, where the recipe says so."""
    equal = {"w": torch.ones(2), "table": torch.tensor([0, 1, 1]).to(dtype)}
    other = equal | {"table": torch.tensor([1, 0, 1]).to(dtype)}
    checkpoints = save(tmp_path / "equal", {BASE: other, "a": equal, "b": equal})
    assert torch.equal(both(recipe_of(checkpoints), checkpoints, tmp_path / "out")["table"], equal["table"])
    checkpoints = save(tmp_path / "differ", {BASE: equal, "a": equal, "b": other})
    with pytest.raises(MergeError, match=r"buffer 'table' .* differs between the sources"):
        streamed(recipe_of(checkpoints), checkpoints, tmp_path / "refused")
    recipe = recipe_of(checkpoints, integer_buffers="base", dtype="float16")
    merged = both(recipe, checkpoints, tmp_path / "base")
    assert merged["table"].dtype == dtype and torch.equal(merged["table"], equal["table"])


def pickled(make: Callable[[int], dict[str, Tensor]], folder: Path) -> dict[str, Checkpoint]:
    folder.mkdir(parents=True)
    for at, name in enumerate((BASE, "a", "b")):
        torch.save(make(at), folder / f"{name}.pt")
    return {name: open_checkpoint(folder / f"{name}.pt") for name in (BASE, "a", "b")}


def test_views_in_pytorch_files(tmp_path: Path) -> None:
    """Transposed, sliced, strided and expanded tensors, several of them in one storage."""

    def make(seed: int) -> dict[str, Tensor]:
        storage = draw(seed, torch.float32, 12, 10)
        return {
            "whole": storage,
            "transposed": storage.T,
            "rows": storage[3:7],
            "columns": storage[:, 2:5],
            "strided": storage[::3, ::2],
            "expanded": storage[0, :1].expand(6),
        }

    checkpoints = pickled(make, tmp_path / "in")
    contiguous = {
        name: {key: tensor.contiguous() for key, tensor in make(at).items()} for at, name in enumerate((BASE, "a", "b"))
    }
    plain = save(tmp_path / "plain", contiguous)
    for technique in ("linear", "ties", "dare_linear"):
        merged = both(recipe_of(checkpoints, technique), checkpoints, tmp_path / technique)
        expected = streamed(recipe_of(plain, technique), plain, tmp_path / f"plain-{technique}")
        assert list(merged) == list(expected)
        assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_tied_tensors_in_pytorch_files(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        shared = draw(seed, torch.bfloat16, 8, 4)
        return {"emb": shared, "out": shared, "w": draw(seed + 9, torch.bfloat16, 4)}

    checkpoints = pickled(make, tmp_path / "in")
    recipe = recipe_of(checkpoints, "ties", names=["emb", "w"], tied={"out": "emb"})
    assert list(both(recipe, checkpoints, tmp_path / "out")) == ["emb", "w"]


def write_shards(folder: Path, state: dict[str, Tensor], order: list[str], names: list[str]) -> None:
    """One tensor per shard, under any names, the index in any order."""
    folder.mkdir(parents=True)
    weight_map = dict(zip(order, names, strict=True))
    for tensor, file in weight_map.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({tensor: state[tensor]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_of_any_order_and_name(tmp_path: Path) -> None:
    states = {
        name: {key: draw(10 * at + place, torch.float16, 9, 4) for place, key in enumerate("xyz")}
        for at, name in enumerate((BASE, "a", "b"))
    }
    single = save(tmp_path / "single", states)
    orders = itertools.cycle(itertools.permutations("xyz"))
    files = ["z-last.safetensors", "part/1.safetensors", "A.safetensors"]
    sharded = {}
    for name, state in states.items():
        write_shards(tmp_path / name, state, list(next(orders)), files)
        sharded[name] = open_checkpoint(tmp_path / name)
    expected = streamed(recipe_of(single, "dare_ties"), single, tmp_path / "one")
    merged = both(recipe_of(sharded, "dare_ties"), sharded, tmp_path / "many")
    small = streamed(recipe_of(sharded, "dare_ties"), sharded, tmp_path / "small", shard=80)
    assert sorted(path.name for path in (tmp_path / "small").glob("*.safetensors")) == [
        f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)
    ]
    for name in "xyz":
        assert torch.equal(merged[name], expected[name]) and torch.equal(small[name], expected[name])


def test_private_tensors_of_every_dtype(tmp_path: Path) -> None:
    """Kept as they are, under `same`; converted otherwise, but never cut to the range."""
    heads = {f"head.{ids(dtype)}": draw(1, dtype, 3) for dtype in FLOATS} | {"head.ids": torch.arange(4)}
    states = {name: {"w": draw(2, torch.float32, 4), **heads} for name in "ab"}
    checkpoints = save(tmp_path / "in", states)
    private = {name: sorted(heads) for name in "ab"}
    recipe = recipe_of(checkpoints, names=["w"], private=private)
    merge_checkpoints(recipe, None, checkpoints, tmp_path / "same", max_shard_bytes=1 << 40)
    kept = load_file(tmp_path / "same" / "heads" / "a.safetensors")
    assert {name: tensor.dtype for name, tensor in kept.items()} == {name: t.dtype for name, t in heads.items()}
    assert all(torch.equal(kept[name].double(), heads[name].double()) for name in heads)
    recipe = recipe.model_copy(update={"dtype": "bfloat16"})
    merge_checkpoints(recipe, None, checkpoints, tmp_path / "cast", max_shard_bytes=1 << 40)
    cast = load_file(tmp_path / "cast" / "heads" / "b.safetensors")
    assert {str(tensor.dtype) for tensor in cast.values()} == {"torch.bfloat16", "torch.int64"}


FAR = (1 << 32) + 4096
"""Bytes of a tensor that pushes what comes after it beyond offsets of 32 bits."""


def test_tensors_beyond_four_gigabytes_are_read_at_the_right_place(tmp_path: Path) -> None:
    """A file with a hole: 4 GB that take no disk, then a tensor that is merged."""
    for seed, name in enumerate("ab"):
        header = {
            "big": {"dtype": TAG_OF_DTYPE["uint8"], "shape": [FAR], "data_offsets": [0, FAR]},
            "last": {"dtype": "F32", "shape": [3], "data_offsets": [FAR, FAR + 12]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.seek(8 + len(text) + FAR)
            file.write(draw(seed, torch.float32, 3).numpy().tobytes())
    checkpoints = {name: open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab"}
    for seed, checkpoint in enumerate(checkpoints.values()):
        assert checkpoint.tensors["big"] == TensorInfo("uint8", (FAR,))
        assert torch.equal(checkpoint.read("last"), draw(seed, torch.float32, 3))
        extent = checkpoint.extent("last")
        assert extent is not None and extent.begin > 1 << 32
        with extent.file.open("rb") as file:
            file.seek(extent.begin)
            assert file.read(extent.nbytes) == draw(seed, torch.float32, 3).numpy().tobytes()


def test_tensors_beyond_four_gigabytes_are_written_at_the_right_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is not taken on the disk here, so that the file has a hole; two parts lie on either side of it."""
    import automerge.checkpoint.write as module

    monkeypatch.setattr(
        module.os, "posix_fallocate", lambda descriptor, start, size: module.os.ftruncate(descriptor, size)
    )
    infos = {"a": TensorInfo("float32", (FAR // 4,)), "b": TensorInfo("float32", (3,))}
    last = draw(1, torch.float32, 3)
    with CheckpointWriter(tmp_path, infos) as writer:
        shard = writer._shards[0]
        assert shard.offsets["b"] > 1 << 32 and shard.size == shard.offsets["b"] + 12
        writer.write("b", last)
        writer.write_part("a", FAR - 8, memoryview(b"12345678"))
        path = Path(writer._temporaries[0])
        with path.open("rb") as file:
            file.seek(shard.offsets["a"] + FAR - 8)
            assert file.read(20) == b"12345678" + last.numpy().tobytes()
        assert path.stat().st_blocks * 512 < 1_000_000, "the hole takes no room"

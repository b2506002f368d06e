"""Streamed and resident: the same bytes from the same recipe, ties and private tensors kept, all or nothing."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.errors import MergeError, StorageError
from automerge.merging import workers as workers_module
from automerge.merging.apply import merge_tensor
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique

BIG = 1 << 40
ELEMENTWISE = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
]


def draw(seed, dtype=torch.float32, count=100):
    """A model's weights: a matrix, a vector, a scalar, an empty tensor, BatchNorm's buffers, an index table."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "conv.weight": torch.randn(4, 3, 5, generator=generator),
        "conv.bias": torch.randn(count, generator=generator),
        "scale": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 4),
        "bn.running_var": torch.rand(5, generator=generator),
    }
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return state | {"bn.num_batches_tracked": torch.tensor(seed), "table": torch.arange(3)}


def save(folder: Path, name: str, state):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({each: tensor.clone() for each, tensor in state.items()}, folder / f"{name}.safetensors")
    return open_checkpoint(folder / f"{name}.safetensors")


def make_recipe(checkpoints, blocks, **fields):
    digests = {name: InputDigest(name=name, digest=each.digest()) for name, each in checkpoints.items()}
    base = digests.pop("base", None)
    return Recipe(release="0.1.0", base=base, sources=list(digests.values()), blocks=blocks, **fields)


def make_block(technique, names, weights, name="trunk", **changes):
    return RecipeBlock(
        name=name,
        technique=technique,
        weights=weights,
        hyperparameters=load_technique(technique).declaration.defaults() | changes,
        parameters=names,
        buffers=[],
    )


def trunk(technique, weights, **changes):
    block = make_block(technique, ["conv.bias", "conv.weight", "empty", "scale", "table"], weights, **changes)
    return block.model_copy(update={"buffers": ["bn.num_batches_tracked", "bn.running_var"]})


def resident(recipe, checkpoints, live):
    states = {name: {each: of.read(each) for each in of.tensors} for name, of in checkpoints.items()}
    base = states.pop("base", None)
    return ResidentMerger(base, states, "cpu").apply(recipe, live)


def streamed(recipe, checkpoints, folder, **options):
    sources = {name: each for name, each in checkpoints.items() if name != "base"}
    return merge_checkpoints(recipe, checkpoints.get("base"), sources, folder, max_shard_bytes=BIG, **options)


def assert_same_bytes(one, other):
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other[name])]
        assert torch.equal(*flat), name


@given(
    st.sampled_from(["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.sampled_from(["same", "float32", "float16", "bfloat16"]),
    st.lists(st.floats(0.05, 1.5), min_size=1, max_size=4),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_both_engines_give_the_same_bytes(tmp_path_factory, technique, dtype, output, weights, seed):
    folder = tmp_path_factory.mktemp("merge")
    names = ["base", *(f"s{index}" for index in range(len(weights)))]
    checkpoints = {name: save(folder / "in", name, draw(10 * seed + at, dtype)) for at, name in enumerate(names)}
    block = trunk(technique, dict(zip(names[1:], weights, strict=True)))
    recipe = make_recipe(checkpoints, [block], dtype=output, seed=seed)
    (file,) = streamed(recipe, checkpoints, folder / "out")
    merged = load_file(file)
    live = {name: torch.full_like(tensor, 9) for name, tensor in merged.items()}
    assert resident(recipe, checkpoints, live) == ["trunk"]
    assert_same_bytes(merged, live)
    assert merged["bn.num_batches_tracked"].item() == 10 * seed + len(weights)
    assert (merged["bn.running_var"] >= 0).all()


@st.composite
def models(draw):
    """Shapes by name, a dtype for each checkpoint, and to which of some shards each tensor goes."""
    shapes = draw(st.lists(st.lists(st.integers(0, 130), max_size=3).map(tuple), min_size=1, max_size=4))
    sources = draw(st.integers(1, 4))
    dtypes = draw(st.lists(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), min_size=5, max_size=5))
    shards = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    limited = [shape if torch.Size(shape).numel() <= 20_000 else (7, 1999) for shape in shapes]
    return {f"t{index}": shape for index, shape in enumerate(limited)}, dtypes[: sources + 1], shards


def save_shards(folder: Path, state, shards):
    """Tensors in files of any name and order, which only the index brings together."""
    folder.mkdir(parents=True)
    places = {name: f"part-{shard}.safetensors" for name, shard in zip(state, shards, strict=False)}
    for file in sorted(set(places.values())):
        save_file({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return open_checkpoint(folder)


@given(
    models(),
    st.sampled_from(ELEMENTWISE),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.lists(st.floats(-1, 1.5).filter(lambda weight: abs(weight) > 0.01), min_size=4, max_size=4),
    st.floats(0.02, 1.0),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_engines_threads_and_shards_give_the_bytes_of_the_reference(
    tmp_path_factory, model, technique, output, weights, density, seed
):
    shapes, dtypes, shards = model
    folder = tmp_path_factory.mktemp("merge")
    generator = torch.Generator().manual_seed(seed)
    shared = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    names = ["base", *(f"s{index}" for index in range(len(dtypes) - 1))]
    states = {
        name: {each: (of + 0.1 * torch.randn(of.shape, generator=generator)).to(dtype) for each, of in shared.items()}
        for name, dtype in zip(names, dtypes, strict=True)
    }
    checkpoints = {
        name: save_shards(folder / name, state, shards[at % 4 :] + shards[: at % 4])
        for at, (name, state) in enumerate(states.items())
    }
    changes = {"density": density} if technique not in ("linear", "task_arithmetic") else {}
    named = dict(zip(names[1:], [abs(each) for each in weights] if technique == "linear" else weights, strict=False))
    block = make_block(technique, sorted(shapes), named, **changes)
    recipe = make_recipe(checkpoints, [block], dtype=output, seed=seed)
    base = states.pop("base")
    expected = {
        name: merge_tensor(
            name, block, base[name], {each: state[name] for each, state in states.items()}, seed=seed, dtype=output
        )
        for name in shapes
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_module, "TILE", 2048)
        for threads in (1, 2):
            files = streamed(recipe, checkpoints, folder / f"out{threads}", threads=threads)
            assert_same_bytes({name: tensor for file in files for name, tensor in load_file(file).items()}, expected)
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                live = {name: torch.full_like(tensor, 9) for name, tensor in expected.items()}
                ResidentMerger(base, states, "cpu").apply(recipe, live)
            finally:
                torch.set_num_threads(before)
            assert_same_bytes(live, expected)


@pytest.mark.parametrize("technique", ["linear", "ties", "dare_ties"])
def test_threads_and_shards_do_not_change_the_bytes(tmp_path, technique):
    names = ["base", "a", "b"]
    checkpoints = {name: save(tmp_path, name, draw(at, count=600_003)) for at, name in enumerate(names)}
    changes = {"rescale": "l1"} if technique == "dare_ties" else {}
    recipe = make_recipe(checkpoints, [trunk(technique, {"a": 0.3, "b": 0.6}, **changes)])
    threads = torch.get_num_threads()
    results = []
    try:
        for count, shard in ((1, BIG), (2, BIG), (3, 1000)):
            torch.set_num_threads(count)
            sources = {"b": checkpoints["b"], "a": checkpoints["a"]}
            files = merge_checkpoints(
                recipe, checkpoints["base"], sources, tmp_path / f"out{count}", max_shard_bytes=shard, threads=count
            )
            results.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    finally:
        torch.set_num_threads(threads)
    assert len(files) > 1
    for other in results[1:]:
        assert_same_bytes(results[0], other)


def two(tmp_path, a, b, base=None):
    states = {"base": base, "a": a, "b": b}
    return {name: save(tmp_path / "in", name, state) for name, state in states.items() if state is not None}


HALVES = {"a": 0.5, "b": 0.5}


def test_tied_tensors_are_merged_once_and_stay_tied(tmp_path):
    embedding, other = torch.ones(2, 2), torch.full((2, 2), 3.0)
    # The first file holds both names, the second only the alias.
    checkpoints = two(tmp_path, {"emb": embedding, "head": embedding.clone()}, {"head": other})
    recipe = make_recipe(checkpoints, [make_block("linear", ["emb"], HALVES)], tied={"head": "emb"})
    (file,) = streamed(recipe, checkpoints, tmp_path / "out")
    assert load_file(file)["emb"].tolist() == [[2, 2], [2, 2]]
    assert list(load_file(file)) == ["emb"]

    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(2, 2), "head": torch.nn.Linear(2, 2, bias=False)})
    model["head"].weight = model["emb"].weight
    resident(recipe, checkpoints, {"emb": model["emb"].weight, "head": model["head"].weight})
    assert model["head"].weight is model["emb"].weight
    assert model["head"].weight.tolist() == [[2, 2], [2, 2]]
    apart = {"emb": torch.zeros(2, 2), "head": torch.zeros(2, 2)}
    resident(recipe, checkpoints, apart)
    assert apart["head"].tolist() == [[2, 2], [2, 2]]


def test_a_tied_alias_of_another_shape_is_refused(tmp_path):
    for other in (torch.ones(5, 2), torch.ones(1, 2)):
        state = {"emb": torch.ones(1, 2), "head": other.expand(len(other), 2).contiguous()}
        if other.shape == (1, 2):
            state["emb"] = torch.ones(4, 2)
        folder = tmp_path / str(len(other))
        checkpoints = two(folder, state, {"emb": state["emb"].clone()})
        recipe = make_recipe(checkpoints, [make_block("linear", ["emb"], HALVES)], tied={"head": "emb"})
        with pytest.raises(MergeError, match="'emb' and 'head' are tied in the model, and their values differ"):
            streamed(recipe, checkpoints, folder / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_base_that_is_not_read_does_not_matter(tmp_path, suffix):
    """Neither its dtype nor its values, wherever the tensors lie."""
    generator = torch.Generator().manual_seed(0)
    states = {name: {"w": torch.randn(1000, generator=generator), "bn.running_var": torch.rand(9)} for name in "ab"}
    expected = None
    for number, value in (("float32", 1.0), ("float64", 1.0), ("float32", float("nan"))):
        states["base"] = {
            "w": torch.full((1000,), value, dtype=getattr(torch, number)),
            "bn.running_var": torch.full((9,), value, dtype=getattr(torch, number)),
        }
        folder = tmp_path / f"{number}{value}"
        folder.mkdir()
        for name, state in states.items():
            write = save_file if suffix == "safetensors" else torch.save
            write(state, folder / f"{name}.{suffix}")
        checkpoints = {name: open_checkpoint(folder / f"{name}.{suffix}") for name in ("base", "a", "b")}
        block = make_block("linear", ["w"], {"a": 0.3, "b": 0.6}).model_copy(update={"buffers": ["bn.running_var"]})
        (file,) = streamed(make_recipe(checkpoints, [block]), checkpoints, folder / "out")
        expected = expected or load_file(file)
        assert_same_bytes(load_file(file), expected)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    checkpoints = two(tmp_path, {"emb": torch.ones(2), "head": torch.zeros(2)}, {"emb": torch.ones(2)})
    recipe = make_recipe(checkpoints, [make_block("linear", ["emb"], HALVES)], tied={"head": "emb"})
    message = "source 'a': the tensors 'emb' and 'head' are tied in the model, and their values differ"
    with pytest.raises(MergeError, match=message):
        streamed(recipe, checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MergeError, match=message):
        resident(recipe, checkpoints, {"emb": torch.zeros(2)})


def test_private_tensors_go_to_heads(tmp_path):
    checkpoints = two(
        tmp_path,
        {"w": torch.ones(2), "head": torch.full((3,), 1.0)},
        {"w": torch.ones(2), "head": torch.full((5,), 2.0), "extra": torch.arange(2)},
        {"w": torch.ones(2), "old": torch.full((7,), 0.5)},
    )
    recipe = make_recipe(
        checkpoints,
        [make_block("task_arithmetic", ["w"], HALVES)],
        private={"a": ["head"], "b": ["head", "extra"], "base": ["old"]},
        dtype="bfloat16",
    )
    seen = []
    files = streamed(recipe, checkpoints, tmp_path / "out", progress=lambda *call: seen.append(call))
    assert [str(file.relative_to(tmp_path / "out")) for file in files] == [
        "model.safetensors",
        "heads/a.safetensors",
        "heads/b.safetensors",
        "heads/base.safetensors",
    ]
    written = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written == sorted(files)
    assert load_file(files[1])["head"].tolist() == [1, 1, 1]
    assert load_file(files[2])["head"].dtype == torch.bfloat16
    assert load_file(files[2])["extra"].tolist() == [0, 1]
    assert seen == [("w", 1, 5), ("head", 2, 5), ("head", 3, 5), ("extra", 4, 5), ("old", 5, 5)]
    assert list(open_checkpoint(tmp_path / "out").tensors) == ["w"]

    # A later merge into the same folder leaves nothing of this one.
    plain = two(tmp_path / "plain", {"w": torch.ones(2)}, {"w": torch.ones(2)})
    streamed(make_recipe(plain, [make_block("linear", ["w"], HALVES)]), plain, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["model.safetensors"]


def test_another_input_than_the_recipes_is_refused(tmp_path):
    checkpoints = two(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2)}, {"w": torch.zeros(2)})
    block = make_block("linear", ["w"], HALVES)
    recipe = make_recipe(checkpoints, [block])
    for changed in ("a", "base"):
        other = checkpoints | {changed: save(tmp_path / "other", changed, {"w": torch.full((2,), 7.0)})}
        with pytest.raises(MergeError, match=f"{changed}.* is not the one of the recipe"):
            streamed(recipe, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["merged", "head"])
def test_nothing_is_left_after_a_failure(tmp_path, where):
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    checkpoints = two(
        tmp_path,
        {"v": good, "w": bad if where == "merged" else good, "head": good},
        {"v": good, "w": good, "head": bad if where == "head" else good},
    )
    private = {"a": ["head"], "b": ["head"]}
    recipe = make_recipe(checkpoints, [make_block("linear", ["v", "w"], HALVES)], private=private)
    with pytest.raises(MergeError, match="1 NaN and 0 infinite values"):
        streamed(recipe, checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(MergeError):
        streamed(recipe, checkpoints, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["notes.txt"]


def test_a_folder_that_cannot_be_written(tmp_path):
    checkpoints = two(tmp_path, {"w": torch.ones(2), "h": torch.ones(1)}, {"w": torch.ones(2)})
    recipe = make_recipe(checkpoints, [make_block("linear", ["w"], HALVES)], private={"a": ["h"]})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        streamed(recipe, checkpoints, tmp_path / "file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "heads").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        streamed(recipe, checkpoints, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heads"]


def test_overwriting_an_input_is_safe(tmp_path):
    checkpoints = {
        name: save(tmp_path / name, "model", {"w": torch.full((2,), at)}) for at, name in [(1.0, "a"), (3.0, "b")]
    }
    recipe = make_recipe(checkpoints, [make_block("linear", ["w"], HALVES)])
    (file,) = streamed(recipe, checkpoints, tmp_path / "a")
    assert load_file(file)["w"].tolist() == [2, 2]


class TestResident:
    """Only what changed is merged again."""

    @pytest.fixture
    def merger(self):
        states = {
            name: {f"{part}.w": torch.full((3,), at) for part in ("x", "y")} for name, at in [("a", 1.0), ("b", 3.0)]
        }
        return ResidentMerger({"x.w": torch.zeros(3), "y.w": torch.zeros(3)}, states, "cpu")

    @staticmethod
    def recipe(x, y, **fields):
        blocks = [
            block.model_copy(update={"name": part, "parameters": [f"{part}.w"]})
            for part, block in zip("xy", (x, y), strict=True)
        ]
        inputs = {name: InputDigest(name=name, digest="0") for name in ("base", "a", "b")}
        return Recipe(base=inputs.pop("base"), sources=list(inputs.values()), blocks=blocks, **fields)

    def test_what_is_merged_again(self, merger):
        live = {"x.w": torch.nn.Parameter(torch.zeros(3)), "y.w": torch.zeros(3)}
        even = make_block("linear", [], HALVES)
        first = make_block("linear", [], {"a": 1.0, "b": 0.0})
        assert merger.apply(self.recipe(even, even), live) == ["x", "y"]
        assert merger.apply(self.recipe(even, even, seed=9), live) == []
        assert merger.apply(self.recipe(even, first), live) == ["y"]
        assert live["y.w"].tolist() == [1, 1, 1]
        assert live["x.w"].requires_grad
        # The same merge in another form.
        assert merger.apply(self.recipe(make_block("task_arithmetic", [], HALVES), first), live) == []
        dropped = make_block("dare_linear", [], HALVES)
        assert merger.apply(self.recipe(dropped, first), live) == ["x"]
        assert merger.apply(self.recipe(dropped, first, seed=1), live) == ["x"]
        assert merger.apply(self.recipe(dropped, first, seed=1, dtype="float16"), live) == ["x", "y"]

    def test_another_model_gets_everything(self, merger):
        recipe = self.recipe(*[make_block("linear", [], HALVES)] * 2)
        live = {"x.w": torch.zeros(3), "y.w": torch.zeros(3)}
        merger.apply(recipe, live)
        # state_dict() gives new objects for the same memory.
        assert merger.apply(recipe, {name: tensor.detach() for name, tensor in live.items()}) == []
        live["x.w"] = torch.zeros(3)
        assert merger.apply(recipe, live) == ["x"]
        assert live["x.w"].tolist() == [2, 2, 2]
        live["y.w"].zero_()
        assert merger.apply(recipe, live) == []
        merger.forget()
        assert merger.apply(recipe, live) == ["x", "y"]

    def test_a_failure_is_made_up_for(self, merger):
        live = {"x.w": torch.zeros(3), "y.w": torch.zeros(3)}
        even = make_block("linear", [], HALVES)
        huge = make_block("task_arithmetic", [], {"a": 1e6, "b": 0.0})
        merger.apply(self.recipe(even, even, dtype="float16"), live)
        with pytest.raises(MergeError, match=r"'y\.w'.*float16"):
            merger.apply(self.recipe(make_block("linear", [], {"a": 1.0, "b": 0.0}), huge, dtype="float16"), live)
        assert merger.apply(self.recipe(even, even, dtype="float16"), live) == ["x", "y"]
        assert live["x.w"].tolist() == live["y.w"].tolist() == [2, 2, 2]

    def test_a_wider_live_model_holds_the_rounded_values(self, merger):
        live = {"x.w": torch.zeros(3), "y.w": torch.zeros(3)}
        third = make_block("linear", [], {"a": 1 / 3, "b": 2 / 3})
        merger.apply(self.recipe(third, third, dtype="bfloat16"), live)
        assert live["x.w"][0].item() == torch.tensor(7 / 3).bfloat16().item() != pytest.approx(7 / 3, abs=1e-4)

    def test_refusals(self, merger):
        recipe = self.recipe(*[make_block("linear", [], HALVES)] * 2)
        with pytest.raises(MergeError, match=r"the live model has no tensor 'y\.w'"):
            merger.apply(recipe, {"x.w": torch.zeros(3)})
        with pytest.raises(MergeError, match=r"'y.w' has shape \[4\], the merged one \[3\]"):
            merger.apply(recipe, {"x.w": torch.zeros(3), "y.w": torch.zeros(4)})
        with pytest.raises(MergeError, match="source 'b', tensor 'w': 1 NaN"):
            ResidentMerger(None, {"a": {"w": torch.ones(1)}, "b": {"w": torch.tensor([float("nan")])}}, "cpu")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """Merging 2 x 64 MB in tensors of 1 MB holds a few tensors at a time."""

    def anonymous_kib():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    names = [f"layer{index}" for index in range(64)]
    checkpoints = {
        name: save(tmp_path, name, {each: torch.full((1 << 18,), float(at)) for each in names})
        for at, name in enumerate("ab")
    }
    recipe = make_recipe(checkpoints, [make_block("linear", names, HALVES)])
    seen = []
    streamed(recipe, checkpoints, tmp_path / "out", progress=lambda *_: seen.append(anonymous_kib()))
    assert max(seen) - seen[0] < 24_000, "all merged weights are 65536 KiB"


def test_the_bytes_of_a_recipe_are_pinned(tmp_path):
    """A change of these digests is a change of what published recipes rebuild: raise the recipe's version."""
    checkpoints = {}
    for at, name in enumerate(["base", "a", "b"]):
        values = torch.arange(1000, dtype=torch.float32)
        checkpoints[name] = save(tmp_path, name, {"w": ((values * (at + 3) * 7919) % 1009 - 504) / 512})
    digests = {}
    for technique in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        recipe = make_recipe(checkpoints, [make_block(technique, ["w"], {"a": 0.3, "b": 0.6})], seed=11)
        (file,) = streamed(recipe, checkpoints, tmp_path / technique)
        digests[technique] = hashlib.sha256(load_file(file)["w"].numpy().tobytes()).hexdigest()[:16]
    assert digests == {
        "linear": "f23b357a4523ce2c",
        "task_arithmetic": "46a7cfb9360a5e2c",
        "ties": "adefdf723047d16d",
        "dare_linear": "a7fa79800bfbe497",
        "dare_ties": "c41159fcc832121a",
    }

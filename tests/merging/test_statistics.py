"""The statistics file: written whole or not at all, known by its digest, and the same to both engines."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.checkpoint.digest import sha256_file
from automerge.checkpoint.info import info_of
from automerge.checkpoint.open import open_checkpoint
from automerge.errors import CheckpointError, MergeError, PluginError, StorageError
from automerge.merging.apply import merge_tensor
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.statistics import (
    Statistics,
    read_metadata,
    recalibrated_key,
    statistic_key,
    write_statistics,
)
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique, technique

SOURCES = ("a", "b")
WEIGHTS = {"a": 0.25, "b": 0.5}


def draw(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    state = {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "fc.bias": torch.randn(5, generator=generator),
        "fc.weight": torch.randn(5, 6, generator=generator),
        "norm.running_mean": torch.randn(5, generator=generator),
        "norm.running_var": torch.rand(5, generator=generator),
    }
    return {name: tensor.to(dtype) for name, tensor in state.items()} | {"norm.num_batches_tracked": torch.tensor(seed)}


def statistics_of(seed=7):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for source in SOURCES:
        for name, tensor in draw(0).items():
            if not name.startswith("norm."):
                found[statistic_key("fisher", source, name)] = torch.rand(tensor.shape, generator=generator)
        for name, inputs in (("conv.weight", 12), ("fc.weight", 6)):
            rows = torch.randn(20, inputs, generator=generator)
            found[statistic_key("gram", source, name)] = rows.T @ rows / 20
    found[recalibrated_key("norm.running_mean")] = torch.linspace(-1, 1, 5, dtype=torch.float64)
    found[recalibrated_key("norm.running_var")] = torch.linspace(0, 2, 5, dtype=torch.float64)
    return found


def written(path, tensors, **metadata):
    return write_statistics(path, {key: info_of(each) for key, each in tensors.items()}, tensors.items(), metadata)


@dataclass
class Case:
    folder: Path
    checkpoints: dict
    states: dict

    def recipe(self, name, **fields):
        parameters = [each for each in self.states["a"] if not each.startswith("norm.")]
        block = RecipeBlock(
            name="all",
            technique=name,
            weights=WEIGHTS,
            hyperparameters=load_technique(name).declaration.defaults(),
            parameters=parameters,
            buffers=[each for each in self.states["a"] if each not in parameters],
        )
        digests = [InputDigest(name=each, digest=self.checkpoints[each].digest()) for each in SOURCES]
        return Recipe(release="0.1.0", sources=digests, blocks=[block], **fields)

    def streamed(self, recipe, statistics):
        (file,) = merge_checkpoints(
            recipe, None, self.checkpoints, self.folder / "out", max_shard_bytes=1 << 40, statistics=statistics
        )
        return load_file(file)

    def resident(self, recipe, statistics, dtype=None):
        live = {
            name: torch.full_like(each, 9, dtype=dtype if each.is_floating_point() else None)
            for name, each in self.states["a"].items()
        }
        ResidentMerger(None, self.states, "cpu", statistics).apply(recipe, live)
        return live


@pytest.fixture
def case(tmp_path):
    states = {name: draw(at) for at, name in enumerate(SOURCES)}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    checkpoints = {name: open_checkpoint(tmp_path / f"{name}.safetensors") for name in SOURCES}
    return Case(tmp_path, checkpoints, states)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "statistics.safetensors"


def test_what_is_written_is_read(path):
    tensors = statistics_of()
    digest = written(path, tensors, made="here")
    assert digest == sha256_file(path)
    assert read_metadata(path)["made"] == "here"
    with Statistics.open(path, digest) as statistics:
        assert statistics.digest == digest
        assert all(torch.equal(statistics.read(key), tensor) for key, tensor in tensors.items())
        fisher = statistics.of("fc.bias", ["b", "a"], ("fisher", "gram"), like=torch.zeros(5, dtype=torch.float64))
    assert list(fisher) == ["fisher"]
    assert fisher["fisher"][0].dtype == torch.float64
    assert torch.equal(fisher["fisher"][0].float(), tensors["fisher/b/fc.bias"])
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_the_same_tensors_give_the_same_file(path):
    first = written(path, statistics_of(), made="here")
    assert written(path, dict(reversed(statistics_of().items())), made="here") == first


def test_what_recalibration_adds_does_not_change_what_was_gathered(path):
    tensors = statistics_of()
    whole = Statistics.of_tensors(tensors)
    gathered = Statistics.of_tensors({key: tensor for key, tensor in tensors.items() if "norm" not in key})
    assert whole.gathered() == sorted(gathered.infos)
    assert whole.gathered_digest() == gathered.gathered_digest()
    assert whole.gathered_digest() != Statistics.of_tensors(statistics_of(seed=8)).gathered_digest()


def test_a_failure_leaves_the_old_file(path):
    digest = written(path, statistics_of())

    def tensors():
        yield "fisher/a/w", torch.zeros(3)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_statistics(path, {"fisher/a/w": info_of(torch.zeros(3)), "x": info_of(torch.zeros(2))}, tensors())
    with pytest.raises(CheckpointError, match="were never written: x"):
        write_statistics(path, {"x": info_of(torch.zeros(2))}, [])
    assert sha256_file(path) == digest
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_a_file_is_one_sentence(path):
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"):
        written(path / "below", statistics_of())


def test_a_missing_or_different_file_is_one_sentence(path):
    with pytest.raises(
        MergeError, match=r"statistics\.safetensors: the recipe needs this statistics file, and it is not"
    ):
        Statistics.open(path)
    written(path, statistics_of())
    with pytest.raises(MergeError, match=r"is not the statistics file of the recipe \(sha256 .*, expected 0000"):
        Statistics.open(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        Statistics.open(path)
    assert read_metadata(path) == {}


@pytest.mark.parametrize("name", ["fisher", "regmean"])
@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_both_engines_give_the_same_bytes_from_the_same_file(case, path, name, dtype):
    digest = written(path, statistics_of())
    recipe = case.recipe(name, dtype=dtype, statistics=digest, recalibrated=["norm.running_mean", "norm.running_var"])
    with Statistics.open(path, digest) as lazy:
        streamed = case.streamed(recipe, lazy)
        resident = case.resident(recipe, lazy.resident("cpu"), dtype=torch.bfloat16 if dtype == "bfloat16" else None)
    for key, tensor in streamed.items():
        assert tensor.dtype == resident[key].dtype
        assert torch.equal(tensor, resident[key]), key
    # The recalibrated values, rounded to the output; and no average of the sources' anywhere near them.
    expected = statistics_of()[recalibrated_key("norm.running_mean")]
    assert torch.equal(streamed["norm.running_mean"], expected.to(streamed["norm.running_mean"].dtype))
    assert (streamed["norm.running_var"] >= 0).all()
    # The technique has used what the file says: an equal file of other numbers gives other weights.
    with Statistics.open(path) as lazy:
        weights = case.streamed(recipe, lazy)["fc.weight"]
    other = written(path, statistics_of(seed=8))
    with Statistics.open(path) as lazy:
        changed = case.streamed(recipe.model_copy(update={"statistics": other}), lazy)["fc.weight"]
    assert not torch.equal(weights, changed)


def test_engines_refuse_what_is_not_the_recipe_s(case, path):
    digest = written(path, statistics_of())
    recipe = case.recipe("fisher", statistics=digest)
    for merge in (case.streamed, case.resident):
        with pytest.raises(MergeError, match=r"needs the statistics file of sha256 .*, and none was passed"):
            merge(recipe, None)
        with pytest.raises(MergeError, match="and statistics is another one"):
            merge(recipe, Statistics.of_tensors(statistics_of()))
    nameless = case.recipe("fisher")
    for statistics in (None, Statistics.of_tensors(statistics_of())):
        with pytest.raises(MergeError, match="needs statistics, and the recipe names no file of them"):
            case.streamed(nameless, statistics)
    with pytest.raises(MergeError, match=r"block 'all': its technique 'fisher' .* need statistics, and there are none"):
        case.resident(nameless, None)
    assert not (case.folder / "out").exists()


def test_a_search_merges_with_statistics_that_are_in_no_file(case):
    tensors = statistics_of()
    merged = case.resident(case.recipe("fisher"), Statistics.of_tensors(tensors))
    for name in ("fc.weight", "fc.bias"):
        factors = [WEIGHTS[source] * tensors[f"fisher/{source}/{name}"] for source in SOURCES]
        sources = [case.states[source][name] for source in SOURCES]
        expected = sum(f * t for f, t in zip(factors, sources, strict=True)) / sum(factors)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fisher/b/fc.bias": None}, r"has nothing under 'fisher/b/fc\.bias', expected \[5\]"),
        ({"fisher/a/fc.bias": torch.zeros(4)}, r"has \[4\] under 'fisher/a/fc\.bias', expected \[5\]"),
        ({"recalibrated/norm.running_var": torch.zeros(4)}, r"'norm\.running_var' has the shape \[4\], expected \[5\]"),
        ({"recalibrated/norm.running_var": None}, r"there is no 'recalibrated/norm\.running_var'"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(case, changes, problem):
    tensors = {key: tensor for key, tensor in {**statistics_of(), **changes}.items() if tensor is not None}
    recipe = case.recipe("fisher", recalibrated=["norm.running_var"])
    with pytest.raises(MergeError, match=problem):
        case.resident(recipe, Statistics.of_tensors(tensors))


@pytest.mark.parametrize(("name", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
@pytest.mark.parametrize("gone", [("a", "b"), ("b",)], ids=str)
def test_a_file_without_statistics_of_a_source_is_not_silently_linear(case, name, kind, gone):
    left_out = tuple(f"{kind}/{source}/" for source in gone)
    tensors = {key: tensor for key, tensor in statistics_of().items() if not key.startswith(left_out)}
    with pytest.raises(
        MergeError, match=rf"statistics: has no '{kind}' statistics of source '{gone[0]}'; search again in a new folder"
    ):
        case.resident(case.recipe(name), Statistics.of_tensors(tensors))


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_a_tensor_without_statistics_is_averaged(case, name):
    tensors = {key: tensor for key, tensor in statistics_of().items() if not key.endswith("/fc.weight")}
    merged, plain = (
        case.resident(case.recipe(each), Statistics.of_tensors(tensors))["fc.weight"] for each in (name, "linear")
    )
    assert torch.equal(merged, plain)


def test_gram_matrices_that_do_not_fit_are_refused(case):
    tensors = {**statistics_of(), "gram/a/conv.weight": torch.eye(3)}
    with pytest.raises(MergeError, match=r"has \[3, 3\] under 'gram/a/conv\.weight', expected \[12, 12\]"):
        case.resident(case.recipe("regmean"), Statistics.of_tensors(tensors))


def test_recalibrated_tensors_must_be_buffers(case):
    recipe = case.recipe("linear", statistics="0" * 64, recalibrated=["fc.weight"])
    with pytest.raises(MergeError, match=r"1 recalibrated tensors that are no buffer of a block: fc\.weight"):
        case.resident(recipe, Statistics.of_tensors({}))


def test_a_value_that_does_not_fit_the_output_is_refused(case):
    block = case.recipe("linear").blocks[0]
    sources = {name: case.states[name]["norm.running_var"] for name in SOURCES}
    statistics = Statistics.of_tensors({recalibrated_key("norm.running_var"): torch.full((5,), 1e6).double()})
    with pytest.raises(MergeError, match="do not fit float16"):
        merge_tensor(
            "norm.running_var", block, None, sources, dtype="float16", statistics=statistics, recalibrated=True
        )


def test_a_recipe_speaks_of_statistics_only_where_it_needs_them(case, tmp_path):
    plain = case.recipe("linear")
    text = plain.write(tmp_path / "plain.json").read_text()
    assert "statistics" not in text
    assert "recalibrated" not in text
    assert Recipe.read(tmp_path / "plain.json") == plain
    # A digest that nothing needs is no part of the merge; one that is needed is.
    assert case.recipe("linear", statistics="0" * 64).digest() == plain.digest()
    assert case.recipe("fisher", statistics="0" * 64).digest() != case.recipe("fisher", statistics="1" * 64).digest()
    recalibrated = case.recipe("linear", statistics="0" * 64, recalibrated=["norm.running_var"])
    assert recalibrated.needs_statistics
    assert recalibrated.digest() != plain.digest()
    assert Recipe.read(recalibrated.write(tmp_path / "more.json")) == recalibrated


def test_a_block_whose_canonical_form_is_linear_needs_none(case):
    recipe = case.recipe("fisher")
    alone = recipe.blocks[0].model_copy(update={"weights": {"a": 1.0, "b": 0.0}})
    assert recipe.needs_statistics
    assert not recipe.model_copy(update={"blocks": [alone]}).needs_statistics
    buffers_only = recipe.blocks[0].model_copy(update={"parameters": []})
    assert not recipe.model_copy(update={"blocks": [buffers_only]}).needs_statistics


def test_a_technique_cannot_declare_unknown_statistics():
    with pytest.raises(
        PluginError, match="technique 'mine' declares the statistics 'hessian'; declare some of fisher, gram"
    ):
        technique(name="mine", source="nowhere", statistics=("hessian",))(lambda inputs, weights: inputs.sources[0])

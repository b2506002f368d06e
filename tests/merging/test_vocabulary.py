"""Embeddings of different size: what is cut, what is filled, and that both engines write the same."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from automerge.checkpoint.checkpoint import Checkpoint
from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.open import open_checkpoint
from automerge.errors import MergeError
from automerge.merging.plan import plan_merge
from automerge.merging.recipe import BASE, InputDigest, Recipe, RecipeBlock, Vocabulary
from automerge.merging.resident import ResidentMerger
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique
from automerge.merging.vocabulary import fit_checkpoints, fit_rows, fit_tensor, fitted_infos, origin_of, spellings

ELEMENTWISE = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number per row."""
    return torch.tensor(values, dtype=dtype)[:, None]


class TestRows:
    """One tensor at a time: [rows, 1]."""

    def test_more_rows_are_cut_off(self) -> None:
        own = column(1, 2, 3)
        assert fit_rows(own, 2, [own], None).tolist() == [[1], [2]]
        assert fit_rows(own, 3, [own], None) is not own and torch.equal(fit_rows(own, 3, [own], None), own)

    def test_a_row_that_a_source_lacks_is_the_mean_of_those_that_have_it(self) -> None:
        short, middle, long = column(1), column(2, 4), column(3, 6, 9)
        sources = [short, middle, long]
        base = column(0, 0, 0)
        assert fit_rows(short, 3, sources, base).tolist() == [[1], [5], [9]]
        assert fit_rows(middle, 3, sources, base).tolist() == [[2], [4], [9]]

    def test_so_it_is_in_a_base_that_lacks_it(self) -> None:
        sources = [column(1), column(2, 4), column(3, 6, 9)]
        assert fit_rows(column(0), 3, sources, column(0), is_base=True).tolist() == [[0], [5], [9]]

    def test_a_row_that_no_source_has_is_the_bases(self) -> None:
        sources = [column(1), column(2, 4)]
        base = column(7, 8, 9)
        assert fit_rows(sources[0], 3, sources, base).tolist() == [[1], [4], [9]]
        with pytest.raises(MergeError, match="no input has the 4 rows"):
            fit_rows(sources[0], 4, sources, base)

    def test_dtypes(self) -> None:
        """A source stays what it is; the base's filled rows are not rounded."""
        third = [column(0, 1, dtype=torch.bfloat16), column(0, 2, dtype=torch.bfloat16), column(0, 1.0078125)]
        filled = fit_rows(column(0, dtype=torch.bfloat16), 2, third, None)
        assert filled.dtype == torch.bfloat16
        base = fit_rows(column(0, dtype=torch.bfloat16), 2, third, None, is_base=True)
        assert base.dtype == torch.float32
        assert base[1].item() == pytest.approx((1 + 2 + 1.0078125) / 3, abs=1e-7)
        wide = [*third, column(0, 0, dtype=torch.float64)]
        assert fit_rows(column(0), 2, wide, None, is_base=True).dtype == torch.float64


def make(
    folder: Path, rows: dict[str, int], *, tied: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Checkpoint]:
    """Checkpoints with an embedding of so many rows, an output layer, its bias and a matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = {}
    for seed, (name, count) in enumerate(rows.items()):
        generator = torch.Generator().manual_seed(seed)
        state = {
            "emb.weight": torch.randn(count, 4, generator=generator),
            "body.weight": torch.randn(4, 4, generator=generator),
        }
        if not tied:
            state |= {"out.weight": torch.randn(count, 4, generator=generator), "out.bias": torch.randn(count)}
        elif seed % 2:
            state["out.weight"] = state.pop("emb.weight")
        save_file({key: value.to(dtype) for key, value in state.items()}, folder / f"{name}.safetensors")
        opened[name] = open_checkpoint(folder / f"{name}.safetensors")
    return opened


def recipe_of(
    checkpoints: dict[str, Checkpoint], technique: str, weights: list[float], rows: int, *, tied: bool = False
) -> Recipe:
    digests = {name: InputDigest(name=name, digest=each.digest()) for name, each in checkpoints.items()}
    base = digests.pop(BASE, None)
    vocabulary = ["emb.weight"] if tied else ["emb.weight", "out.bias", "out.weight"]
    return Recipe(
        base=base,
        sources=list(digests.values()),
        blocks=[
            RecipeBlock(
                name="all",
                technique=technique,
                weights=dict(zip(digests, weights, strict=True)),
                hyperparameters=load_technique(technique).declaration.defaults(),
                parameters=[*vocabulary, "body.weight"],
            )
        ],
        tied={"out.weight": "emb.weight"} if tied else {},
        vocabulary=Vocabulary(rule="largest", rows=rows, tensors=vocabulary),
    )


def streamed(recipe: Recipe, checkpoints: dict[str, Checkpoint], folder: Path) -> dict[str, Tensor]:
    sources = {name: each for name, each in checkpoints.items() if name != BASE}
    base, fitted = fit_checkpoints(recipe, checkpoints.get(BASE), sources)
    files = merge_checkpoints(recipe, base, fitted, folder, max_shard_bytes=1 << 40)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def resident(recipe: Recipe, checkpoints: dict[str, Checkpoint], like: dict[str, Tensor]) -> dict[str, Tensor]:
    assert recipe.vocabulary is not None
    states = {owner: {name: each.read(name) for name in each.tensors} for owner, each in checkpoints.items()}
    groups = spellings(recipe.vocabulary, recipe.tied)
    infos = {owner: each.tensors for owner, each in checkpoints.items()}
    for owner, changed in fitted_infos(recipe.vocabulary, groups, infos).items():
        fits = {
            name: fit_tensor(recipe.vocabulary, groups, infos, lambda o, n: checkpoints[o].read(n), owner, name)
            for name in changed
        }
        assert {name: TensorInfo(str(t.dtype)[6:], tuple(t.shape)) for name, t in fits.items()} == changed
        states[owner] |= fits
    live = {name: torch.full_like(tensor, 9) for name, tensor in like.items()}
    ResidentMerger(states.pop(BASE, None), states, "cpu").apply(recipe, live)
    return live


@given(
    st.sampled_from([*ELEMENTWISE, "slerp", "tsv_merge"]),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_both_engines_write_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    technique: str,
    lengths: list[int],
    cut: int,
    tied: bool,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("vocabulary")
    checkpoints = make(folder, dict(zip((BASE, "a", "b"), lengths, strict=True)), tied=tied, dtype=dtype)
    rows = max(1, max(lengths) - cut)
    recipe = recipe_of(checkpoints, technique, [0.3, 0.7], rows, tied=tied)
    merged = streamed(recipe, checkpoints, folder / "out")
    assert {name: len(tensor) for name, tensor in merged.items() if name != "body.weight"} == dict.fromkeys(
        recipe.vocabulary.tensors if recipe.vocabulary else [], rows
    )
    live = resident(recipe, checkpoints, merged)
    for name, tensor in merged.items():
        assert torch.equal(tensor, live[name]), name


@pytest.mark.parametrize("technique", ELEMENTWISE)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.6]])
def test_a_token_of_one_source_alone_keeps_its_row(tmp_path: Path, technique: str, weights: list[float]) -> None:
    """Under all weights, of any sum: it is neither halved nor mixed with the base."""
    checkpoints = make(tmp_path, {BASE: 5, "a": 5, "b": 7})
    merged = streamed(recipe_of(checkpoints, technique, weights, 7), checkpoints, tmp_path / "out")
    for name in ("emb.weight", "out.weight", "out.bias"):
        torch.testing.assert_close(merged[name][5:], checkpoints["b"].read(name)[5:])


@pytest.mark.parametrize("technique", ELEMENTWISE)
def test_a_row_of_the_base_alone_stays(tmp_path: Path, technique: str) -> None:
    checkpoints = make(tmp_path, {BASE: 7, "a": 5, "b": 5})
    merged = streamed(recipe_of(checkpoints, technique, [0.4, 0.6], 7), checkpoints, tmp_path / "out")
    torch.testing.assert_close(merged["emb.weight"][5:], checkpoints[BASE].read("emb.weight")[5:])


def test_rows_that_all_have_are_merged_as_ever(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {BASE: 4, "a": 4, "b": 6})
    merged = streamed(recipe_of(checkpoints, "task_arithmetic", [0.5, 0.25], 6), checkpoints, tmp_path / "out")
    base, a, b = (checkpoints[name].read("emb.weight") for name in (BASE, "a", "b"))
    torch.testing.assert_close(merged["emb.weight"][:4], base + 0.5 * (a - base) + 0.25 * (b[:4] - base))


def test_the_weight_of_a_source_that_lacks_a_row_goes_to_the_others(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {BASE: 6, "a": 4, "b": 6})
    for technique in ("linear", "task_arithmetic"):
        merged = streamed(recipe_of(checkpoints, technique, [0.5, 0.5], 6), checkpoints, tmp_path / technique)
        torch.testing.assert_close(merged["emb.weight"][4:], checkpoints["b"].read("emb.weight")[4:])


def test_without_a_vocabulary_the_inputs_are_passed_on(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {BASE: 4, "a": 4, "b": 4})
    recipe = recipe_of(checkpoints, "linear", [1, 1], 4)
    sources = {"a": checkpoints["a"], "b": checkpoints["b"]}
    base, same = fit_checkpoints(recipe, checkpoints[BASE], sources)
    assert base is checkpoints[BASE] and same["a"] is sources["a"], "their rows are the recipe's already"
    base, same = fit_checkpoints(recipe.model_copy(update={"vocabulary": None}), checkpoints[BASE], sources)
    assert base is checkpoints[BASE] and same == sources


def test_a_recipe_of_other_sources_is_left_to_the_plan(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {"a": 4, "b": 6, "c": 6})
    recipe = recipe_of({name: checkpoints[name] for name in "ab"}, "linear", [1, 1], 6)
    for names in ("ac", "a", "abc"):
        sources = {name: checkpoints[name] for name in names}
        base, same = fit_checkpoints(recipe, None, sources)
        assert base is None and same == sources
        with pytest.raises(MergeError, match=f"the recipe's sources are a, b, got {', '.join(names)}; pass the"):
            streamed(recipe, sources, tmp_path / "out")


def test_so_is_a_base_that_is_missing(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {BASE: 8, "a": 4, "b": 6})
    recipe = recipe_of(checkpoints, "linear", [1, 1], 8)
    with pytest.raises(MergeError, match="the recipe has a base and no base was passed"):
        streamed(recipe, {name: checkpoints[name] for name in "ab"}, tmp_path / "out")


def test_more_rows_than_any_input_has_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {BASE: 4, "a": 4, "b": 6})
    recipe = recipe_of(checkpoints, "linear", [1, 1], 7)
    with pytest.raises(MergeError, match=r"no input has the 7 rows of the recipe's vocabulary in 'emb\.weight'; pass"):
        streamed(recipe, checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whose_configuration_fits(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {"a": 4, "b": 6})
    origins = {rows: origin_of(recipe_of(checkpoints, "linear", [1, 1], rows), None, checkpoints) for rows in (6, 4, 3)}
    assert origins == {6: "b", 4: "a", 3: "a"}, "the first source where no input has that many rows"


def test_a_cut_view_needs_no_copy_and_keeps_the_digest(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {"a": 4, "b": 6})
    recipe = recipe_of(checkpoints, "linear", [1, 1], 4)
    _, views = fit_checkpoints(recipe, None, checkpoints)
    view, inner = views["b"], checkpoints["b"]
    assert view.digest() == inner.digest() and view.files == inner.files
    extent, whole = view.extent("emb.weight"), inner.extent("emb.weight")
    assert extent is not None and whole is not None
    assert (extent.begin, extent.nbytes) == (whole.begin, 4 * 4 * 4) and whole.nbytes == 6 * 4 * 4
    assert view.extent("body.weight") == inner.extent("body.weight")
    _, filled = fit_checkpoints(recipe_of(checkpoints, "linear", [1, 1], 6), None, checkpoints)
    assert filled["a"].extent("emb.weight") is None
    assert torch.equal(view.read("emb.weight"), inner.read("emb.weight")[:4])


class TestRecipe:
    """What is written down."""

    def test_a_recipe_without_one_is_written_as_ever(self, tmp_path: Path) -> None:
        checkpoints = make(tmp_path, {"a": 4, "b": 6})
        recipe = recipe_of(checkpoints, "linear", [1, 1], 6)
        plain = recipe.model_copy(update={"vocabulary": None})
        assert "vocabulary" not in plain.model_dump_json() and "vocabulary" not in plain.model_dump()
        assert plain.digest() != recipe.digest()
        path = recipe.write(tmp_path / "recipe.json")
        assert Recipe.read(path) == recipe and '"rule": "largest"' in path.read_text()

    def test_the_same_rows_by_another_rule_are_the_same_merge(self, tmp_path: Path) -> None:
        recipe = recipe_of(make(tmp_path, {"a": 4, "b": 6}), "linear", [1, 1], 6)
        assert recipe.vocabulary is not None
        other = recipe.vocabulary.model_copy(update={"rule": "base"})
        assert recipe.model_copy(update={"vocabulary": other}).digest() == recipe.digest()
        other = recipe.vocabulary.model_copy(update={"rows": 5})
        assert recipe.model_copy(update={"vocabulary": other}).digest() != recipe.digest()


def test_refusals(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, {"a": 4, "b": 6})
    infos = {name: each.tensors for name, each in checkpoints.items()}
    recipe = recipe_of(checkpoints, "linear", [1, 1], 6)
    with pytest.raises(MergeError, match=r"'emb\.weight' does not have the 6 rows .* in all inputs; bring the inputs"):
        plan_merge(recipe, None, infos)
    silent = recipe.model_copy(update={"vocabulary": None})
    with pytest.raises(MergeError, match=r"'emb\.weight' has the shapes \[4, 4\].*merge\.vocabulary how many rows"):
        plan_merge(silent, None, infos)
    assert recipe.vocabulary is not None
    groups = spellings(recipe.vocabulary, {})
    with pytest.raises(MergeError, match=r"source 'a' lacks 'emb\.weight', a tensor of the vocabulary"):
        fitted_infos(recipe.vocabulary, groups, {"a": {}, "b": infos["b"]})
    integers = dict.fromkeys(groups, TensorInfo("int8", (4, 4)))
    with pytest.raises(MergeError, match=r"is int8 \[4, 4\], so it has no rows of floating-point numbers"):
        fitted_infos(recipe.vocabulary, groups, {"a": integers, "b": infos["b"]})
    unknown = recipe.vocabulary.model_copy(update={"tensors": ["x"]})
    with pytest.raises(MergeError, match="1 tensors of the vocabulary that are in no block: x"):
        plan_merge(recipe.model_copy(update={"vocabulary": unknown}), None, infos)

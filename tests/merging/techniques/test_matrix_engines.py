"""Techniques with matrix products, in both engines and on other numbers of threads: within the stated tolerance."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.merging.apply import merge_tensor
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique

TOLERANCE = 1e-5


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"bias": (17,), "embedding": (300, 8), "kernel": (12, 4, 3, 3), "scale": (), "square": (40, 40)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_block(technique):
    return RecipeBlock(
        name="trunk",
        technique=technique,
        weights={"one": 0.75, "other": 0.5},
        hyperparameters=load_technique(technique).declaration.defaults() | {"lambda": 1.5},
        parameters=sorted(state(0)),
    )


def assert_near(merged, expected):
    assert (merged - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("technique", ["tsv_merge", "iso_c"])
def test_streamed_and_resident_agree(technique, tmp_path):
    states = {name: state(seed) for seed, name in enumerate(("base", "one", "other"))}
    for name, tensors in states.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    opened = {name: open_checkpoint(tmp_path / f"{name}.safetensors") for name in states}
    digests = {name: InputDigest(name=name, digest=each.digest()) for name, each in opened.items()}
    base = digests.pop("base")
    recipe = Recipe(base=base, sources=list(digests.values()), blocks=[make_block(technique)])

    live = {name: torch.zeros_like(tensor) for name, tensor in states["base"].items()}
    sources = {name: states[name] for name in digests}
    ResidentMerger(states["base"], sources, "cpu").apply(recipe, live)
    merge_checkpoints(
        recipe, opened["base"], {name: opened[name] for name in digests}, tmp_path / "merged", max_shard_bytes=1 << 40
    )
    (written,) = sorted((tmp_path / "merged").glob("*.safetensors"))
    streamed = load_file(written)
    assert sorted(streamed) == sorted(live)
    for name, tensor in live.items():
        assert_near(streamed[name], tensor)


@pytest.mark.parametrize("technique", ["tsv_merge", "iso_c"])
def test_the_number_of_threads_changes_the_last_digits_at_most(technique):
    base, one, other = state(0), state(1), state(2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            sources = {"one": one["square"], "other": other["square"]}
            results.append(merge_tensor("square", make_block(technique), base["square"], sources))
    finally:
        torch.set_num_threads(threads)
    assert_near(results[1], results[0])
    assert torch.equal(results[2], results[0])

"""merge: a recipe and the checkpoints are enough, and always give the same bytes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from automerge.errors import MergeError
from automerge.merging.recipe import Recipe
from automerge.spec import Spec
from automerge.stages.documents import Merged
from automerge.stages.merge import merge


def test_a_recipe_rebuilds_the_same_bytes_without_data(spec: Spec, finished: Path, tmp_path: Path) -> None:
    shutil.rmtree(finished / "fetch" / "data")
    again = merge(spec, finished / "fetch", finished / "search" / "recipe.json", tmp_path / "again")
    assert again == Merged.read(finished / "merge" / "merged.json")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (finished / "merge" / name).read_bytes()


def test_a_recipe_written_by_hand_is_followed(spec: Spec, finished: Path, tmp_path: Path) -> None:
    found = Recipe.read(finished / "search" / "recipe.json")
    blocks = [
        block.model_copy(
            update={"technique": "linear", "weights": {"left": 0.25, "right": 0.75}, "hyperparameters": {}}
        )
        for block in found.blocks
    ]
    path = found.model_copy(update={"blocks": blocks}).write(tmp_path / "mine.json")
    merged = merge(spec, finished / "fetch", path, tmp_path / "merge")
    left, right = (load_file(source.uri) for source in spec.sources)
    mine = load_file(tmp_path / "merge" / "model.safetensors")
    assert merged.parameter_count == sum(tensor.numel() for tensor in mine.values())
    for name in left:
        torch.testing.assert_close(mine[name], 0.25 * left[name] + 0.75 * right[name])


def test_a_recipe_of_other_checkpoints_is_refused(spec: Spec, finished: Path, tmp_path: Path) -> None:
    found = Recipe.read(finished / "search" / "recipe.json")
    first, second = found.sources
    swapped = [first.model_copy(update={"digest": second.digest}), second.model_copy(update={"digest": first.digest})]
    path = found.model_copy(update={"sources": swapped}).write(tmp_path / "swapped.json")
    with pytest.raises(MergeError, match=r"source 'left': the checkpoint .* is not the one of the recipe"):
        merge(spec, finished / "fetch", path, tmp_path / "merge")
    assert not [item for item in (tmp_path / "merge").rglob("*") if item.is_file() and item.suffix != ".prom"]

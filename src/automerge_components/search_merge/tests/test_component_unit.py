"""The component ``search_merge``: two stages in one pod, and a second attempt in the same folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from automerge.checkpoint.open import open_checkpoint
from automerge.merging.recipe import Recipe
from automerge.stages.documents import Merged
from automerge_components.search_merge import search_merge


def test_writes_trials_recipe_and_the_model_of_that_recipe(searched: dict[str, Any]) -> None:
    search, model = Path(searched["search"].path), Path(searched["model"].path)
    recipe, merged = Recipe.read(search / "recipe.json"), Merged.read(model / "merged.json")
    assert merged.recipe == recipe.digest()
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.digest() == merged.weights
    assert searched["search"].metadata["trials"] == 3 + 1, "one of them is refined"
    assert searched["search"].metadata["recipe"] == searched["model"].metadata["recipe"] == recipe.digest()
    assert json.loads(json.dumps(searched["model"].metadata)) == searched["model"].metadata


def test_a_second_attempt_pays_for_no_trial_again(spec: str, searched: dict[str, Any], artifact: Any) -> None:
    trials = Path(searched["search"].path) / "trials.jsonl"
    before = trials.read_bytes()
    inputs, segmentation, search = (searched[name] for name in ("inputs", "segmentation", "search"))
    again = artifact(dsl.Model)
    search_merge.python_func(spec=spec, inputs=inputs, segmentation=segmentation, search=search, model=again)
    assert trials.read_bytes() == before
    assert again.metadata == searched["model"].metadata


def test_folders_of_another_spec_are_refused(
    spec: str, segmented: dict[str, Any], artifact: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(spec)
    other["sources"][0]["uri"] += ".other"
    with pytest.raises(SystemExit):
        search_merge.python_func(spec=json.dumps(other), **segmented, search=artifact(), model=artifact(dsl.Model))
    assert "error: " in capsys.readouterr().err

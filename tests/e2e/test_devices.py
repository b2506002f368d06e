"""The digits network from checkpoints to a merged model, on every device: done again, it is the same in every bit."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.merging.recipe import Recipe
from automerge.merging.streamed import merge_checkpoints
from automerge.searching.search import SearchResult
from automerge.spec import Spec
from automerge.stages.fetch import fetch
from automerge.stages.inputs import Inputs
from automerge.stages.merge import merge
from automerge.stages.search import search
from automerge.stages.segment import segment
from digits.cct import build
from tests.devices import DEVICES

TASKS = {"low": range(5), "high": range(5, 10)}
EXAMPLES = Path(__file__).parents[2] / "examples"


def write(folder: Path) -> None:
    """A base and two networks near it, and data, all drawn: what a search does with them need not make sense."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = build().state_dict()
        states = {"base": base}
        for name, classes in TASKS.items():
            states[name] = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in base.items()}
            for split in ("validation", "test"):
                labels = torch.tensor(classes).repeat(20)
                content = {"inputs": torch.rand(len(labels), 1, 8, 8), "labels": labels}
                save_file(content, folder / f"{name}-{split}.safetensors")
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")


def spec_on(device: str, folder: Path) -> Spec:
    return Spec.model_validate(
        {
            "name": "digits",
            "model": {"kind": "factory", "target": "digits.cct:build", "python_path": [str(EXAMPLES)]},
            "base": {"uri": f"{folder}/base.safetensors"},
            "sources": [{"name": name, "uri": f"{folder}/{name}.safetensors"} for name in TASKS],
            "tasks": [
                {
                    "name": name,
                    "kind": "classification",
                    "specialist": name,
                    "validation": f"{folder}/{name}-validation.safetensors",
                    "test": f"{folder}/{name}-test.safetensors",
                }
                for name in TASKS
            ],
            "search": {
                "trials": 8,
                "initial": 6,
                "seed": 0,
                "objective": "loss_ratio",  # by a metric the drawn networks are no better than a guess
                "split": {"trials": 4, "blocks": 1},
                "refine": {"steps": 10, "starts": 1},
            },
            "compute": {"device": device, "threads": 1},
        }
    )


def trials_of(result: SearchResult) -> list[tuple[object, ...]]:
    return [(trial.objective, trial.losses, trial.status) for trial in result.trials]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_search_repeats_exactly_and_its_recipe_gives_the_same_bytes_everywhere(device: str, tmp_path: Path) -> None:
    write(tmp_path)
    spec = spec_on(device, tmp_path)
    inputs, blocks = tmp_path / "fetch", tmp_path / "segment"
    fetch(spec, inputs)
    segment(spec, inputs, blocks)
    once, again = (search(spec, inputs, blocks, tmp_path / name) for name in ("once", "again"))
    assert [trial.phase for trial in once.trials] == ["search"] * 8 + ["split-1"] * 4 + ["refine"]
    assert not [trial.error for trial in once.trials if trial.status == "failed"]
    assert trials_of(once) == trials_of(again)
    recipe = Recipe.read(tmp_path / "once" / "recipe.json")
    assert recipe == Recipe.read(tmp_path / "again" / "recipe.json")

    merge(spec, inputs, tmp_path / "once" / "recipe.json", tmp_path / "merged")
    opened = Inputs.open(spec, inputs)
    with ExitStack() as stack:
        base, sources = opened.open_checkpoints(stack)
        (by_kernels,) = merge_checkpoints(recipe, base, sources, tmp_path / "kernels", max_shard_bytes=1 << 40)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(by_kernels)
    assert sorted(written) == sorted(expected)
    for name, tensor in written.items():
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name

"""search: interrupted and resumed it ends as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.errors import SearchError, SpecError
from automerge.merging.recipe import Recipe
from automerge.searching.evaluator import mean_losses
from automerge.searching.search import SearchProgress
from automerge.spec import Spec
from automerge.stages.fetch import fetch
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded
from automerge.stages.merge import merge
from automerge.stages.search import search
from automerge.stages.segment import segment
from tests.stages.conftest import SEARCH
from tests.stages.variants import PAIR, build, spec_of, write


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


def interrupt_after(count: int) -> Callable[[SearchProgress], None]:
    def progress(event: SearchProgress) -> None:
        if event.done == count and not event.replayed:
            raise KeyboardInterrupt

    return progress


def test_interrupted_and_resumed_it_ends_with_the_same_recipe(spec: Spec, finished: Path, tmp_path: Path) -> None:
    inputs, blocks = finished / "fetch", finished / "segment"
    stopped = search(spec, inputs, blocks, tmp_path / "search", progress=interrupt_after(3))
    assert stopped.stopped == "interrupted"
    log = (tmp_path / "search" / "trials.jsonl").read_bytes()

    seen: list[SearchProgress] = []
    resumed = search(spec, inputs, blocks, tmp_path / "search", resume=True, progress=seen.append)
    assert resumed.stopped == "budget"
    assert [event.replayed for event in seen] == [True, True, True, False, False]
    assert (tmp_path / "search" / "trials.jsonl").read_bytes().startswith(log)
    assert Recipe.read(tmp_path / "search" / "recipe.json") == Recipe.read(finished / "search" / "recipe.json")


def test_resume_without_a_search_begins_it(spec: Spec, finished: Path, tmp_path: Path) -> None:
    result = search(spec, finished / "fetch", finished / "segment", tmp_path / "search", resume=True)
    assert len(result.trials) == 5
    assert Recipe.read(tmp_path / "search" / "recipe.json") == Recipe.read(finished / "search" / "recipe.json")


def test_a_search_is_not_begun_over_another(spec: Spec, finished: Path) -> None:
    before = (finished / "search" / "trials.jsonl").read_bytes()
    with pytest.raises(SearchError, match=r"a search was begun here; pass --resume"):
        search(spec, finished / "fetch", finished / "segment", finished / "search")
    other = changed(spec, search={**SEARCH, "seed": 1})
    with pytest.raises(SearchError, match=r"belongs to another search .*; start in another folder"):
        search(other, finished / "fetch", finished / "segment", finished / "search", resume=True)
    assert (finished / "search" / "trials.jsonl").read_bytes() == before


def test_more_trials_go_on_from_the_finished_ones(spec: Spec, finished: Path) -> None:
    longer = changed(spec, search={**SEARCH, "trials": 7})
    seen: list[SearchProgress] = []
    search(longer, finished / "fetch", finished / "segment", finished / "search", resume=True, progress=seen.append)
    assert [event.replayed for event in seen] == [True] * 5 + [False] * 2


def test_nothing_to_merge_is_refused(spec: Spec, finished: Path, tmp_path: Path) -> None:
    private = changed(spec, private=["*"])
    with pytest.raises(SearchError, match="every parameter is private, so there is nothing to merge; narrow 'private'"):
        search(private, finished / "fetch", finished / "segment", tmp_path / "search")
    assert not (tmp_path / "search" / "trials.jsonl").exists()


def test_blocks_of_another_granularity_are_refused(spec: Spec, finished: Path, tmp_path: Path) -> None:
    whole = changed(spec, segmentation={"granularity": "whole"})
    refusal = (
        r"segmentation\.json: was cut by granularity 'transition', and the spec says 'whole'; run `automerge segment`"
    )
    with pytest.raises(SpecError, match=refusal):
        search(whole, finished / "fetch", finished / "segment", tmp_path / "search")
    assert not (tmp_path / "search" / "trials.jsonl").exists()


def test_the_model_that_is_measured_is_the_one_that_is_written(tmp_path: Path) -> None:
    """Sources in bfloat16, the merged model and its heads in float32: the losses of both are equal to the last bit."""
    write(tmp_path, PAIR, own_heads=True)
    for name in ("base", *PAIR):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    losses = {"weights": "simplex", "objective": "loss_ratio", "epsilon": 0.3, "split": None, "refine": None}
    spec = spec_of(
        tmp_path, PAIR, own_heads=True, search={"trials": 8, "initial": 3, **losses}, merge={"dtype": "float32"}
    )
    folders = {stage: tmp_path / "run" / stage for stage in ("fetch", "segment", "search", "merge")}
    fetch(spec, folders["fetch"])
    segment(spec, folders["fetch"], folders["segment"])
    best = search(spec, folders["fetch"], folders["segment"], folders["search"]).best
    merge(spec, folders["fetch"], folders["search"] / "recipe.json", folders["merge"])

    shared = load_file(folders["merge"] / "model.safetensors")

    def written(reference: str) -> torch.nn.Module:
        head = load_file(folders["merge"] / "heads" / f"{reference}.safetensors")
        module = build(len(PAIR[reference]))
        module.load_state_dict({**shared, **head})
        return module.eval()

    inputs, device = Inputs.open(spec, folders["fetch"]), torch.device("cpu")
    loaded = Loaded.load(inputs, device)
    tasks = loaded.measured("validation")
    assert best.losses == mean_losses(tasks, written, inputs.architecture, device)
    # The specialists are measured as they are.
    for name in PAIR:
        specialist = build(len(PAIR[name])).bfloat16()
        specialist.load_state_dict(loaded.tensors[name])
        own = mean_losses({name: tasks[name]}, lambda _, model=specialist: model.eval(), inputs.architecture, device)
        assert best.cp[name] == pytest.approx((own[name] + 0.3) / (best.losses[name] + 0.3), rel=1e-12)

"""search: interrupted and resumed it ends as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest

from automerge.errors import SearchError
from automerge.merging.recipe import Recipe
from automerge.searching.search import SearchProgress
from automerge.spec import Spec
from automerge.stages.search import search


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
    other = changed(spec, search={"trials": 5, "initial": 2, "seed": 1})
    with pytest.raises(SearchError, match=r"belongs to another search .*; start in another folder"):
        search(other, finished / "fetch", finished / "segment", finished / "search", resume=True)
    assert (finished / "search" / "trials.jsonl").read_bytes() == before


def test_more_trials_go_on_from_the_finished_ones(spec: Spec, finished: Path) -> None:
    longer = changed(spec, search={"trials": 7, "initial": 2})
    seen: list[SearchProgress] = []
    search(longer, finished / "fetch", finished / "segment", finished / "search", resume=True, progress=seen.append)
    assert [event.replayed for event in seen] == [True] * 5 + [False] * 2


def test_nothing_to_merge_is_refused(spec: Spec, finished: Path, tmp_path: Path) -> None:
    private = changed(spec, private=["*"])
    with pytest.raises(SearchError, match="every parameter is private, so there is nothing to merge; narrow 'private'"):
        search(private, finished / "fetch", finished / "segment", tmp_path / "search")
    assert not (tmp_path / "search" / "trials.jsonl").exists()

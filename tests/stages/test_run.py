"""run: the stages in a row, into one folder a stage."""

from pathlib import Path

import pytest

from automerge.errors import SearchError
from automerge.searching.search import SearchProgress
from automerge.spec import Spec
from automerge.stages.run import run


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


def test_each_stage_has_a_folder(finished: Path) -> None:
    documents = sorted(
        path.relative_to(finished).as_posix()
        for path in finished.rglob("*")
        if path.is_file()
        and path.suffix != ".prom"
        and path.parts[len(finished.parts) + 1] not in ("checkpoints", "data")
    )
    assert documents == [
        "evaluate/evaluation.json",
        "evaluate/report.html",
        "fetch/manifest.json",
        "merge/merged.json",
        "merge/model.safetensors",
        "register/registration.json",
        "register/spec.json",
        "search/recipe.json",
        "search/trials.jsonl",
        "segment/segmentation.json",
    ]


def test_interrupted_it_keeps_the_search_and_goes_on(spec: Spec, finished: Path, tmp_path: Path) -> None:
    def stop(event: SearchProgress) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    first = run(spec, tmp_path / "mine", progress=stop)
    assert (first.search.stopped, first.evaluation, first.registration) == ("interrupted", None, None)
    assert not (tmp_path / "mine" / "merge").exists()
    second = run(spec, tmp_path / "mine", resume=True)
    assert second.registration is not None
    recipe = "search/recipe.json"
    assert (tmp_path / "mine" / recipe).read_bytes() == (finished / recipe).read_bytes()


def test_a_refused_model_is_evaluated_and_not_registered(spec: Spec, empty_database: Path, tmp_path: Path) -> None:
    result = run(changed(spec, gate={"min_worst_pr": 1000}), tmp_path / "mine")
    assert result.evaluation is not None
    assert result.evaluation.gate.verdict == "fail"
    assert result.registration is None
    assert not (tmp_path / "mine" / "register").exists()
    assert (tmp_path / "mlflow.db").read_bytes() == empty_database.read_bytes()


def test_a_second_run_changes_nothing(spec: Spec, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SearchError, match="a run was begun here; pass --resume to go on, or another folder"):
        run(spec, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before

"""evaluate: what the merged model kept, beside sources, base and single techniques; for every form of merge."""

import logging
import shutil
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.errors import SearchError, SpecError, TaskError
from automerge.merging.recipe import Recipe
from automerge.models import onnx
from automerge.preservation import Evaluation
from automerge.spec import Spec
from automerge.stages import evaluate as stage
from automerge.stages.documents import Merged
from automerge.stages.evaluate import evaluate
from automerge.stages.fetch import fetch
from automerge.stages.merge import merge
from automerge.stages.run import run
from tests.stages.variants import PAIR, TRIPLE, spec_of, write

STAGES = ("fetch", "segment", "search", "merge")


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


def measured(spec: Spec, folder: Path) -> Evaluation:
    return evaluate(spec, *[folder / stage for stage in STAGES], folder / "again")


def evaluated(spec: Spec, folder: Path) -> Evaluation:
    result = run(spec, folder).evaluation
    assert result is not None
    return result


def test_every_model_is_a_row(spec: Spec, finished: Path) -> None:
    evaluation = Evaluation.read(finished / "evaluate" / "evaluation.json")
    rows = [(row.name, row.role) for row in evaluation.models]
    techniques = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
    assert rows == [
        ("merged", "merged"),
        ("base", "base"),
        ("left", "source"),
        ("right", "source"),
        *((name, "technique") for name in techniques),
    ]
    by_name = {row.name: row for row in evaluation.models}
    for name in ("left", "right"):
        assert by_name[name].tasks[name].pr is not None
        assert by_name[name].tasks[name].pr.value == 100.0  # type: ignore[union-attr]
    # Equal weights and lambda 1: both are the plain average.
    assert by_name["linear"].tasks == by_name["task_arithmetic"].tasks
    # Measured again, nothing changes.
    assert measured(spec, finished) == evaluation
    assert (finished / "again" / "report.html").is_file()


def test_baselines_can_be_left_out(spec: Spec, finished: Path) -> None:
    evaluation = measured(changed(spec, evaluation={"resamples": 100, "onnx": False, "baselines": False}), finished)
    assert [row.role for row in evaluation.models] == ["merged", "base", "source", "source"]


def test_the_merged_model_is_exported_to_onnx(spec: Spec, finished: Path) -> None:
    evaluation = measured(changed(spec, evaluation={"resamples": 100, "baselines": False}), finished)
    assert evaluation.onnx.status == "exported"
    assert evaluation.onnx.files == {"merged": "model.onnx"}
    assert evaluation.onnx.written == ["model.onnx"]
    assert evaluation.onnx.max_abs_difference is not None
    assert evaluation.onnx.max_abs_difference < 1e-4
    assert (finished / "again" / "model.onnx").is_file()


def test_weights_beside_the_onnx_file_are_part_of_the_export(
    spec: Spec, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "export_onnx", partial(onnx.export_onnx, max_inline_bytes=100))
    job = changed(spec, evaluation={"resamples": 100, "baselines": False})
    evaluation = measured(job, finished)
    assert evaluation.onnx.files == {"merged": "model.onnx"}
    assert evaluation.onnx.written == ["model.onnx", "model.onnx.data"]
    (tmp_path / "copy").mkdir()
    for name in evaluation.onnx.written:
        shutil.copy(finished / "again" / name, tmp_path / "copy")
    session = onnxruntime.InferenceSession(tmp_path / "copy" / "model.onnx")
    assert session.run(["logits"], {"inputs": torch.zeros(3, 1, 6, 6).numpy()})[0].shape == (3, 4)

    monkeypatch.setattr(onnx, "TOLERANCES", {torch.float32: -1.0})  # no export is good enough
    failed = measured(job, finished).onnx
    assert (failed.status, failed.files, failed.written) == ("failed", {}, [])
    assert list((finished / "again").glob("*.onnx*")) == []


def write_fragile(folder: Path, *, pixel: float) -> Spec:
    """A pair of which ``left`` and the base fail on a test sample of ``right``, and DARE's rescaled sums overflow."""
    write(folder, PAIR)
    for name, limit, ballast in (("base", 20.0, 0.0), ("left", 20.0, 3e38), ("right", 100.0, 3e38)):
        path = folder / f"{name}.safetensors"
        save_file({**load_file(path), "limit": torch.full((4,), limit), "ballast": torch.full((32,), ballast)}, path)
    path = folder / "right-test.safetensors"
    data = load_file(path)
    data["inputs"][3, 0, 0, 0] = pixel
    save_file(data, path)
    spec = spec_of(
        folder,
        PAIR,
        search={"trials": 4, "initial": 2, "techniques": ["linear"], "weights": "simplex", "weight_range": [0.4, 0.6]},
    )
    return changed(spec, model={**spec.model.model_dump(), "target": "variants:build_fragile"})


def test_a_row_that_cannot_be_measured_is_left_out_with_a_warning(tmp_path: Path) -> None:
    evaluation = evaluated(write_fragile(tmp_path, pixel=30.0), tmp_path / "run")
    assert [row.name for row in evaluation.models] == ["merged", "right", "linear", "task_arithmetic", "ties"]
    not_finite = "is left out of the table: task 'right': the loss of sample 3 is not finite"
    overflow = "is left out of the table: tensor 'ballast': "
    found = [warning for warning in evaluation.warnings if "left out" in warning]
    assert found[:2] == [f"'base' {not_finite}", f"'left' {not_finite}"]
    assert [warning[: warning.index("ballast")] for warning in found[2:]] == [
        f"technique {name!r} {overflow[: overflow.index('ballast')]}" for name in ("dare_linear", "dare_ties")
    ]
    # The specialist has no row, and its own task is measured against it all the same.
    assert evaluation.merged.tasks["left"].pr is not None
    report = (tmp_path / "run" / "evaluate" / "report.html").read_text()
    assert report.count("is left out of the table") == len(found) == 4


def test_a_merged_model_or_reference_that_fails_ends_the_evaluation(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task 'right': the loss of sample 3 is not finite"):
        run(write_fragile(tmp_path / "merged", pixel=90.0), tmp_path / "merged" / "run")  # below the limit of `right`
    with pytest.raises(TaskError, match="task 'right': the loss of sample 3 is not finite"):
        run(write_fragile(tmp_path / "right", pixel=200.0), tmp_path / "right" / "run")
    assert not (tmp_path / "right" / "run" / "evaluate" / "evaluation.json").exists()


def test_single_techniques_are_those_of_the_paper_and_of_the_spec(spec: Spec, finished: Path) -> None:
    few = changed(spec, search={**spec.search.model_dump(), "techniques": ["breadcrumbs", "ties"]})
    rows = [row.name for row in measured(few, finished).models if row.role == "technique"]
    assert rows == ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"]


def test_single_techniques_are_measured_in_the_output_dtype(tmp_path: Path) -> None:
    write(tmp_path, PAIR, own_heads=True)
    for name in ("base", *PAIR):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    search = {"trials": 2, "initial": 2, "techniques": ["linear"], "weights": "simplex"}
    spec = spec_of(tmp_path, PAIR, own_heads=True, merge={"dtype": "float32"}, search=search)
    folder = tmp_path / "run"
    run(spec, folder)
    # The plain average as the merged model: it is the single technique `linear`.
    path = folder / "search" / "recipe.json"
    recipe = Recipe.read(path)
    average = [block.model_copy(update={"weights": dict.fromkeys(PAIR, 0.5)}) for block in recipe.blocks]
    recipe.model_copy(update={"blocks": average}).write(path)
    merge(spec, folder / "fetch", path, folder / "merge")
    rows = {row.name: row for row in measured(spec, folder).models}
    assert load_file(folder / "merge" / "model.safetensors")["conv.weight"].dtype == torch.float32
    assert rows["linear"].tasks == rows["merged"].tasks


def test_a_source_that_was_replaced_is_not_taken_for_the_specialist(spec: Spec, finished: Path, tmp_path: Path) -> None:
    path = Path(spec.sources[1].uri)
    copy = tmp_path / "right.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, copy)
    sources = [source.model_dump() for source in spec.sources]
    sources[1]["uri"] = str(copy)
    replaced = changed(spec, sources=sources)
    fetch(replaced, finished / "fetch")
    with pytest.raises(
        SpecError, match=r"recipe\.json: the recipe is of another 'right' than the one that was fetched"
    ):
        measured(replaced, finished)


def test_blocks_that_are_not_those_of_spec_and_recipe_are_refused(spec: Spec, finished: Path) -> None:
    with pytest.raises(
        SpecError, match=r"cut by granularity 'transition', and the spec says 'layer'; run `automerge seg"
    ):
        measured(changed(spec, segmentation={"granularity": "layer"}), finished)
    with pytest.raises(SpecError, match=r"does not merge the tensors of the segmentation \('head.bias' is in only one"):
        measured(changed(spec, private=["head.bias"]), finished)
    assert Recipe.read(finished / "search" / "recipe.json").private == {}


def test_shared_samples_are_warned_of(spec: Spec, finished: Path, tmp_path: Path) -> None:
    seen, test = (load_file(path) for path in (spec.tasks[1].validation, spec.tasks[0].test))
    mixed = {name: test[name].clone() for name in test}
    mixed["inputs"][:7] = seen["inputs"][:7]
    save_file(mixed, tmp_path / "mixed.safetensors")
    tasks = [task.model_dump() for task in spec.tasks]
    tasks[0]["test"] = str(tmp_path / "mixed.safetensors")
    leaky = changed(spec, tasks=tasks, evaluation={"resamples": 100, "onnx": False, "baselines": False})
    fetch(leaky, finished / "fetch")
    shared = "task 'left': 7 of 400 test samples are also among the validation data of task 'right', so its figures "
    assert [warning for warning in measured(leaky, finished).warnings if "samples are also" in warning] == [
        f"{shared}may be too good"
    ]
    assert Evaluation.read(finished / "evaluate" / "evaluation.json").warnings == []


def test_a_weak_specialist_is_warned_of(spec: Spec, tmp_path: Path) -> None:
    tasks = [{**task.model_dump(), "specialist": "left"} for task in spec.tasks]
    search = {
        **spec.search.model_dump(),
        "objective": "soft_metric",
    }  # the metric of a guess leaves the other undefined
    evaluation = evaluated(changed(spec, tasks=tasks, search=search), tmp_path)
    assert len(evaluation.warnings) == 1
    assert evaluation.warnings[0].startswith("task 'right': its specialist 'left' (top1 0.")
    assert "is not clearly better than source 'right'" in evaluation.warnings[0]


def test_weights_that_were_changed_or_merged_by_another_recipe_are_refused(spec: Spec, finished: Path) -> None:
    merged = Merged.read(finished / "merge" / "merged.json")
    merged.model_copy(update={"recipe": "0" * 64}).write(finished / "merge" / "merged.json")
    with pytest.raises(SpecError, match="merged by another recipe than the one of this search; run `automerge merge`"):
        measured(spec, finished)
    merged.write(finished / "merge" / "merged.json")
    weights = load_file(finished / "merge" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, finished / "merge" / "model.safetensors")
    with pytest.raises(SpecError, match="the merged weights were changed since they were written"):
        measured(spec, finished)
    assert not (finished / "again" / "evaluation.json").exists()


def test_a_damaged_log_is_found_before_anything_is_measured(
    spec: Spec, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = finished / "search" / "trials.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"event":"tell"', b'"event":"tall"', 1))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="automerge"), pytest.raises(SearchError, match=r"line \d+ is damaged"):
        measured(spec, finished)
    assert "measuring" not in caplog.text


def test_heads_with_different_numbers_of_classes(tmp_path: Path) -> None:
    write(tmp_path, PAIR, own_heads=True)
    spec = spec_of(tmp_path, PAIR, own_heads=True, evaluation={"resamples": 100})
    result = run(spec, tmp_path / "run")
    evaluation = result.evaluation
    assert evaluation is not None
    assert result.registration is not None
    shared = load_file(tmp_path / "run" / "merge" / "model.safetensors")
    assert set(shared) == {"conv.weight", "conv.bias"}
    for name, group in PAIR.items():
        # A head lies beside the merged weights as its source has it.
        head = load_file(tmp_path / "run" / "merge" / "heads" / f"{name}.safetensors")
        own = load_file(tmp_path / f"{name}.safetensors")
        assert len(head["head.bias"]) == len(group)
        assert all(bool((head[key] == own[key]).all()) for key in ("head.weight", "head.bias"))
        assert evaluation.merged.tasks[name].pr is not None
        assert evaluation.merged.tasks[name].pr.value > 80  # type: ignore[union-attr]
    assert evaluation.onnx.status == "exported", evaluation.onnx.reason
    assert evaluation.onnx.files == {name: f"model-{name}.onnx" for name in PAIR}


def test_a_guard_task_is_measured_against_the_base(tmp_path: Path) -> None:
    write(tmp_path, PAIR)
    evaluation = evaluated(spec_of(tmp_path, PAIR, guard=True), tmp_path / "run")
    guard = next(task for task in evaluation.tasks if task.name == "all")
    assert (guard.guard, guard.reference) == (True, "base")
    base = next(row for row in evaluation.models if row.role == "base")
    assert base.tasks["all"].pr is not None
    assert base.tasks["all"].pr.value == 100.0


def test_a_guard_task_under_private_heads_runs_under_the_bases(tmp_path: Path) -> None:
    write(tmp_path, PAIR, own_heads=True)
    evaluation = evaluated(spec_of(tmp_path, PAIR, own_heads=True, guard=True), tmp_path / "run")
    assert set(evaluation.merged.tasks) == {"left", "right", "all"}
    head = load_file(tmp_path / "run" / "merge" / "heads" / "base.safetensors")
    assert len(head["head.bias"]) == 5


@pytest.mark.parametrize("weights", ["simplex", "independent"])
def test_three_sources(tmp_path: Path, weights: str) -> None:
    write(tmp_path, TRIPLE)
    spec = spec_of(tmp_path, TRIPLE, search={"trials": 8, "initial": 3, "weights": weights})
    evaluation = evaluated(spec, tmp_path / "run")
    assert [task.name for task in evaluation.tasks] == list(TRIPLE)
    assert evaluation.merged.pd is not None
    assert evaluation.merged.pd_pairwise is not None
    assert evaluation.merged.pd >= evaluation.merged.pd_pairwise
    assert len([row for row in evaluation.models if row.role == "technique"]) == 5


def test_without_a_base_the_task_vectors_leave_with_one_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, PAIR)
    spec = changed(spec_of(tmp_path, PAIR), base=None)
    with caplog.at_level(logging.WARNING, logger="automerge"):
        evaluation = evaluated(spec, tmp_path / "run")
    notices = [record.getMessage() for record in caplog.records if "without a base" in record.getMessage()]
    assert notices == ["without a base these techniques are left out: task_arithmetic, ties, dare_linear, dare_ties"]
    assert [row.name for row in evaluation.models] == ["merged", "left", "right", "linear"]


def test_a_source_may_be_called_like_a_technique(tmp_path: Path) -> None:
    groups = {"linear": (0, 1), "other": (2, 3)}
    write(tmp_path, groups)
    spec = spec_of(tmp_path, groups, search={"trials": 3, "initial": 2, "techniques": ["linear"], "weights": "simplex"})
    rows = [(row.name, row.role) for row in evaluated(spec, tmp_path / "run").models]
    assert rows[2:5] == [("linear", "source"), ("other", "source"), ("linear (technique)", "technique")]

"""The whole flow as one pipeline: a tiny pair from a real S3 server to a version in MLflow on SQLite."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from automerge.checkpoint.open import open_checkpoint
from automerge.merging.recipe import Recipe
from automerge.preservation import Evaluation
from automerge.searching.store import read_trials
from automerge.segmenting.segmentation import Segmentation
from automerge.stages.documents import Manifest, Merged, Registration
from automerge.testing.s3_server import S3Server
from automerge_pipelines.local import run_local
from tests.e2e.tiny import TASKS, prepare, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def uploaded(s3_env: S3Server, tmp_path: Path) -> str:
    """The tiny pair in a bucket; returns its URI."""
    pair = prepare(tmp_path / "tiny")
    client = s3_env.client()
    for key in pair.keys:
        client.upload_file(str(pair.folder / key), s3_env.bucket, f"tiny/{key}")
    return f"s3://{s3_env.bucket}/tiny"


def test_from_s3_to_a_registered_version_once(uploaded: str, tmp_path: Path) -> None:
    (tmp_path / "python3").mkdir()  # the engine would put an interpreter's path there, and a value for the braces
    registry = f"sqlite:///{tmp_path / 'python3' / 'mlflow.db'}"
    spec = tiny_spec(uploaded, registry, gate={"min_worst_pr": 80.0, "max_pd": 20.0}, private=["{{$.none}}.*"])
    first = run_local(spec, tmp_path / "runs")

    manifest = Manifest.read(first.inputs / "manifest.json")
    assert manifest.spec == spec.digest()
    assert all(item.uri.startswith("s3://") for item in manifest.inputs)
    segmentation = Segmentation.read(first.segmentation / "segmentation.json")
    recipe = Recipe.read(first.search / "recipe.json")
    parents = {name: block.name for block in segmentation.blocks for name in block.parameters}
    assert {name for block in recipe.blocks for name in block.parameters} == set(parents)
    for block in recipe.blocks:  # a block of the segmentation, or a part of one that was refined
        assert {parents[name] for name in block.parameters} == {block.name.split("/")[0]}
    trials = read_trials(first.search / "trials.jsonl")
    assert {trial.phase for trial in trials} == {"search", "refine"}
    assert not [trial.error for trial in trials if trial.status == "failed"]
    assert {source.name: source.digest for source in recipe.sources} == {
        name: manifest.input(name).digest for name in TASKS
    }
    merged = Merged.read(first.model / "merged.json")
    assert merged.recipe == recipe.digest()
    with open_checkpoint(first.model) as checkpoint:
        assert checkpoint.digest() == merged.weights

    evaluation = Evaluation.read(first.evaluation / "evaluation.json")
    assert evaluation.recipe == recipe.digest()
    assert first.verdict == evaluation.gate.verdict == "pass"
    assert {task.name for task in evaluation.tasks} == set(TASKS)
    # Sources are measured on each other's tasks too, where each is far worse than the merged model.
    worst = {row.name: row.worst_pr for row in evaluation.models}
    assert worst["left"] is not None and worst["right"] is not None and evaluation.merged.worst_pr is not None
    assert evaluation.merged.worst_pr > 80.0 > 50.0 > max(worst["left"], worst["right"])
    assert evaluation.onnx.status == "exported"
    assert first.report.read_text().lstrip().lower().startswith("<!doctype html>")

    assert first.registration is not None
    version = Registration.read(first.registration / "registration.json").registered
    assert (version.model, version.version, version.created) == ("tiny", "1", True)
    client = MlflowClient(registry, registry)
    assert client.get_model_version("tiny", "1").tags["automerge.recipe"] == recipe.digest()

    second = run_local(spec, tmp_path / "runs")
    assert second.folder != first.folder
    assert second.registration is not None
    again = Registration.read(second.registration / "registration.json")
    assert again.recipe == recipe.digest()
    assert again.registered == version.model_copy(update={"created": False})
    assert len(client.search_model_versions("name = 'tiny'")) == 1


def test_a_gate_that_cannot_be_met_registers_nothing(uploaded: str, tmp_path: Path) -> None:
    registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
    spec = tiny_spec(
        uploaded,
        registry,
        gate={"min_worst_pr": 1000.0},
        search={"trials": 2, "initial": 1, "split": None, "refine": None},
        evaluation={"resamples": 100, "baselines": False, "onnx": False},
    )
    run = run_local(spec, tmp_path / "runs")
    assert run.verdict == "fail"
    assert run.registration is None
    gate = Evaluation.read(run.evaluation / "evaluation.json").gate
    assert gate.verdict == "fail"
    assert gate.reasons
    assert run.report.is_file()
    assert MlflowClient(registry, registry).search_registered_models() == []

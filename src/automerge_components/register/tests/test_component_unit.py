"""The component ``register``: one version for a recipe, none for a refused model."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from automerge.preservation import Evaluation
from automerge.stages.documents import Registration
from automerge_components.register import register

INPUTS = ("inputs", "segmentation", "search", "model", "evaluation")


def test_the_same_recipe_is_registered_once(spec: str, evaluated: dict[str, Any], artifact: Any) -> None:
    inputs = {name: evaluated[name] for name in INPUTS}
    first, second = artifact(), artifact()
    assert register.python_func(spec=spec, **inputs, registration=first) == ("1", "models:/tiny/1")
    assert register.python_func(spec=spec, **inputs, registration=second) == ("1", "models:/tiny/1")
    documents = [Registration.read(Path(output.path) / "registration.json") for output in (first, second)]
    assert [document.registered.created for document in documents] == [True, False]
    assert first.metadata == {"model": "tiny", "version": "1", "uri": "models:/tiny/1"}


def test_a_refused_model_is_not_registered(
    spec: str, evaluated: dict[str, Any], artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((Path(evaluated["evaluation"].path) / "evaluation.json").read_text())
    document["gate"] = {"verdict": "fail", "reasons": ["the worst task kept too little"]}
    Evaluation.parse(document, "test").write(tmp_path / "evaluation" / "evaluation.json")
    inputs = {name: evaluated[name] for name in INPUTS}
    inputs["evaluation"] = dsl.Artifact(uri=str(tmp_path / "evaluation"))
    registration = artifact()
    with pytest.raises(SystemExit):
        register.python_func(spec=spec, **inputs, registration=registration)
    assert "the worst task kept too little" in capsys.readouterr().err
    assert not (Path(registration.path) / "registration.json").exists()

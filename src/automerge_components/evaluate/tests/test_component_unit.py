"""The component ``evaluate``: documents, the report and the metrics of the user interface, the verdict."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from automerge.preservation import Evaluation
from automerge_components.evaluate import evaluate


def test_the_verdict_is_the_documents(evaluated: dict[str, Any]) -> None:
    document = Evaluation.read(Path(evaluated["evaluation"].path) / "evaluation.json")
    assert evaluated["verdict"] == document.gate.verdict == "pass"


def test_the_report_is_one_html_file(evaluated: dict[str, Any]) -> None:
    report = Path(evaluated["report"].path)
    assert report.read_bytes() == (Path(evaluated["evaluation"].path) / "report.html").read_bytes()
    assert "<html" in report.read_text()


def test_metrics_are_the_rates_of_the_merged_model(evaluated: dict[str, Any]) -> None:
    merged = Evaluation.read(Path(evaluated["evaluation"].path) / "evaluation.json").merged
    metrics = evaluated["metrics"].metadata
    assert set(metrics) == {"pr.left", "pr.right", "pr.mean", "pr.worst", "pd", "gate_passed"}
    assert metrics["pr.worst"] == pytest.approx(merged.worst_pr)
    assert metrics["pd"] == pytest.approx(merged.pd)
    assert metrics["gate_passed"] == 1


def test_a_refused_model_is_a_result(spec: str, searched: dict[str, Any], artifact: Any) -> None:
    strict = {**json.loads(spec), "gate": {"min_worst_pr": 1000.0}}
    outputs = {"evaluation": artifact(), "report": artifact(dsl.HTML), "metrics": artifact(dsl.Metrics)}
    assert evaluate.python_func(spec=json.dumps(strict), **searched, **outputs) == "fail"
    assert outputs["metrics"].metadata["gate_passed"] == 0

"""The metrics against Prometheus' own tools (Debian: prometheus, prometheus-pushgateway)."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from automerge.telemetry.metrics import METRICS, StageMetrics, observe_stage
from tests.observability.servers import read, running_gateway

pytestmark = pytest.mark.system


def test_promtool_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    metrics = StageMetrics("search", "digits", "cct", None)
    for definition in METRICS.values():
        labels = dict.fromkeys(definition.labels, "x")
        {"gauge": metrics.set, "counter": metrics.add, "histogram": metrics.observe}[definition.kind](
            definition.name, 1.0, **labels
        )
    metrics.write_textfile(tmp_path / "all.prom")
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: apt-get install prometheus"
    with (tmp_path / "all.prom").open() as file:
        done = subprocess.run([promtool, "check", "metrics"], stdin=file, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def gateway() -> Iterator[str]:
    with running_gateway() as address:
        yield address


def test_a_failure_does_not_erase_the_last_success(
    gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOMERGE_PUSHGATEWAY", gateway)
    with observe_stage("evaluate", pipeline="digits", family="cct", folder=tmp_path) as metrics:
        metrics.set("automerge_preservation_rate_ratio", 0.97, task="low")
    with pytest.raises(RuntimeError), observe_stage("evaluate", pipeline="digits", family="cct", folder=tmp_path):
        raise RuntimeError
    lines = [line for line in read(f"{gateway}/metrics").splitlines() if line.startswith("automerge_")]
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert values["automerge_stage_last_success_timestamp_seconds"] > 1.7e9
    assert values["automerge_stage_last_run_success"] == 0
    assert values["automerge_preservation_rate_ratio"] == 0.97
    assert all('job="automerge"' in line and 'model_family="cct"' in line for line in lines)
    assert not (tmp_path / "metrics").exists()

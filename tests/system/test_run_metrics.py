"""The metrics that a real run leaves, against Prometheus' own checker (Debian: prometheus)."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system.conftest import Run

pytestmark = pytest.mark.system

STAGES = ("fetch", "segment", "search", "merge", "evaluate", "register")


def check(content: str) -> tuple[int, str]:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: apt-get install prometheus"
    done = subprocess.run([promtool, "check", "metrics"], input=content, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def textfile(run: Run, stage: str) -> Path:
    return run.folder / stage / "metrics" / f"{stage}.prom"


@pytest.mark.parametrize("stage", STAGES)
def test_promtool_accepts_the_textfile_of_each_stage(finished_run: Run, stage: str) -> None:
    content = textfile(finished_run, stage).read_text()
    assert check(content) == (0, "")
    labels = f'model_family="tiny:build",pipeline="tiny",stage="{stage}"'
    assert f"automerge_stage_last_run_success{{{labels}}} 1.0" in content


def test_there_is_one_textfile_a_stage_and_they_agree_on_what_a_metric_is(finished_run: Run) -> None:
    """A collector reads them from one folder: the help and type of a metric must be the same in all."""
    files = sorted(finished_run.folder.glob("*/metrics/*.prom"))
    assert files == sorted(textfile(finished_run, stage) for stage in STAGES)
    said: dict[str, set[str]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            if line.startswith("#"):
                _, keyword, name, rest = line.split(" ", 3)
                said.setdefault(f"{keyword} {name}", set()).add(rest)
    assert "TYPE automerge_stage_duration_seconds" in said
    assert {key: texts for key, texts in said.items() if len(texts) > 1} == {}


def test_the_checker_finds_a_fault() -> None:
    code, output = check('# HELP automerge_trials trials\n# TYPE automerge_trials counter\nautomerge_trials{a="b"} 1\n')
    assert code != 0
    assert 'counter metrics should have "_total" suffix' in output

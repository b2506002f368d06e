"""The alerts against Prometheus' own tool (Debian: prometheus)."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.expressions import RULES, alerts

pytestmark = pytest.mark.system

TESTS = tuple(Path(__file__).with_name(name) for name in ("rules_test.yaml", "rules_over_days_test.yaml"))
NAMES = [rule["alert"] for rule in alerts()]


def promtool(*arguments: str | Path) -> tuple[int, str]:
    program = shutil.which("promtool")
    assert program, "promtool is missing: apt-get install prometheus"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def checked(alert: str, folder: Path, **changes: object) -> tuple[int, str]:
    """What promtool's tests of one alert say when it is changed."""
    (rule,) = [rule for rule in alerts() if rule["alert"] == alert]
    rules = {"groups": [{"name": "changed", "rules": [{**rule, **changes}]}]}
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    files = []
    for path in TESTS:
        content = yaml.safe_load(path.read_text())
        about = [test for test in content["tests"] if _is_about(test, alert)]
        if about:
            files.append(folder / path.name)
            files[-1].write_text(yaml.safe_dump({**content, "rule_files": ["rules.yaml"], "tests": about}))
    assert files, f"no test is about {alert}"
    return promtool("test", "rules", *files)


def _is_about(test: dict[str, Any], alert: str) -> bool:
    """Whether a group of tests is; what it says of other alerts is taken out."""
    test["alert_rule_test"] = [each for each in test["alert_rule_test"] if each["alertname"] == alert]
    return bool(test["alert_rule_test"])


def test_the_rules_are_rules() -> None:
    code, output = promtool("check", "rules", RULES)
    assert code == 0, output
    assert f"{len(NAMES)} rules found" in output


def test_every_alert_begins_and_ends_when_it_should() -> None:
    code, output = promtool("test", "rules", *TESTS)
    assert code == 0, output


@pytest.mark.parametrize("alert", NAMES)
def test_a_broken_alert_is_found(alert: str, tmp_path: Path) -> None:
    """One that never begins, and one that always goes on; as it is, nothing is found."""
    assert checked(alert, tmp_path)[0] == 0
    for changes in ({"expr": "vector(1) > 2"}, {"expr": "vector(1)", "for": "0s"}):
        code, output = checked(alert, tmp_path, **changes)
        assert code != 0, changes
        assert f"alertname: {alert}" in output


def test_what_is_no_rule_is_found(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("last_success == 0", "last_success =="))
    code, output = promtool("check", "rules", tmp_path / "rules.yaml")
    assert code != 0
    assert "could not parse expression" in output

"""Alerts and dashboard ask only for what is there, and are documented."""

import re

import pytest

from tests.observability.expressions import ROOT, alerts, known, queries, selectors

ALERTS = {rule["alert"]: rule for rule in alerts()}
ASKED = [(f"alert {name}", rule["expr"]) for name, rule in ALERTS.items()] + queries()
PAGE = (ROOT / "docs" / "alerts.md").read_text()


@pytest.mark.parametrize(("where", "expression"), ASKED, ids=[where for where, _ in ASKED])
def test_it_parses_and_reads_metrics_that_exist(where: str, expression: str) -> None:
    series = known()
    read = selectors(expression)
    assert read, where
    for name, labels in read:
        assert name in series, where
        assert labels <= series[name], where


def test_the_parser_and_the_list_find_faults() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        selectors("rate(automerge_search_trials_total[5m]")
    assert selectors('a{b="c"} > increase(d[5m]) unless on (e) f') == [("a", {"b"}), ("d", set()), ("f", set())]
    assert "automerge_search_trials" not in known()
    assert known()["automerge_search_trials_total"] == {"job", "pipeline", "model_family", "stage", "status"}


def test_labels_in_texts_exist() -> None:
    """A label that is not there would be an empty word."""
    for name, rule in ALERTS.items():
        grouped = re.search(r"\bby \(([^)]*)\)", rule["expr"])
        read = selectors(rule["expr"])[0][0]
        there = {label.strip() for label in grouped.group(1).split(",")} if grouped else known()[read]
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= there, name


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{name.lower()}"
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_the_dashboard_shows_every_metric_that_no_alert_is_about() -> None:
    read = {name for _, expression in ASKED for name, _ in selectors(expression)}
    left_out = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in set(known()) - read
    }
    shown = {name.removesuffix("_bucket") for name in read}
    # Said by the run's last success, which the dashboard shows.
    assert left_out - shown == {"automerge_stage_last_success_timestamp_seconds"}

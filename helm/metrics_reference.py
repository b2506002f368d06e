"""``docs/metrics.md``: the metrics of the stages, of the trigger service, and the Pushgateway's own that we use."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from automerge.telemetry.metrics import GROUP, METRICS, MetricDefinition
from automerge.trigger.config import TriggerConfig
from automerge.trigger.metrics import TriggerMetrics

MARKER = "<!-- what follows is written by `make chart` -->"

PUSHGATEWAY = (
    MetricDefinition("push_time_seconds", "gauge", "Unix time of the last push that the gateway took."),
    MetricDefinition("push_failure_time_seconds", "gauge", "Unix time of the last push that it refused; 0: never."),
)
"""What the Pushgateway adds to each group."""


def trigger_definitions() -> tuple[MetricDefinition, ...]:
    """The metrics of the trigger service, as it has them when it starts."""
    return tuple(_of_trigger())


def _of_trigger() -> Iterator[MetricDefinition]:
    rule = {"name": "any", "registry": "mlflow", "models": ["*"], "select": {"alias": "candidate"}, "spec": {}}
    config = TriggerConfig.model_validate(
        {
            "state": "trigger.sqlite",
            "registries": [{"kind": "mlflow", "uri": "http://mlflow"}],
            "runner": {"kind": "local", "folder": "runs"},
            "rules": [rule],
        }
    )
    for family in TriggerMetrics(config).registry.collect():
        labels = tuple(family.samples[0].labels)  # every series is there from the beginning
        if family.type == "counter":
            yield MetricDefinition(f"{family.name}_total", "counter", family.documentation, labels)
        elif family.type == "gauge":
            yield MetricDefinition(family.name, "gauge", family.documentation, labels)
        else:
            raise ValueError(f"{family.name} is a {family.type}, which docs/metrics.md has no words for")


def metrics_reference(path: Path) -> str:
    """The page that should be at ``path``: what stands before the marker, and the tables.

    Raises:
        ValueError: the page has no marker.
    """
    by_hand, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"{path}: the line {MARKER!r} is missing; add it")
    group = ", ".join(f"`{label}`" for label in GROUP)
    lines = [
        by_hand + MARKER,
        "",
        "## Stages and runs",
        "",
        f"Pushed, with the labels {group}; the stage of what is about a whole run is `run`.",
        "",
        *_table(METRICS.values()),
        "## Trigger service",
        "",
        "Scraped from `/metrics`.",
        "",
        *_table(trigger_definitions()),
        "## Pushgateway",
        "",
        f"Its own, for each group, with the labels {group}.",
        "",
        *_table(PUSHGATEWAY),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(definitions: Iterable[MetricDefinition]) -> list[str]:
    rows = ["| Metric | Type | More labels | |", "|---|---|---|---|"]
    for each in definitions:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{each.name}` | {each.kind} | {labels} | {each.help} |")
    return [*rows, ""]

"""What the alerts and the dashboard ask Prometheus, and what they may ask it."""

import json
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from automerge.telemetry.metrics import GROUP, METRICS
from helm.metrics_reference import PUSHGATEWAY, trigger_definitions

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "automerge" / "files" / "rules.yaml"
DASHBOARD = ROOT / "helm" / "automerge" / "files" / "dashboard.json"

CHOSEN = {"$pipeline": ".*", "$family": ".*", "$__rate_interval": "1m"}
"""What Grafana puts in for its variables when all is chosen."""


def alerts() -> list[dict[str, Any]]:
    """All rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> list[tuple[str, str]]:
    """Title of the panel and expression, as Grafana sends it, of every query of the dashboard."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in CHOSEN.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found


def known() -> dict[str, set[str]]:
    """Every series there can be, and its labels as Prometheus has them."""
    series: dict[str, set[str]] = {}
    for pushed in (*METRICS.values(), *PUSHGATEWAY):
        labels = {"job", *GROUP, *pushed.labels}
        if pushed.kind == "histogram":
            series |= {f"{pushed.name}_{part}": labels for part in ("count", "sum")}
            series[f"{pushed.name}_bucket"] = labels | {"le"}
        else:
            series[pushed.name] = labels
    return series | {scraped.name: {"job", "instance", *scraped.labels} for scraped in trigger_definitions()}


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics that an expression reads, each with the labels that it matches.

    Raises:
        ValueError: it is no expression.
    """
    found: list[tuple[str, set[str]]] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((str(node.name), {matcher.name for matcher in node.matchers.matchers}))
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found

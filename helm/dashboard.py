"""The Grafana dashboard, from a table of its panels."""

from dataclasses import dataclass
from typing import Any, Literal

SELECTION = 'pipeline=~"$pipeline", model_family=~"$family"'

_WIDTH = 24
_REFERENCES = "ABCDEFGH"


@dataclass(frozen=True)
class Panel:
    """One panel: what it asks Prometheus and how it shows the answer.

    Attributes:
        title: of the panel.
        queries: pairs of expression and legend.
        kind: Grafana's name of the panel.
        unit: Grafana's name of the unit.
        description: what to read from it.
        width: of the 24 columns.
        meanings: what values mean: (value, text, colour).
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    kind: Literal["timeseries", "stat", "bargauge"] = "timeseries"
    unit: str = "short"
    description: str = ""
    width: int = 8
    meanings: tuple[tuple[str, str, str], ...] = ()


def _of(metric: str, *matchers: str) -> str:
    """The metric for the pipelines and model families that were chosen."""
    return f"{metric}{{{', '.join((SELECTION, *matchers))}}}"


_SUCCESS = (("1", "ok", "green"), ("0", "failed", "red"))
_GATE = (("1", "pass", "green"), ("0", "refused", "orange"))
_RUN = "{{pipeline}}"
_RATIO = "percentunit"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Runs",
        (
            Panel("Last run", ((_of("automerge_run_last_success"), _RUN),), "stat", meanings=_SUCCESS, width=6),
            Panel("Quality gate", ((_of("automerge_gate_passed"), _RUN),), "stat", meanings=_GATE, width=6),
            Panel(
                "Time since the last success",
                ((f"time() - {_of('automerge_run_last_success_timestamp_seconds')}", _RUN),),
                "stat",
                "s",
                width=6,
            ),
            Panel(
                "Time since the last run",
                ((f"time() - {_of('automerge_run_last_end_timestamp_seconds')}", _RUN),),
                "stat",
                "s",
                width=6,
            ),
            Panel(
                "Stages of the last run",
                ((_of("automerge_stage_last_run_success"), "{{pipeline}} {{stage}}"),),
                "stat",
                meanings=_SUCCESS,
                width=12,
            ),
            Panel(
                "Duration of each stage's last run",
                ((_of("automerge_stage_duration_seconds"), "{{pipeline}} {{stage}}"),),
                "bargauge",
                "s",
                width=12,
            ),
        ),
    ),
    (
        "What the merged model keeps",
        (
            Panel(
                "Preservation rate by task",
                (
                    (_of("automerge_preservation_rate_ratio"), "{{pipeline}} {{task}}"),
                    (_of("automerge_preservation_rate_low_ratio"), "{{pipeline}} {{task}}, lower end"),
                ),
                unit=_RATIO,
                description="The merged model's metric relative to the specialist's; the lower end of its interval.",
            ),
            Panel(
                "Mean and worst preservation rate",
                (
                    (_of("automerge_preservation_mean_ratio"), "{{pipeline}} mean"),
                    (_of("automerge_preservation_worst_ratio"), "{{pipeline}} worst"),
                ),
                unit=_RATIO,
            ),
            Panel(
                "Preservation discrepancy",
                ((_of("automerge_preservation_discrepancy_ratio"), _RUN),),
                unit=_RATIO,
                description="How far the tasks lie apart. Two ruined tasks lie close together: read it with the worst.",
            ),
        ),
    ),
    (
        "Search",
        (
            Panel("Trials", ((_of("automerge_search_trials_total"), "{{pipeline}} {{status}}"),)),
            Panel("Best objective", ((_of("automerge_search_best_objective"), _RUN),)),
            Panel(
                "Time of a trial",
                tuple(
                    (
                        f"histogram_quantile({quantile}, sum by (le, pipeline) "
                        f"({_of('automerge_search_trial_duration_seconds_bucket')}))",
                        f"{{{{pipeline}}}} {name}",
                    )
                    for quantile, name in (("0.5", "median"), ("0.95", "95 of 100"))
                ),
                unit="s",
                description="Of all trials of the search so far: the counts begin at 0 with each search.",
            ),
            Panel(
                "Time since the search was last pushed",
                (('time() - push_time_seconds{stage="search", ' + SELECTION + "}", _RUN),),
                unit="s",
                description="Grows after a search has ended, too.",
            ),
            Panel(
                "Time since the search was whole in its mirror",
                ((f"time() - {_of('automerge_search_mirror_last_success_timestamp_seconds')}", _RUN),),
                unit="s",
            ),
            Panel("Failures of the mirror", ((_of("automerge_search_mirror_failures_total"), _RUN),)),
        ),
    ),
    (
        "Sizes",
        (
            Panel(
                "Inputs",
                (
                    (_of("automerge_fetch_size_bytes"), "{{pipeline}} all"),
                    (_of("automerge_fetch_downloaded_bytes"), "{{pipeline}} downloaded"),
                ),
                unit="bytes",
            ),
            Panel("Merged weights", ((_of("automerge_merge_size_bytes"), _RUN),), unit="bytes"),
            Panel(
                "Parameters",
                (
                    (_of("automerge_segment_parameters"), "{{pipeline}} of the model"),
                    (_of("automerge_merge_parameters"), "{{pipeline}} merged"),
                ),
            ),
            Panel("Blocks", ((_of("automerge_segment_blocks"), _RUN),)),
            Panel(
                "Exported to ONNX",
                ((_of("automerge_onnx_exported"), _RUN),),
                "stat",
                meanings=(("1", "yes", "green"), ("0", "no", "orange")),
            ),
            Panel(
                "Registered",
                ((_of("automerge_register_new_version"), _RUN),),
                "stat",
                meanings=(("1", "new version", "green"), ("0", "was there", "blue")),
            ),
            Panel(
                "Promoted",
                ((_of("automerge_register_promoted"), _RUN),),
                "stat",
                meanings=(("1", "has the alias", "green"), ("0", "another keeps it", "blue")),
            ),
        ),
    ),
    (
        "Trigger",
        (
            Panel(
                "Deliveries",
                (
                    (
                        "sum by (door, outcome) (increase(automerge_trigger_deliveries_total[$__rate_interval]))",
                        "{{door}} {{outcome}}",
                    ),
                ),
            ),
            Panel(
                "Decisions",
                (
                    (
                        "sum by (rule, decision) (increase(automerge_trigger_decisions_total[$__rate_interval]))",
                        "{{rule}} {{decision}}",
                    ),
                ),
            ),
            Panel(
                "Runs, started and ended",
                (("sum by (rule, outcome) (automerge_trigger_runs_total)", "{{rule}} {{outcome}}"),),
            ),
            Panel("Runs that go on", (("automerge_trigger_runs_active", "{{rule}}"),)),
            Panel(
                "Time since a registry was read",
                (("time() - (automerge_trigger_last_reconcile_timestamp_seconds > 0)", "{{registry}}"),),
                unit="s",
            ),
            Panel(
                "Failures to read a registry",
                (("increase(automerge_trigger_reconcile_failures_total[$__rate_interval])", "{{registry}}"),),
            ),
        ),
    ),
    (
        "Pushgateway",
        (
            Panel(
                "Time since the last push",
                (('time() - push_time_seconds{job="automerge", ' + SELECTION + "}", "{{pipeline}} {{stage}}"),),
                unit="s",
                width=12,
            ),
            Panel(
                "Time of the last refused push",
                (
                    (
                        'push_failure_time_seconds{job="automerge", ' + SELECTION + "} * 1000",
                        "{{pipeline}} {{stage}}",
                    ),
                ),
                "stat",
                "dateTimeAsIso",
                "1970 means never.",
                width=12,
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": _WIDTH, "x": 0, "y": top},
            }
        )
        top, left, height = top + 1, 0, 7
        for panel in row:
            if left + panel.width > _WIDTH:
                top, left = top + height, 0
            place = {"h": height, "w": panel.width, "x": left, "y": top}
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": place})
            left += panel.width
        top += height
    return {
        "uid": "automerge",
        "title": "AutoMerge",
        "tags": ["automerge"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-24h", "to": "now"},
        "timezone": "",
        "templating": {"list": [_datasource(), _variable("pipeline"), _variable("family", "model_family")]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.meanings:
        options = {value: {"text": text, "color": colour} for value, text, colour in panel.meanings}
        defaults["mappings"] = [{"type": "value", "options": options}]
    if panel.kind == "timeseries":
        defaults["custom"] = {"drawStyle": "line", "showPoints": "auto", "spanNulls": False}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
        "targets": [
            {"refId": reference, "expr": expression, "legendFormat": legend, "instant": panel.kind != "timeseries"}
            for reference, (expression, legend) in zip(_REFERENCES, panel.queries, strict=False)
        ],
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    shown: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}, "orientation": "auto"}
    return {**shown, "textMode": "value_and_name"} if kind == "stat" else {**shown, "displayMode": "basic"}


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(name: str, label: str | None = None) -> dict[str, Any]:
    """A choice among the values of a label."""
    return {
        "name": name,
        "type": "query",
        "label": name,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values(automerge_stage_last_run_timestamp_seconds, {label or name})",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }

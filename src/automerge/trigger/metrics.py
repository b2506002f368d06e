"""The service's own Prometheus metrics, scraped from ``/metrics``."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from automerge.trigger.config import TriggerConfig
from automerge.trigger.delivery import Outcome
from automerge.trigger.rules import Verb

DOORS = ("mlflow", "cloudevents")
RUN_OUTCOMES = ("started", "passed", "refused", "failed")


class TriggerMetrics:
    """Every series is there from the beginning, with 0, so that an alert on a rate sees the first event."""

    def __init__(self, config: TriggerConfig) -> None:
        self.registry = CollectorRegistry()
        self.deliveries = Counter(
            "automerge_trigger_deliveries_total",
            "Deliveries by door and what became of them.",
            ("door", "outcome"),
            registry=self.registry,
        )
        self.decisions = Counter(
            "automerge_trigger_decisions_total",
            "Decisions that differ from the last one of their group.",
            ("rule", "decision"),
            registry=self.registry,
        )
        self.runs = Counter(
            "automerge_trigger_runs_total",
            "Runs by how they ended, and started ones.",
            ("rule", "outcome"),
            registry=self.registry,
        )
        self.active = Gauge(
            "automerge_trigger_runs_active", "Runs that are to be started or go on.", ("rule",), registry=self.registry
        )
        self.last_reconcile = Gauge(
            "automerge_trigger_last_reconcile_timestamp_seconds",
            "Unix time at which the registry was last read; 0: never.",
            ("registry",),
            registry=self.registry,
        )
        self.reconcile_failures = Counter(
            "automerge_trigger_reconcile_failures_total",
            "Attempts to read the registry that failed.",
            ("registry",),
            registry=self.registry,
        )
        for door in DOORS:
            for outcome in get_args(Outcome):
                self.deliveries.labels(door, outcome)
        for rule in config.rules:
            self.active.labels(rule.name)
            for verb in get_args(Verb):
                self.decisions.labels(rule.name, verb)
            for outcome in RUN_OUTCOMES:
                self.runs.labels(rule.name, outcome)
        for registry in config.registries:
            self.last_reconcile.labels(registry.title)
            self.reconcile_failures.labels(registry.title)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

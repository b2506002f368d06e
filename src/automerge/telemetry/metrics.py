"""Prometheus metrics of the stages, pushed to a Pushgateway or written as a textfile.

A stage lives for one run and cannot be scraped, so it pushes when it ends. Names follow Prometheus' naming guide: base
units (seconds, bytes, ratios), a unit as suffix, ``_total`` for counters only. ``METRICS`` is the one place where they
are decided.

A Pushgateway stores the last value and never adds up. What a run knows only once is therefore a gauge of the last run;
a counter is used only where the value is also pushed while the run goes on (``StageMetrics.publish``), so that
``rate()`` sees it grow from zero in every run.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, pushadd_to_gateway
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from automerge.documents import write_atomically
from automerge.telemetry.traces import span

log = logging.getLogger(__name__)

GATEWAY_VARIABLE = "AUTOMERGE_PUSHGATEWAY"
JOB = "automerge"

# Series of concurrent runs of different pipelines, model families and stages must not overwrite each other; a run's own
# id must not be in the group, or the gateway would keep every run for ever.
GROUP = ("pipeline", "model_family", "stage")

_PUSH_TIMEOUT_SECONDS = 10.0
_PUBLISH_INTERVAL_SECONDS = 15.0  # the usual scrape interval: more often would not be seen


@dataclass(frozen=True)
class MetricDefinition:
    """One metric family: its name, type, help text, and labels beyond those of the group."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_DEFINITIONS = (
    MetricDefinition("automerge_stage_duration_seconds", "gauge", "Wall time of the stage's last run."),
    MetricDefinition("automerge_stage_last_run_timestamp_seconds", "gauge", "Unix time at which the last run ended."),
    MetricDefinition(
        "automerge_stage_last_success_timestamp_seconds",
        "gauge",
        "Unix time at which the last successful run ended; kept when a later run fails.",
    ),
    MetricDefinition("automerge_stage_last_run_success", "gauge", "1 if the last run succeeded, 0 if it failed."),
    MetricDefinition("automerge_run_last_end_timestamp_seconds", "gauge", "Unix time at which the last run ended."),
    MetricDefinition(
        "automerge_run_last_success_timestamp_seconds",
        "gauge",
        "Unix time at which the last run without a failed task ended; a run whose model the gate refused is one.",
    ),
    MetricDefinition("automerge_run_last_success", "gauge", "1 if no task of the last run failed, else 0."),
    MetricDefinition("automerge_fetch_size_bytes", "gauge", "Size of all inputs of the last fetch."),
    MetricDefinition("automerge_fetch_downloaded_bytes", "gauge", "What the last fetch had to download."),
    MetricDefinition("automerge_segment_blocks", "gauge", "Blocks of the segmentation."),
    MetricDefinition("automerge_segment_parameters", "gauge", "Parameters of the model, tied ones once."),
    MetricDefinition("automerge_search_trials_total", "counter", "Trials of this search, by status.", ("status",)),
    MetricDefinition("automerge_search_best_objective", "gauge", "Best objective found so far."),
    MetricDefinition(
        "automerge_search_trial_duration_seconds",
        "histogram",
        "Time from a trial's proposal to its result; cached trials are left out.",
        buckets=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0),
    ),
    MetricDefinition(
        "automerge_search_mirror_last_success_timestamp_seconds",
        "gauge",
        "Unix time at which the search was last seen to be whole in its mirror.",
    ),
    MetricDefinition(
        "automerge_search_mirror_failures_total", "counter", "Attempts of this search to reach its mirror that failed."
    ),
    MetricDefinition("automerge_merge_parameters", "gauge", "Parameters that the last merge wrote."),
    MetricDefinition("automerge_merge_size_bytes", "gauge", "Size of the merged weights."),
    MetricDefinition("automerge_preservation_rate_ratio", "gauge", "Preservation rate (specialist: 1).", ("task",)),
    MetricDefinition(
        "automerge_preservation_rate_low_ratio", "gauge", "Lower end of the preservation rate's interval.", ("task",)
    ),
    MetricDefinition("automerge_preservation_mean_ratio", "gauge", "Mean preservation rate over the tasks."),
    MetricDefinition("automerge_preservation_worst_ratio", "gauge", "Preservation rate of the worst task."),
    MetricDefinition(
        "automerge_preservation_discrepancy_ratio", "gauge", "Largest minus smallest preservation rate of the tasks."
    ),
    MetricDefinition("automerge_gate_passed", "gauge", "1 if the quality gate let the merged model pass, else 0."),
    MetricDefinition("automerge_onnx_exported", "gauge", "1 if the merged model was exported to ONNX, else 0."),
    MetricDefinition("automerge_register_new_version", "gauge", "1 if a version was created, 0 if it existed already."),
    MetricDefinition(
        "automerge_register_promoted", "gauge", "1 if the version has the promotion's alias, 0 if another one kept it."
    ),
)

METRICS: dict[str, MetricDefinition] = {definition.name: definition for definition in _DEFINITIONS}


class StageMetrics:
    """The metrics of one run of one stage, in a collector registry of their own.

    A metric exists only once it was given a value: a gauge never set would otherwise read as 0.

    Args:
        stage: the stage's name.
        pipeline: what the run belongs to: the spec's name.
        family: the model family: what distinguishes architectures, e.g. the target's name.
        gateway: address of the Pushgateway; None: there is none.
        clock: monotonic seconds, for the interval between pushes.
    """

    def __init__(
        self, stage: str, pipeline: str, family: str, gateway: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.group = dict(zip(GROUP, (pipeline, family, stage), strict=True))
        self.gateway = gateway
        self._registry = CollectorRegistry()
        self._families: dict[str, Gauge | Counter | Histogram] = {}
        self._clock = clock
        self._last_push = clock()
        self._gateway_failed = False

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        family = self._labelled(name, "gauge", labels)
        assert isinstance(family, Gauge)  # noqa: S101 - narrows the type; the kind was checked
        family.set(value)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        family = self._labelled(name, "counter", labels)
        assert isinstance(family, Counter)  # noqa: S101
        family.inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        family = self._labelled(name, "histogram", labels)
        assert isinstance(family, Histogram)  # noqa: S101
        family.observe(value)

    def publish(self) -> None:
        """Push what is known so far; call it as often as you like.

        Does nothing without a gateway, within 15 seconds of the last push, or once the gateway did not answer: a long
        run must not wait for it again and again.
        """
        if self._clock() - self._last_push >= _PUBLISH_INTERVAL_SECONDS:
            self.push()

    def push(self) -> bool:
        """Push now; returns whether the gateway took it. A gateway that fails is logged and never fails the run."""
        if self.gateway is None or self._gateway_failed:
            return False
        self._last_push = self._clock()
        try:
            pushadd_to_gateway(
                self.gateway, JOB, _Families(self), grouping_key=self.group, timeout=_PUSH_TIMEOUT_SECONDS
            )
        except (OSError, HTTPException, ValueError) as error:
            self._gateway_failed = True
            log.warning("metrics were not pushed to %s: %s", self.gateway, error)
            return False
        return True

    def write_textfile(self, path: Path) -> None:
        """Write the node exporter's textfile format, atomically.

        Families that the file already has and this run does not (the last success, after a failure) are kept, as a
        Pushgateway would.
        """
        write_atomically(path, generate_latest(_Families(self, _families_in(path))))

    def collect(self) -> Iterable[Metric]:
        """The families that have a value."""
        return self._registry.collect()

    def _labelled(self, name: str, kind: str, labels: dict[str, str]) -> Gauge | Counter | Histogram:
        definition = METRICS[name]
        if definition.kind != kind or set(labels) != set(definition.labels):
            raise ValueError(f"{name} is a {definition.kind} with the labels {definition.labels}")
        if name not in self._families:
            self._families[name] = self._family(definition)
        return self._families[name].labels(**self.group, **labels)

    def _family(self, definition: MetricDefinition) -> Gauge | Counter | Histogram:
        labels = (*GROUP, *definition.labels)
        if definition.kind == "gauge":
            return Gauge(definition.name, definition.help, labels, registry=self._registry)
        if definition.kind == "counter":
            return Counter(definition.name, definition.help, labels, registry=self._registry)
        return Histogram(definition.name, definition.help, labels, registry=self._registry, buckets=definition.buckets)


class _Families(Collector):
    """The families of a run after those kept from before, without the ``_created`` series of the client library."""

    def __init__(self, metrics: StageMetrics, kept: Iterable[Metric] = ()) -> None:
        self._metrics = metrics
        self._kept = list(kept)

    def collect(self) -> Iterator[Metric]:
        new = list(self._metrics.collect())
        names = {family.name for family in new}
        for family in [*(kept for kept in self._kept if kept.name not in names), *new]:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _families_in(path: Path) -> list[Metric]:
    """The families of an earlier textfile; one that cannot be read is replaced, with a warning."""
    try:
        return list(text_string_to_metric_families(path.read_text()))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s: the earlier metrics cannot be read and are replaced: %s", path, error)
        return []


@contextmanager
def observe_stage(stage: str, *, pipeline: str, family: str, folder: Path) -> Iterator[StageMetrics]:
    """Measure one run of a stage, and publish its metrics when it ends, however it ends; it is a span of a trace, too.

    Pushed to the gateway named by ``AUTOMERGE_PUSHGATEWAY``; where there is none, or it does not answer, written to
    ``<folder>/metrics/<stage>.prom``. A failed run leaves the time of the last success as it was. Metrics never fail
    a run.

    Args:
        stage: the stage's name.
        pipeline: the spec's name.
        family: the model family.
        folder: the run's folder.
    """
    metrics = StageMetrics(stage, pipeline, family, os.environ.get(GATEWAY_VARIABLE) or None)
    start = time.monotonic()
    succeeded = False
    try:
        with span(stage, pipeline=pipeline, model_family=family):
            yield metrics
        succeeded = True
    finally:
        now = time.time()
        metrics.set("automerge_stage_duration_seconds", time.monotonic() - start)
        metrics.set("automerge_stage_last_run_timestamp_seconds", now)
        metrics.set("automerge_stage_last_run_success", float(succeeded))
        if succeeded:
            metrics.set("automerge_stage_last_success_timestamp_seconds", now)
        metrics._gateway_failed = False  # a last try: the gateway may be back since a push during the run failed
        if not metrics.push():
            try:
                metrics.write_textfile(folder / "metrics" / f"{stage}.prom")
            except OSError as error:
                log.warning("metrics were not written: %s", error)

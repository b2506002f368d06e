"""Traces by OpenTelemetry: a span for each stage, and one around them where one process runs them all.

Nothing is traced unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) names a collector that takes OTLP
over HTTP. OpenTelemetry's other variables hold too: ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_TRACES_SAMPLER``.

The spans of a process belong to the span that ``TRACEPARENT`` names (W3C Trace Context). Where it names none, the
processes of one run find each other by its name: with ``AUTOMERGE_RUN`` the trace's id is made of it, so that the pods
of a pipeline, which nobody hands a context, are in one trace.

A collector that does not answer fails nothing; a process waits for it at its end, `FLUSH_SECONDS` unless
``OTEL_EXPORTER_OTLP_TIMEOUT`` says otherwise.
"""

import atexit
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from automerge.telemetry.logs import redact

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

RUN_VARIABLE = "AUTOMERGE_RUN"
"""Names the run of the pipeline or the trigger that a process is part of."""

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_SECONDS = 5.0

_LONGEST_ERROR = 1000


@contextmanager
def span(name: str, **attributes: str | float | bool) -> Iterator[None]:
    """A span around some work, with the span that is open as its parent; an exception marks it as failed.

    Args:
        name: what is done, e.g. a stage's name.
        attributes: what it is done to; each is named ``automerge.<key>``.
    """
    tracer = _tracer()
    if tracer is None:
        yield
        return
    from opentelemetry import trace

    parent = None if trace.get_current_span().get_span_context().is_valid else _context()
    named = {f"automerge.{key}": value for key, value in attributes.items()}
    # The traceback is left out: it may quote what the environment holds.
    with tracer.start_as_current_span(
        name, context=parent, attributes=named, record_exception=False, set_status_on_exception=False
    ) as opened:
        try:
            yield
        except BaseException as error:
            text = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:_LONGEST_ERROR]
            opened.set_status(trace.Status(trace.StatusCode.ERROR, text))
            raise


@cache
def _tracer() -> "Tracer | None":
    """What makes spans; None where no collector is named, or OpenTelemetry is not installed."""
    if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
    except ModuleNotFoundError:
        log.warning("nothing is traced: install this package with its extra [traces]: automerge-models[traces]")
        return None

    class Exporter(OTLPSpanExporter):
        def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
            result = super().export(spans)
            if result is not SpanExportResult.SUCCESS:
                log.warning("%d spans of the trace did not reach their collector", len(spans))
            return result

    # It tells its own failures with tracebacks.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "automerge"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    timeout = None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else FLUSH_SECONDS
    provider.add_span_processor(BatchSpanProcessor(Exporter(timeout=timeout)))
    atexit.register(provider.shutdown)  # sends what is left
    return provider.get_tracer("automerge")


def _context() -> "Context | None":
    """What the spans of this process belong to; None: a trace of their own."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key.lower(): os.environ[key] for key in ("TRACEPARENT", "TRACESTATE") if os.environ.get(key)}
    if carrier:
        return TraceContextTextMapPropagator().extract(carrier)
    run = os.environ.get(RUN_VARIABLE)
    if not run:
        return None
    digest = hashlib.sha256(run.encode()).digest()
    parent = trace.SpanContext(
        trace_id=int.from_bytes(digest[:16]),
        span_id=int.from_bytes(digest[16:24]),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))

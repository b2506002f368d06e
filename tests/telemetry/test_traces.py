"""Traces as a collector receives them: OTLP over HTTP, in a server that reads it by OpenTelemetry's own messages."""

import gzip
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from automerge.spec import Spec
from tests.e2e.tiny import TinyPair, tiny_spec

AUTOMERGE = (sys.executable, "-c", "from automerge.cli import main; main()")


class Collector:
    """What arrived: spans by name, and the resource that they are of."""

    def __init__(self) -> None:
        self.spans: dict[str, Any] = {}
        self.resource: dict[str, str] = {}
        self.url = ""

    def take(self, content: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(content)
        for group in request.resource_spans:
            self.resource = {item.key: item.value.string_value for item in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans |= {found.name: found for found in scope.spans}


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            found.take(gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def spec(pair: TinyPair, tmp_path: Path) -> Spec:
    search = {"trials": 4, "initial": 2, "split": None, "refine": None}
    return tiny_spec(
        str(pair.folder),
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        search=search,
        evaluation={"resamples": 100, "onnx": False, "baselines": False},
    )


def automerge(spec: Spec, folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    path = folder / "spec.json"
    path.write_text(spec.model_dump_json())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TRACE"))}
    command = [*AUTOMERGE, arguments[0], str(path), *arguments[1:]]
    return subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def test_a_run_is_a_span_with_a_span_for_each_stage(collector: Collector, spec: Spec, tmp_path: Path) -> None:
    done = automerge(spec, tmp_path, "run", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    assert done.returncode == 0, done.stderr
    stages = {"fetch", "segment", "search", "merge", "evaluate", "register"}
    assert set(collector.spans) == {"run", *stages}
    root = collector.spans["run"]
    assert not root.parent_span_id
    assert {collector.spans[stage].parent_span_id for stage in stages} == {root.span_id}
    assert {found.trace_id for found in collector.spans.values()} == {root.trace_id}
    attributes = {item.key: item.value.string_value for item in root.attributes}
    assert attributes == {"automerge.pipeline": "tiny", "automerge.model_family": "tiny:build"}
    assert collector.resource["service.name"] == "automerge"


def test_processes_of_one_run_are_in_one_trace(collector: Collector, spec: Spec, tmp_path: Path) -> None:
    """The pods of a pipeline know the run's name, and nothing of each other."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "AUTOMERGE_RUN": "run-7", "OTEL_SERVICE_NAME": "ours"}
    for stage in ("fetch", "segment"):
        done = automerge(spec, tmp_path, stage, **environment)
        assert done.returncode == 0, done.stderr
    assert set(collector.spans) == {"fetch", "segment"}
    assert {found.trace_id for found in collector.spans.values()} == {hashlib.sha256(b"run-7").digest()[:16]}
    assert collector.resource["service.name"] == "ours"


def test_a_span_may_belong_to_one_of_somebody_else(collector: Collector, spec: Spec, tmp_path: Path) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    environment = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces", "AUTOMERGE_RUN": "run-7"}
    done = automerge(spec, tmp_path, "fetch", TRACEPARENT=parent, **environment)
    assert done.returncode == 0, done.stderr
    found = collector.spans["fetch"]
    assert (found.trace_id.hex(), found.parent_span_id.hex()) == tuple(parent.split("-")[1:3])


def test_a_failure_is_told_in_a_sentence_and_without_secrets(
    collector: Collector, pair: TinyPair, tmp_path: Path
) -> None:
    spec = tiny_spec(str(tmp_path / "s3cret-place"), f"sqlite:///{tmp_path / 'mlflow.db'}")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "AWS_SECRET_ACCESS_KEY": "s3cret-place"}
    done = automerge(spec, tmp_path, "fetch", **environment)
    assert done.returncode == 2
    found = collector.spans["fetch"]
    assert found.status.code == Status.STATUS_CODE_ERROR
    assert found.status.message.startswith("StorageError: ")
    assert "base.safetensors" in found.status.message
    assert "s3cret" not in found.status.message
    assert not found.events


def test_a_collector_that_does_not_answer_fails_nothing(spec: Spec, tmp_path: Path) -> None:
    begin = time.monotonic()
    done = automerge(spec, tmp_path, "fetch", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "1 spans of the trace did not reach their collector" in done.stderr
    assert time.monotonic() - begin < 60


def test_nothing_of_it_is_imported_unless_it_is_asked_for(spec: Spec, tmp_path: Path) -> None:
    code = (
        "import sys; from automerge.telemetry.traces import span\n"
        "with span('work'): pass\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

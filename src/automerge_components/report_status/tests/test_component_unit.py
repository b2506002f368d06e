"""The component ``report_status``: what is logged and pushed of a run's end."""

import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from kfp import dsl

from automerge_components.report_status import report_status


def status(state: str, message: str = "") -> dsl.PipelineTaskFinalStatus:
    return dsl.PipelineTaskFinalStatus(
        state=state,
        pipeline_job_resource_name="projects/none/runs/nightly-7",
        pipeline_task_name="exit-handler-1",
        error_code=None,
        error_message=message,
    )


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Path and body of what a gateway of our own gets; the real one is in the system tests."""
    got: list[tuple[str, str]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(202)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Gateway)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AUTOMERGE_PUSHGATEWAY", f"http://127.0.0.1:{server.server_port}")
    yield got
    server.shutdown()
    server.server_close()


def test_a_success(spec: str, pushed: list[tuple[str, str]], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report_status.python_func(spec=spec, status=status("SUCCEEDED"))
    assert "run projects/none/runs/nightly-7 ended: succeeded" in caplog.text
    ((path, body),) = pushed
    assert "/stage/run" in path
    assert "automerge_run_last_success{" in body
    assert "automerge_run_last_success_timestamp_seconds{" in body


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_whatever_else_is_no_success_and_keeps_the_time_of_the_last(
    spec: str, pushed: list[tuple[str, str]], caplog: pytest.LogCaptureFixture, state: str
) -> None:
    report_status.python_func(spec=spec, status=status(state, "search-merge: exit code 2"))
    assert f"ended: {state.lower()} (search-merge: exit code 2)" in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR
    ((_, body),) = pushed
    (value,) = [line.rpartition(" ")[2] for line in body.splitlines() if line.startswith("automerge_run_last_success{")]
    assert float(value) == 0
    assert "automerge_run_last_success_timestamp_seconds" not in body


def test_a_gateway_that_is_gone_fails_nothing(
    spec: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AUTOMERGE_PUSHGATEWAY", "http://127.0.0.1:1")
    report_status.python_func(spec=spec, status=status("SUCCEEDED"))
    assert "metrics were not pushed" in caplog.text

"""Metrics: names by Prometheus' guide, pushed or written, and never in the way."""

import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from automerge.telemetry.metrics import METRICS, StageMetrics, observe_stage

IDENTITY = {"pipeline": "digits", "model_family": "cct", "stage": "search"}


@dataclass
class Gateway:
    """A server that keeps what was pushed to it."""

    url: str
    status: int = 200
    pushes: list[tuple[str, str, str]] = field(default_factory=list)

    def samples(self, number: int = -1) -> dict[str, float]:
        return samples_of(self.pushes[number][2])


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    class Handler(BaseHTTPRequestHandler):
        def _take(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            found.pushes.append((self.command, self.path, body))
            self.send_response(found.status)
            self.end_headers()

        do_POST = do_PUT = _take  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    found = Gateway(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AUTOMERGE_PUSHGATEWAY", found.url)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOMERGE_PUSHGATEWAY", raising=False)


def samples_of(text: str) -> dict[str, float]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for sample in samples:
        assert {key: sample.labels[key] for key in IDENTITY} == IDENTITY
    return {
        sample.name + "".join(f"/{value}" for key, value in sample.labels.items() if key not in IDENTITY): sample.value
        for sample in samples
    }


def run(folder: Path, fail: bool = False) -> None:
    with observe_stage("search", pipeline="digits", family="cct", folder=folder) as metrics:
        metrics.set("automerge_search_best_objective", 0.9)
        metrics.add("automerge_search_trials_total", status="ok")
        metrics.add("automerge_search_trials_total", status="ok")
        metrics.observe("automerge_search_trial_duration_seconds", 0.5)
        if fail:
            raise RuntimeError("the stage's own error")


@pytest.mark.parametrize("definition", METRICS.values(), ids=list(METRICS))
def test_names_follow_the_naming_guide(definition) -> None:
    """The rules that `promtool check metrics` applies, and base units."""
    name = definition.name
    assert re.fullmatch(r"automerge_[a-z][a-z0-9_]*", name)
    assert definition.help.endswith(".") and not definition.help[0].islower()
    assert name.endswith("_total") == (definition.kind == "counter")
    assert not re.search(r"_(gauge|counter|histogram|summary|metric|count|sum|bucket|info)(_|$)", name)
    assert not re.search(r"_(milliseconds|ms|minutes|hours|percent|kilobytes|megabytes|mb|kb)(_|$)", name)
    assert not {"le", "quantile", *IDENTITY} & set(definition.labels)
    assert bool(definition.buckets) == (definition.kind == "histogram")


@pytest.mark.parametrize("definition", METRICS.values(), ids=METRICS.keys())
def test_every_metric_is_written_once_it_is_set(definition, tmp_path: Path) -> None:
    """The client library keeps some endings of names for itself."""
    metrics = StageMetrics("merge", "digits", "cct", None)
    labels = dict.fromkeys(definition.labels, "x")
    {"gauge": metrics.set, "counter": metrics.add, "histogram": metrics.observe}[definition.kind](
        definition.name, 1.0, **labels
    )
    metrics.write_textfile(tmp_path / "one.prom")
    suffix = "_count" if definition.kind == "histogram" else ""
    assert re.search(rf"^{definition.name}{suffix}{{.*}} 1.0$", (tmp_path / "one.prom").read_text(), re.MULTILINE)


def test_without_a_gateway_a_textfile_is_written(tmp_path: Path) -> None:
    run(tmp_path)
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["search.prom"]
    samples = samples_of((tmp_path / "metrics" / "search.prom").read_text())
    assert samples["automerge_search_best_objective"] == 0.9
    assert samples["automerge_search_trials_total/ok"] == 2
    assert samples["automerge_search_trial_duration_seconds_count"] == 1
    assert samples["automerge_stage_last_run_success"] == 1
    assert samples["automerge_stage_last_success_timestamp_seconds"] > 1.7e9
    assert not [name for name in samples if "_created" in name or "preservation" in name]  # nothing that was not set


def test_a_failed_run_keeps_the_last_success_in_the_textfile(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "metrics" / "search.prom"
    before = samples_of(path.read_text())["automerge_stage_last_success_timestamp_seconds"]
    with pytest.raises(RuntimeError, match="own error"):
        run(tmp_path, fail=True)
    after = samples_of(path.read_text())
    assert after["automerge_stage_last_success_timestamp_seconds"] == before
    assert after["automerge_stage_last_run_success"] == 0
    assert after["automerge_search_trials_total/ok"] == 2  # replaced, not added up


def test_a_damaged_textfile_is_replaced_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics" / "search.prom"
    path.parent.mkdir()
    path.write_text("automerge_stage_duration_seconds{ 7")
    run(tmp_path)
    assert "cannot be read" in caplog.text
    assert samples_of(path.read_text())["automerge_search_best_objective"] == 0.9


def test_push_adds_to_the_group_of_pipeline_family_and_stage(gateway: Gateway, tmp_path: Path) -> None:
    run(tmp_path)
    [(method, path, _)] = gateway.pushes
    assert method == "POST"  # PUT would replace the group, and a failure would erase the last success
    assert path == "/metrics/job/automerge/model_family/cct/pipeline/digits/stage/search"
    assert gateway.samples()["automerge_search_trials_total/ok"] == 2
    assert not (tmp_path / "metrics").exists()


def test_a_failed_run_pushes_no_last_success(gateway: Gateway, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="own error"):
        run(tmp_path, fail=True)
    samples = gateway.samples()
    assert samples["automerge_stage_last_run_success"] == 0
    assert "automerge_stage_last_success_timestamp_seconds" not in samples


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "http://[bad", "http://"])
def test_an_unreachable_gateway_is_a_warning_and_a_textfile(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AUTOMERGE_PUSHGATEWAY", address)
    run(tmp_path)
    assert "metrics were not pushed" in caplog.text
    assert (tmp_path / "metrics" / "search.prom").exists()


def test_a_gateway_that_refuses_is_a_warning(
    gateway: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.status = 400
    run(tmp_path)
    assert "metrics were not pushed" in caplog.text


def test_an_unwritable_folder_does_not_fail_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    run(blocked)
    assert "metrics were not written" in caplog.text


def test_publish_pushes_at_most_every_quarter_of_a_minute(gateway: Gateway) -> None:
    now = 0.0
    metrics = StageMetrics("search", "digits", "cct", gateway.url, clock=lambda: now)
    for now in range(61):  # noqa: B007 - read by the clock
        metrics.add("automerge_search_trials_total", status="ok")
        metrics.publish()
    assert [gateway.samples(index)["automerge_search_trials_total/ok"] for index in range(4)] == [16, 31, 46, 61]


def test_publish_asks_a_dead_gateway_only_once(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    gateway.status = 503
    now = 0.0
    metrics = StageMetrics("search", "digits", "cct", gateway.url, clock=lambda: now)
    metrics.add("automerge_search_trials_total", status="ok")
    with caplog.at_level(logging.WARNING):
        for now in (20, 40, 60):  # noqa: B007
            metrics.publish()
    assert len(gateway.pushes) == 1
    assert len(caplog.records) == 1


def test_a_wrong_name_kind_or_label_is_an_error() -> None:
    metrics = StageMetrics("search", "digits", "cct", None)
    with pytest.raises(KeyError):
        metrics.set("automerge_unknown", 1)
    with pytest.raises(ValueError, match="is a counter"):
        metrics.set("automerge_search_trials_total", 1, status="ok")
    with pytest.raises(ValueError, match="labels"):
        metrics.set("automerge_preservation_rate_ratio", 1)

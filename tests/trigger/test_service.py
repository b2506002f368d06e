"""The running service: what it makes of hostile and clumsy deliveries, of a thousand at once, and of being killed."""

import json
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny import TinyPair, tiny_spec
from tests.trigger.registry import add_version, client, copy_database
from tests.trigger.service import (
    AUTOMERGE,
    SECRET,
    Answer,
    Service,
    alias_event,
    running_service,
    signed_headers,
    wait_for,
)

pytestmark = pytest.mark.slow

GOOD = alias_event("digits-low")


def configured(database: Path, template: dict[str, Any], **rule: Any) -> dict[str, Any]:
    return {
        "state": "state/trigger.sqlite",
        "registries": [{"kind": "mlflow", "uri": f"sqlite:///{database}"}],
        "reconcile_seconds": 3600,
        "max_body_bytes": 100_000,
        "runner": {"kind": "local", "folder": "runs"},
        "rules": [
            {
                "name": "digits",
                "registry": "mlflow",
                "models": ["digits-*"],
                "select": {"alias": "candidate"},
                "group_by": ["base"],
                "cooldown_seconds": 0,
                "dry_run": True,
                "spec": template,
                **rule,
            }
        ],
    }


TEMPLATE = {
    "name": "merged",
    "model": {"kind": "transformers", "target": "AutoModel"},
    "each": {
        "source": {"name": "$(candidate.name)", "uri": "$(candidate.uri)"},
        "tasks": [
            {
                "name": "$(candidate.name)",
                "kind": "language_modelling",
                "specialist": "$(candidate.name)",
                "validation": "s3://data/v",
                "test": "s3://data/t",
            }
        ],
    },
}


@pytest.fixture(scope="module")
def service(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that decides and starts nothing."""
    folder = tmp_path_factory.mktemp("service")
    database = copy_database(empty_database, folder)
    with running_service(folder, configured(database, TEMPLATE)) as running:
        yield running


def raw(service: Service, content: bytes, *, close: bool = False, seconds: float = 30) -> bytes:
    """The answer to bytes that no client would send."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(content)
        if close:
            return b""
        answer = b""
        try:
            while part := connection.recv(65_536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def unsigned(body: bytes = GOOD, **changes: str | None) -> Callable[[Service], Answer]:
    """A good delivery with some headers changed, or taken out."""
    headers = signed_headers(body)
    for name, value in changes.items():
        headers[name.replace("_", "-")] = value  # type: ignore[assignment]
    kept = {name: value for name, value in headers.items() if value is not None}
    return lambda service: service.request("POST", "/webhooks/mlflow", body=body, headers=kept)


def signed(body: bytes, **how: Any) -> Callable[[Service], Answer]:
    return lambda service: service.deliver(body, **how)


HUGE = b'{"entity": "' + b"x" * 200_000 + b'"}'
TEST = alias_event("example_model")

HOSTILE: dict[str, tuple[Callable[[Service], Answer], int, str]] = {
    "another secret": (signed(GOOD, secret="guessed-it"), 401, "bad_signature"),
    "no secret": (signed(GOOD, secret=""), 401, "bad_signature"),
    "no signature": (unsigned(X_MLflow_Signature=None), 401, "bad_signature"),
    "empty signature": (unsigned(X_MLflow_Signature=""), 401, "bad_signature"),
    "signature of another scheme": (unsigned(X_MLflow_Signature="v2,abc"), 401, "bad_signature"),
    "signature that is no ASCII": (unsigned(X_MLflow_Signature="v1,\xff\xfe"), 401, "bad_signature"),
    "no delivery id": (unsigned(X_MLflow_Delivery_Id=None), 401, "bad_signature"),
    "another delivery id": (unsigned(X_MLflow_Delivery_Id="other"), 401, "bad_signature"),
    "delivery id without end": (unsigned(X_MLflow_Delivery_Id="a" * 5_000), 401, "bad_signature"),
    "no timestamp": (unsigned(X_MLflow_Timestamp=None), 401, "bad_signature"),
    "timestamp that is none": (unsigned(X_MLflow_Timestamp="1e9"), 401, "bad_signature"),
    "negative timestamp": (unsigned(X_MLflow_Timestamp="-5"), 401, "bad_signature"),
    "stale": (lambda s: s.deliver(GOOD, timestamp=time.time() - 700), 401, "stale"),
    "from the future": (lambda s: s.deliver(GOOD, timestamp=time.time() + 700), 401, "stale"),
    "huge": (signed(HUGE), 413, "too_large"),
    "huge and not signed": (unsigned(HUGE, X_MLflow_Signature="v1,x"), 413, "too_large"),
    "no JSON": (signed(b"{entity: 1}"), 400, "malformed"),
    "empty": (signed(b""), 400, "malformed"),
    "no UTF-8": (signed(b'{"entity": "\xff"}'), 400, "malformed"),
    "a list": (signed(b"[1, 2]"), 400, "malformed"),
    "nested": (signed(b"[" * 50_000), 400, "malformed"),
    "no data": (signed(b'{"entity": "a", "action": "b"}'), 400, "malformed"),
    "data that is a list": (signed(b'{"entity": "a", "action": "b", "data": [1]}'), 400, "malformed"),
    "form": (signed(GOOD, content_type="application/x-www-form-urlencoded"), 415, "malformed"),
    "no content type": (signed(GOOD, content_type=""), 415, "malformed"),
    "unknown model": (signed(alias_event("nobodys-model")), 200, "ignored"),
    "test of the webhook": (signed(TEST), 200, "ignored"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_clumsy_deliveries(service: Service, name: str) -> None:
    deliver, status, outcome = HOSTILE[name]
    before = service.metric("automerge_trigger_deliveries_total", door="mlflow", outcome=outcome)
    answer = deliver(service)
    assert (answer.status, answer.outcome) == (status, outcome), answer
    assert service.metric("automerge_trigger_deliveries_total", door="mlflow", outcome=outcome) == before + 1
    assert service.audited("delivery", outcome=outcome)


def test_a_replayed_delivery_is_taken_once(service: Service) -> None:
    headers = signed_headers(GOOD)
    outcomes = [service.request("POST", "/webhooks/mlflow", body=GOOD, headers=headers).outcome for _ in range(3)]
    assert outcomes == ["accepted", "duplicate", "duplicate"]


def test_a_signature_is_good_for_its_body_only(service: Service) -> None:
    headers = signed_headers(GOOD)
    assert service.request("POST", "/webhooks/mlflow", body=GOOD + b" ", headers=headers).status == 401


def test_a_body_without_a_declared_length_is_cut_off(service: Service) -> None:
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    head = b"POST /webhooks/mlflow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(service, head + chunk * 20).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /webhooks/mlflow HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /events HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000,
    ],
    ids=["TLS", "no host", "negative length", "two lengths", "header without end"],
)
def test_what_is_no_request_is_refused(service: Service, content: bytes) -> None:
    assert raw(service, content)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 413", b"HTTP/1.1 431")
    assert service.get("/healthz").status == 200


def test_a_body_that_does_not_come_is_given_up(service: Service) -> None:
    head = b"POST /webhooks/mlflow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"
    begin = time.monotonic()
    assert raw(service, head).startswith(b"HTTP/1.1 408 ")
    assert 8 < time.monotonic() - begin < 28
    raw(service, head, close=True)  # and one whose sender goes away
    assert service.get("/healthz").status == 200


def test_a_cloud_event_in_both_modes(service: Service) -> None:
    bearer = {"Authorization": f"Bearer {SECRET}"}
    identity = str(uuid.uuid4())
    attributes = {"id": identity, "source": "/registry", "type": "model.ready", "specversion": "1.0"}
    binary = bearer | {f"ce-{name}": value for name, value in attributes.items()}
    structured = bearer | {"Content-Type": "application/cloudevents+json; charset=utf-8"}
    body = json.dumps({**attributes, "data": {"name": "digits-low"}}).encode()

    def send(headers: dict[str, str], body: bytes = b"") -> tuple[int, str]:
        answer = service.request("POST", "/events", body=body, headers=headers)
        return answer.status, answer.outcome

    assert send(binary) == (202, "accepted")
    assert send(structured, body) == (200, "duplicate")
    assert send({**binary, "ce-id": "other"}) == (202, "accepted")
    assert send({**binary, "Authorization": "Bearer no"}) == (401, "bad_signature")
    assert send({**binary, "ce-specversion": "0.3"}) == (400, "malformed")
    assert send({**structured, "Content-Type": "application/cloudevents-batch+json"}, b"[]") == (415, "malformed")
    assert send(structured, b"{}") == (400, "malformed")
    assert send(bearer, b"x") == (415, "malformed")
    assert send(structured, HUGE) == (413, "too_large")


def test_an_admin_may_and_nobody_else(service: Service) -> None:
    assert service.admin("/admin/reconcile").status == 202
    assert service.admin("/admin/reconcile", token="guess").status == 401
    assert service.admin("/admin/reconcile", token="").status == 401
    assert service.admin("/admin/runs/none/retry").status == 404
    assert service.admin("/admin/runs/none/retry", token="guess").status == 401
    assert service.get("/admin/reconcile").status == 405


def test_no_secret_comes_out(service: Service) -> None:
    signed(TEST)(service)
    shown = "".join(service.get(path).text for path in ("/", "/metrics", "/openapi.json"))
    shown += (service.folder / "audit.jsonl").read_text() + (service.folder / "log.txt").read_text()
    assert SECRET not in shown
    assert "the-token-of-the-admin" not in shown


def test_no_torch_is_loaded(service: Service) -> None:
    loaded = Path(f"/proc/{service.process.pid}/maps").read_text()
    assert "_sqlite3" in loaded
    assert "/torch/" not in loaded


def test_every_answer_forbids_what_browsers_guess(service: Service) -> None:
    for path in ("/", "/healthz", "/metrics", "/nothing"):
        headers = service.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    policy = service.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_a_model_with_a_hostile_name_is_text_on_the_page(service: Service) -> None:
    name = "digits-<script>alert(1)</script>"
    assert service.deliver(alias_event(name)).outcome == "accepted"
    page = service.get("/").text
    assert "<script" not in page
    assert "digits-&lt;script&gt;" in page


def test_two_secrets_while_one_is_changed(empty_database: Path, tmp_path: Path) -> None:
    config = configured(copy_database(empty_database, tmp_path), TEMPLATE)
    with running_service(tmp_path, config, {"AUTOMERGE_WEBHOOK_SECRET": "the-new-one, the-old-one"}) as service:
        assert service.deliver(GOOD, secret="the-old-one").status == 202
        assert service.deliver(GOOD, secret="the-new-one").status == 202
        assert service.deliver(GOOD, secret="the-new-one, the-old-one").status == 401
        service.stop()
    with running_service(tmp_path, config, {"AUTOMERGE_WEBHOOK_SECRET": "", "AUTOMERGE_ADMIN_TOKEN": ""}) as service:
        assert service.deliver(GOOD, secret="").status == 403
        assert service.admin("/admin/reconcile", token="").status == 403
        page = service.get("/").text
        assert "The doors are closed" in page
        assert "Read-only: no admin token is configured." in page


def test_a_mistake_at_the_start_is_one_sentence(empty_database: Path, tmp_path: Path) -> None:
    config = configured(copy_database(empty_database, tmp_path), TEMPLATE)

    def start(*options: str) -> str:
        done = subprocess.run(
            [*AUTOMERGE, "serve", "--config", "trigger.yaml", *options], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2
        [sentence] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr
        return sentence

    assert "trigger.yaml: cannot be read (No such file or directory)" in start()
    with running_service(tmp_path, config) as service:
        port = service.url.rpartition(":")[2]
        assert f"127.0.0.1:{port}: cannot listen there (Address already in use)" in start("--port", port)
        assert "another trigger service has it open" in start("--port", "0")
    config["rules"][0]["spec"] = {**TEMPLATE, "name": "$(nothing)"}
    (tmp_path / "trigger.yaml").write_text(json.dumps(config))
    assert "rule digits: spec: name: there is no $(nothing) here" in start("--port", "0")


def test_sigterm_finishes_what_was_begun(empty_database: Path, tmp_path: Path) -> None:
    config = configured(copy_database(empty_database, tmp_path), TEMPLATE)
    with running_service(tmp_path, config) as service:
        host, port = service.url.removeprefix("http://").split(":")
        head = "".join(f"{name}: {value}\r\n" for name, value in signed_headers(GOOD).items())
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"POST /webhooks/mlflow HTTP/1.1\r\nHost: x\r\n{head}".encode())
            connection.sendall(f"Content-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD[:10])
            time.sleep(0.5)
            service.process.terminate()
            time.sleep(0.5)
            connection.sendall(GOOD[10:])
            assert connection.recv(65_536).startswith(b"HTTP/1.1 202 ")
        assert service.process.wait(60) == 0
        assert [line["event"] for line in map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())] == [
            "start",
            *("delivery",),
            "stop",
        ]
    with running_service(tmp_path, config) as service:
        assert "digits-low" in service.get("/").text


def tiny_rule(pair: TinyPair, database: Path) -> dict[str, Any]:
    """A rule whose run is the smallest real job."""
    spec = tiny_spec(str(pair.folder), f"sqlite:///{database}", evaluation={"resamples": 100, "onnx": False})
    value = spec.model_dump(mode="json")
    del value["sources"], value["tasks"]
    value["each"] = {
        "source": {"name": "$(candidate.tags.half)", "uri": "$(candidate.uri)"},
        "tasks": [
            {
                "name": "$(candidate.tags.half)",
                "kind": "classification",
                "specialist": "$(candidate.tags.half)",
                "validation": f"{pair.folder}/$(candidate.tags.half)-validation.safetensors",
                "test": f"{pair.folder}/$(candidate.tags.half)-test.safetensors",
            }
        ],
    }
    return {
        "name": "tiny",
        "registry": "mlflow",
        "models": ["tiny*"],
        "select": {"alias": "candidate"},
        "cooldown_seconds": 0,
        "spec": value,
    }


def add_tiny(pair: TinyPair, database: Path) -> None:
    for half in ("left", "right"):
        add_version(database, f"tiny-{half}", {"half": half}, source=f"{pair.folder}/{half}.safetensors")


GROUPS = 10
DELIVERIES, REPEATED = 1000, 200


def test_a_thousand_deliveries_at_once(pair: TinyPair, empty_database: Path, tmp_path: Path) -> None:
    """Ten groups are decided in a dry run; one pair is merged for real."""
    database = copy_database(empty_database, tmp_path)
    for group in range(GROUPS):
        for half in ("a", "b"):
            add_version(database, f"digits-{group}-{half}", {"base": f"base-{group}"})
    add_tiny(pair, database)
    config = configured(database, TEMPLATE)
    config["rules"].append(tiny_rule(pair, database))
    names = [f"digits-{group}-{half}" for group in range(GROUPS) for half in ("a", "b")] + ["tiny-left", "tiny-right"]
    bodies = [alias_event(names[number % len(names)]) for number in range(DELIVERIES - REPEATED)]
    deliveries = [(body, signed_headers(body)) for body in bodies]
    deliveries += deliveries[:REPEATED]
    with running_service(tmp_path, config) as service:
        wait_for(lambda: service.metric("automerge_trigger_last_reconcile_timestamp_seconds", registry="mlflow"))

        def send(delivery: tuple[bytes, dict[str, str]]) -> tuple[int, str]:
            body, headers = delivery
            answer = service.request("POST", "/webhooks/mlflow", body=body, headers=headers)
            return answer.status, answer.outcome

        with ThreadPoolExecutor(50) as pool:
            list(pool.map(send, [(body, signed_headers(body)) for body in bodies[:100]]))  # everything is loaded
            before = service.resident_bytes()
            begin = time.monotonic()
            answers = list(pool.map(send, deliveries))
            seconds = time.monotonic() - begin
        grown = service.resident_bytes() - before
        print(f"{DELIVERIES} deliveries in {seconds:.1f} s; RSS {before / 1e6:.0f} MB, grown by {grown / 1e6:.1f} MB")
        assert answers.count((202, "accepted")) == DELIVERIES - REPEATED
        assert answers.count((200, "duplicate")) == REPEATED
        assert grown < 30e6
        wait_for(lambda: service.metric("automerge_trigger_runs_total", rule="tiny", outcome="passed"), 240)
        time.sleep(1)
        assert service.metric("automerge_trigger_decisions_total", rule="digits", decision="would_start") == GROUPS
        assert service.metric("automerge_trigger_decisions_total", rule="tiny", decision="start") == 1
        assert service.metric("automerge_trigger_runs_total", rule="tiny", outcome="started") == 1
        assert len(service.audited("decision", decision="would_start")) == GROUPS
        assert len(list((tmp_path / "runs").iterdir())) == 1
        assert len(client(database).search_model_versions("name = 'tiny'")) == 1


def test_kills_lose_and_double_nothing(pair: TinyPair, empty_database: Path, tmp_path: Path) -> None:
    """Killed right after an answer, then again and again while it decides, starts and follows."""
    database = copy_database(empty_database, tmp_path)
    config = configured(database, TEMPLATE)
    config["rules"] = [tiny_rule(pair, database)]
    accepted: list[dict[str, str]] = []
    body = alias_event("tiny-left")
    with running_service(tmp_path, config) as service:
        wait_for(lambda: service.metric("automerge_trigger_last_reconcile_timestamp_seconds", registry="mlflow"))
        add_tiny(pair, database)
        for _ in range(5):
            headers = signed_headers(body)
            assert service.request("POST", "/webhooks/mlflow", body=body, headers=headers).status == 202
            accepted.append(headers)
        service.kill()
    for delay in (0.0, 0.3, 1.0, 3.0):
        with running_service(tmp_path, config) as service:
            for headers in accepted:
                answer = service.request("POST", "/webhooks/mlflow", body=body, headers=headers)
                assert answer.outcome == "duplicate"
            time.sleep(delay)
            service.kill()
    with running_service(tmp_path, config) as service:
        wait_for(lambda: "passed" in service.get("/").text, 240)
        assert service.stop() == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert len(client(database).search_model_versions("name = 'tiny'")) == 1
    assert len(service.audited("run", state="passed")) == 1
    assert len(service.audited("decision", decision="start")) <= 1  # the line may be lost with the process


def test_a_failed_run_is_retried_by_the_admin(pair: TinyPair, empty_database: Path, tmp_path: Path) -> None:
    database = copy_database(empty_database, tmp_path)
    add_tiny(pair, database)
    config = configured(database, TEMPLATE)
    rule = tiny_rule(pair, database)
    good = rule["spec"]["base"]["uri"]
    rule["spec"]["base"]["uri"] = str(tmp_path / "base.safetensors")  # is not there yet
    config["rules"] = [rule]
    with running_service(tmp_path, config) as service:
        wait_for(lambda: service.metric("automerge_trigger_runs_total", rule="tiny", outcome="failed"), 240)
        [name] = [path.name for path in (tmp_path / "runs").iterdir()]
        assert "base.safetensors" in service.get("/").text
        (tmp_path / "base.safetensors").symlink_to(good)
        service.admin("/admin/reconcile")
        time.sleep(2)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]  # not by itself
        assert service.admin(f"/admin/runs/{name}/retry").status == 202
        assert service.admin(f"/admin/runs/{name}/retry").status == 409
        wait_for(lambda: service.metric("automerge_trigger_runs_total", rule="tiny", outcome="passed"), 240)
        assert service.admin(f"/admin/runs/{name}/retry").status == 409
        assert f'<a href="/runs/{name}/report">report</a>' in service.get("/").text
        report = service.get(f"/runs/{name}/report")
        assert "Merge report" in report.text
        assert "sandbox" in report.headers["content-security-policy"]
        assert service.get("/runs/..%2F..%2Fetc/report").status == 404
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [name, f"{name}-2"]

"""The service in a process of its own on loopback, and deliveries to it."""

import base64
import hashlib
import hmac
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3

SECRET = "the-secret-of-the-webhook"
AUTOMERGE = (sys.executable, "-c", "from automerge.cli import main; main()")
ADMIN = "the-token-of-the-admin"


@dataclass
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def outcome(self) -> str:
        return str(json.loads(self.body)["outcome"])

    @property
    def text(self) -> str:
        return self.body.decode()


@dataclass
class Service:
    """A running service; ``folder`` holds trigger.yaml, audit.jsonl and log.txt."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    pool: urllib3.PoolManager

    def request(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        answer = self.pool.request(method, f"{self.url}{path}", body=body, headers=dict(headers or {}), retries=False)
        return Answer(answer.status, answer.data, answer.headers)

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def deliver(self, body: bytes, **signed: Any) -> Answer:
        return self.request("POST", "/webhooks/mlflow", body=body, headers=signed_headers(body, **signed))

    def admin(self, path: str, token: str = ADMIN) -> Answer:
        return self.request("POST", path, headers={"Authorization": f"Bearer {token}"})

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; 0 if it is not there."""
        for line in self.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")) == labels:
                return float(match[2])
        return 0.0

    def audited(self, event: str, **fields: str) -> list[dict[str, Any]]:
        """Lines of the audit log."""
        lines = [json.loads(line) for line in (self.folder / "audit.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == event and fields.items() <= line.items()]

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def signed_headers(
    body: bytes,
    *,
    secret: str = SECRET,
    identity: str | None = None,
    timestamp: float | None = None,
    content_type: str = "application/json",
) -> dict[str, str]:
    """The headers of a delivery, as MLflow makes them."""
    identity = identity or str(uuid.uuid4())
    seconds = str(int(time.time() if timestamp is None else timestamp))
    message = f"{identity}.{seconds}.".encode() + body
    digest = hmac.new(secret.encode(), message, hashlib.sha256).digest()
    return {
        "Content-Type": content_type,
        "X-MLflow-Delivery-Id": identity,
        "X-MLflow-Timestamp": seconds,
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def alias_event(model: str, version: str = "1", alias: str = "candidate") -> bytes:
    """The body of a delivery: an alias was set."""
    return json.dumps(
        {
            "entity": "model_version_alias",
            "action": "created",
            "timestamp": "2026-11-26T04:00:00+00:00",
            "data": {"name": model, "alias": alias, "version": version},
        }
    ).encode()


@contextmanager
def running_service(
    folder: Path, config: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """A service on a free port of loopback, killed at the end if it still runs."""
    path = folder / "trigger.yaml"
    path.write_text(json.dumps(config))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AUTOMERGE_", "MLFLOW_"))}
    secrets = {"AUTOMERGE_WEBHOOK_SECRET": SECRET, "AUTOMERGE_ADMIN_TOKEN": ADMIN}
    with (folder / "audit.jsonl").open("ab") as audit, (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*AUTOMERGE, "serve", "--config", str(path), "--host", "127.0.0.1", "--port", "0"],
            stdout=audit,
            stderr=log,
            env={**inherited, "OMP_NUM_THREADS": "1", **secrets, **(environment or {})},
            cwd=folder,
        )
    try:
        url = wait_for(lambda: _address(folder / "log.txt", process))
        pool = urllib3.PoolManager(maxsize=64, block=True, timeout=urllib3.Timeout(60))
        service = Service(process, url, folder, pool)
        wait_for(lambda: _is_ready(service))
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(look: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What ``look`` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str | None:
    found = re.search(r"listening on (http://\S+)", log.read_text())
    assert process.poll() is None, log.read_text()
    return found[1] if found else None


def _is_ready(service: Service) -> bool:
    try:
        return service.get("/readyz").status == 200
    except urllib3.exceptions.HTTPError:
        return False

"""Prometheus and its Pushgateway (Debian: prometheus, prometheus-pushgateway) on free ports of loopback."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SCRAPE_SECONDS = 1


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus; ``address`` is ``HOST:PORT``."""

    address: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API; a question that it does not understand is an HTTPError."""
        answer = json.loads(read(f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression is now, for each series."""
        return [float(found["value"][1]) for found in self.ask("query", query=expression)["result"]]

    def firing(self) -> set[str]:
        """The alerts that have begun."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}


def read(address: str) -> str:
    """The body at ``HOST:PORT/PATH``."""
    with urllib.request.urlopen(f"http://{address}", timeout=10) as answer:
        return str(answer.read().decode())


@contextmanager
def running_gateway() -> Iterator[str]:
    """A Pushgateway; its ``HOST:PORT``."""
    with _running("prometheus-pushgateway", "--web.listen-address={address}") as address:
        yield address


@contextmanager
def running_prometheus(folder: Path, rules: Path, *, gateway: str, services: Mapping[str, str]) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a gateway, and services by job and ``HOST:PORT``, every second."""
    config = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {"job_name": "pushgateway", "honor_labels": True, "static_configs": [{"targets": [gateway]}]},
            *({"job_name": job, "static_configs": [{"targets": [at]}]} for job, at in services.items()),
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = (f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}")
    with _running("prometheus", "--web.listen-address={address}", *options) as address:
        yield Prometheus(address)


@contextmanager
def _running(name: str, *options: str) -> Iterator[str]:
    program = shutil.which(name)
    assert program, f"{name} is missing: apt-get install {name}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program, *(option.format(address=address) for option in options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                read(f"{address}/-/ready")
                break
            except urllib.error.URLError:
                assert process.poll() is None, f"{name} ended"
                assert time.monotonic() < deadline, f"{name} does not answer"
                time.sleep(0.05)
        yield address
    finally:
        process.kill()
        process.wait()

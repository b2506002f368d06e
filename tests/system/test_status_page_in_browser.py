"""The trigger's status page in a real browser: under its own policy, at two widths, in light and dark."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from automerge.trigger.candidate import Candidate
from automerge.trigger.rules import Decision
from automerge.trigger.state import Delivery, State
from tests.system.test_report_in_browser import PROBE, browse
from tests.trigger.registry import add_version, make_database
from tests.trigger.service import Service, alias_event, running_service, wait_for
from tests.trigger.test_service import TEMPLATE, configured

pytestmark = pytest.mark.system

LONG = "digits-" + "a-rather-long-name-without-any-space" * 3
HOSTILE = "digits-<script>document.title='owned'</script>"


def fill(path: Path) -> None:
    """Runs of all ends, and decisions and deliveries of several kinds, as the service writes them."""
    state, now = State(path), time.time()

    def decision(verb: Any, number: int, reason: str) -> Decision:
        pair = tuple(
            Candidate("mlflow", f"digits-{name}", str(number), "s3://models/x", number, {"base": "cct"})
            for name in ("low", "high")
        )
        return Decision("digits", (("base", "cct"),), pair, verb, reason)

    ends = [("passed", "", "http://mlflow:5000/#/models/merged/versions/3"), ("refused", "", "")]
    ends += [("failed", f"run failed in 'fetch' ({LONG}: no such object); its log is at http://kfp/1", "")]
    for number, (end, message, registered) in enumerate(ends):
        state.intend(decision("start", number, "digits-low 1, digits-high 1: enough candidates"), "{}", now + number)
        [run] = state.active_runs()
        state.mark_started(run, f"id-{number}", f"http://kfp:8888/#/runs/details/{number}", now + number)
        state.mark_ended(run, end, message, registered, now + 60 + number)  # type: ignore[arg-type]
    state.record_decision(decision("too_few", 7, "1 of the 2 candidates that the rule needs"), now)
    state.record_decision(decision("invalid", 8, "there is no $(candidate.tags.test) here; set the tag 'test'"), now)
    state.record_delivery(Delivery("mlflow", "d-1", now, "model_version_alias.created", LONG, "12", "accepted"))
    state.record_delivery(Delivery("mlflow", "d-2", now, "model_version.created", HOSTILE, "1", "accepted"))
    state.record_delivery(
        Delivery("cloudevents", '["/registry", "1"]', now, "model.ready", "x", "", "ignored", "no rule is about it")
    )
    state.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("status")
    database = make_database(folder / "mlflow.db")
    for name in ("digits-low", "digits-high"):
        add_version(database, name, {"base": "base-1"})
    fill(folder / "state" / "trigger.sqlite")
    config = configured(database, TEMPLATE)
    config["registries"][0]["ui"] = "http://mlflow:5000"
    with running_service(folder, config) as running:
        wait_for(lambda: running.metric("automerge_trigger_decisions_total", rule="digits", decision="would_start"))
        running.deliver(alias_event("digits-low"), secret="not-ours")
        running.deliver(alias_event("digits-low"))
        yield running


def look(service: Service, folder: Path, *options: str, path: str = "/") -> subprocess.CompletedProcess[str]:
    """The page as the service sends it, with its headers, in the browser."""
    program = shutil.which("chromium")
    assert program, "the browser is missing: apt-get install chromium"
    return subprocess.run(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            *options,
            f"{service.url}{path}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_its_own_policy_lets_all_of_it_in(service: Service, tmp_path: Path) -> None:
    """A style sheet whose digest is not the policy's, or any request, would be a line on the console."""
    done = look(service, tmp_path, "--dump-dom")
    assert [line for line in done.stderr.splitlines() if ":CONSOLE:" in line] == []
    assert "Which models became candidates" in done.stdout
    assert "<script" not in done.stdout
    for word in ("passed", "refused", "failed", "would start", "too few", "1 bad signature"):
        assert word in done.stdout


def test_the_policy_lets_nothing_else_in(service: Service, tmp_path: Path) -> None:
    """The same page with an intruder, under the header that the service sends."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    page = service.get("/")
    content = page.body.replace(b"</body>", b'<img src="http://127.0.0.1:9/x.png"><script>1</script></body>')

    class Intruded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", page.headers["content-security-policy"])
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Intruded)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        other = Service(service.process, f"http://127.0.0.1:{server.server_port}", service.folder, service.pool)
        done = look(other, tmp_path, "--dump-dom")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    console = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line and "favicon" not in line]
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_it_fits_its_window_and_can_be_read(
    service: Service, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    content = service.get("/").text.replace("</body>", f"{PROBE}</body>")
    found = browse(content, tmp_path, width=width, scheme=scheme).found
    assert found["width"] == width
    assert found["dark"] == (scheme == "dark")
    assert found["requests"] == []
    assert found["content"] <= width
    assert found["outside"] == []
    assert found["texts"] > 80
    assert found["faint"] == []


def test_it_can_be_heard(service: Service) -> None:
    """A language, one main heading, captioned regions, scoped headers: what a screen reader goes by."""
    page = service.get("/").text
    assert '<html lang="en">' in page
    assert page.count("<h1>") == 1
    assert page.count("<main>") == 1
    for section in ("registries", "runs", "decisions", "deliveries", "rules"):
        assert f'<section aria-labelledby="{section}">' in page
        assert f'id="{section}"' in page
    headers = re.findall(r"<th\b[^>]*>", page)
    assert headers
    assert all("scope=" in header for header in headers)
    assert not re.search(r"<(form|input|button|script|img|iframe)\b", page)


def test_a_picture_of_it(service: Service, tmp_path: Path) -> None:
    picture = tmp_path / "status.png"
    look(service, tmp_path, f"--screenshot={picture}", "--window-size=1200,1500", "--hide-scrollbars")
    assert picture.stat().st_size > 20_000

"""Each way in which a Kubeflow Pipelines server is not reached, as one sentence of the command line."""

import ipaddress
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from automerge_pipelines.client import connect
from tests.pipelines.commands import Command
from tests.pipelines.kfp_server import KfpServer, running_kfp

TOKEN = "a-token-that-must-not-be-shown"
JSON = {"Content-Type": "application/json"}
HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody but itself has signed, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_no_server_is_named(automerge: Command) -> None:
    assert automerge("deploy", "--list").error.startswith(
        "no Kubeflow Pipelines server is named; name its address with --endpoint or AUTOMERGE_KFP_ENDPOINT"
    )


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("ml-pipeline:8888", "'ml-pipeline:8888' is no address of a server; write http://HOST:PORT"),
        ("ftp://host", "is no address of a server"),
        ("http://", "is no address of a server"),
        ("http://host:port", "is no address"),
        ("http://ho st", "is no address of a server"),
        ("https://host/pipeline/#/runs", "is the address of a page; leave out what follows"),
        ("http://someone:secret-word@host", "the endpoint holds a user name or password"),
    ],
)
def test_an_endpoint_that_is_none(automerge: Command, endpoint: str, said: str) -> None:
    error = automerge("deploy", "--list", "--endpoint", endpoint).error
    assert said in error
    assert "secret-word" not in error


def test_nothing_listens(automerge: Command) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        error = automerge("deploy", "--list", "--endpoint", endpoint).error
    assert error.startswith(f"{endpoint}: nothing answers there; check the address and the port")


def test_the_host_is_not_known(automerge: Command) -> None:
    error = automerge("deploy", "--list", "--endpoint", "http://nowhere.invalid").error
    assert error == "http://nowhere.invalid: the host is not known; check the address"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, HTML, "<html>Sign in</html>"), "this is no Kubeflow Pipelines API (it answers with text/html"),
        ((200, JSON, '["a list"]'), "this is no Kubeflow Pipelines API"),
        ((200, {}, ""), "this is no Kubeflow Pipelines API (it answers with nothing)"),
        (
            (404, HTML, "<html>Not found</html>"),
            "this is no Kubeflow Pipelines API (404); check the address and its path",
        ),
        ((404, {}, "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")), "404"),
        (
            (302, {"Location": "https://login.example/auth?state=private-state"}, ""),
            "the server redirects to https://login.example/auth (302); name the address it redirects to",
        ),
        ((403, {}, "RBAC: access denied"), "we may not do this (403: RBAC: access denied); ask for the right"),
        ((502, HTML, "<html>Bad gateway</html>"), "the server fails (502); try again later"),
        ((400, JSON, '{"error_message": "bad  request.\\n"}'), "the server refuses (400: bad request)"),
    ],
)
def test_what_answers_is_something_else(
    automerge: Command, server: KfpServer, answer: tuple[int, dict[str, str], str], said: str
) -> None:
    server.answers = answer
    error = automerge("deploy", "--list").error
    assert error.startswith(f"{server.endpoint}: ")
    assert said in error
    assert "private-state" not in error


def test_tokens(automerge: Command, server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = TOKEN
    error = automerge("deploy", "--list").error
    assert "the server asks for a token (401: " in error
    assert error.endswith("set AUTOMERGE_KFP_TOKEN to a fresh one")
    monkeypatch.setenv("AUTOMERGE_KFP_TOKEN", f"{TOKEN}-of-yesterday")
    error = automerge("deploy", "--list").error
    assert "the token is not accepted; it may have expired (401: " in error
    assert TOKEN not in error
    monkeypatch.setenv("AUTOMERGE_KFP_TOKEN", f"{TOKEN}\n")
    assert automerge("deploy").code == 0
    monkeypatch.setenv("AUTOMERGE_KFP_TOKEN", f"{TOKEN}\nX-Another: header")
    assert "holds no token" in automerge("deploy", "--list").error


def test_no_option_takes_a_token(automerge: Command) -> None:
    """Others see the options of a process."""
    for command in ("deploy", "submit"):
        assert "--token" not in automerge(command, "--help").out


def test_the_service_accounts_token_is_read_for_each_call(
    automerge: Command, server: KfpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    volume = tmp_path / "token"
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(volume))
    server.token = TOKEN
    assert "asks for a token" in automerge("deploy", "--list").error
    volume.write_text(TOKEN)
    client = connect(server.endpoint)
    server.token = "another"
    volume.write_text("another\n")
    assert list(client.pages(client.pipelines.pipeline_service_list_pipelines, "pipelines")) == []
    monkeypatch.setenv("AUTOMERGE_KFP_TOKEN", TOKEN)  # wins
    assert "is not accepted" in automerge("deploy", "--list").error


def test_tls(automerge: Command, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_kfp(certificate) as server:
        error = automerge("deploy", "--list", "--endpoint", server.endpoint).error
        assert error.startswith(f"{server.endpoint}: no TLS connection (")
        assert "name the file of a private certificate authority in AUTOMERGE_KFP_CA_CERT" in error
        monkeypatch.setenv("AUTOMERGE_KFP_CA_CERT", str(certificate))
        assert automerge("deploy", "--endpoint", server.endpoint).code == 0
        monkeypatch.setenv("AUTOMERGE_KFP_CA_CERT", str(tmp_path / "none.pem"))
        assert "none.pem: no such file" in automerge("deploy", "--list", "--endpoint", server.endpoint).error


def test_tls_where_there_is_none(automerge: Command, server: KfpServer) -> None:
    error = automerge("deploy", "--list", "--endpoint", server.endpoint.replace("http", "https")).error
    assert "no TLS connection (" in error


def test_what_may_pass_is_tried_again_but_only_where_that_is_safe(automerge: Command, server: KfpServer) -> None:
    server.fail = {"healthz_service_get_healthz": [503, 500], "pipeline_service_list_pipelines": [502]}
    assert automerge("deploy").code == 0
    server.fail = {"upload_pipeline_version": [503]}
    server.pipeline_versions.clear()
    server.log.clear()
    assert "the server fails (503: played by the test); try again later" in automerge("deploy").error
    assert server.log.count("upload_pipeline_version") == 1


def test_a_context_of_the_kfp_client_is_not_read(automerge: Command, server: KfpServer, tmp_path: Path) -> None:
    context = tmp_path / "home" / ".config" / "kfp" / "context.json"
    context.parent.mkdir(parents=True)
    context.write_text(json.dumps({"namespace": "elsewhere", "client_authentication_cookie": "c"}))
    done = automerge("deploy")
    assert (done.code, done.err) == (0, "")
    assert all("namespace" not in item for item in server.pipelines.values())


def test_by_the_installed_command(server: KfpServer, spec: Path) -> None:
    """In a process of its own nothing is printed but what we print."""
    command = Path(sys.executable).with_name("automerge")
    for arguments, printed in ([("deploy",), "uploaded"], [("submit", spec), "started: tiny-"]):
        done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert printed in done.stdout


class Kubernetes:
    """As much of the Kubernetes API as says whether a secret is there."""

    def __init__(self, certificate: Path) -> None:
        self.status = 404
        self.asked: list[str] = []
        state = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                state.asked.append(self.path)
                token = self.headers.get("authorization", "").lower() == "bearer of the pod"
                self.send_response(state.status if token else 401)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)


@pytest.fixture
def kubernetes(
    automerge: Command, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Kubernetes]:
    """As in a pod: an API server, and a service account."""
    running = Kubernetes(certificate)
    threading.Thread(target=running.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    (tmp_path / "pod-token").write_text("of the pod")
    loader = "kubernetes.config.incluster_config"
    monkeypatch.setattr(f"{loader}.SERVICE_TOKEN_FILENAME", str(tmp_path / "pod-token"))
    monkeypatch.setattr(f"{loader}.SERVICE_CERT_FILENAME", str(certificate))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(running.http.server_address[1]))
    yield running
    running.http.shutdown()
    running.http.server_close()


def test_a_missing_secret_is_said_before_the_run_is_started(
    automerge: Command, server: KfpServer, kubernetes: Kubernetes, spec: Path
) -> None:
    automerge("deploy")
    error = automerge("submit", spec, "--namespace", "team").error
    assert error.startswith(
        "namespace team: the secret 'automerge-s3' with the storage's credentials is missing; create"
    )
    assert server.runs == {}
    automerge("submit", spec, "--namespace", "team", "--parameter", "s3_secret=mine")
    assert [path.rsplit("/", 3)[-3:] for path in kubernetes.asked] == [
        ["team", "secrets", "automerge-s3"],
        ["team", "secrets", "mine"],
    ]
    assert automerge("submit", spec, "--namespace", "team", "--without-secret").code == 0
    assert len(server.runs) == 1


@pytest.mark.parametrize("status", [200, 403, 500])
def test_a_secret_that_is_there_or_cannot_be_looked_for_is_no_obstacle(
    automerge: Command, server: KfpServer, kubernetes: Kubernetes, spec: Path, status: int
) -> None:
    automerge("deploy")
    kubernetes.status = status
    assert automerge("submit", spec, "--namespace", "team").code == 0
    assert len(kubernetes.asked) >= 1


def test_outside_of_a_cluster_no_secret_is_looked_for(automerge: Command, server: KfpServer, spec: Path) -> None:
    automerge("deploy")
    assert automerge("submit", spec, "--namespace", "team").code == 0

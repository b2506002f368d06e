"""A Kubeflow Pipelines server: how it is reached, who we are to it, and each failure of a call as one sentence.

``kfp.Client`` is not used: it prints links, reads a context with cookies from the home folder, takes the page that a
redirect to a login leads to for an empty answer, and has no time limits. The generated classes below it are used.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp_server_api
import urllib3
from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, ServiceAccountTokenVolumeCredentials

from automerge.errors import AutoMergeError

ENDPOINT = "AUTOMERGE_KFP_ENDPOINT"
NAMESPACE = "AUTOMERGE_KFP_NAMESPACE"
TOKEN = "AUTOMERGE_KFP_TOKEN"  # noqa: S105 - the variable's name
CA_CERT = "AUTOMERGE_KFP_CA_CERT"
UI = "AUTOMERGE_KFP_UI"

_SECONDS = (5, 60)
"""Limits for connecting and for an answer."""

_TRANSIENT = (429, 500, 502, 503, 504)
_PAGE = 100
_LONGEST_MESSAGE = 300


class KubeflowError(AutoMergeError):
    """The Kubeflow Pipelines server refuses, does not answer, or does not have what is asked for.

    Args:
        status: the HTTP status, where there was one.
        transient: the same call may succeed later.
    """

    def __init__(self, problem: str, remedy: str = "", *, status: int = 0, transient: bool = False) -> None:
        super().__init__(problem, remedy)
        self.status = status
        self.transient = transient


@dataclass(frozen=True)
class Server:
    """A server that answered.

    Attributes:
        endpoint: its address, without a slash at the end.
        ui: the address of its user interface, by default the same.
        namespace: what lists are restricted to and objects are made in; None where the server has one user.
        pods: the namespace in which the pods of runs start, as far as it is known.
        pipelines, uploads, runs, recurring_runs, experiments: the generated API classes, for :meth:`ask`.
    """

    endpoint: str
    ui: str
    namespace: str | None
    pods: str | None
    api: Any = field(repr=False)
    pipelines: Any = field(repr=False)
    uploads: Any = field(repr=False)
    runs: Any = field(repr=False)
    recurring_runs: Any = field(repr=False)
    experiments: Any = field(repr=False)

    def ask(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call one method of an API class; a GET is repeated twice where the failure may pass.

        Raises:
            KubeflowError: nothing answers, the server refuses, or the answer is not one of Kubeflow Pipelines.
        """
        return _ask(self.endpoint, self.api, function, *arguments, **options)

    def pages(self, function: Callable[..., Any], items: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """All items of a list, page by page.

        Raises:
            KubeflowError: as :meth:`ask`.
        """
        token = ""
        while True:
            answer = self.ask(function, *arguments, page_token=token, page_size=_PAGE, **options)
            yield from getattr(answer, items) or ()
            token = answer.next_page_token or ""
            if not token:
                return

    def named(
        self, function: Callable[..., Any], items: str, name: str, *arguments: Any, **options: Any
    ) -> Iterator[Any]:
        """The items of a list that are called exactly so; the server's own filter takes no notice of case.

        Raises:
            KubeflowError: as :meth:`ask`.
        """
        if not set(name) & set("+%"):  # the server decodes a filter once more than it was encoded
            options["filter"] = equals("display_name", name)
        found = self.pages(function, items, *arguments, **options)
        return (item for item in found if item.display_name == name)

    def own(self) -> dict[str, str]:
        """What restricts a list to our namespace: an argument, or none."""
        return {"namespace": self.namespace} if self.namespace is not None else {}


def equals(key: str, value: str) -> str:
    """A filter of lists: the value of one field."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def connect(endpoint: str | None, namespace: str | None = None) -> Server:
    """Reach a server and ask it whether it is one.

    Who we are is said by a token: that of the environment variable ``AUTOMERGE_KFP_TOKEN``, else that of the service
    account volume which Kubeflow mounts for pipelines (read anew for each call, since it expires), else none. A private
    certificate authority is named by ``AUTOMERGE_KFP_CA_CERT``.

    Args:
        endpoint: address of the API, e.g. ``http://ml-pipeline.kubeflow:8888`` or ``https://kubeflow.example/pipeline``.
        namespace: needed where the server has several users; else only the place of the pods.

    Raises:
        KubeflowError: the address is none, nothing answers there, the server refuses us, it is no Kubeflow Pipelines,
            or it needs a namespace.
    """
    address = _checked(endpoint)
    api = kfp_server_api.ApiClient(_configuration(address))
    # One sentence comes at the end; a warning of each attempt would say the same in other words.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    health = _ask(address, api, kfp_server_api.HealthzServiceApi(api).healthz_service_get_healthz)
    if health.multi_user and namespace is None:
        raise KubeflowError(
            f"{address}: the server has several users, and no namespace is named",
            f"name yours with --namespace or {NAMESPACE}",
        )
    return Server(
        endpoint=address,
        ui=(os.environ.get(UI) or address).rstrip("/"),
        namespace=namespace if health.multi_user else None,
        pods=namespace,
        api=api,
        pipelines=kfp_server_api.PipelineServiceApi(api),
        uploads=kfp_server_api.PipelineUploadServiceApi(api),
        runs=kfp_server_api.RunServiceApi(api),
        recurring_runs=kfp_server_api.RecurringRunServiceApi(api),
        experiments=kfp_server_api.ExperimentServiceApi(api),
    )


def _checked(endpoint: str | None) -> str:
    if not endpoint:
        raise KubeflowError(
            "no Kubeflow Pipelines server is named",
            f"name its address with --endpoint or {ENDPOINT}, e.g. http://ml-pipeline.kubeflow:8888",
        )
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
    except ValueError as error:
        raise KubeflowError(f"{endpoint!r} is no address ({error})", "write http://HOST:PORT") from None
    if parts.username is not None:
        raise KubeflowError("the endpoint holds a user name or password", f"take it out and set {TOKEN}")
    if parts.scheme not in ("http", "https") or not parts.hostname or any(letter.isspace() for letter in endpoint):
        raise KubeflowError(f"{endpoint!r} is no address of a server", "write http://HOST:PORT or https://HOST/PATH")
    if parts.query or parts.fragment:
        raise KubeflowError(f"{endpoint!r} is the address of a page", "leave out what follows '?' or '#'")
    return endpoint.rstrip("/")


def _configuration(address: str) -> Any:
    configuration = kfp_server_api.Configuration(host=address)
    configuration.retries = urllib3.Retry(
        total=2,
        other=0,
        redirect=False,  # it leads to a login page
        respect_retry_after_header=False,  # it may name an hour
        status_forcelist=_TRANSIENT,
        allowed_methods={"GET"},
        backoff_factor=0.2,
        raise_on_status=False,
    )
    authority = os.environ.get(CA_CERT)
    if authority:
        if not Path(authority).is_file():
            raise KubeflowError(f"{authority}: no such file", f"name the certificate authority's file in {CA_CERT}")
        configuration.ssl_ca_cert = authority
    token = os.environ.get(TOKEN, "").strip()
    volume = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH
    if token:
        if not token.isascii() or not token.isprintable():
            raise KubeflowError(f"{TOKEN} holds no token: it has letters that none has", "set it to the bare token")
        configuration.api_key["authorization"] = token
    elif Path(volume).exists():
        configuration.api_key["authorization"] = "read for each call"
        configuration.refresh_api_key_hook = ServiceAccountTokenVolumeCredentials(volume).refresh_api_key_hook
    configuration.api_key_prefix["authorization"] = "Bearer"
    return configuration


def _ask(address: str, api: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        answer = function(*arguments, _request_timeout=_SECONDS, **options)
        kind = str(api.last_response.getheader("content-type") or "nothing")
        # The generated classes make an object without values of whatever else it is.
        is_answer = "json" in kind and isinstance(json.loads(api.last_response.data), dict)
    except kfp_server_api.ApiException as error:
        raise _refusal(address, error) from None
    except kfp_server_api.OpenApiException:
        raise  # our own mistake: a parameter that the method does not have
    except urllib3.exceptions.HTTPError as error:
        raise _silence(address, error) from None
    except OSError as error:
        raise KubeflowError(
            f"{error.filename or address}: the token or certificate cannot be read ({error.strerror or error})",
            f"check the file, or set {TOKEN}",
        ) from None
    except (ValueError, TypeError, AttributeError, KeyError):
        kind, is_answer = "something that is no answer of it", False  # the generated classes cannot read it
    if not is_answer:
        raise KubeflowError(
            f"{address}: this is no Kubeflow Pipelines API (it answers with {kind})",
            f"check the address; Kubeflow's is https://HOST/pipeline, and a login page is passed with {TOKEN}",
        )
    return answer


def _silence(address: str, error: Exception) -> KubeflowError:
    """There was no answer."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.SSLError):
        return KubeflowError(
            f"{address}: no TLS connection ({_short(str(reason))})",
            f"name the file of a private certificate authority in {CA_CERT}, or write http:// where there is no TLS",
        )
    if isinstance(reason, urllib3.exceptions.NameResolutionError):
        return KubeflowError(f"{address}: the host is not known", "check the address", transient=True)
    if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
        return KubeflowError(
            f"{address}: no answer within {_SECONDS[1]} seconds",
            "try again: what the call was to make is looked for first",
            transient=True,
        )
    if isinstance(reason, urllib3.exceptions.ProtocolError):
        return KubeflowError(
            f"{address}: the connection broke before the answer",
            "try again: what the call was to make is looked for first",
            transient=True,
        )
    return KubeflowError(
        f"{address}: nothing answers there",
        "check the address and the port; from outside a cluster: kubectl port-forward -n kubeflow "
        "service/ml-pipeline 8888",
        transient=True,
    )


def _refusal(address: str, error: Any) -> KubeflowError:
    """There was an answer that says no."""
    status, said = int(error.status or 0), _message(error.body)
    quoted = f"{status}: {said}" if said else f"{status}"
    if 300 <= status < 400:
        target = urlsplit(str((error.headers or {}).get("location", "")))
        where = f" to {target.scheme}://{target.netloc}{target.path}" if target.netloc else ""
        return KubeflowError(
            f"{address}: the server redirects{where} ({status})",
            f"name the address it redirects to; if that is a login page, set {TOKEN}",
            status=status,
        )
    if status == 401:
        has_token = bool(os.environ.get(TOKEN))
        problem = "the token is not accepted; it may have expired" if has_token else "the server asks for a token"
        return KubeflowError(f"{address}: {problem} ({quoted})", f"set {TOKEN} to a fresh one", status=status)
    if status == 403:
        return KubeflowError(
            f"{address}: we may not do this ({quoted})",
            "ask for the right in this namespace, or use a token that has it",
            status=status,
        )
    if status == 404 and not said:
        return KubeflowError(
            f"{address}: this is no Kubeflow Pipelines API ({status})",
            "check the address and its path; Kubeflow's is https://HOST/pipeline",
            status=status,
        )
    if status >= 500 or status == 429:
        return KubeflowError(
            f"{address}: the server fails ({quoted})", "try again later", status=status, transient=True
        )
    return KubeflowError(f"{address}: the server refuses ({quoted})", status=status)


def _message(body: Any) -> str:
    """What the server says in its own words; nothing where that is a page."""
    try:
        value = json.loads(body)
    except (TypeError, ValueError):
        text = str(body or "")
        return "" if "<" in text else _short(text)
    if not isinstance(value, dict):
        return ""
    return _short(str(value.get("message") or value.get("error_message") or value.get("error") or ""))


def _short(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}..."

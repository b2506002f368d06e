"""The web service: two doors for events, the status page, probes, metrics, and the admin's two actions."""

import asyncio
import hmac
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from automerge.errors import AutoMergeError
from automerge.trigger import cloudevents, mlflow_webhook
from automerge.trigger.audit import audit
from automerge.trigger.config import LocalRunner, Secrets, TriggerConfig
from automerge.trigger.delivery import Facts, Refusal
from automerge.trigger.metrics import TriggerMetrics
from automerge.trigger.page import StatusPage
from automerge.trigger.reconcile import DecisionLoop
from automerge.trigger.runners import Runner, described
from automerge.trigger.state import Delivery, State
from automerge.trigger.template import render

log = logging.getLogger(__name__)

_BODY_SECONDS = 10.0
_SMALL_BODY = 64 * 1024
_MOST_THROWN_AWAY, _SECONDS_THROWN_AWAY = 16 * 1024 * 1024, 2.0
_LARGE_AT_ONCE = 16
"""Bodies that are large, or do not say how large they are, are read so many at a time: memory has a bound."""

_CONTENT_POLICY = "default-src 'none'; style-src '{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"


class Answer(BaseModel):
    """What a door says."""

    outcome: str
    reason: str = ""


class Problem(BaseModel):
    """Why something is refused."""

    outcome: str
    reason: str


class Health(BaseModel):
    """The answer of a probe."""

    status: str


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The delivery is malformed."},
    401: {"model": Problem, "description": "The signature or token is not ours, or too old."},
    403: {"model": Problem, "description": "No secret is configured, so the door is closed."},
    408: {"model": Problem, "description": "The body did not arrive in time."},
    413: {"model": Problem, "description": "The body is too large."},
    415: {"model": Problem, "description": "The content type is not taken."},
}
_PROBLEM = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Not able to work."}}
_TAKEN: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "A repetition, or nothing that needs a look at the registry."},
    202: {"model": Answer, "description": "Written down; the registry is read again."},
}
_ADMIN: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is not the admin's."},
    403: {"model": Problem, "description": "No admin token is configured."},
}


def make_app(
    config: TriggerConfig,
    state: State,
    loop: DecisionLoop,
    runner: Runner,
    metrics: TriggerMetrics,
    secrets: Secrets,
    folder: Path,
) -> FastAPI:
    """The application; its lifespan starts and ends the decision loop, and closes the runner and the state.

    Args:
        config: the configuration.
        state: the state file.
        loop: not started yet.
        runner: where runs go.
        metrics: what is counted.
        secrets: of the environment.
        folder: where relative paths of spec templates start.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        audit("start", version=version("automerge-models"))
        yield
        await run_in_threadpool(loop.stop)
        await run_in_threadpool(runner.close)
        state.close()
        audit("stop")

    app = FastAPI(
        title="AutoMerge trigger",
        description="Starts merges when registries have candidates.",
        version=version("automerge-models"),
        lifespan=lifespan,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(_SecurityHeaders)
    large_bodies = asyncio.Semaphore(_LARGE_AT_ONCE)
    page = StatusPage(config, state, runner, metrics, secrets)
    patterns = {
        kind: [p for r in config.registries if r.kind == kind for rule in config.rules_of(r) for p in rule.models]
        for kind in ("mlflow", "kubeflow")
    }

    async def take(
        door: str, request: Request, verify_and_read: Callable[[Mapping[str, str], bytes], tuple[str, Facts]]
    ) -> JSONResponse:
        """Verify, write down, wake the loop, answer."""
        try:
            if not secrets.webhook:
                raise Refusal("bad_signature", "no AUTOMERGE_WEBHOOK_SECRET is configured", 403)
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _body(request, config.max_body_bytes, large_bodies)
            identity, facts = verify_and_read(dict(request.headers), body)
        except TimeoutError:
            return _refused(door, Refusal("malformed", f"the body did not arrive in {_BODY_SECONDS:g} seconds", 408))
        except ClientDisconnect:
            return _refused(door, Refusal("malformed", "the sender went away", 400))
        except Refusal as refusal:
            return _refused(door, refusal)
        del body
        ignored = facts.ignored
        if not ignored and door == "mlflow" and facts.model and not _is_watched(facts.model, patterns["mlflow"]):
            ignored = "no rule is about this model"
        outcome = "ignored" if ignored else "accepted"
        delivery = Delivery(
            door,
            identity,
            time.time(),
            facts.kind,
            facts.model,
            facts.version,
            "ignored" if ignored else "accepted",
            ignored,
        )
        if not await run_in_threadpool(state.record_delivery, delivery):
            outcome = "duplicate"
        elif not ignored:
            loop.notice("mlflow" if door == "mlflow" else None)
        metrics.deliveries.labels(door, outcome).inc()
        audit(
            "delivery",
            door=door,
            id=identity,
            kind=facts.kind,
            model=facts.model,
            version=facts.version,
            outcome=outcome,
            reason=ignored,
        )
        return JSONResponse({"outcome": outcome, "reason": ignored}, 202 if outcome == "accepted" else 200)

    def _refused(door: str, refusal: Refusal) -> JSONResponse:
        # Nothing of it is written to the state file: whoever is not known must not fill the disk.
        metrics.deliveries.labels(door, refusal.outcome).inc()
        audit("delivery", door=door, outcome=refusal.outcome, reason=refusal.reason)
        headers = {"Connection": "close"} if refusal.status in (408, 413) else {}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer" if door == "cloudevents" else "Signature"
        return JSONResponse({"outcome": refusal.outcome, "reason": refusal.reason}, refusal.status, headers)

    @app.post(
        "/webhooks/mlflow",
        status_code=202,
        response_model=Answer,
        responses={**_TAKEN, **_REFUSALS},
        openapi_extra=_MLFLOW_REQUEST,
        tags=["doors"],
    )
    async def mlflow_delivery(request: Request) -> Response:
        """A webhook of MLflow, signed by HMAC-SHA256 over the raw body."""

        def verify_and_read(headers: Mapping[str, str], body: bytes) -> tuple[str, Facts]:
            identity = mlflow_webhook.verify(headers, body, secrets.webhook, time.time(), config.replay_seconds)
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Refusal("malformed", "the content type is not application/json", 415)
            return identity, mlflow_webhook.read(body)

        return await take("mlflow", request, verify_and_read)

    @app.post(
        "/events",
        status_code=202,
        response_model=Answer,
        responses={**_TAKEN, **_REFUSALS},
        openapi_extra=_EVENT_REQUEST,
        tags=["doors"],
    )
    async def event(request: Request) -> Response:
        """A CloudEvent, version 1.0, in binary or structured mode; the bearer token is the webhook secret."""

        def verify_and_read(headers: Mapping[str, str], body: bytes) -> tuple[str, Facts]:
            cloudevents.verify(headers, secrets.webhook)
            return cloudevents.read(headers, body)

        return await take("cloudevents", request, verify_and_read)

    @app.get("/", response_class=HTMLResponse, tags=["status"])
    def status() -> Response:
        """What was received and decided, and why; what runs."""
        return HTMLResponse(page.html(), headers={"Content-Security-Policy": _CONTENT_POLICY.format(style=page.style)})

    @app.get("/healthz", response_model=Health, responses=_UNAVAILABLE, tags=["probes"])
    def healthz() -> Response:
        """Whether the service works at all: the decision loop is alive."""
        return _probe(loop.alive)

    @app.get("/readyz", response_model=Health, responses=_UNAVAILABLE, tags=["probes"])
    def readyz() -> Response:
        """Whether deliveries can be taken: the state file answers."""
        try:
            state.check()
        except sqlite3.Error:
            return _probe(False)
        return _probe(loop.alive)

    @app.get("/metrics", response_class=Response, tags=["status"])
    def scrape() -> Response:
        """Prometheus metrics."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get(
        "/runs/{name}/report",
        response_class=HTMLResponse,
        responses={404: {"description": "No run of this name has a report here.", "content": _PROBLEM}},
        tags=["status"],
    )
    def report(name: Annotated[str, PathParameter(max_length=200)]) -> Response:
        """The report of a run on this machine; a cluster's lies with the registered version and in its own pages."""
        run = state.run(name)
        found = runner.report(run) if run is not None else None
        if found is None:
            raise _Denied(404, "unknown", "no run of this name has a report here")
        return HTMLResponse(found.read_bytes(), headers={"Content-Security-Policy": _REPORT_POLICY})

    @app.post("/admin/reconcile", status_code=202, responses=_ADMIN, tags=["admin"], openapi_extra=_ADMIN_SECURITY)
    def reconcile(request: Request) -> Answer:
        """Read all registries now."""
        _check_admin(request)
        loop.notice()
        audit("admin", action="reconcile")
        return Answer(outcome="accepted")

    @app.post(
        "/admin/runs/{name}/retry",
        status_code=202,
        responses={
            **_ADMIN,
            404: {"model": Problem, "description": "There is no such run."},
            409: {"model": Problem, "description": "The run goes on, has passed, or its rule cannot make a spec now."},
        },
        tags=["admin"],
        openapi_extra=_ADMIN_SECURITY,
    )
    def retry(request: Request, name: Annotated[str, PathParameter(max_length=200)]) -> Answer:
        """Start a run again that failed or was refused, by the rule's template as it is now."""
        _check_admin(request)
        run = state.run(name)
        if run is None:
            raise _Denied(404, "unknown", "there is no run of this name")
        rule = next((rule for rule in config.rules if rule.name == run.rule), None)
        if rule is None:
            raise _Denied(409, "unchanged", "its rule is no longer configured")
        try:
            anchor = folder if isinstance(config.runner, LocalRunner) else None
            spec = render(rule, run.group, run.candidates, anchor).model_dump_json()
        except AutoMergeError as error:
            raise _Denied(409, "unchanged", described(error)) from None
        if not state.retry(run, spec, time.time()):
            raise _Denied(409, "unchanged", f"the run is {run.state}; only failed and refused ones are started again")
        loop.notice()
        audit("admin", action="retry", run=name)
        return Answer(outcome="accepted")

    def _check_admin(request: Request) -> None:
        if not secrets.admin:
            raise _Denied(403, "closed", "no AUTOMERGE_ADMIN_TOKEN is configured")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(secrets.admin.encode(), given):
            audit("admin", action="refused")
            raise _Denied(401, "refused", "the bearer token is not the admin's")

    @app.exception_handler(_Denied)
    async def denied(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, _Denied)  # noqa: S101 - registered for it alone
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return JSONResponse({"outcome": error.outcome, "reason": error.reason}, error.status, headers)

    @app.exception_handler(sqlite3.Error)
    async def unwritable(request: Request, error: Exception) -> JSONResponse:
        # The sender tries again; until then nothing was promised.
        log.error("the state file cannot be used: %s", error)
        return JSONResponse(
            {"outcome": "failed", "reason": "the state cannot be written now"}, 503, {"Retry-After": "10"}
        )

    return app


class _Denied(Exception):  # noqa: N818 - it is an answer
    def __init__(self, status: int, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.outcome, self.reason = status, outcome, reason


class _SecurityHeaders:
    """Headers of every answer."""

    _HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
        (b"x-frame-options", b"DENY"),
    )

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def _body(request: Request, limit: int, large_bodies: asyncio.Semaphore) -> bytes:
    """The body, no more of it than the limit.

    Raises:
        Refusal: it says that it is larger, or is.
    """
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isascii() and declared.isdigit() else None
    if length is not None and length <= min(_SMALL_BODY, limit):
        return await _read(request, limit)
    async with large_bodies:
        return await _read(request, 0 if length is not None and length > limit else limit, limit)


async def _read(request: Request, limit: int, named: int = 0) -> bytes:
    body = bytearray()
    chunks = request.stream()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            body.clear()
            await _throw_away(chunks)
            raise Refusal("too_large", f"the body is larger than {named or limit} bytes")
    return bytes(body)


async def _throw_away(chunks: AsyncIterator[bytes]) -> None:
    """Take the rest of a body, within bounds: whoever still sends when the connection is closed sees no answer."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_SECONDS_THROWN_AWAY):
            async for chunk in chunks:
                size += len(chunk)
                if size > _MOST_THROWN_AWAY:
                    return


def _probe(works: bool) -> Response:
    return JSONResponse({"status": "ok"}) if works else JSONResponse({"status": "not able to work"}, 503)


def _is_watched(model: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)


_ADMIN_SECURITY: dict[str, Any] = {
    "parameters": [
        {
            "name": "Authorization",
            "in": "header",
            "required": True,
            "schema": {"type": "string"},
            "description": "Bearer and the admin's token.",
        },
    ]
}
_MLFLOW_REQUEST: dict[str, Any] = {
    "parameters": [
        {"name": "X-MLflow-Delivery-Id", "in": "header", "required": True, "schema": {"type": "string"}},
        {"name": "X-MLflow-Timestamp", "in": "header", "required": True, "schema": {"type": "string"}},
        {"name": "X-MLflow-Signature", "in": "header", "required": True, "schema": {"type": "string"}},
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["entity", "action", "data"],
                    "properties": {
                        "entity": {"type": "string"},
                        "action": {"type": "string"},
                        "timestamp": {"type": "string"},
                        "data": {"type": "object"},
                    },
                }
            }
        },
    },
}
_EVENT_REQUEST: dict[str, Any] = {
    "parameters": [
        {
            "name": "Authorization",
            "in": "header",
            "required": True,
            "schema": {"type": "string"},
            "description": "Bearer and the webhook secret.",
        },
        *(
            {
                "name": f"ce-{name}",
                "in": "header",
                "required": False,
                "schema": {"type": "string"},
                "description": "In binary mode.",
            }
            for name in ("id", "source", "type", "specversion", "subject")
        ),
    ],
    "requestBody": {
        "required": False,
        "content": {
            "application/cloudevents+json": {
                "schema": {
                    "type": "object",
                    "required": ["id", "source", "type", "specversion"],
                    "properties": {
                        "id": {"type": "string", "minLength": 1},
                        "source": {"type": "string", "minLength": 1},
                        "type": {"type": "string", "minLength": 1},
                        "specversion": {"const": "1.0"},
                        "subject": {"type": "string"},
                        "data": {},
                    },
                }
            },
            "application/json": {"schema": {}},
        },
    },
}

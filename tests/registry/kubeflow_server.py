"""A server that answers as Kubeflow Model Registry does, for there is none to install.

Made from the models of the registry's own client, and strict: a body or a query with anything that the API does not
know is refused, so are a name that is taken and an id that is not there. What it cannot show is what a real server does
otherwise.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from mr_openapi import models

LISTED = {"pageSize", "nextPageToken", "orderBy", "sortOrder", "filterQuery"}
FOUND = {"name", "externalId", "parentResourceId"}


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class ModelRegistryServer:
    """What the registry holds, each kind by id; and what was asked of it."""

    url: str = ""
    models: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, Any]] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuse: dict[tuple[str, str], int] = field(default_factory=dict)
    """Status by method and last part of the path: such calls are refused."""
    says: str | None = None
    """What every call is answered with, as by another server."""
    page: int = 100
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, method: str, path: list[str], query: dict[str, str], body: Any) -> tuple[int, Any]:
        match method, path:
            case "GET", ["registered_models"]:
                return 200, self._list(self.models.values(), models.RegisteredModelList, query)
            case "GET", ["registered_model"]:
                return 200, self._find(self.models.values(), query, {"name", "externalId"})
            case "POST", ["registered_models"]:
                made = strictly(models.RegisteredModelCreate, body)
                return 201, self._add(self.models, models.RegisteredModel, made)
            case "PATCH", ["registered_models", key]:
                return 200, self._update(self.models, key, strictly(models.RegisteredModelUpdate, body))
            case "GET", ["registered_models", key, "versions"]:
                self._get(self.models, key)
                mine = [each for each in self.versions.values() if each.registered_model_id == key]
                return 200, self._list(mine, models.ModelVersionList, query)
            case "GET", ["model_version"]:
                return 200, self._find(self.versions.values(), query, FOUND)
            case "POST", ["model_versions"]:
                made = strictly(models.ModelVersionCreate, body)
                self._get(self.models, made.registered_model_id)
                return 201, self._add(self.versions, models.ModelVersion, made)
            case "GET", ["model_versions", key]:
                return 200, self._get(self.versions, key)
            case "PATCH", ["model_versions", key]:
                return 200, self._update(self.versions, key, strictly(models.ModelVersionUpdate, body))
            case "GET", ["model_versions", key, "artifacts"]:
                self._get(self.versions, key)
                mine = [models.Artifact(each) for owner, each in self.artifacts.values() if owner == key]
                return 200, self._list(mine, models.ArtifactList, query)
            case "POST", ["model_versions", key, "artifacts"]:
                self._get(self.versions, key)
                return 201, self._add_artifact(key, strictly(models.Artifact, body).actual_instance)
        raise RefusedError(404, f"no such operation: {method} {'/'.join(path)}")

    def _list(self, found: Any, kind: Any, query: dict[str, str]) -> Any:
        if unknown := set(query) - LISTED:
            raise RefusedError(400, f"unknown parameters {sorted(unknown)}")
        found = list(found)
        begin = int(query.get("nextPageToken") or 0)
        end = begin + min(self.page, int(query.get("pageSize", self.page)))
        token = str(end) if end < len(found) else ""
        return kind(items=found[begin:end], nextPageToken=token, pageSize=self.page, size=len(found[begin:end]))

    def _find(self, found: Any, query: dict[str, str], known: set[str]) -> Any:
        if unknown := set(query) - known:
            raise RefusedError(400, f"unknown parameters {sorted(unknown)}")
        for each in found:
            parent = getattr(each, "registered_model_id", None)
            if each.name == query.get("name") and parent == query.get("parentResourceId"):
                return each
        raise RefusedError(404, "nothing of this name")

    def _add(self, place: dict[str, Any], kind: Any, made: Any) -> Any:
        taken = {(each.name, getattr(each, "registered_model_id", None)) for each in place.values()}
        if (made.name, getattr(made, "registered_model_id", None)) in taken:
            raise RefusedError(409, f"{made.name} exists already")
        now = str(int(time.time() * 1000))
        key = str(len(self.models) + len(self.versions) + 1)
        place[key] = kind.from_dict(
            {**made.to_dict(), "id": key, "createTimeSinceEpoch": now, "lastUpdateTimeSinceEpoch": now}
        )
        return place[key]

    def _add_artifact(self, owner: str, made: Any) -> Any:
        if any(each.name == made.name for version, each in self.artifacts.values() if version == owner):
            raise RefusedError(409, f"{made.name} exists already")
        made.id = str(len(self.artifacts) + 1)
        self.artifacts[made.id] = (owner, made)
        return models.Artifact(made)

    def _update(self, place: dict[str, Any], key: str, update: Any) -> Any:
        place[key] = type(place[key]).from_dict({**self._get(place, key).to_dict(), **update.to_dict()})
        return place[key]

    def _get(self, place: dict[str, Any], key: str) -> Any:
        if key not in place:
            raise RefusedError(404, f"no resource {key}")
        return place[key]


def strictly(kind: Any, body: Any) -> Any:
    """The body as the API's model has it; nothing may be in it that the model does not take."""
    try:
        made = kind.from_dict(body)
    except ValueError as error:
        raise RefusedError(400, str(error)) from None
    kept = made.to_dict()
    if lost := sorted(set(body) - set(kept)):
        raise RefusedError(400, f"unknown keys {lost}")
    return made


@contextmanager
def running_model_registry() -> Iterator[ModelRegistryServer]:
    """A server on a free port of loopback, empty at first."""
    registry = ModelRegistryServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            address = urlsplit(self.path)
            _, _, path = address.path.removeprefix("/api/model_registry/").partition("/")
            parts = [unquote(part) for part in path.split("/")]
            query = dict(parse_qsl(address.query, strict_parsing=bool(address.query)))
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with registry.lock:
                registry.calls.append((self.command, path))
                registry.tokens.add(self.headers.get("Authorization"))
                try:
                    if (refusal := registry.refuse.get((self.command, parts[-1]))) is not None:
                        raise RefusedError(refusal, "refused on purpose")
                    status, found = registry.answer(
                        self.command, parts, query, json.loads(content) if content else None
                    )
                    body = json.dumps(found.to_dict())
                except RefusedError as error:
                    status, body = error.status, json.dumps({"code": str(error.status), "message": str(error)})
            body = registry.says if registry.says is not None else body
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PATCH = do  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    registry.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

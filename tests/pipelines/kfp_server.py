"""An HTTP server that takes what a Kubeflow Pipelines API server takes, and nothing else.

Its routes, the names of query parameters, and the models of bodies and answers are read from the installed
kfp-server-api package, which is generated from the server's own API description. A request that does not fit them
exactly is refused: an unknown path, an unknown query parameter, an unknown field, a value of another type. Uploads must
be multipart and parse strictly as ``PipelineSpec`` and ``PlatformSpec``; filters must be of the filter's model, name a
field that the server can filter by, and compare without regard to case, as the server does; lists come in pages.

What it cannot show: that the real server agrees with its description; what its database, the controller of scheduled
workflows or Argo make of what was accepted (whether a cron expression means what we think, when a recurring run starts,
what the tasks of a run are called, whether deleting a recurring run with ``ORPHAN`` spares its runs); authorisation by
namespace; any answer of a gateway in front of it but those that a test plays by hand.
"""

import base64
import inspect
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format  # type: ignore[import-untyped]
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec
from kfp_server_api import models

Json = dict[str, Any]

FILTERABLE = {
    "pipelines": {"pipeline_id", "name", "display_name", "created_at", "description", "namespace"},
    "pipeline_versions": {"pipeline_version_id", "name", "display_name", "created_at", "description"},
    "experiments": {"experiment_id", "display_name", "created_at", "namespace", "storage_state"},
    "runs": {"run_id", "display_name", "created_at", "state", "storage_state", "experiment_id", "recurring_run_id"},
    "recurring_runs": {"recurring_run_id", "display_name", "created_at", "description"},
}
SORTABLE = {"created_at", "display_name"}


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Operation:
    """One operation of the API, as the generated client has it."""

    name: str
    verb: str
    path: re.Pattern[str]
    query: frozenset[str]
    body: str | None
    is_upload: bool
    answer: str


def operations() -> list[Operation]:
    """All operations of the installed client package."""
    found = []
    for class_name, owner in inspect.getmembers(kfp_server_api, inspect.isclass):
        for name, method in inspect.getmembers(owner, inspect.isfunction) if class_name.endswith("Api") else []:
            if not name.endswith("_with_http_info"):
                continue
            source = inspect.getsource(method)
            path, verb = re.search(r"'(/apis/[^']+)', '([A-Z]+)'", source).groups()  # type: ignore[union-attr]
            body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
            kind = re.search(rf":type {body[1]}: (\w+)", source) if body else None
            found.append(
                Operation(
                    name.removesuffix("_with_http_info"),
                    verb,
                    re.compile("([^/:]+)".join(re.escape(piece) for piece in re.split(r"\{[^}]+\}", path))),
                    frozenset(re.findall(r"query_params\.append\(\('([\w.]+)'", source)),
                    kind[1] if kind else None,
                    "local_var_files['uploadfile']" in source,
                    re.search(r"response_type='([^']+)'", source)[1],  # type: ignore[index]
                )
            )
    return found


def check(value: Any, kind: str, where: str) -> None:
    """Refuse a value that is not of one of the package's types."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            raise RefusedError(400, f"{where}: expected a list")
        for index, item in enumerate(value):
            check(item, inner[1], f"{where}[{index}]")
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            raise RefusedError(400, f"{where}: expected a mapping")
        for key, item in value.items():
            check(item, inner[1], f"{where}.{key}")
    elif kind == "datetime":
        if not isinstance(value, str) or not value.endswith("Z"):
            raise RefusedError(400, f"{where}: expected a time")
        datetime.fromisoformat(value)
    elif kind in ("str", "int", "bool", "float"):
        wanted = {"str": str, "int": int, "bool": bool, "float": int | float}[kind]
        if not isinstance(value, wanted) or (kind != "bool" and isinstance(value, bool)):
            raise RefusedError(400, f"{where}: expected {kind}, got {value!r}")
    elif kind != "object":
        model = getattr(models, kind)
        if not model.openapi_types:
            allowed = model.allowable_values
            if value not in allowed:
                raise RefusedError(400, f"{where}: {value!r} is none of {allowed}")
            return
        if not isinstance(value, dict):
            raise RefusedError(400, f"{where}: expected a {kind}")
        attributes = {alias: attribute for attribute, alias in model.attribute_map.items()}
        for key, item in value.items():
            if key not in attributes:
                raise RefusedError(400, f"{where}: unknown field {key!r}")
            check(item, model.openapi_types[attributes[key]], f"{where}.{key}")


@dataclass
class KfpServer:
    """A running server and what it holds; a test may change both.

    Attributes:
        endpoint: its address.
        token: what requests must carry; None for no authentication.
        multi_user: what it says of itself, and whether it asks for namespaces.
        page: largest size of a page.
        log: the operations that it was asked for, in order.
        break_on: operations whose next request gets no answer: the connection is closed instead.
        fail: statuses for the next requests of an operation.
        answers: a status, headers and a body for every request, instead of an answer: a gateway in front of the server.
        frames: of the next runs: what each look at it shows, the last one for ever; see :meth:`show`.
    """

    endpoint: str = ""
    token: str | None = None
    multi_user: bool = False
    page: int = 2
    log: list[str] = field(default_factory=list)
    break_on: list[str] = field(default_factory=list)
    fail: dict[str, list[int]] = field(default_factory=dict)
    answers: tuple[int, dict[str, str], str] | None = None
    frames: list[Json] = field(default_factory=list)
    pipelines: dict[str, Json] = field(default_factory=dict)
    pipeline_versions: dict[str, Json] = field(default_factory=dict)
    experiments: dict[str, Json] = field(default_factory=dict)
    runs: dict[str, Json] = field(default_factory=dict)
    recurring_runs: dict[str, Json] = field(default_factory=dict)
    ended_by_deletion: list[str] = field(default_factory=list)
    _script: dict[str, list[Json]] = field(default_factory=dict)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def changes(self) -> list[str]:
        """The operations so far that change something; the log is emptied."""
        done = [name for name in self.log if not re.search("_(list|get)_", name)]
        self.log.clear()
        return done

    def show(self, state: str, error: str = "", **tasks: str) -> None:
        """Add a look at the next run: its state, an error, and tasks by name (``_`` for ``-``) with their states."""
        details = [
            {"run_id": "", "task_id": name, "display_name": name.replace("_", "-"), "state": task}
            for name, task in tasks.items()
        ]
        frame: Json = {"state": state}
        if details:
            frame["run_details"] = {"task_details": details}
        if error:
            frame["error"] = {"code": 13, "message": error}
        self.frames.append(frame)

    def see_nothing_once(self, operation: str) -> None:
        """The next answer of an operation that lists has no items."""
        look = getattr(self, operation)

        def nothing(*arguments: Any) -> Json:
            setattr(self, operation, look)
            return {"total_size": 0}

        setattr(self, operation, nothing)

    # --- what the operations do ---

    def healthz_service_get_healthz(self, path: list[str], query: Json, body: Any) -> Json:
        return {"multi_user": self.multi_user}

    def pipeline_service_list_pipelines(self, path: list[str], query: Json, body: Any) -> Json:
        return self._list("pipelines", query)

    def pipeline_service_create_pipeline(self, path: list[str], query: Json, body: Json) -> Json:
        self._namespace(body)
        if any(item["name"] == body["name"] for item in self.pipelines.values()):
            raise RefusedError(409, "Already exist error: the name is taken")
        return self._add("pipelines", "pipeline_id", {**body, "display_name": body.get("display_name", body["name"])})

    def pipeline_service_list_pipeline_versions(self, path: list[str], query: Json, body: Any) -> Json:
        self._get("pipelines", path[0])
        return self._list("pipeline_versions", query, pipeline_id=path[0])

    def pipeline_service_get_pipeline_version(self, path: list[str], query: Json, body: Any) -> Json:
        return self._get("pipeline_versions", path[1])

    def pipeline_service_delete_pipeline_version(self, path: list[str], query: Json, body: Any) -> Json:
        self._get("pipeline_versions", path[1])
        del self.pipeline_versions[path[1]]
        return {}

    def upload_pipeline_version(self, path: list[str], query: Json, body: bytes) -> Json:
        pipeline_id, name = query["pipelineid"], query["name"]
        self._get("pipelines", pipeline_id)
        if any(v["pipeline_id"] == pipeline_id and v["name"] == name for v in self.pipeline_versions.values()):
            raise RefusedError(409, "Failed to create a pipeline version")
        pipeline, *rest = yaml.safe_load_all(body.decode("ascii"))
        try:
            parsed = json_format.ParseDict(pipeline, PipelineSpec())
            for platform in rest:
                json_format.ParseDict(platform, PlatformSpec())
        except json_format.ParseError as error:
            raise RefusedError(400, f"Invalid input error: {error}") from None
        if not parsed.pipeline_info.name:
            raise RefusedError(400, "Invalid input error: pipeline's name is missing")
        shown = {"pipeline_spec": pipeline, "platform_spec": rest[0]} if rest else pipeline
        return self._add(
            "pipeline_versions",
            "pipeline_version_id",
            {"pipeline_id": pipeline_id, "name": name, "display_name": name, "pipeline_spec": shown},
        )

    def experiment_service_list_experiments(self, path: list[str], query: Json, body: Any) -> Json:
        self._namespace(query)
        return self._list("experiments", query)

    def experiment_service_create_experiment(self, path: list[str], query: Json, body: Json) -> Json:
        self._namespace(body)
        if any(item["display_name"] == body["display_name"] for item in self.experiments.values()):
            raise RefusedError(409, "Already exist error: the name is taken")
        return self._add("experiments", "experiment_id", body)

    def run_service_list_runs(self, path: list[str], query: Json, body: Any) -> Json:
        if "experiment_id" not in query:
            self._namespace(query)
        return self._list("runs", query)

    def run_service_create_run(self, path: list[str], query: Json, body: Json) -> Json:
        self._get("experiments", body["experiment_id"])
        self._check_start(body)
        frames = self.frames or [{"state": "PENDING"}]
        self.frames = []
        made = self._add("runs", "run_id", {**body, "storage_state": "AVAILABLE", "state": "PENDING"})
        self._script[made["run_id"]] = frames
        return made

    def run_service_get_run(self, path: list[str], query: Json, body: Any) -> Json:
        run = self._get("runs", path[0])
        script = self._script.get(path[0], [])
        if script:
            run.update(script[0])
            if len(script) > 1:
                script.pop(0)
        return run

    def recurring_run_service_list_recurring_runs(self, path: list[str], query: Json, body: Any) -> Json:
        if "experiment_id" not in query:
            self._namespace(query)
        return self._list("recurring_runs", query)

    def recurring_run_service_create_recurring_run(self, path: list[str], query: Json, body: Json) -> Json:
        self._get("experiments", body["experiment_id"])
        self._namespace(body)
        self._check_start(body)
        if not 1 <= int(body["max_concurrency"]) <= 10:
            raise RefusedError(400, "Invalid input error: The max concurrency of the recurring run is out of range")
        if len(body["trigger"]["cron_schedule"]["cron"].split(" ")) != 6:
            raise RefusedError(400, "Invalid input error: Schedule cron is not a supported format")
        return self._add("recurring_runs", "recurring_run_id", body)

    def recurring_run_service_delete_recurring_run(self, path: list[str], query: Json, body: Any) -> Json:
        self._get("recurring_runs", path[0])
        del self.recurring_runs[path[0]]
        if query.get("propagation_policy") != "ORPHAN":
            unfinished = [run for run in self.runs.values() if run.get("recurring_run_id") == path[0]]
            self.ended_by_deletion += [run["run_id"] for run in unfinished if run["state"] in ("PENDING", "RUNNING")]
        return {}

    def recurring_run_service_enable_recurring_run(self, path: list[str], query: Json, body: Any) -> Json:
        self._get("recurring_runs", path[0])["mode"] = "ENABLE"
        return {}

    def recurring_run_service_disable_recurring_run(self, path: list[str], query: Json, body: Any) -> Json:
        self._get("recurring_runs", path[0])["mode"] = "DISABLE"
        return {}

    # --- what they share ---

    def _namespace(self, given: Json) -> None:
        if self.multi_user and not given.get("namespace"):
            raise RefusedError(400, "Invalid input error: a namespace is required in multi-user mode")
        if not self.multi_user and given.get("namespace"):
            raise RefusedError(400, "Invalid input error: in single-user mode there is no filtering by namespace")

    def _check_start(self, body: Json) -> None:
        """What starts a run must name a version that is there, and pass the parameters that it has, all it needs."""
        reference = body["pipeline_version_reference"]
        version = self._get("pipeline_versions", reference["pipeline_version_id"])
        if version["pipeline_id"] != reference["pipeline_id"]:
            raise RefusedError(400, "Invalid input error: the version is not of this pipeline")
        document = version["pipeline_spec"]
        declared = document.get("pipeline_spec", document)["root"]["inputDefinitions"]["parameters"]
        given = body["runtime_config"]["parameters"]
        types = {"STRING": str, "NUMBER_INTEGER": int, "BOOLEAN": bool}
        for name, value in given.items():
            if name not in declared:
                raise RefusedError(400, f"Invalid input error: unknown parameter {name}")
            if not isinstance(value, types[declared[name]["parameterType"]]):
                raise RefusedError(400, f"Invalid input error: type of parameter {name}")
        missing = [name for name, each in declared.items() if not each.get("isOptional") and name not in given]
        if missing:
            raise RefusedError(400, f"Invalid input error: missing parameters {missing}")

    def _add(self, what: str, key: str, item: Json) -> Json:
        self._count += 1
        made = datetime(2026, 11, 1, tzinfo=UTC) + timedelta(minutes=self._count)
        identity = f"{what}-{self._count:03}"
        stored = {**item, key: identity, "created_at": made.isoformat().replace("+00:00", "Z")}
        getattr(self, what)[identity] = stored
        return stored

    def _get(self, what: str, identity: str) -> Json:
        found = getattr(self, what).get(identity)
        if found is None:
            raise RefusedError(404, f"ResourceNotFoundError: {what} {identity} not found")
        return found  # type: ignore[no-any-return]

    def _list(self, what: str, query: Json, **owner: str) -> Json:
        items = [item for item in getattr(self, what).values() if owner.items() <= item.items()]
        for key in ("namespace", "experiment_id"):
            if query.get(key):
                items = [item for item in items if item.get(key) == query[key] or key not in item]
        for predicate in self._predicates(query.get("filter", "")):
            key = predicate["key"]
            if key not in FILTERABLE[what]:
                raise RefusedError(400, f"Invalid input error: no support for filtering on unrecognized field {key!r}")
            if predicate["operation"] != "EQUALS":
                raise RefusedError(400, "this stand-in compares by EQUALS only")
            wanted = predicate["string_value"].lower()
            items = [item for item in items if str(item.get(key, "")).lower() == wanted]
        name, _, direction = (query.get("sort_by") or "created_at").partition(" ")
        if name not in SORTABLE or direction not in ("", "asc", "desc"):
            raise RefusedError(400, f"Invalid input error: cannot sort on {query['sort_by']!r}")
        items.sort(key=lambda item: item[name], reverse=direction == "desc")
        start = int(base64.b64decode(query["page_token"])) if query.get("page_token") else 0
        size = min(int(query.get("page_size") or 20), self.page)
        answer: Json = {"recurringRuns" if what == "recurring_runs" else what: items[start : start + size]}
        if start + size < len(items):
            answer["next_page_token"] = base64.b64encode(str(start + size).encode()).decode()
        return {**answer, "total_size": len(items)}

    def _predicates(self, text: str) -> list[Json]:
        """The filter's predicates. The real server decodes the text once more, and takes both spellings of a field."""
        if not text:
            return []

        def snake(value: Any) -> Any:
            if isinstance(value, dict):
                return {re.sub("[A-Z]", lambda m: f"_{m[0].lower()}", key): snake(item) for key, item in value.items()}
            return [snake(item) for item in value] if isinstance(value, list) else value

        value = snake(json.loads(unquote_plus(text)))
        check(value, "V2beta1Filter", "filter")
        return value["predicates"]  # type: ignore[no-any-return]


@contextmanager
def running_kfp(certificate: Path | None = None, **options: Any) -> Iterator[KfpServer]:
    """A server on a free port of 127.0.0.1 while the context lasts; with TLS if it has a certificate (and its key)."""
    state = KfpServer(**options)
    known = operations()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if state.answers is not None:
                return self.reply(*state.answers)
            try:
                with state._lock:
                    answer = self.answer(body)
            except RefusedError as error:
                text = json.dumps({"error": str(error), "code": 3, "message": str(error), "details": []})
                return self.reply(error.status, {"Content-Type": "application/json"}, text)
            if answer is None:
                self.close_connection = True
                return None
            return self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer))

        def answer(self, body: bytes) -> Json | None:
            if state.token is not None and self.headers.get("authorization") != f"Bearer {state.token}":
                raise RefusedError(401, "Unauthenticated: the token is not valid")
            parts = urlsplit(self.path)
            for operation in known:
                match = operation.path.fullmatch(parts.path)
                if match is not None and operation.verb == self.command:
                    break
            else:
                raise RefusedError(404, f"no operation {self.command} {parts.path}")
            state.log.append(operation.name)
            if state.fail.get(operation.name):
                raise RefusedError(state.fail[operation.name].pop(0), "played by the test")
            if operation.name in state.break_on:
                state.break_on.remove(operation.name)
                return None
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            if unknown := set(query) - operation.query:
                raise RefusedError(400, f"{operation.name}: unknown query parameters {sorted(unknown)}")
            given: Any = None
            if operation.is_upload:
                given = self.uploaded(body)
            elif operation.body is not None:
                given = json.loads(body)
                check(given, operation.body, operation.name)
            elif body:
                raise RefusedError(400, f"{operation.name}: takes no body")
            answer = getattr(state, operation.name)([unquote(part) for part in match.groups()], query, given)
            if answer is not None:  # else the test loses it after the work was done
                check(answer, operation.answer, "answer")
            return answer  # type: ignore[no-any-return]

        def uploaded(self, body: bytes) -> bytes:
            head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
            message = BytesParser().parsebytes(head + body)
            parts = message.get_payload() if message.is_multipart() else []
            if len(parts) != 1 or parts[0].get_param("name", header="content-disposition") != "uploadfile":
                raise RefusedError(400, "Failed to read pipeline from file")
            return parts[0].get_payload(decode=True)  # type: ignore[union-attr,return-value]

        def reply(self, status: int, headers: dict[str, str], text: str) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = handle_any  # noqa: N815

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True)
    state.endpoint = f"http{'s' if certificate else ''}://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
        thread.join()

"""MLflow as the registry: a tracking server, or an SQLite database in the working folder where none is named.

A registration is a run (params, metrics, the artifact folder ``model/``) and a model version whose source is that
folder. MLflow has no call that does both or that creates a version unless one exists, so:

- the run is found again by its tag and completed, if an earlier attempt died before the version was made; weights that
  had arrived are not sent again;
- a version is created together with its tags, in one transaction, and only after everything else is in place, so a
  version that can be seen is whole;
- after creating a version, the versions of the recipe are read again, and if an older one is there (another process was
  quicker) ours is deleted and the older one returned.

On a server that is at-least-once with deduplication: two processes that register one recipe at the same instant return
the same version, and for a moment a second one can be seen. On an embedded database a lock file beside it makes it
exactly once.
"""

import fcntl
import importlib
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from automerge.errors import MissingExtraError, RegistryError
from automerge.registry.registry import RegisteredVersion, RegistryEntry, check_files, weight_files
from automerge.spec import RegistrySpec

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

log = logging.getLogger(__name__)

PREFIX = "automerge."
_RECIPE_TAG = f"{PREFIX}recipe"
_ARTIFACTS = "model"
_DOCUMENTS = "documents"

# MLflow would try for four minutes before it says that a server is not there. These are only defaults: what the user
# sets stays.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# Of the storage that KServe's initializer loads a model from, those that MLflow can keep artifacts in.
_SERVED_SCHEMES = ("s3://", "gs://", "hdfs://", "webhdfs://")

# Limits of MLflow's stores (mlflow.utils.validation).
_LONGEST_KEY = 250
_LONGEST_PARAM = 6000
_LONGEST_RUN_TAG = 8000
_LONGEST_VERSION_TAG = 5000  # newer servers take more
_LARGEST_BATCH = 100


class MlflowRegistry:
    """Registers merged models in MLflow.

    The address is the spec's ``registry.uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite database ``mlflow.db`` in
    the working folder with its artifacts in ``mlartifacts/`` beside it. Credentials are MLflow's own environment
    variables.

    Raises:
        MissingExtraError: mlflow is not installed.
        RegistryError: the address is not usable.
    """

    kind = "mlflow"

    def __init__(self, spec: RegistrySpec) -> None:
        self.uri = _address(spec)
        self._client_when_needed: MlflowClient | None = None
        _import_mlflow()

    def find(self, model: str, recipe_digest: str) -> RegisteredVersion | None:
        """The first version of a recipe, or None."""
        with self._errors(f"find a version of {model!r}"), self._lock():
            found = self._versions(model, recipe_digest)
            return self._registered(found[0], created=False) if found else None

    def register(self, entry: RegistryEntry) -> RegisteredVersion:
        """Register a merged model once for each recipe; see the module's description for crashes and races."""
        with self._errors(f"register {entry.model!r}"), self._lock():
            first = self._versions(entry.model, entry.recipe_digest)
            if first:
                return self._registered(first[0], created=False)
            check_files(entry)
            mlflow = _import_mlflow("exceptions")
            try:
                return self._register_first(entry)
            except mlflow.MlflowException:
                # Processes that complete one interrupted run share it, and the first of them to find that it comes too
                # late deletes it under the others.
                first = self._versions(entry.model, entry.recipe_digest)
                if not first:
                    raise
                return self._registered(first[0], created=False)

    def _register_first(self, entry: RegistryEntry) -> RegisteredVersion:
        """Register a recipe that had no version a moment ago."""
        self._ensure_model(entry.model)
        run_id = self._complete_run(entry)
        made = self._client.create_model_version(
            entry.model,
            source=f"{self._client.get_run(run_id).info.artifact_uri}/{_ARTIFACTS}",
            run_id=run_id,
            tags=_tags(entry, _LONGEST_VERSION_TAG),
            description=entry.description or None,
        )
        oldest = self._versions(entry.model, entry.recipe_digest)[0]
        if int(oldest.version) == int(made.version):
            return self._registered(made, created=True)
        log.info("another process registered this recipe first, as version %s", oldest.version)
        self._client.delete_model_version(entry.model, made.version)
        if oldest.run_id != run_id:
            self._client.delete_run(run_id)
        return self._registered(oldest, created=False)

    def download(self, model: str, version: str, folder: Path) -> Path:
        """Download a version's weights, ONNX files and documents into ``folder``, which must be empty or missing."""
        if folder.exists() and any(folder.iterdir()):
            raise RegistryError(f"{folder}: the folder is not empty", "name a new one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._errors(f"download version {version} of {model!r}"),
            tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary,
        ):
            with self._lock():
                # Not by models:/<name>/<version>: MLflow would look that up in its global registry instead of this one.
                uri = self._client.get_model_version_download_uri(model, version)
            found = _import_mlflow("artifacts").download_artifacts(
                artifact_uri=uri, dst_path=temporary, tracking_uri=self.uri, registry_uri=self.uri
            )
            if folder.exists():
                folder.rmdir()
            Path(found).rename(folder)
        return folder

    def read_document(self, model: str, version: str, name: str) -> bytes | None:
        """One document of a version, whole; None if it has none of this name."""
        with (
            self._errors(f"read {name} of version {version} of {model!r}"),
            tempfile.TemporaryDirectory() as temporary,
        ):
            with self._lock():
                uri = self._client.get_model_version_download_uri(model, version).rstrip("/")
            artifacts = _import_mlflow("artifacts")
            where: dict[str, Any] = {"tracking_uri": self.uri}
            there = artifacts.list_artifacts(artifact_uri=f"{uri}/{_DOCUMENTS}", **where)
            if all(Path(item.path).name != name for item in there):
                return None
            found = artifacts.download_artifacts(
                artifact_uri=f"{uri}/{_DOCUMENTS}/{name}", dst_path=temporary, registry_uri=self.uri, **where
            )
            return Path(found).read_bytes()

    def with_alias(self, model: str, alias: str) -> RegisteredVersion | None:
        """The version that carries an alias, or None."""
        with self._errors(f"look for the alias {alias!r} of {model!r}"), self._lock():
            found = list(self._client.search_registered_models(f"name = {_quoted(model)}"))
            number = found[0].aliases.get(alias) if found else None
            if number is None:
                return None
            return self._registered(self._client.get_model_version(model, str(number)), created=False)

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Give an alias to a version, and take it from the one that carried it."""
        with self._errors(f"set the alias {alias!r} of {model!r}"), self._lock():
            self._client.set_registered_model_alias(model, alias, version)

    @property
    def _client(self) -> "MlflowClient":
        if self._client_when_needed is None:
            self._client_when_needed = _import_mlflow().MlflowClient(self.uri, self.uri)
        return self._client_when_needed

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time on an embedded database: also its tables must be made only once."""
        if not self.uri.startswith("sqlite:"):
            yield
            return
        database = _database(self.uri)
        _check_database(database)
        with database.with_name(f"{database.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process to finish with %s", database)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _versions(self, model: str, recipe_digest: str) -> list[Any]:
        """All versions of a recipe, the oldest first."""
        found: list[Any] = []
        token = None
        condition = f"name = {_quoted(model)} AND tags.`{_RECIPE_TAG}` = {_quoted(recipe_digest)}"
        while True:
            page = self._client.search_model_versions(condition, page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version))

    def _ensure_model(self, model: str) -> None:
        mlflow = _import_mlflow("exceptions")
        try:
            self._client.create_registered_model(model)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _experiment(self, model: str) -> str:
        """The experiment of a model's registrations: ``automerge/<model>``."""
        mlflow = _import_mlflow("exceptions")
        name = f"automerge/{model}"
        location = _artifact_location(self.uri)
        while True:
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                if found.lifecycle_stage == "deleted":  # its name stays taken
                    self._client.restore_experiment(found.experiment_id)
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _complete_run(self, entry: RegistryEntry) -> str:
        """The run behind the version: a new one, or the one that an interrupted registration left, completed."""
        experiment = self._experiment(entry.model)
        tags = _tags(entry, _LONGEST_RUN_TAG)
        condition = f"tags.`{_RECIPE_TAG}` = {_quoted(entry.recipe_digest)}"
        left = self._client.search_runs([experiment], condition, order_by=["attributes.start_time ASC"], max_results=1)
        if left:
            run_id = str(left[0].info.run_id)
            log.info("completing the interrupted registration of run %s", run_id)
        else:
            name = f"{entry.model}-{entry.recipe_digest[:8]}"
            # All tags come with the run: one without its recipe could never be found again.
            run_id = str(self._client.create_run(experiment, tags=tags, run_name=name).info.run_id)
        self._log_numbers(run_id, entry, tags if left else {})
        self._upload_weights(run_id, entry, is_new=not left)
        for folder, files in (("onnx", entry.onnx), (_DOCUMENTS, entry.documents)):
            for file in files:
                self._client.log_artifact(run_id, str(file), f"{_ARTIFACTS}/{folder}")
        self._client.set_terminated(run_id, "FINISHED")
        return run_id

    def _log_numbers(self, run_id: str, entry: RegistryEntry, tags: Mapping[str, str]) -> None:
        entities = _import_mlflow("entities")
        known = self._client.get_run(run_id).data.params  # a param cannot be logged again
        now = int(time.time() * 1000)
        params = {key: value[:_LONGEST_PARAM] for key, value in _keyed(entry.params).items() if key not in known}
        metrics = {key: value for key, value in _keyed(entry.metrics).items() if math.isfinite(value)}
        for batch in _batches([entities.Param(key, value) for key, value in params.items()]):
            self._client.log_batch(run_id, params=batch)
        for batch in _batches([entities.Metric(key, value, now, step=0) for key, value in metrics.items()]):
            self._client.log_batch(run_id, metrics=batch)
        for batch in _batches([entities.RunTag(key, value) for key, value in tags.items()]):
            self._client.log_batch(run_id, tags=batch)

    def _upload_weights(self, run_id: str, entry: RegistryEntry, *, is_new: bool) -> None:
        """Upload what is not there yet: equal recipes make equal weights, so name and size tell."""
        files = weight_files(entry)
        for folder in sorted({path.parent for path in files}):
            target = "/".join((_ARTIFACTS, "weights", *folder.relative_to(entry.weights).parts))
            there = (
                {} if is_new else {item.path: item.file_size for item in self._client.list_artifacts(run_id, target)}
            )
            for file in sorted(path for path in files if path.parent == folder):
                if there.get(f"{target}/{file.name}") != file.stat().st_size:
                    self._client.log_artifact(run_id, str(file), target)

    def _registered(self, version: Any, *, created: bool) -> RegisteredVersion:
        address = _without_credentials(self.uri)
        is_server = address.startswith(("http://", "https://"))
        page = f"{address.rstrip('/')}/#/models/{quote(version.name)}/versions/{version.version}"
        return RegisteredVersion(
            registry=self.kind,
            model=version.name,
            version=str(version.version),
            uri=f"models:/{version.name}/{version.version}",
            url=page if is_server else address,
            storage_uri=_storage_uri(str(version.source or "")),
            created=created,
        )

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Turn MLflow's many exceptions into one sentence."""
        try:
            yield
        except _foreign_errors() as error:
            where = _without_credentials(self.uri)
            raise RegistryError(f"MLflow at {where}: cannot {action}: {_reason(error)}", _remedy(error)) from error


def _address(spec: RegistrySpec) -> str:
    uri = spec.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "KUBERNETES_SERVICE_HOST" in os.environ:
        raise RegistryError(
            "no MLflow server is named, and a database in a pod's working folder is lost with the pod",
            "set MLFLOW_TRACKING_URI in the config map, or registry.uri in the spec",
        )
    uri = uri or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    if re.match(r"^(https?|sqlite|postgresql|mysql|mssql)([+:-]|$)", uri):
        return uri
    raise RegistryError(
        f"registry.uri: {_without_credentials(uri)!r} is no address that MLflow can register models at",
        "use http(s)://host, sqlite:///file, or leave it out",
    )


def _storage_uri(source: str) -> str | None:
    """Where the weights are for a model server, which knows nothing of MLflow: not behind its proxy or on its disk."""
    return f"{source.rstrip('/')}/weights" if source.startswith(_SERVED_SCHEMES) else None


def _artifact_location(uri: str) -> str | None:
    """Beside an embedded database; a server or a shared database decides itself."""
    if not uri.startswith("sqlite:"):
        return None
    return (_database(uri).parent / "mlartifacts").resolve().as_uri()


def _database(uri: str) -> Path:
    return Path(urlsplit(uri).path.removeprefix("/") or "mlflow.db").absolute()


def _check_database(path: Path) -> None:
    """Refuse at once what MLflow would retry for a minute."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"), path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise RegistryError(
            f"{path}: the registry's database cannot be opened ({error.strerror})", "set registry.uri to another place"
        ) from None
    if start and start != b"SQLite format 3\x00":
        raise RegistryError(f"{path}: not an SQLite database", "set registry.uri to another file")


def _import_mlflow(module: str = "") -> Any:
    """mlflow, or one of its modules, with its usage statistics off and our defaults set before its first import."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module("mlflow")
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        raise MissingExtraError("the MLflow registry", "registry") from None
    _silence()  # its import sets levels
    return importlib.import_module(f"mlflow.{module}".rstrip("."))


def _silence() -> None:
    """Only warnings of MLflow and its libraries, which log their progress through handlers of their own."""
    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _foreign_errors() -> tuple[type[BaseException], ...]:
    import sqlalchemy.exc

    exceptions = _import_mlflow("exceptions")
    return (exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError)


def _reason(error: BaseException) -> str:
    """The first line of an error, short, and without the library's doubled prefixes."""
    text = " ".join(str(error).splitlines()[0].split()) if str(error) else type(error).__name__
    if "Max retries exceeded" in text or "Connection refused" in text:
        return "the server does not answer"
    return _without_credentials(text if len(text) <= 300 else f"{text[:300]}...").rstrip(".")


def _remedy(error: BaseException) -> str:
    code = getattr(error, "error_code", "")
    text = str(error)
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or " 401" in text or " 403" in text:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if "Max retries exceeded" in text or "Connection refused" in text:
        return "start it, or correct registry.uri or MLFLOW_TRACKING_URI"
    if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
        return "check the model's name and version"
    return "mend it and run `automerge register` again: it goes on where it stopped"


def _tags(entry: RegistryEntry, longest: int) -> dict[str, str]:
    tags = _keyed({f"{PREFIX}{key}": value[:longest] for key, value in entry.tags.items()})
    return {**tags, _RECIPE_TAG: entry.recipe_digest}


def _keyed(values: Mapping[str, T]) -> dict[str, T]:
    """The values under names that MLflow accepts: letters, digits, ``_ - . /``, spaces and colons."""
    return {re.sub(r"[^\w\-. /:]", "_", key).strip("/")[:_LONGEST_KEY]: value for key, value in values.items()}


def _batches(items: list[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), _LARGEST_BATCH):
        yield items[start : start + _LARGEST_BATCH]


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escape."""
    if "'" in text:
        raise RegistryError(f"{text!r} has an apostrophe, which MLflow cannot search for", "choose another name")
    return f"'{text}'"


def _without_credentials(text: str) -> str:
    if "://" not in text:
        return text
    parts = urlsplit(text)
    if " " not in text and parts.netloc:
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    return re.sub(r"(?<=://)[^/\s@]+@", "", text)

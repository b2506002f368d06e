"""Reading candidates from a registry: nothing in it is changed.

Each through the client of the registry's own project.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

from automerge.errors import MissingExtraError, RegistryError
from automerge.registry.kubeflow_api import call, import_client, items, plain_properties
from automerge.trigger.candidate import Candidate
from automerge.trigger.config import Rule, WatchedRegistry

Read = Callable[[Rule], list[Candidate]]
"""The versions that a rule selects.

Raises:
    RegistryError: the registry does not answer or refuses.
"""

_SPEC_TAG = "automerge.spec.digest"
_PAGE = 100
_ARCHIVED = "ARCHIVED"

# MLflow would try for four minutes before it says that a server is not there. What the user sets stays.
_MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def reader(registry: WatchedRegistry) -> Read:
    """How to read a registry.

    Raises:
        MissingExtraError: its client is not installed.
    """
    if registry.kind == "mlflow":
        return _mlflow_reader(registry)
    return _kubeflow_reader(registry)


def model_page(registry: WatchedRegistry, model: str) -> str:
    """Where people look at a registered model; empty where there is no page."""
    address = registry.ui or registry.uri
    if registry.kind != "mlflow" or not address.startswith("http"):
        return ""
    return f"{address}/#/models/{_quoted(model)}"


def version_page(registry: WatchedRegistry, spec_digest: str) -> str:
    """Where people look at the version that a merge of this spec registered; empty where there is none to be found.

    Args:
        registry: where it may be.
        spec_digest: of :meth:`automerge.spec.Spec.digest`.

    Raises:
        RegistryError: the registry does not answer or refuses.
    """
    if registry.kind != "mlflow":
        return ""
    client, errors = _mlflow_client(registry)
    try:
        found = client.search_model_versions(f"tags.`{_SPEC_TAG}` = '{spec_digest}'", max_results=_PAGE)
    except errors as error:
        raise _failure(registry, error) from None
    newest = max(found, key=lambda version: int(version.creation_timestamp or 0), default=None)
    page = model_page(registry, newest.name) if newest is not None else ""
    return f"{page}/versions/{newest.version}" if newest is not None and page else ""


def _mlflow_client(registry: WatchedRegistry) -> tuple[Any, tuple[type[BaseException], ...]]:
    """A client, and the errors that its calls raise."""
    for name, value in _MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError:
        raise MissingExtraError("watching MLflow", "trigger") from None
    return MlflowClient(registry.uri, registry.uri), (MlflowException, OSError)


def _mlflow_reader(registry: WatchedRegistry) -> Read:
    client, errors = _mlflow_client(registry)

    def read(rule: Rule) -> list[Candidate]:
        try:
            models = {
                model.name: model
                for model in _pages(lambda token: client.search_registered_models(max_results=_PAGE, page_token=token))
                if _matches(rule, model.name)
            }
            return [
                Candidate(
                    registry.title,
                    version.name,
                    str(version.version),
                    _artifacts(client, version),
                    int(version.creation_timestamp or 0),
                    {**models[version.name].tags, **version.tags},
                )
                for version in _selected(client, rule, models)
                if version.status in (None, "READY")
            ]
        except errors as error:
            raise _failure(registry, error) from None

    return read


def _selected(client: Any, rule: Rule, models: Mapping[str, Any]) -> Iterator[Any]:
    """The versions of MLflow that a rule selects."""
    if rule.select.alias is not None:
        for name, model in models.items():
            number = model.aliases.get(rule.select.alias)
            if number is not None:
                yield client.get_model_version(name, number)
        return
    condition = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in (rule.select.tag or {}).items())
    for version in _pages(lambda token: client.search_model_versions(condition, max_results=_PAGE, page_token=token)):
        if version.name in models:
            yield version


def _artifacts(client: Any, version: Any) -> str:
    """Where a version's files are."""
    source = str(version.source or "")
    if source.startswith(("models:/", "runs:/")):
        return str(client.get_model_version_download_uri(version.name, version.version))
    return source


def _pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def _kubeflow_reader(registry: WatchedRegistry) -> Read:
    import_client()

    async def candidates(api: Any, rule: Rule) -> list[Candidate]:
        found = []
        async for model in items(api.get_registered_models):
            if not _matches(rule, model.name) or model.state == _ARCHIVED:
                continue
            async for version in items(api.get_registered_model_versions, model.id):
                own = plain_properties(version)
                selected = all(own.get(key) == value for key, value in (rule.select.tag or {}).items())
                if version.state == _ARCHIVED or not selected:
                    continue
                artifacts = [item.actual_instance async for item in items(api.get_model_version_artifacts, version.id)]
                uris = [each.uri for each in artifacts if each.artifact_type == "model-artifact"]
                uri = next((uri for uri in uris if uri), "")
                tags = {**plain_properties(model), **own}
                # Its ids are never used again, unlike a version's name: they tell what `created` tells elsewhere.
                found.append(Candidate(registry.title, model.name, version.name, uri, int(version.id), tags))
        return found

    return lambda rule: call(registry.uri, "read the candidates", lambda api: candidates(api, rule))


def _matches(rule: Rule, model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in rule.models)


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _failure(registry: WatchedRegistry, error: BaseException) -> RegistryError:
    text = " ".join(str(error).split()) or type(error).__name__
    if any(sign in text for sign in ("Max retries exceeded", "Connection refused", "timed out", "Failed to resolve")):
        return RegistryError(f"{registry.uri}: the registry does not answer", "start it, or correct its uri")
    if any(sign in text for sign in (" 401", " 403", "PERMISSION_DENIED", "UNAUTHENTICATED")):
        return RegistryError(
            f"{registry.uri}: the registry refuses us",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    return RegistryError(f"{registry.uri}: {text[:300].rstrip('.')}", "see the registry's log")

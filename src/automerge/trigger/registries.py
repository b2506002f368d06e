"""Reading candidates from a registry: nothing in it is changed.

MLflow is read through its client, Kubeflow Model Registry through its REST API (v1alpha3).
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote, urlencode

from automerge.errors import MissingExtraError, RegistryError
from automerge.trigger.candidate import Candidate
from automerge.trigger.config import Rule, WatchedRegistry

Read = Callable[[Rule], list[Candidate]]
"""The versions that a rule selects.

Raises:
    RegistryError: the registry does not answer or refuses.
"""

_SPEC_TAG = "automerge.spec.digest"
_PAGE = 100
_SECONDS = (5.0, 30.0)
"""Limits for connecting and for an answer of Kubeflow Model Registry."""

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
    try:
        import urllib3
    except ModuleNotFoundError:
        raise MissingExtraError("watching Kubeflow Model Registry", "trigger") from None

    connect, answer = _SECONDS
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=connect, read=answer),
        retries=urllib3.Retry(total=1, redirect=False, backoff_factor=0.5, status_forcelist=(502, 503, 504)),
    )
    root = f"{registry.uri}/api/model_registry/v1alpha3"

    def ask(path: str, token: str) -> dict[str, Any]:
        query = urlencode({"pageSize": _PAGE, **({"nextPageToken": token} if token else {})})
        response = pool.request("GET", f"{root}{path}?{query}", headers={"Accept": "application/json"})
        if response.status != 200:
            raise RegistryError(f"{registry.uri}: the registry answers {response.status}", "check address and rights")
        value = json.loads(response.data)
        if not isinstance(value, dict) or not isinstance(value.get("items", []), list):
            raise ValueError
        return value

    def items(path: str) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            page = ask(path, token)
            yield from page.get("items", [])
            token = page.get("nextPageToken") or ""
            if not token:
                return

    def candidates(rule: Rule) -> Iterator[Candidate]:
        for model in items("/registered_models"):
            if not _matches(rule, model["name"]) or model.get("state") == "ARCHIVED":
                continue
            for version in items(f"/registered_models/{_quoted(model['id'])}/versions"):
                own = _properties(version)
                selected = all(own.get(key) == value for key, value in (rule.select.tag or {}).items())
                if version.get("state") == "ARCHIVED" or not selected:
                    continue
                artifacts = items(f"/model_versions/{_quoted(version['id'])}/artifacts")
                uris = [found.get("uri") for found in artifacts if found.get("artifactType") == "model-artifact"]
                uri = next((found for found in uris if found), "")
                tags = {**_properties(model), **own}
                # Its ids are never used again, unlike a version's name: they tell what `created` tells elsewhere.
                yield Candidate(registry.title, model["name"], version["name"], uri, int(version["id"]), tags)

    def read(rule: Rule) -> list[Candidate]:
        try:
            return list(candidates(rule))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _failure(registry, error) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RegistryError(
                f"{registry.uri}: this is no Kubeflow Model Registry of API v1alpha3", "check the address"
            ) from None

    return read


def _properties(item: Mapping[str, Any]) -> dict[str, str]:
    """Custom properties as text; those of other kinds (structs) are left out."""
    kinds = ("string_value", "int_value", "double_value", "bool_value")
    found: dict[str, str] = {}
    for key, value in (item.get("customProperties") or {}).items():
        for kind in kinds:
            if kind in value:
                plain = value[kind]
                found[key] = plain if isinstance(plain, str) else json.dumps(plain)
    return found


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

"""The REST API of Kubeflow Model Registry, through the client that its package generates (``mr_openapi``).

The package's own facade is not used: its registration cannot be repeated after a crash, and it replaces the process's
event loop.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from automerge.errors import MissingExtraError, RegistryError

if TYPE_CHECKING:
    from mr_openapi import ModelRegistryServiceApi

T = TypeVar("T")

TOKEN_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - the variable that Kubeflow's own clients read
"""Names the file with the bearer token. Without it the pod's own token is sent, over https only."""

_POD_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_SECONDS = 120.0
"""Limit of one piece of work with the registry, of several calls."""

_RETRIES = 3
_PAGE = 100


def call(uri: str, action: str, work: "Callable[[ModelRegistryServiceApi], Coroutine[Any, Any, T]]") -> T:
    """Do some work with the registry at ``uri`` and return what it returns.

    Reading is tried again when the server is busy; writing is not, and the caller must be able to repeat it. Runs in a
    thread of its own, so it may be called where an event loop is running.

    Args:
        uri: http(s)://host[:port].
        action: completes "cannot ..." in errors.
        work: called with the client.

    Raises:
        MissingExtraError: the client is not installed.
        RegistryError: the registry refuses, cannot be reached, or is none.
    """
    client = import_client()
    import aiohttp
    from pydantic import ValidationError

    async def connected() -> T:
        configuration = client.Configuration(host=uri.rstrip("/"), access_token=_token(uri), retries=_RETRIES)
        async with client.ApiClient(configuration) as connection:
            return await asyncio.wait_for(work(client.ModelRegistryServiceApi(connection)), _SECONDS)

    where = f"Kubeflow Model Registry at {uri}: cannot {action}"
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(lambda: asyncio.run(connected())).result()
        except client.ApiException as error:
            raise RegistryError(f"{where}: {_reason(error)}", _remedy(error)) from None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            text = " ".join(str(error).split()) or "no answer in time"
            raise RegistryError(
                f"{where}: the server does not answer ({text})", "start it, or correct its uri"
            ) from None
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryError(f"{where}: this is no Kubeflow Model Registry", "check the uri") from error


async def found_or_none(answer: Awaitable[T]) -> T | None:
    """What a call finds; None where the registry says that there is nothing."""
    try:
        return await answer
    except import_client().exceptions.NotFoundException:
        return None


async def items(ask: Callable[..., Awaitable[Any]], *arguments: str) -> AsyncIterator[Any]:
    """The items of all pages of a list."""
    token = None
    while True:
        page = await ask(*arguments, page_size=str(_PAGE), next_page_token=token)
        for item in page.items or []:
            yield item
        token = page.next_page_token or None
        if token is None:
            return


def plain_properties(item: Any) -> dict[str, str]:
    """Custom properties as text; those of other kinds (structs, protocol buffers) are left out."""
    found: dict[str, str] = {}
    for key, value in (item.custom_properties or {}).items():
        value = value.actual_instance
        for kind in ("string_value", "int_value", "double_value", "bool_value"):
            if hasattr(value, kind):
                plain = getattr(value, kind)
                found[key] = plain if isinstance(plain, str) else json.dumps(plain)
    return found


def properties(values: Mapping[str, str | float]) -> dict[str, Any]:
    """Custom properties: texts as string values, numbers as double values."""
    models = import_client().models
    return {
        key: models.MetadataValue(
            models.MetadataStringValue(string_value=value, metadataType="MetadataStringValue")
            if isinstance(value, str)
            else models.MetadataDoubleValue(double_value=float(value), metadataType="MetadataDoubleValue")
        )
        for key, value in values.items()
    }


def import_client() -> Any:
    """The client's package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import mr_openapi
        import mr_openapi.models
    except ModuleNotFoundError as error:
        if error.name != "mr_openapi":
            raise
        raise MissingExtraError("Kubeflow Model Registry", "kubeflow") from None
    return mr_openapi


def _token(uri: str) -> str | None:
    named = os.environ.get(TOKEN_VARIABLE)
    path = Path(named) if named else _POD_TOKEN
    if not named and (not uri.startswith("https://") or not path.is_file()):
        return None
    try:
        return path.read_text().strip()
    except OSError as error:
        raise RegistryError(
            f"{path}: the token cannot be read ({error.strerror})", f"correct {TOKEN_VARIABLE}"
        ) from None


def _reason(error: Any) -> str:
    """What the server says, short."""
    try:
        text = str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        text = str(error.reason or "no reason given")
    return f"{' '.join(text.split())[:300].rstrip('.')} ({error.status})"


def _remedy(error: Any) -> str:
    if error.status in (401, 403):
        return f"name a file with a token that may do this in {TOKEN_VARIABLE}"
    if error.status == 404:
        return "check the uri, and the model's name and version"
    return "see the registry's log, mend it and try again"

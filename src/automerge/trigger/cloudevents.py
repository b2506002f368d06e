"""CloudEvents 1.0 over HTTP, in binary and structured mode: the door for everything that is not MLflow.

An event says only that something happened: the registries are read again, and they decide. So a repeated or old event
does no harm.
"""

import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from automerge.trigger.delivery import Facts, Refusal

_REQUIRED = ("id", "source", "type", "specversion")
_LONGEST = 500


def verify(headers: Mapping[str, str], secrets: Sequence[str]) -> None:
    """Whether the sender knows one of the secrets: ``Authorization: Bearer <secret>``.

    Raises:
        Refusal: it does not.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1", "replace")
    if scheme.lower() != "bearer" or not any(hmac.compare_digest(each.encode(), given) for each in secrets):
        raise Refusal("bad_signature", "the bearer token is not a secret that is known here")


def read(headers: Mapping[str, str], body: bytes) -> tuple[str, Facts]:
    """The event's identity (its source and id), and what it is about: ``subject``, else ``name`` in its JSON data.

    Args:
        headers: by name in small letters.
        body: as it came.

    Raises:
        Refusal: it is no event of version 1.0, or a batch.
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type.startswith("application/cloudevents"):
        if content_type != "application/cloudevents+json":
            raise Refusal("malformed", f"{content_type[:60]} is not taken; send application/cloudevents+json", 415)
        value = _decoded(body)
        if not isinstance(value, dict):
            raise Refusal("malformed", "the body is no JSON object")
        attributes, data = value, value.get("data")
    else:
        attributes = {name[3:]: unquote(text) for name, text in headers.items() if name.startswith("ce-")}
        if not attributes:
            raise Refusal("malformed", "neither application/cloudevents+json nor headers ce-*", 415)
        is_json = content_type in ("application/json", "text/json") or content_type.endswith("+json")
        data = _decoded(body) if body and is_json else None
    for name in _REQUIRED:
        found = attributes.get(name)
        if not isinstance(found, str) or not 0 < len(found) <= _LONGEST:
            raise Refusal("malformed", f"the attribute {name} is missing, no text, or longer than {_LONGEST} letters")
    if attributes["specversion"] != "1.0":
        raise Refusal("malformed", "only version 1.0 of CloudEvents is taken")
    subject = attributes.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise Refusal("malformed", "the attribute subject is no text")
    about = data if isinstance(data, dict) else {}
    model, version = subject or about.get("name"), about.get("version")
    identity = json.dumps([attributes["source"], attributes["id"]])
    return identity, Facts(_kept(attributes["type"]), _kept(model), _kept(version))


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal("malformed", "the body is no JSON") from None


def _kept(value: Any) -> str:
    """Text short enough to be kept."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return str(value)[:200].encode("utf-8", "replace").decode()

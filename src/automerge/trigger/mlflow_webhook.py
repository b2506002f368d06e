"""MLflow's webhooks: who sent a delivery, and what it is about.

The signature is ``v1,`` and the base64 of HMAC-SHA256 over ``<delivery id>.<timestamp>.<raw body>``. MLflow repeats a
delivery under the same id, time and signature.
"""

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from automerge.trigger.candidate import OUR_TAG
from automerge.trigger.delivery import Facts, Refusal

_ID = re.compile(r"[\x21-\x7e]{1,200}")
_TIMESTAMP = re.compile(r"\d{1,12}")


def verify(headers: Mapping[str, str], body: bytes, secrets: Sequence[str], now: float, replay_seconds: float) -> str:
    """The delivery's id, if one of the secrets signed it not long ago.

    Args:
        headers: by name in small letters.
        body: as it came.
        secrets: any of them will do, so that a secret can be changed.
        now: unix seconds.
        replay_seconds: how far the signed time may be from ``now``.

    Raises:
        Refusal: a header is missing, the signature is not ours, or the signed time is too far away.
    """
    identity, timestamp, signature = (
        headers.get(f"x-mlflow-{name}", "") for name in ("delivery-id", "timestamp", "signature")
    )
    if not _ID.fullmatch(identity) or not _TIMESTAMP.fullmatch(timestamp):
        raise Refusal("bad_signature", "the headers of a signed delivery are missing")
    message = f"{identity}.{timestamp}.".encode() + body
    wanted = [b"v1," + base64.b64encode(hmac.digest(secret.encode(), message, hashlib.sha256)) for secret in secrets]
    given = signature.encode("latin-1", "replace")
    if not any(hmac.compare_digest(each, given) for each in wanted):
        raise Refusal("bad_signature", "the signature is not of a secret that is known here")
    if abs(now - int(timestamp)) > replay_seconds:
        raise Refusal("stale", f"it was signed more than {replay_seconds:g} seconds from now")
    return identity


def read(body: bytes) -> Facts:
    """What a verified delivery is about.

    Raises:
        Refusal: the body is no JSON, or not what MLflow sends.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal("malformed", "the body is no JSON") from None
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, dict) or not all(_is_word(value.get(key)) for key in ("entity", "action")):
        raise Refusal("malformed", "the body has not entity, action and data, as MLflow sends them")
    model = _text(data.get("name"))
    tags = data.get("tags")
    ours = (isinstance(tags, dict) and OUR_TAG in tags) or data.get("key") == OUR_TAG
    ignored = ""
    if ours:
        ignored = "a version that a merge made"
    elif model == "example_model":
        ignored = "a test of the webhook"
    return Facts(f"{value['entity']}.{value['action']}", model, _text(data.get("version")), ignored)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z_]{1,60}", value) is not None


def _text(value: Any) -> str:
    """A name or number, short enough to be kept."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return str(value)[:200].encode("utf-8", "replace").decode()

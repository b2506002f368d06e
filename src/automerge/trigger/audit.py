"""The audit log: one JSON object a line on stdout, for each delivery, decision and change of a run; never a secret."""

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any

from automerge.telemetry.logs import redact

_mutex = threading.Lock()


def audit(event: str, **fields: Any) -> None:
    """Write one line: ``ts`` (UTC, RFC 3339), ``event``, and the fields.

    Each text is redacted before it is escaped, so that no escape hides a secret.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"ts": now, "event": event, **_redacted(fields)}, default=str)
    with _mutex:
        try:
            print(line, flush=True)
        except (BrokenPipeError, ValueError):  # whoever read it is gone; the service goes on
            sys.stderr.write(f"{line}\n")


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value

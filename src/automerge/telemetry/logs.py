"""Logs: short lines for humans, or one JSON object a line; never a secret in either."""

import contextvars
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO
from urllib.parse import quote

from automerge.secrets import SECRET_NAME

Style = Literal["human", "json"]

_SHORTEST_SECRET = 6  # a shorter value is no secret worth the name, and striking it out would maim ordinary words
_USER_INFO = re.compile(r"(?<=://)[^/\s@?#]+@")
_SIGNED_QUERY = re.compile(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+")
_STRUCK = "***"

_context: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("automerge_log_context", default=None)

# What the standard library puts on every record; whatever else is there came from ``extra=``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logs(style: Style = "human", level: str = "INFO") -> None:
    """Send logs and warnings to stderr; may be called again to change style or level.

    Our own loggers speak from ``level`` on, all others from WARNING on (from ``level`` if that is DEBUG).

    Args:
        style: ``human``: time, level where it is not INFO, message; ``json``: one object a line with ``ts`` (UTC,
            RFC 3339), ``level``, ``logger``, ``message``, ``stage`` and ``run`` where known, and every extra field.
        level: DEBUG, INFO, WARNING or ERROR.

    Raises:
        ValueError: the level is unknown.
    """
    handler = _StderrHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter())
    logging.getLogger("automerge").setLevel(level)
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel("DEBUG" if level == "DEBUG" else "WARNING")
    logging.captureWarnings(True)


@contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Add fields, such as ``stage`` and ``run``, to every JSON line logged inside."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def redact(text: str) -> str:
    """The text without secrets.

    Struck out are the values of environment variables whose name says that they are secret (tokens, passwords, access
    keys), plain or escaped; user and password in a URL; and the signature of a presigned S3 URL.
    """
    for secret in _secrets():
        text = text.replace(secret, _STRUCK)
    text = _USER_INFO.sub(f"{_STRUCK}@", text)
    return _SIGNED_QUERY.sub(rf"\g<1>{_STRUCK}", text)


class HumanFormatter(logging.Formatter):
    """``12:03:04 warning: message``, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One redacted line, and what follows it."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        return redact("\n".join([f"{time} {level}{_message(record)}", *_details(self, record)]))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; every string in it is redacted before it is escaped, so that escapes hide no secret."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **(_context.get() or {}),
        }
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        line.update({key: value for key, value in extra.items() if key not in line})
        details = _details(self, record)
        if details:
            line["exception"] = "\n".join(details)
        return json.dumps(_redacted(line), default=lambda value: redact(str(value)), allow_nan=True)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is now, so that a progress display can redirect it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current stderr."""
        return sys.stderr


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    # A captured warning carries the source line that raised it on a second line.
    return message.splitlines()[0] if record.name == "py.warnings" and message else message


def _details(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    details = []
    if record.exc_info:
        details.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        details.append(formatter.formatStack(record.stack_info))
    return details


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(key)): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return value


def _secrets() -> list[str]:
    """The secrets in the environment now, the longest first: one may contain another."""
    values = {
        value
        # Not by items(): another thread may take a variable away meanwhile, as MLflow's telemetry does.
        for name, value in ((name, os.environ.get(name, "")) for name in list(os.environ))
        if SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not value.startswith("/")
    }
    escaped = {form for value in values for form in (quote(value, safe=""), repr(value)[1:-1], json.dumps(value)[1:-1])}
    return sorted(values | escaped, key=lambda value: (-len(value), value))

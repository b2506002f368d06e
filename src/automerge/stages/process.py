"""A process that runs stages unattended: how it logs, and how it ends when a user's error stops it."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from automerge.errors import AutoMergeError
from automerge.telemetry.logs import configure_logs, redact

if TYPE_CHECKING:
    from automerge.searching.search import SearchProgress

log = logging.getLogger(__name__)

ERROR_PREFIX = "error: "
"""What the sentence of a user's error begins with on stderr, so that whoever reads the log can find it."""

LOG_EVERY_TRIALS = 10


@contextmanager
def stage_process() -> Iterator[None]:
    """Run stages in a process whose only reader is its log.

    Logs go to stderr by ``AUTOMERGE_LOG_FORMAT`` and ``AUTOMERGE_LOG_LEVEL``. An error that a user can cause ends the
    process as it ends the CLI: one sentence on stderr and the error's exit code. Anything else is a defect of ours and
    keeps its traceback.

    Raises:
        SystemExit: an AutoMergeError was raised inside.
    """
    level = os.environ.get("AUTOMERGE_LOG_LEVEL", "INFO").upper()
    configure_logs(
        "json" if os.environ.get("AUTOMERGE_LOG_FORMAT") == "json" else "human",
        level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO",
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)  # the workflow engine's own: every line would appear twice
    try:
        yield
    except AutoMergeError as error:
        print(f"{ERROR_PREFIX}{redact(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def log_progress(event: "SearchProgress") -> None:
    """Log one line for every tenth trial of a search, and for the last."""
    if not event.replayed and (event.done % LOG_EVERY_TRIALS == 0 or event.done == event.total):
        log.info("trial %d of %d, %s", event.done, event.total, best_text(event))


def best_text(event: "SearchProgress") -> str:
    """The best objective so far, and its capability preservation by task, in a few words."""
    if event.best is None or event.best.objective is None:
        return "none has succeeded yet"
    cp = ", ".join(f"{task} {value:.3f}" for task, value in event.best.cp.items())
    return f"best objective {event.best.objective:.4f} (CP: {cp})"

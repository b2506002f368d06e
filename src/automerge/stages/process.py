"""A process that runs stages unattended: how it logs, and how it ends when a user's error stops it."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from automerge.errors import AutoMergeError
from automerge.telemetry.logs import configure_logs, redact

if TYPE_CHECKING:
    from automerge.searching.search import SearchProgress

log = logging.getLogger(__name__)

ERROR_PREFIX = "error: "
"""What the sentence of a user's error begins with on stderr, so that whoever reads the log can find it."""

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM in a search, by the shell's convention."""

LOG_EVERY_TRIALS = 10


@contextmanager
def stage_process() -> Iterator[None]:
    """Run stages in a process whose only reader is its log.

    Logs go to stderr by ``AUTOMERGE_LOG_FORMAT`` and ``AUTOMERGE_LOG_LEVEL``. An error that a user can cause ends the
    process as it ends the CLI: one sentence on stderr and the error's exit code. Anything else is a defect of ours and
    keeps its traceback.

    Raises:
        SystemExit: an AutoMergeError was raised inside, or it was interrupted.
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
    except KeyboardInterrupt:
        print(f"{ERROR_PREFIX}interrupted; run the task again", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """While the context lasts, SIGTERM, by which a scheduler ends a process, is what Ctrl-C is; a second one ends it.

    Nothing happens in another thread than the main one, or where the process has a handler of its own.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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

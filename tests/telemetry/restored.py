"""For what sets up the logs of its process, in a test: the next tests want theirs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restored_logs() -> Iterator[None]:
    """Handlers, levels and warnings are as before afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("automerge")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        logging.captureWarnings(False)

"""`automerge serve`: the service as a process, until SIGTERM or Ctrl-C."""

import logging
import os
import signal
import socket
from pathlib import Path

from automerge.errors import MissingExtraError, TriggerError
from automerge.trigger.config import LocalRunner, Secrets, load_config
from automerge.trigger.metrics import TriggerMetrics
from automerge.trigger.reconcile import DecisionLoop
from automerge.trigger.runners import make_runner
from automerge.trigger.state import State
from automerge.trigger.template import check_template

log = logging.getLogger(__name__)

_GRACE_SECONDS = 10


def serve(path: Path, host: str, port: int) -> None:
    """Serve until a signal: then no new connection is taken, answers are finished, and the state is closed.

    Args:
        path: of trigger.yaml.
        host, port: where to listen.

    Raises:
        SpecError: the configuration, or a spec template in it, is not valid.
        TriggerError: the state file or the port cannot be had.
        MissingExtraError: the extra ``trigger`` is not installed.
    """
    try:
        import uvicorn

        from automerge.trigger.app import make_app
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("automerge"):
            raise
        raise MissingExtraError("the trigger service", "trigger") from None

    config = load_config(path)
    folder = path.resolve().parent
    for rule in config.rules:
        check_template(rule, folder if isinstance(config.runner, LocalRunner) else None)
    secrets = Secrets.of(os.environ)
    if not secrets.webhook:
        log.warning("AUTOMERGE_WEBHOOK_SECRET is not set: no delivery is taken, and registries are only polled")
    runner, metrics = make_runner(config), TriggerMetrics(config)
    listener = _listen(host, port)
    state = State(config.state)
    loop = DecisionLoop(config, state, runner, metrics, folder)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(config, state, loop, runner, metrics, secrets, folder),
            http="h11",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            h11_max_incomplete_event_size=32 * 1024,
        )
    )
    # uvicorn raises the signal again when it has shut down; that is the end we asked for, and no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    log.info("listening on http://%s:%d", host, listener.getsockname()[1])
    server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise TriggerError(
            f"{host}:{port}: cannot listen there ({error.strerror or error})", "name another --host or --port"
        ) from None
    listener.listen(2048)
    return listener

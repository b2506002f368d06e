"""Where runs go: Kubeflow Pipelines, or processes on this machine.

A runner starts a run at most once for each name, however often it is asked, as far as its engine allows.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from automerge.documents import write_atomically
from automerge.errors import AutoMergeError, MissingExtraError, SpecError
from automerge.spec import parse_spec
from automerge.telemetry.logs import redact
from automerge.telemetry.traces import RUN_VARIABLE
from automerge.trigger.config import KfpRunner, LocalRunner, TriggerConfig
from automerge.trigger.state import Run, RunState

log = logging.getLogger(__name__)

OWN_SECRETS = ("AUTOMERGE_WEBHOOK_SECRET", "AUTOMERGE_ADMIN_TOKEN", "AUTOMERGE_KFP_TOKEN")
"""Secrets of the service, which no run needs."""


_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Started:
    """A run that the engine has: its id there, and where to look at it."""

    id: str
    url: str


@dataclass(frozen=True)
class Look:
    """What the engine says of a run.

    Attributes:
        state: ``started`` while it goes on.
        message: why it failed, or what hinders it.
        registered: where to look at the registered version, if that is known.
    """

    state: RunState
    message: str = ""
    registered: str = ""


class Runner(Protocol):
    """An engine of runs.

    Its methods raise :class:`~automerge.errors.AutoMergeError` where the engine does not answer or refuses.
    """

    def start(self, run: Run) -> Started | None:
        """Start a run, or find the one of this name; None: it waits for a free place."""
        ...

    def look(self, run: Run) -> Look:
        """How a started run is doing."""
        ...

    def report(self, run: Run) -> Path | None:
        """The run's report, if it is a file here."""
        ...

    def close(self) -> None:
        """The service ends; what goes on elsewhere goes on."""
        ...


def make_runner(config: TriggerConfig) -> Runner:
    """The runner that a configuration names.

    Raises:
        MissingExtraError: its client is not installed.
    """
    if isinstance(config.runner, LocalRunner):
        return LocalRuns(config.runner)
    return KfpRuns(config.runner)


class KfpRuns:
    """Runs on Kubeflow Pipelines.

    The server has no key by which it would refuse a second run of a name. So the name is looked for before a run is
    started, and one service at a time starts runs: a second one could only come about if the server took a request,
    did not answer, and does not show the run yet when the name is looked for again.
    """

    def __init__(self, settings: KfpRunner) -> None:
        self._settings = settings
        try:
            import automerge_pipelines.client  # noqa: F401 - to know at once whether it is there
        except ModuleNotFoundError:
            raise MissingExtraError("starting runs on Kubeflow Pipelines", "trigger") from None

    def start(self, run: Run) -> Started | None:
        """Start it on the deployed pipeline unless a run of this name is there, in whatever state."""
        from automerge_pipelines import submit
        from automerge_pipelines.arguments import spec_argument
        from automerge_pipelines.client import connect
        from automerge_pipelines.experiments import find_experiment
        from automerge_pipelines.parameters import run_parameters
        from automerge_pipelines.versions import find_version

        wanted, name = self._settings, run.attempt_name
        server = connect(wanted.endpoint, wanted.namespace)
        experiment = find_experiment(server, wanted.experiment)
        listed = server.runs.run_service_list_runs
        for found in server.named(listed, "runs", name, experiment_id=experiment, sort_by="created_at desc"):
            return Started(str(found.run_id), submit.run_url(server, found.run_id))
        version = find_version(server, wanted.pipeline, wanted.version)
        spec = spec_argument(parse_spec(run.spec, where=f"run {run.name}"))
        values = run_parameters(version.parameters, spec, wanted.parameters, "runner.parameters")
        made = submit.submit(
            server, version, values, name, experiment, service_account=wanted.service_account, again=True
        )
        return Started(made.id, made.url)

    def look(self, run: Run) -> Look:
        """Ask the server once."""
        from automerge_pipelines import submit
        from automerge_pipelines.client import KubeflowError, connect

        try:
            server = connect(self._settings.endpoint, self._settings.namespace)
            submitted = submit.Submitted(run.id, run.attempt_name, run.url, False, "")
            return Look(submit.look(server, submitted) or "started")
        except submit.RunError as error:
            return Look("failed", str(error))
        except KubeflowError as error:
            if error.status == 404:
                return Look("failed", "the server does not know the run any more")
            raise

    def report(self, run: Run) -> Path | None:
        """None: it is an artifact there."""
        return None

    def close(self) -> None:
        """Runs go on without us."""


class LocalRuns:
    """Runs as processes ``automerge run``, each in a folder of its own.

    The folder holds ``spec.json``, ``log.txt``, ``lock`` (held as long as a process of the run lives) and, when it has
    ended, ``exit_code``. A run that a stop of the machine or of the service ended goes on where it stopped.
    """

    def __init__(self, settings: LocalRunner) -> None:
        self._folder, self._at_once = settings.folder, settings.at_once
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, run: Run) -> Started | None:
        """Start its process, unless it lives or has ended."""
        folder = self._folder / run.attempt_name
        started = Started(folder.name, "")
        if (folder / "exit_code").exists() or _is_held(folder / "lock"):
            return started
        self._reap()
        if sum(_is_held(other / "lock") for other in self._folder.glob("*/")) >= self._at_once:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "spec.json", run.spec.encode())
            self._spawn(folder)
        except OSError as error:
            raise SpecError(f"{folder}: the run cannot be started ({error.strerror})", "check runner.folder") from None
        return started

    def look(self, run: Run) -> Look:
        """Its exit code, if it has ended."""
        self._reap()
        folder = self._folder / run.attempt_name
        if _is_held(folder / "lock"):
            return Look("started")
        try:
            code = int((folder / "exit_code").read_text())
        except FileNotFoundError:
            return self._go_on(run)
        except ValueError:
            return Look("failed", f"{folder / 'exit_code'}: not a number")
        ends: dict[int, Literal["passed", "refused"]] = {0: "passed", 3: "refused"}
        if code in ends:
            return Look(ends[code], registered=_registered(folder))
        return Look("failed", _last_words(folder / "log.txt") or f"it ended with exit code {code}")

    def report(self, run: Run) -> Path | None:
        """What the evaluation wrote."""
        path = self._folder / run.attempt_name / "run" / "evaluate" / "report.html"
        return path if path.is_file() else None

    def close(self) -> None:
        """Interrupt what we started: a search writes down what it has, and the next service goes on with it."""
        self._reap()
        for child in self._children.values():
            os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + _CLOSE_SECONDS
        for name in self._children:
            while _is_held(self._folder / name / "lock"):
                if time.monotonic() > deadline:
                    log.warning("run %s did not end within %g seconds and is left alone", name, _CLOSE_SECONDS)
                    break
                time.sleep(0.05)

    def _go_on(self, run: Run) -> Look:
        """Start it again, in its folder, after something ended it from outside."""
        if (self._folder / run.attempt_name).exists():
            log.info("run %s was interrupted, and goes on", run.attempt_name)
        self.start(run)
        return Look("started", "it was interrupted, and goes on")

    def _spawn(self, folder: Path) -> None:
        command = [sys.executable, "-c", "from automerge.cli import main; main()"]
        command += ["run", str(folder / "spec.json"), "--output", str(folder / "run"), "--resume"]
        # Written by a shell that outlives us; an interruption (130) is no end.
        script = (
            '"$@"; code=$?; if [ $code -ne 130 ]; then echo $code > exit_code.part && mv exit_code.part exit_code; fi'
        )
        # Not by items(): another thread may take a variable away meanwhile.
        found = {key: os.environ.get(key) for key in list(os.environ) if key not in OWN_SECRETS}
        environment = {key: value for key, value in found.items() if value is not None}
        environment[RUN_VARIABLE] = folder.name
        with (folder / "lock").open("w") as lock, (folder / "log.txt").open("ab") as output:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock goes to the processes of the run, and is free when the last of them is gone.
            self._children[folder.name] = subprocess.Popen(
                ["/bin/sh", "-c", script, "run", *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )

    def _reap(self) -> None:
        self._children = {name: child for name, child in self._children.items() if child.poll() is None}


def _is_held(lock: Path) -> bool:
    """Whether a process of a run lives."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _registered(folder: Path) -> str:
    """Where the registered version can be looked at."""
    try:
        value: Any = json.loads((folder / "run" / "register" / "registration.json").read_bytes())
        return str(value["registered"]["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _last_words(path: Path) -> str:
    """The last sentence of an error in a run's log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65_536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    found = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    return redact(found.removeprefix("error: "))[:1000]


def described(error: AutoMergeError) -> str:
    """An error as the page shows it: redacted and short."""
    return redact(str(error))[:1000]

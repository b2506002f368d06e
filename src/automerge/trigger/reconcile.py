"""The decision loop: one thread that reads the registries, decides, starts runs and follows them.

What it does depends on the registries and on the state file alone. A delivery only makes it look at once; so a delivery
that is lost, repeated or interrupted by a crash changes nothing but the time.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from automerge.errors import AutoMergeError
from automerge.spec import parse_spec
from automerge.telemetry.logs import redact
from automerge.trigger.audit import audit
from automerge.trigger.config import LocalRunner, Rule, TriggerConfig, WatchedRegistry
from automerge.trigger.metrics import TriggerMetrics
from automerge.trigger.registries import Read, reader, version_page
from automerge.trigger.rules import Decision, decide
from automerge.trigger.runners import Runner, described
from automerge.trigger.state import Run, State
from automerge.trigger.template import render

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 10.0
_SETTLE_SECONDS = 0.2
"""Deliveries come in bursts: so long it waits for more before it looks."""

_FIRST_RETRY_SECONDS = 5.0
_PRUNE_SECONDS = 3600.0


class DecisionLoop:
    """The loop; its work can also be done step by step, without the thread.

    Args:
        config: the configuration.
        state: the state file.
        runner: where runs go.
        metrics: what is counted.
        folder: where relative paths of spec templates start.
        clock: unix seconds.
    """

    def __init__(
        self,
        config: TriggerConfig,
        state: State,
        runner: Runner,
        metrics: TriggerMetrics,
        folder: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._state, self._runner, self._metrics, self._clock = config, state, runner, metrics, clock
        self._folder = folder if isinstance(config.runner, LocalRunner) else None
        self._readers: dict[str, Read] = {}
        self._due = {registry.title: 0.0 for registry in config.registries}
        self._failures = dict.fromkeys(self._due, 0)
        self._pruned = 0.0
        self._wake = threading.Event()
        self._mutex = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None
        for title, found in state.reconciles().items():
            if title in self._due and found.succeeded is not None:
                metrics.last_reconcile.labels(title).set(found.succeeded)

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name="decisions", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 20.0) -> None:
        """End the thread after the step that it is in."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def notice(self, kind: str | None = None) -> None:
        """Something happened: read all registries of this kind (None: of any) at once."""
        with self._mutex:
            for registry in self._config.registries:
                if kind is None or registry.kind == kind:
                    self._due[registry.title] = 0.0
        self._wake.set()

    def step(self) -> float:
        """Do what is due; returns how many seconds later something is due again."""
        for registry in self._config.registries:
            if not self._stopping and self._is_due(registry):
                self._reconcile(registry)
        ended = [self._advance(run) for run in self._state.active_runs() if not self._stopping]
        if any(ended):
            self.notice()  # a place is free: what was refused for want of one is decided again
        active = self._state.active_runs()
        for rule in self._config.rules:
            self._metrics.active.labels(rule.name).set(sum(run.rule == rule.name for run in active))
        now = self._clock()
        if now - self._pruned > _PRUNE_SECONDS:
            self._pruned = now
            self._state.prune(now - 2 * self._config.replay_seconds)
        with self._mutex:
            waits = [due - now for due in self._due.values()]
        return max(0.0, min([*waits, *([_FOLLOW_SECONDS] if active else [])]))

    def _work(self) -> None:
        while not self._stopping:
            try:
                wait = self.step()
            except sqlite3.Error as error:
                log.error("the state file cannot be written: %s", error)
                wait = _FIRST_RETRY_SECONDS
            except Exception:  # the loop must go on, whatever a library raises; the traceback says that it is a defect
                log.exception("a step of the decision loop failed")
                wait = _FIRST_RETRY_SECONDS
            if self._wake.wait(wait) and not self._stopping:
                time.sleep(_SETTLE_SECONDS)
            self._wake.clear()

    def _is_due(self, registry: WatchedRegistry) -> bool:
        with self._mutex:
            now = self._clock()
            if self._due[registry.title] > now:
                return False
            # Set before the reading: an event that comes meanwhile makes it due once more.
            self._due[registry.title] = now + self._config.reconcile_seconds
            return True

    def _reconcile(self, registry: WatchedRegistry) -> None:
        """Read a registry, and decide all its rules."""
        title = registry.title
        try:
            if title not in self._readers:
                self._readers[title] = reader(registry)
            found = [(rule, self._readers[title](rule)) for rule in self._config.rules_of(registry)]
        except AutoMergeError as error:
            self._failures[title] += 1
            self._metrics.reconcile_failures.labels(title).inc()
            self._state.mark_unreachable(title, described(error), self._clock())
            log.warning("%s", redact(str(error)))
            pause = _FIRST_RETRY_SECONDS * 2 ** min(self._failures[title] - 1, 10)
            self._postpone(title, self._clock() + min(pause, self._config.reconcile_seconds))
            return
        self._failures[title] = 0
        for rule, candidates in found:
            for decision in decide(rule, candidates, self._state.past_runs(), self._clock()):
                self._carry_out(rule, decision)
                if decision.look_again is not None:
                    self._postpone(title, decision.look_again)
        now = self._clock()
        self._state.mark_reconciled(title, now)
        self._metrics.last_reconcile.labels(title).set(now)

    def _postpone(self, title: str, due: float) -> None:
        """Look again then, if not before."""
        with self._mutex:
            self._due[title] = min(self._due[title], due)

    def _carry_out(self, rule: Rule, decision: Decision) -> None:
        """Record a decision; for a start, with the intention, which :meth:`_advance` fulfils."""
        spec = ""
        if decision.verb in ("start", "would_start"):
            try:
                spec = render(rule, decision.group, decision.candidates, self._folder).model_dump_json()
            except AutoMergeError as error:
                decision = Decision(decision.rule, decision.group, decision.candidates, "invalid", described(error))
        if decision.verb == "start":
            recorded = self._state.intend(decision, spec, self._clock())
        else:
            recorded = self._state.record_decision(decision, self._clock())
        if recorded:
            self._metrics.decisions.labels(rule.name, decision.verb).inc()
            audit(
                "decision",
                rule=rule.name,
                group=dict(decision.group),
                candidates=[candidate.title for candidate in decision.candidates],
                decision=decision.verb,
                reason=decision.reason,
                run=decision.run if decision.verb in ("start", "would_start", "known") else "",
            )

    def _advance(self, run: Run) -> bool:
        """Start an intended run, or look at a started one; returns whether it ended."""
        try:
            if run.state == "intended":
                started = self._runner.start(run)
                if started is not None:
                    self._state.mark_started(run, started.id, started.url, self._clock())
                    self._count(run, "started")
                    audit("run", run=run.attempt_name, rule=run.rule, state="started", id=started.id, url=started.url)
                return False
            look = self._runner.look(run)
        except AutoMergeError as error:
            log.warning("run %s: %s", run.name, redact(str(error)))
            self._state.mark_hindered(run, described(error))
            return False
        if look.state == "started":
            self._state.mark_hindered(run, look.message)
            return False
        registered = look.registered or (self._find_registered(run) if look.state == "passed" else "")
        self._state.mark_ended(run, look.state, redact(look.message)[:1000], redact(registered), self._clock())
        self._count(run, look.state)
        audit("run", run=run.attempt_name, rule=run.rule, state=look.state, message=look.message)
        return True

    def _find_registered(self, run: Run) -> str:
        """The page of the version that a run elsewhere registered; a link that is missing hinders nothing."""
        try:
            digest = parse_spec(run.spec, where=f"run {run.name}").digest()
            pages = (version_page(registry, digest) for registry in self._config.registries)
            return next((page for page in pages if page), "")
        except AutoMergeError as error:
            log.warning("the registered version of run %s was not found: %s", run.name, redact(str(error)))
            return ""

    def _count(self, run: Run, outcome: str) -> None:
        self._metrics.runs.labels(run.rule, outcome).inc()

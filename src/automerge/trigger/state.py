"""What the service must not forget: deliveries, decisions and runs, in one SQLite file.

Every write is on the disk before it returns (WAL, ``synchronous=FULL``). A run is written down as intended before it is
started, so that a crash at any point leaves either no run or one that is found again by its name.
"""

import fcntl
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from automerge.errors import TriggerError
from automerge.trigger.candidate import Candidate
from automerge.trigger.rules import Decision, Group, PastRun, Verb

RunState = Literal["intended", "started", "passed", "refused", "failed"]
ACTIVE: tuple[RunState, ...] = ("intended", "started")

_VERSION = 1
_SCHEMA = """
CREATE TABLE deliveries (
    door TEXT NOT NULL, id TEXT NOT NULL, received REAL NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
    version TEXT NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (door, id)
) WITHOUT ROWID;
CREATE INDEX deliveries_by_time ON deliveries (received);
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY, decided REAL NOT NULL, rule TEXT NOT NULL, grouped TEXT NOT NULL, digest TEXT NOT NULL,
    candidates TEXT NOT NULL, verb TEXT NOT NULL, reason TEXT NOT NULL, run TEXT NOT NULL
);
CREATE INDEX decisions_by_group ON decisions (rule, grouped, number);
CREATE TABLE runs (
    name TEXT PRIMARY KEY, rule TEXT NOT NULL, grouped TEXT NOT NULL, digest TEXT NOT NULL, candidates TEXT NOT NULL,
    spec TEXT NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL, id TEXT NOT NULL, url TEXT NOT NULL,
    registered TEXT NOT NULL, message TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    UNIQUE (rule, digest)
);
CREATE INDEX runs_by_state ON runs (state);
CREATE TABLE reconciles (registry TEXT PRIMARY KEY, succeeded REAL, failed REAL, message TEXT NOT NULL);
"""

_KEPT_DELIVERIES = 50_000
_KEPT_DECISIONS = 10_000


@dataclass(frozen=True)
class Delivery:
    """A delivery that was verified.

    Attributes:
        door: where it came in: ``mlflow`` or ``cloudevents``.
        id: the sender's; a repetition has the same.
        received: unix seconds.
        kind: what happened, in the sender's words.
        model, version: what it is about; empty where it does not say.
        outcome: ``accepted`` or ``ignored``.
        reason: why it is ignored.
    """

    door: str
    id: str
    received: float
    kind: str
    model: str
    version: str
    outcome: Literal["accepted", "ignored"]
    reason: str = ""


@dataclass(frozen=True)
class RecordedDecision:
    """A decision as it was recorded: when it first differed from the last one of its group."""

    decided: float
    rule: str
    group: Group
    digest: str
    candidates: tuple[Candidate, ...]
    verb: Verb
    reason: str
    run: str


@dataclass(frozen=True)
class Run:
    """A run for a set of versions.

    Attributes:
        name: made of rule and set.
        rule, group, digest, candidates: what was decided.
        spec: what is run, as JSON.
        state: ``intended`` until the runner has it, ``started`` until it ends.
        attempt: 1, and one more for each retry.
        id: the runner's; empty until it is started.
        url: where to look at it.
        registered: where to look at the registered version.
        message: why it failed, or what hinders it.
        created, started, ended: unix seconds.
    """

    name: str
    rule: str
    group: Group
    digest: str
    candidates: tuple[Candidate, ...]
    spec: str
    state: RunState
    attempt: int
    id: str
    url: str
    registered: str
    message: str
    created: float
    started: float | None
    ended: float | None

    @property
    def attempt_name(self) -> str:
        """What the runner calls it: a retry is a run of its own there."""
        return self.name if self.attempt == 1 else f"{self.name}-{self.attempt}"


@dataclass(frozen=True)
class Reconciled:
    """When a registry was last read: unix seconds of the last success and failure, and what the failure was."""

    registry: str
    succeeded: float | None
    failed: float | None
    message: str


class State:
    """The state file, which one service at a time may have open. Its methods may be called from any thread.

    Raises:
        TriggerError: the file cannot be opened, is no state file, is of a newer release, or is another service's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._guard = path.with_name(f"{path.name}.lock").open("w")
        except OSError as error:
            raise TriggerError(f"{path}: cannot be written ({error.strerror})", "name a state file on a disk") from None
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._guard.close()
            raise TriggerError(
                f"{path}: another trigger service has it open", "stop that one, or name another state file"
            ) from None
        try:
            self._open()
        except sqlite3.Error as error:
            self._guard.close()
            raise TriggerError(f"{path}: no state file of this service ({error})", "move it away") from None

    def _open(self) -> None:
        self._connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=10)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > _VERSION:
            self.close()
            raise TriggerError(
                f"{self.path}: written by a newer release (version {version}; this one writes {_VERSION})",
                "run that release, or name another state file",
            )
        if version == 0:
            # One transaction: a crash leaves an empty file, from which it begins again.
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    def close(self) -> None:
        """Close the file; what was written is on the disk already."""
        with self._mutex:
            self._connection.close()
            self._guard.close()

    def check(self) -> None:
        """Ask the file something.

        Raises:
            sqlite3.Error: it does not answer.
        """
        self._all("SELECT 1")

    def record_delivery(self, delivery: Delivery) -> bool:
        """Write a delivery down; returns whether it is new."""
        values = asdict(delivery)
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT OR IGNORE INTO deliveries VALUES "
                "(:door, :id, :received, :kind, :model, :version, :outcome, :reason)",
                values,
            )
            return cursor.rowcount == 1

    def deliveries(self, limit: int) -> list[Delivery]:
        """The last ones, the newest first."""
        rows = self._all(
            "SELECT door, id, received, kind, model, version, outcome, reason FROM deliveries "
            "ORDER BY received DESC LIMIT ?",
            limit,
        )
        return [Delivery(*row) for row in rows]

    def record_decision(self, decision: Decision, now: float) -> bool:
        """Write a decision down unless it is the last one of its group; returns whether it was written."""
        with self._transaction() as connection:
            return _insert_decision(connection, decision, now)

    def intend(self, decision: Decision, spec: str, now: float) -> bool:
        """Write down, in one step, that a run was decided and is to be started.

        Returns:
            Whether it was written; False if this rule has a run for this set of versions.
        """
        with self._transaction() as connection:
            cursor = connection.execute(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?, 'intended', 1, '', '', '', '', ?, NULL, NULL)",
                (
                    decision.run,
                    decision.rule,
                    json.dumps(decision.group),
                    decision.digest,
                    _encode(decision.candidates),
                    spec,
                    now,
                ),
            )
            if cursor.rowcount == 1:
                _insert_decision(connection, decision, now)
            return cursor.rowcount == 1

    def decisions(self, limit: int) -> list[RecordedDecision]:
        """The last ones, the newest first."""
        rows = self._all(
            "SELECT decided, rule, grouped, digest, candidates, verb, reason, run FROM decisions "
            "ORDER BY number DESC LIMIT ?",
            limit,
        )
        return [RecordedDecision(row[0], row[1], _group(row[2]), row[3], _decode(row[4]), *row[5:]) for row in rows]

    def past_runs(self) -> list[PastRun]:
        """All runs there were, as decisions need them."""
        rows = self._all("SELECT name, rule, grouped, digest, created, state FROM runs")
        return [PastRun(row[0], row[1], _group(row[2]), row[3], row[4], row[5] in ACTIVE) for row in rows]

    def runs(self, limit: int) -> list[Run]:
        """The last ones, the newest first."""
        return [_run(row) for row in self._all("SELECT * FROM runs ORDER BY created DESC, name LIMIT ?", limit)]

    def active_runs(self) -> list[Run]:
        """Those that are to be started or go on, the oldest first."""
        rows = self._all("SELECT * FROM runs WHERE state IN ('intended', 'started') ORDER BY created, name")
        return [_run(row) for row in rows]

    def run(self, name: str) -> Run | None:
        """One run."""
        rows = self._all("SELECT * FROM runs WHERE name = ?", name)
        return _run(rows[0]) if rows else None

    def mark_started(self, run: Run, id: str, url: str, now: float) -> None:
        """The runner has it."""
        self._change_run(run, "state = 'started', id = ?, url = ?, message = '', started = ?", id, url, now)

    def mark_ended(self, run: Run, state: RunState, message: str, registered: str, now: float) -> None:
        """It ended so."""
        self._change_run(run, "state = ?, message = ?, registered = ?, ended = ?", state, message, registered, now)

    def mark_hindered(self, run: Run, message: str) -> None:
        """Something keeps it from starting or from being followed; empty: no longer."""
        if message != run.message:
            self._change_run(run, "message = ?", message)

    def retry(self, run: Run, spec: str, now: float) -> bool:
        """Intend another attempt of a run that ended; returns whether it was written."""
        with self._transaction() as connection:
            cursor = connection.execute(
                "UPDATE runs SET state = 'intended', attempt = attempt + 1, id = '', url = '', registered = '', "
                "message = '', spec = ?, created = ?, started = NULL, ended = NULL "
                "WHERE name = ? AND attempt = ? AND state IN ('failed', 'refused')",
                (spec, now, run.name, run.attempt),
            )
            return cursor.rowcount == 1

    def mark_reconciled(self, registry: str, now: float) -> None:
        """The registry was read."""
        self._mark_registry(registry, "succeeded", now, "")

    def mark_unreachable(self, registry: str, message: str, now: float) -> None:
        """The registry could not be read."""
        self._mark_registry(registry, "failed", now, message)

    def reconciles(self) -> dict[str, Reconciled]:
        """When each registry was read, by its name."""
        rows = self._all("SELECT registry, succeeded, failed, message FROM reconciles")
        return {row[0]: Reconciled(*row) for row in rows}

    def prune(self, before: float) -> None:
        """Forget the oldest deliveries and decisions beyond what is kept; runs are kept for ever.

        Args:
            before: unix seconds; a delivery since then is kept in any case, since it may be repeated.
        """
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM deliveries WHERE received < min(?, coalesce((SELECT received FROM deliveries "
                "ORDER BY received DESC LIMIT 1 OFFSET ?), 0))",
                (before, _KEPT_DELIVERIES),
            )
            connection.execute(
                "DELETE FROM decisions WHERE number <= (SELECT max(number) FROM decisions) - ?", (_KEPT_DECISIONS,)
            )

    def _mark_registry(self, registry: str, column: Literal["succeeded", "failed"], now: float, message: str) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO reconciles VALUES (?, NULL, NULL, '')", (registry,))
            connection.execute(
                f"UPDATE reconciles SET {column} = ?, message = ? WHERE registry = ?",  # noqa: S608 - one of two words
                (now, message, registry),
            )

    def _change_run(self, run: Run, change: str, *values: Any) -> None:
        with self._transaction() as connection:
            connection.execute(
                f"UPDATE runs SET {change} WHERE name = ? AND attempt = ?",  # noqa: S608 - our own words
                (*values, run.name, run.attempt),
            )

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._mutex:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _insert_decision(connection: sqlite3.Connection, decision: Decision, now: float) -> bool:
    group = json.dumps(decision.group)
    last = connection.execute(
        "SELECT digest, verb, reason FROM decisions WHERE rule = ? AND grouped = ? ORDER BY number DESC LIMIT 1",
        (decision.rule, group),
    ).fetchone()
    if last == (decision.digest, decision.verb, decision.reason):
        return False
    if last is not None and decision.verb == "known" and last[:2] == (decision.digest, "start"):
        return False  # what the next look at the registry makes of a run that was just started
    connection.execute(
        "INSERT INTO decisions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            now,
            decision.rule,
            group,
            decision.digest,
            _encode(decision.candidates),
            decision.verb,
            decision.reason,
            decision.run if decision.verb in ("start", "would_start", "known") else "",
        ),
    )
    return True


def _run(row: Sequence[Any]) -> Run:
    return Run(row[0], row[1], _group(row[2]), row[3], _decode(row[4]), *row[5:])


def _group(text: str) -> Group:
    return tuple((key, value) for key, value in json.loads(text))


def _encode(candidates: Sequence[Candidate]) -> str:
    return json.dumps([asdict(candidate) for candidate in candidates])


def _decode(text: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(**each) for each in json.loads(text))

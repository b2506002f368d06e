"""The trial store: ``trials.jsonl``, an append-only log of a search that survives a kill at any point.

Line 1 is a header that identifies the search. Then, in the order in which they happened, ``ask`` (a point was
proposed), ``tell`` (its outcome, a whole :class:`Trial`) and ``cut`` (which blocks a phase cuts into layers) events.
Every line is on disk before the search goes on, so a trial once paid for is never lost, and replaying the events in
their order brings an optimiser of the same seed back to the same state.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from automerge.documents import Model, write_atomically
from automerge.errors import SearchError
from automerge.searching.objective import Objective
from automerge.searching.trial import Trial
from automerge.tasks.task import Ratio, Scores, Transform

VERSION: Final = 2
"""Of the log's format."""


class StoredRatio(Model):
    """`automerge.tasks.task.Ratio`."""

    numerator: list[float]
    denominator: list[float]
    transform: Transform = "identity"

    @classmethod
    def of(cls, ratio: Ratio) -> Self:
        """The ratio in a form that JSON holds exactly."""
        return cls(
            numerator=ratio.numerator.tolist(), denominator=ratio.denominator.tolist(), transform=ratio.transform
        )

    @property
    def ratio(self) -> Ratio:
        """As it was."""
        return Ratio(np.array(self.numerator), np.array(self.denominator), self.transform)


class StoredScores(Model):
    """`automerge.tasks.task.Scores`."""

    losses: StoredRatio
    metrics: dict[str, StoredRatio]
    soft: StoredRatio | None
    tempered: dict[float, StoredRatio]

    @classmethod
    def of(cls, scores: Scores) -> Self:
        """The scores in a form that JSON holds exactly."""
        return cls(
            losses=StoredRatio.of(scores.losses),
            metrics={name: StoredRatio.of(ratio) for name, ratio in scores.metrics.items()},
            soft=None if scores.soft is None else StoredRatio.of(scores.soft),
            tempered={at: StoredRatio.of(ratio) for at, ratio in scores.tempered.items()},
        )

    @property
    def scores(self) -> Scores:
        """As they were."""
        return Scores(
            self.losses.ratio,
            {name: stored.ratio for name, stored in self.metrics.items()},
            None if self.soft is None else self.soft.ratio,
            {at: stored.ratio for at, stored in self.tempered.items()},
        )


class Header(Model):
    """What identifies a search: two searches with equal identities propose the same points."""

    event: Literal["header"] = "header"
    format: Literal["automerge/trials"] = "automerge/trials"
    version: Literal[2] = VERSION
    identity: str = Field(description="Digest of all that shapes the search: spec, segmentation, inputs.")
    hardware: str = Field(description="Device and threads; elsewhere the last digits of a loss may differ.")
    objective: Objective = Field(description="The objective, with the specialists' figures that it refers to.")


class Ask(Model):
    """A point was proposed, or a refinement begun."""

    event: Literal["ask"] = "ask"
    number: int
    phase: str = "search"
    origin: str
    config: dict[str, Any] = Field(default_factory=dict)


class Tell(Model):
    """A point was evaluated."""

    event: Literal["tell"] = "tell"
    trial: Trial
    scores: dict[str, StoredScores] | None = Field(
        default=None,
        description="With multi-fidelity, of a trial that became the best: what the next trials race against, by task.",
    )


class Cut(Model):
    """Blocks were chosen to be cut into layers, at the start of a phase."""

    event: Literal["cut"] = "cut"
    phase: str
    blocks: list[str]
    importance: dict[str, float] = Field(description="Of every block that was there.")
    measure: Literal["surrogate", "gradient"] | None = Field(
        default=None, description="What measured the importance; null in logs of earlier releases."
    )


Event = Ask | Tell | Cut
_EVENTS: dict[str, type[Ask] | type[Tell] | type[Cut]] = {"ask": Ask, "tell": Tell, "cut": Cut}


class TrialStore:
    """Appends events durably; locked, so that one process at a time can go on with a search.

    Raises:
        SearchError: another process has the log open.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self._file = path.open("r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however the process ends
        except OSError:
            self._file.close()
            raise _in_use(path) from None
        try:
            self.header, self.events, length = read_log(path)
            if self.header.identity != identity:
                raise SearchError(
                    f"{path}: belongs to another search (the spec, an input or the segmentation has changed)",
                    "start in another folder",
                )
            self._file.truncate(length)
            self._file.seek(length)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def create(cls, path: Path, header: Header) -> Self:
        """Start a new log; the header is on disk before this returns.

        Raises:
            SearchError: there is a log already, which would be lost.
        """
        refuse_begun(path)
        write_atomically(path, _encode(header))
        _sync_folder(path.parent)
        return cls(path, header.identity)

    @classmethod
    def resume(cls, path: Path, identity: str) -> Self:
        """Open a log to go on; a last line torn by a kill is dropped.

        Raises:
            SearchError: there is no log, it is damaged, in use, or belongs to another search.
        """
        if not path.exists():
            raise SearchError(f"{path}: no search was begun here", "run without --resume")
        return cls(path, identity)

    def append(self, event: Event) -> None:
        """Write one event; it is on disk before this returns."""
        self._file.write(_encode(event))
        self._sync()
        self.events.append(event)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def replace_log(path: Path, content: bytes) -> None:
    """Put a log, of the same search, in the place of another one or of none.

    Raises:
        SearchError: another process has the log open.
    """
    if not path.exists():
        write_atomically(path, content)
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(path) from None
        write_atomically(path, content)


def refuse_begun(path: Path) -> None:
    """Raise where there is a log already.

    Raises:
        SearchError: there is.
    """
    if path.exists():
        raise SearchError(f"{path}: a search was begun here", "pass --resume to go on, or another folder")


def read_trials(path: Path) -> list[Trial]:
    """All finished trials of a log, in the order of their numbers.

    Raises:
        SearchError: there is no log, or it is damaged.
    """
    _, events, _ = read_log(path)
    return sorted((event.trial for event in events if isinstance(event, Tell)), key=lambda trial: trial.number)


def read_cuts(path: Path) -> list[Cut]:
    """Which blocks were cut, and how important all were, in the order of the phases.

    Raises:
        SearchError: there is no log, or it is damaged.
    """
    _, events, _ = read_log(path)
    return [event for event in events if isinstance(event, Cut)]


def read_log(path: Path) -> tuple[Header, list[Event], int]:
    """Header, events and the length in bytes of the sound part of a log.

    Raises:
        SearchError: there is no log, or a line other than a torn last one is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SearchError(f"{path}: no search was begun here", "run without --resume") from None
    header: Header | None = None
    events: list[Event] = []
    length = 0
    for number, line in enumerate(_whole_lines(content), start=1):
        try:
            value = json.loads(line)
            if number == 1:
                _refuse_other_format(path, value)
                header = Header.model_validate(value)
            else:
                events.append(_EVENTS[value["event"]].model_validate(value))
        except (ValueError, KeyError, TypeError, ValidationError):
            raise SearchError(f"{path}: line {number} is damaged", "start in another folder") from None
        length += len(line)
    if header is None:
        raise SearchError(f"{path}: has no header", "start in another folder")
    return header, events, length


def _in_use(path: Path) -> SearchError:
    return SearchError(f"{path}: another process is searching here", "wait for it, end it, or start in another folder")


def _refuse_other_format(path: Path, header: object) -> None:
    version = header.get("version") if isinstance(header, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise SearchError(
            f"{path}: is of version {version}, and this release reads version {VERSION}",
            "go on with the release that began the search, or start in another folder",
        )


def _whole_lines(content: bytes) -> Iterator[bytes]:
    return (line + b"\n" for line in content.split(b"\n")[:-1])


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder durable: syncing the file alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(event: Header | Event) -> bytes:
    return (event.model_dump_json() + "\n").encode()

"""A copy of a running search at another place, from which a process that starts elsewhere goes on.

``AUTOMERGE_MIRROR`` names the place, by any URI that `automerge.storage` knows. Below it are

``<identity>/search.zip``
    the search's log up to its last whole line, and the states of its refinements. The identity is the one that the log
    carries, so a search of another spec, of other checkpoints or data has another copy. One object holds all: a copy is
    never a mixture of two moments, and a write that breaks off leaves the earlier one.
``statistics/<key>.safetensors``
    what was gathered from the sources before the search, if its techniques need that; written once.

Threads of its own write the copy, every ``AUTOMERGE_MIRROR_SECONDS`` (60), after each phase and at the end. It never
fails the search, and holds up nothing but its end, for `FLUSH_SECONDS` at most. A process that was taken for dead may
still be writing: a copy is replaced only by one that has got further (``automerge.storage.write_object``).
"""

import io
import json
import logging
import os
import re
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from automerge import storage
from automerge.documents import digest_of, write_atomically
from automerge.errors import AutoMergeError, SearchError, SpecError, StorageError
from automerge.searching.store import replace_log
from automerge.spec import Spec
from automerge.stages.documents import REFINEMENT, STATISTICS, TRIALS
from automerge.telemetry.metrics import StageMetrics

log = logging.getLogger(__name__)

PLACE_VARIABLE = "AUTOMERGE_MIRROR"
SECONDS_VARIABLE = "AUTOMERGE_MIRROR_SECONDS"

FLUSH_SECONDS = 20.0
"""How long the end of a search waits for its last copy: a pod that is preempted has 30 seconds in all."""

_SECONDS = 60.0
_ATTEMPTS = 5
_COPY = "search.zip"
_REFINEMENT = re.compile(r"refinement-\d+\.json")


class Mirror:
    """The copy of one search.

    Args:
        place: URI of the folder of all copies.
        seconds: between two copies.
        metrics: of the search.

    Raises:
        StorageError: the place has a scheme that no store knows.
    """

    def __init__(self, place: str, seconds: float, metrics: StageMetrics) -> None:
        self._place = place.rstrip("/")
        self._seconds = seconds
        self._metrics = metrics
        self._uri = ""
        self._etag: str | None = None
        self._copied: _Reached | None = None
        self._statistics: tuple[Path, str] | None = None
        self._statistics_damaged = False
        self._out = False
        self._overtaken = False
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        storage.check_scheme(place)
        metrics.add("automerge_search_mirror_failures_total", 0.0)

    @classmethod
    def of_environment(cls, metrics: StageMetrics) -> Self | None:
        """The mirror that the environment names; None if it names none.

        Raises:
            SpecError: the interval is no positive number.
            StorageError: the place has a scheme that no store knows.
        """
        place = os.environ.get(PLACE_VARIABLE, "")
        if not place:
            return None
        written = os.environ.get(SECONDS_VARIABLE) or str(_SECONDS)
        try:
            seconds = float(written)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < threading.TIMEOUT_MAX:
            raise SpecError(f"{SECONDS_VARIABLE}: {written!r} is no number of seconds", "write for instance 60")
        return cls(place, seconds, metrics)

    def statistics_uri(self, key: str) -> str:
        """Where the statistics of a key (`statistics_key`) are."""
        return f"{self._place}/statistics/{key}.safetensors"

    def restore_statistics(self, key: str, folder: Path) -> None:
        """Bring back what was gathered from the sources, if the folder holds no search yet and the mirror has it."""
        path, uri = folder / STATISTICS, self.statistics_uri(key)
        if path.exists() or (folder / TRIALS).exists():
            return
        try:
            found = storage.find_object(uri)
            if found is not None:
                self._statistics_damaged = True  # unless it comes through
                storage.download(uri, path)
                self._statistics_damaged = False
                log.info("restored the statistics from %s", uri)
        except StorageError as error:
            self._fail(error)

    def restore(self, identity: str, folder: Path, *, resume: bool) -> None:
        """Bring back what the mirror has of a search, unless the folder has got as far.

        Args:
            identity: of the search, as in its log.
            folder: of the search.
            resume: go on with a search that was begun.

        Raises:
            SearchError: it was begun and ``resume`` is off, or another process is searching in the folder.
        """
        self._uri = f"{self._place}/{identity}/{_COPY}"
        try:
            there = storage.read_object(self._uri)
        except StorageError as error:
            self._fail(error)
            return
        if there is None:
            return
        self._etag = there.etag
        copy = self._unpacked(there.content, identity)
        if copy is None:
            return
        if not resume:
            raise SearchError(
                f"{self._uri}: this search was begun already", f"pass --resume to go on, or unset {PLACE_VARIABLE}"
            )
        if (folder / TRIALS).exists():
            here = _Reached.of(folder)
            if here.identity != identity or here.distance >= copy.distance:
                return
        folder.mkdir(parents=True, exist_ok=True)
        replace_log(folder / TRIALS, copy.log)
        for path in _refinements(folder):
            path.unlink()
        for name, state in copy.refinements.items():
            write_atomically(folder / name, state)
        self._copied = copy
        log.info("restored the search from %s", self._uri)

    @contextmanager
    def kept(self, folder: Path) -> Iterator[None]:
        """Copy what is in the folder from time to time while the context lasts, and at its end."""
        # The last copy has a thread of its own: the other one may be busy with large statistics.
        keeper = threading.Thread(target=self._keep, args=(folder,), name="mirror", daemon=True)
        last = threading.Thread(target=self._finish, args=(folder,), name="mirror-end", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            self._ended = True
            self._wake.set()
            end = time.monotonic() + FLUSH_SECONDS
            last.start()
            for thread in (last, keeper):
                thread.join(max(0.0, end - time.monotonic()))
            if last.is_alive() and not self._out:
                log.warning("%s: did not take the end of the search within %g s", self._uri, FLUSH_SECONDS)

    def copy_soon(self) -> None:
        """Copy now, and not only when the time has come."""
        self._wake.set()

    def hold_statistics(self, key: str, path: Path) -> None:
        """Have the statistics copied with the search; the file stays as it is until the search ends."""
        self._statistics = (path, self.statistics_uri(key))

    def copy_statistics(self) -> None:
        """Copy the statistics now, if the mirror lacks them; where it cannot be reached, later."""
        try:
            self._write_statistics()
        except (AutoMergeError, OSError) as error:
            self._fail(error)

    def _keep(self, folder: Path) -> None:
        while not self._ended:
            try:
                whole = self._write(folder)
                self._write_statistics()
            except (AutoMergeError, OSError) as error:
                self._fail(error)
            else:
                self._succeed(whole)
            self._wake.wait(self._seconds)
            self._wake.clear()

    def _finish(self, folder: Path) -> None:
        try:
            whole = self._write(folder)
        except (AutoMergeError, OSError) as error:
            self._fail(error)
        else:
            self._succeed(whole)

    def _write_statistics(self) -> None:
        if self._statistics is None:
            return
        path, uri = self._statistics
        if self._statistics_damaged or storage.find_object(uri) is None:
            storage.upload(path, uri)
        self._statistics = None

    def _write(self, folder: Path) -> bool:
        """Bring the copy up to the folder, unless that of another process has got further; whether it is there."""
        with self._writing:
            if not (folder / TRIALS).exists():
                return False
            here = _Reached.of(folder)
            if not here.log or here == self._copied:
                return here == self._copied
            content = here.packed()
            replacing = self._etag
            for _ in range(_ATTEMPTS):
                etag = storage.write_object(self._uri, content, replacing=replacing)
                if etag is None:
                    there = storage.read_object(self._uri)
                    replacing = None if there is None else there.etag
                    if there is None:
                        continue
                    if there.content != content:
                        other = self._unpacked(there.content, here.identity)
                        if other is not None and other.distance >= here.distance:
                            self._give_way()
                            return False
                        continue
                    etag = there.etag  # an earlier attempt has got through, unanswered
                self._etag, self._copied, self._overtaken = etag, here, False
                return True
            raise StorageError(f"{self._uri}: is replaced again and again", "see who else searches")

    def _unpacked(self, content: bytes, identity: str) -> "_Reached | None":
        """A copy; None, with a warning, if it is damaged."""
        copy = _Reached.unpacked(content)
        if copy is None or copy.identity != identity:
            log.warning("%s: the copy is damaged, and is not used", self._uri)
            return None
        return copy

    def _give_way(self) -> None:
        if not self._overtaken:
            log.warning(
                "%s: another process has got further in the same search: its copy stays until this one overtakes it",
                self._uri,
            )
        self._overtaken = True

    def _fail(self, error: Exception) -> None:
        """Warn once of an outage."""
        self._metrics.add("automerge_search_mirror_failures_total")
        if not self._out:
            log.warning("the search goes on without a copy elsewhere: %s", error)
        self._out = True

    def _succeed(self, whole: bool) -> None:
        if whole:
            self._metrics.set("automerge_search_mirror_last_success_timestamp_seconds", time.time())
        if whole and self._out:
            log.info("%s: has the search again", self._uri)
            self._out = False


@dataclass(frozen=True)
class _Reached:
    """How far a search has got: whole lines of its log, and the states of its refinements by file name."""

    log: bytes
    refinements: dict[str, bytes]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """What is in a folder now."""
        # The states first: then the log surely has the trials that they start from.
        refinements = {path.name: path.read_bytes() for path in _refinements(folder)}
        content = (folder / TRIALS).read_bytes()
        return cls(content[: content.rfind(b"\n") + 1], refinements)

    @property
    def distance(self) -> tuple[int, int]:
        """To compare with others of the same search: by what is logged, then by the steps of refinements."""
        return self.log.count(b"\n"), sum(_steps(state) for state in self.refinements.values())

    @property
    def identity(self) -> str:
        """Of the search; empty where the log does not say."""
        header = _json(self.log.partition(b"\n")[0])
        return str(header.get("identity", "")) if isinstance(header, dict) else ""

    def packed(self) -> bytes:
        """All in one; the same bytes for the same content."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in {TRIALS: self.log, **self.refinements}.items():
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    @classmethod
    def unpacked(cls, content: bytes) -> "Self | None":
        """What `packed` made; None if it is something else."""
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError):
            return None
        text = files.pop(TRIALS, b"")
        if not text.endswith(b"\n") or not all(_REFINEMENT.fullmatch(name) for name in files):
            return None
        return cls(text, files)


def statistics_key(inputs: str, spec: Spec) -> str:
    """What the gathered statistics depend on.

    Args:
        inputs: `automerge.stages.trials.identity_of` without statistics.
        spec: the spec.
    """
    return digest_of({"inputs": inputs, "techniques": spec.search.techniques, "seed": spec.search.seed})


def _refinements(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(REFINEMENT.format("*")) if _REFINEMENT.fullmatch(path.name))


def _steps(state: bytes) -> int:
    value = _json(state)
    steps = value.get("step") if isinstance(value, dict) else None
    return steps if isinstance(steps, int) else 0


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None

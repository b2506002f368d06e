"""Where trials run: in this process, in processes of their own on this machine, or on a Dask cluster.

All three take a trial by ``submit`` and give a `concurrent.futures.Future` of its outcome. Its ``result()`` raises

- `AutoMergeError`, if this trial failed: the search records that and goes on;
- `LostWorkersError`, if nothing can run any more: the search ends, and can be resumed. The trial is not to blame;
- anything else, if there is a defect, with the worker's traceback as a note.

A worker process holds a model of its own, which its *factory* builds once. We start it by a command, not through
`multiprocessing`: so its environment is set before its interpreter starts (which GPU it sees), the terminal's Ctrl-C
does not reach it, and the caller's main module is not run again. It ends when the other end of its socket closes: no
process outlives the one that started it, however that ended.
"""

import asyncio
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, cast
from urllib.parse import urlsplit

from automerge.errors import AutoMergeError, MissingExtraError, SearchError, is_out_of_memory

if TYPE_CHECKING:  # a worker process imports this module before its factory imports torch
    from automerge.merging.recipe import RecipeBlock
    from automerge.searching.evaluator import Outcome
    from automerge.searching.fidelity import Race

log = logging.getLogger(__name__)

Evaluate: TypeAlias = "Callable[[Sequence[RecipeBlock], Race | None], Outcome]"

Factory: TypeAlias = "Callable[[int], Evaluate]"
"""Index of the worker -> its evaluator. Picklable by reference: a partial of a module's function, or a dataclass."""

ATTEMPTS = 2
"""How many processes may die of one trial, or of building one evaluator."""

IDLE_SECONDS = 600.0
"""After so long without a trial a model leaves the memory of a Dask worker: its search may have been killed."""

CONNECT_SECONDS = 10.0
"""How long to wait for a Dask scheduler, and for its first worker."""


def gpus() -> list[str]:
    """The CUDA devices that this process sees, each as a value of ``CUDA_VISIBLE_DEVICES`` for a worker."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


class LostWorkersError(SearchError):
    """Nothing is left that could run trials; the trials that were under way have not failed, and can be run again."""

    @classmethod
    def of(cls, error: AutoMergeError) -> Self:
        """The same sentence, of an error that kept a lost worker from being replaced."""
        return cls(error.problem, error.remedy)


class Workers(Protocol):
    """Runs trials, ``capacity`` of them at once; more wait for their turn."""

    @property
    def capacity(self) -> int: ...

    def submit(self, blocks: "Sequence[RecipeBlock]", race: "Race | None") -> "Future[Outcome]":
        """Run one trial.

        Raises:
            AutoMergeError: the workers cannot be used at all, for instance since a checkpoint cannot be read.
        """
        ...

    def close(self) -> None:
        """End all workers at once; futures that are not done raise `LostWorkersError`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class _Closing:
    """A context manager by ``close``."""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess(_Closing):
    """Trials run here, one after the other, while ``submit`` is called; a `KeyboardInterrupt` passes through it.

    Args:
        evaluate: runs one trial.
    """

    capacity = 1

    def __init__(self, evaluate: "Evaluate") -> None:
        self._evaluate = evaluate

    def submit(self, blocks: "Sequence[RecipeBlock]", race: "Race | None") -> "Future[Outcome]":
        """Run one trial; the future is done."""
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        try:
            outcome = self._evaluate(blocks, race)
        except Exception as error:  # noqa: BLE001 - the future raises it
            future.set_exception(_failure(error))
        else:
            future.set_result(outcome)
        return future


@dataclass(frozen=True)
class _Job:
    message: bytes
    future: "Future[Outcome]" = field(default_factory=Future)


class ProcessWorkers(_Closing):
    """Trials run in processes of this machine, each with its own model.

    A process that dies (the kernel's out-of-memory killer, a crash in a library) is replaced, and its trial is tried
    once more in a fresh one; a trial of which two die has failed. All processes start at once, in the background.

    Args:
        factory: called once in each process.
        count: how many processes.
        trial_seconds: a trial that takes longer is ended with its process, and has failed; building is not counted.
        devices: one for each process, a value of ``CUDA_VISIBLE_DEVICES``: all that it sees. None: all see all.
        idle_seconds: a process that gets no trial for so long ends; the next trial starts it again. None: never.
    """

    def __init__(
        self,
        factory: "Factory",
        count: int,
        *,
        trial_seconds: float | None = None,
        devices: Sequence[str] | None = None,
        idle_seconds: float | None = None,
    ) -> None:
        if count < 1 or (devices is not None and len(devices) != count):
            raise ValueError(f"{count} workers, devices {devices}")
        self.capacity = count
        self._trial_seconds = trial_seconds
        self._builds = [pickle.dumps((factory, index, idle_seconds)) for index in range(count)]
        self._devices = devices
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._processes: list[_Process | None] = [None] * count
        self._ready: list[Future[None]] = [Future() for _ in range(count)]
        self._failure: Exception | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._dispatch, args=(index,), name=f"worker-{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_ready(self) -> None:
        """Wait until all processes have built their evaluators; `submit` does so, too.

        Raises:
            AutoMergeError: a factory's, as it is.
            LostWorkersError: a process cannot be started, or died twice in building.
        """
        done, _ = wait(self._ready, return_when=FIRST_EXCEPTION)
        for ready in self._ready:
            if ready in done:
                ready.result()

    def submit(self, blocks: "Sequence[RecipeBlock]", race: "Race | None") -> "Future[Outcome]":
        """Run one trial in the next process that is free.

        Raises:
            AutoMergeError: see `wait_until_ready`.
            LostWorkersError: a process that was lost could not be replaced.
        """
        self.wait_until_ready()
        job = _Job(pickle.dumps((list(blocks), race)))
        with self._lock:
            if self._closed:
                raise RuntimeError("the workers are closed")
            if self._failure is not None:
                raise self._failure
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Kill all processes, in the middle of a trial as well; futures that are not done raise `LostWorkersError`."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                if process is not None:
                    process.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _dispatch(self, index: int) -> None:
        """The thread of one worker: whatever happens, no future stays open."""
        try:
            self._build(index)
        except BaseException as error:  # noqa: BLE001 - the future raises it
            self._ready[index].set_exception(error)
        else:
            self._ready[index].set_result(None)
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                outcome = self._run(index, job.message)
            except BaseException as error:  # noqa: BLE001 - the future raises it
                job.future.set_exception(error)
            else:
                job.future.set_result(outcome)
        self._discard(index)

    def _run(self, index: int, message: bytes) -> "Outcome":
        deaths: list[str] = []
        while len(deaths) < ATTEMPTS:
            process = self._replaced(index)
            try:
                reply = process.ask(message, self._trial_seconds)
            except TimeoutError:
                self._discard(index)
                raise SearchError(
                    f"the trial took longer than search.trial_seconds ({self._trial_seconds:g} s) and was ended",
                    "raise the limit if trials need more",
                ) from None
            except EOFError:
                deaths.append(self._discard(index))
                self._refuse_closed()
                if len(deaths) < ATTEMPTS:
                    log.warning("worker %d died (%s); its trial is tried once more", index, deaths[-1])
                continue
            if isinstance(reply, BaseException):
                raise reply
            return cast("Outcome", reply)
        raise SearchError(
            f"the worker that ran it died twice ({_causes(deaths)})",
            "if the machine is short of memory, run fewer trials at once or lower the tasks' batch_size",
        )

    def _replaced(self, index: int) -> "_Process":
        """The worker's process, a new one if it is gone."""
        process = self._processes[index]
        if process is not None and process.is_there():
            return process
        self._discard(index)
        try:
            if self._failure is not None:
                raise self._failure
            return self._build(index)
        except AutoMergeError as error:
            self._failure = LostWorkersError.of(error)
        except Exception as error:  # noqa: BLE001 - raised below
            self._failure = error
        raise self._failure

    def _build(self, index: int) -> "_Process":
        deaths: list[str] = []
        while len(deaths) < ATTEMPTS:
            with self._lock:  # so that `close` knows every process
                self._refuse_closed()
                process = self._processes[index] = _Process(None if self._devices is None else self._devices[index])
            try:
                reply = process.ask(self._builds[index], None)
            except EOFError:
                deaths.append(self._discard(index))
                self._refuse_closed()
                continue
            if isinstance(reply, BaseException):
                self._discard(index)
                raise reply
            return process
        raise LostWorkersError(
            f"worker {index} died twice while it loaded the models ({_causes(deaths)})",
            "if the machine is short of memory, run fewer trials at once",
        )

    def _discard(self, index: int) -> str:
        """End the worker's process, if there is one; how it ended."""
        process, self._processes[index] = self._processes[index], None
        return "" if process is None else process.end()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise LostWorkersError("the workers were closed before the trial ended")


# The path is ours before anything of ours is imported; what stands in the working directory is not on it (-P).
_COMMAND = (
    "import sys; sys.path[:] = sys.argv[2:]; from automerge.searching.workers import _serve; _serve(int(sys.argv[1]))"
)


class _Process:
    """One worker process, seen from its owner: a message in, an answer out."""

    def __init__(self, device: str | None) -> None:
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=None if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device},
                start_new_session=True,  # out of the terminal's reach, and killed with all that it started
            )
        except OSError as error:
            self._connection.close()
            raise LostWorkersError(
                f"a worker process cannot be started ({error.strerror})", "run fewer trials at once"
            ) from None
        finally:
            theirs.close()

    def is_there(self) -> bool:
        """Whether it lives, as long as no answer is due."""
        return not self._connection.poll(0)

    def ask(self, message: bytes, seconds: float | None) -> object:
        """The answer.

        Raises:
            EOFError: it died.
            TimeoutError: it gave none within ``seconds``.
        """
        try:
            self._connection.send_bytes(message)
            in_time = self._connection.poll(seconds)
            if in_time:
                return self._connection.recv()
        except OSError:
            raise EOFError from None
        raise TimeoutError

    def kill(self) -> None:
        """Kill it with all processes that it started. Any thread may."""
        with suppress(ProcessLookupError, PermissionError):  # macOS has the second for a group that has ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Make sure that it is dead; how it died."""
        if self._connection.poll(0):  # dead or dying: it shall tell how by itself
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        self.kill()
        code = self._process.wait()
        self._connection.close()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _causes(deaths: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(deaths))


def _serve(descriptor: int) -> None:
    """A worker process: build the evaluator, then answer trials until the owner is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    try:
        factory, index, idle_seconds = pickle.loads(messages.get())  # noqa: S301 - the owner wrote it
        evaluate: Evaluate = factory(index)
    except Exception as error:  # noqa: BLE001 - the owner raises it
        _answer(connection, _portable(error))
        return
    _answer(connection, None)
    while True:
        try:
            message = messages.get(timeout=idle_seconds)
        except queue.Empty:
            return
        reply: object
        try:
            blocks, race = pickle.loads(message)  # noqa: S301 - the owner wrote it
            reply = evaluate(blocks, race)
        except Exception as error:  # noqa: BLE001 - the owner raises it
            reply = _portable(error)
        _answer(connection, reply)


def _receive(connection: Connection, messages: "queue.SimpleQueue[bytes]") -> None:
    """A thread of the worker: it sees at once, in mid-trial as well, that the owner is gone."""
    try:
        while True:
            messages.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(os.getpid(), signal.SIGKILL)  # the group is this process and what it started


def _answer(connection: Connection, reply: object) -> None:
    # Bytes of pickle's own, not of multiprocessing's, where tensors are handles that live as long as this process.
    try:
        message = pickle.dumps(reply)
    except Exception as error:  # noqa: BLE001 - the owner raises it
        message = pickle.dumps(_portable(error))
    with suppress(OSError):
        connection.send_bytes(message)


def _failure(error: Exception) -> Exception:
    """What a future raises for an error. A new error has no traceback: that would keep the trial's tensors alive."""
    if is_out_of_memory(error):
        return SearchError("out of memory", "lower the tasks' batch_size, or run fewer trials at once")
    return error


def _portable(error: Exception) -> Exception:
    """An error in a form that another process can read."""
    where = "".join(traceback.format_exception(error))
    error = _failure(error)
    if not isinstance(error, AutoMergeError):
        error.add_note(f"In a worker:\n{where}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - written here
    except Exception:  # noqa: BLE001 - a plug-in's exception may break in any way
        if isinstance(error, AutoMergeError):
            return SearchError(error.problem, error.remedy)
        return RuntimeError(where)
    return error


class DaskWorkers(_Closing):
    """Trials run on the workers of a Dask cluster that is there already, one at a time on each.

    Each Dask worker runs its trials in a process of its own (`ProcessWorkers`), which lives from trial to trial: so a
    crash or a time limit costs a trial's process and not a worker of the cluster, and trials never share a model,
    however many threads the worker has. When a Dask worker is lost, the scheduler gives its trial to another; as often
    as its setting ``distributed.scheduler.allowed-failures`` says (3), then the trial has failed. While no worker is
    left, trials wait for one to come.

    Args:
        address: ``dask://host:port`` of the scheduler.
        factory: called once in each process, with index 0; it has to find what it reads on every worker.
        count: trials at a time. None: as many as there are Dask workers at the start.
        trial_seconds: see `ProcessWorkers`.

    Attributes:
        capacity: trials at a time.

    Raises:
        MissingExtraError: Dask is not installed.
        SearchError: no scheduler answers, or it has no workers.
    """

    def __init__(
        self, address: str, factory: "Factory", count: int | None = None, *, trial_seconds: float | None = None
    ) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise MissingExtraError("a Dask cluster (dask://)", "dask") from None
        host = _tcp(address)
        self._address = address
        self._closed = False
        self._lost: LostWorkersError | None = None
        try:
            self._client = Client(host, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ImportError) as error:
            raise SearchError(
                f"no Dask scheduler answers at {address} ({_first_line(error)})",
                "check the address and that `dask scheduler` runs there",
            ) from None
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            self._client.close()
            raise SearchError(
                f"the Dask scheduler at {address} has no workers", f"start some: dask worker {host}"
            ) from None
        self.capacity = count or len(self._client.nthreads())
        self._executor = self._client.get_executor(pure=False)
        self._there = _There(self._client.id, factory, trial_seconds)
        self._ready: Future[None] = Future()
        threading.Thread(target=self._prepare, daemon=True).start()

    def wait_until_ready(self) -> None:
        """Wait until the Dask workers have built their evaluators; `submit` does so, too.

        Raises:
            AutoMergeError: a factory's, as it is.
            SearchError: a worker cannot import what it needs.
            LostWorkersError: the scheduler or all workers are lost.
        """
        self._ready.result()

    def submit(self, blocks: "Sequence[RecipeBlock]", race: "Race | None") -> "Future[Outcome]":
        """Run one trial on the cluster.

        Raises:
            AutoMergeError: see `wait_until_ready`.
            LostWorkersError: the scheduler is lost.
        """
        self.wait_until_ready()
        if self._closed:
            raise RuntimeError("the workers are closed")
        if self._lost is None and self._client.status != "running":
            self._lost = self._connection_lost()
        if self._lost is not None:
            raise self._lost
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        run = self._executor.submit(_run_there, self._there, list(blocks), race)
        run.add_done_callback(partial(self._settle, future))
        return future

    def close(self) -> None:
        """End this search's processes on the cluster; its Dask workers stay."""
        self._closed = True
        with suppress(OSError, RuntimeError):  # the scheduler may be gone
            self._executor.shutdown(wait=False)
            if self._client.status == "running":
                self._client.run(_release_there, self._there.key, wait=False, on_error="ignore")
        self._client.close(timeout=2)

    def _prepare(self) -> None:
        """Build the evaluators, in the background."""
        try:
            replies = self._client.run(_prepare_there, self._there, on_error="return")
        except BaseException:  # noqa: BLE001 - whatever Dask raises here: it did not get through
            self._ready.set_exception(self._connection_lost())
            return
        try:
            self._check(replies)
        except Exception as error:  # noqa: BLE001 - the future raises it
            self._ready.set_exception(error)
        else:
            self._ready.set_result(None)

    def _check(self, replies: dict[str, object]) -> None:
        """Raise what kept a worker from building its evaluator; one that has left meanwhile is no error."""
        left = 0
        for _, reply in sorted(replies.items()):
            if isinstance(reply, _Prepared):
                if reply.error is not None:
                    raise reply.error
            elif isinstance(reply, OSError):
                left += 1
            else:
                raise SearchError(
                    f"the Dask workers at {self._address} cannot run trials ({_first_line(reply)})",
                    "install this package there, in the same version",
                )
        if left == len(replies):
            raise LostWorkersError(f"all Dask workers at {self._address} were lost while they loaded the models")

    def _settle(self, future: "Future[Outcome]", run: "Future[Any]") -> None:
        from distributed import KilledWorker

        if run.cancelled():
            self._lost = self._connection_lost()
            future.set_exception(self._lost)
            return
        error = run.exception() or (reply if isinstance(reply := run.result(), BaseException) else None)
        if isinstance(error, KilledWorker):
            error = SearchError(
                f"{error.allowed_failures + 1} Dask workers died while they ran it",
                "look into the logs of the workers",
            )
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(reply)

    def _connection_lost(self) -> LostWorkersError:
        if self._closed:
            return LostWorkersError("the workers were closed before the trial ended")
        return LostWorkersError(
            f"the connection to the Dask scheduler at {self._address} was lost",
            "start it again, then resume the search",
        )


def _tcp(address: str) -> str:
    """``dask://host:port`` as Dask's own address.

    Raises:
        SearchError: it is none.
    """
    with suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme == "dask" and parts.hostname and parts.port and not parts.path.strip("/"):
            return f"tcp://{parts.netloc}"
    raise SearchError(f"{address!r} is no address of a Dask scheduler", "give it as dask://host:port")


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _There:
    """What a Dask worker needs for the trials of one search.

    Attributes:
        key: names this client, so that no other search's end is the end of its processes.
        factory, trial_seconds: see `ProcessWorkers`.
    """

    key: str
    factory: "Factory"
    trial_seconds: float | None


_pools: dict[str, ProcessWorkers] = {}
_pools_lock = threading.Lock()


def _pool(there: _There) -> ProcessWorkers:
    """The process of this Dask worker for a search."""
    with _pools_lock:
        if there.key not in _pools:
            _pools[there.key] = ProcessWorkers(
                there.factory, 1, trial_seconds=there.trial_seconds, idle_seconds=IDLE_SECONDS
            )
        return _pools[there.key]


def _release(key: str) -> None:
    with _pools_lock:
        pool = _pools.pop(key, None)
    if pool is not None:
        pool.close()


async def _release_there(key: str) -> None:
    await asyncio.to_thread(_release, key)


@dataclass(frozen=True)
class _Prepared:
    """A Dask worker has built its evaluator, or knows why not; any other reply is one of Dask's own."""

    error: Exception | None


async def _prepare_there(there: _There) -> _Prepared:
    """Build the evaluator of this Dask worker, outside its event loop."""
    try:
        await asyncio.to_thread(_pool(there).wait_until_ready)
    except Exception as error:  # noqa: BLE001 - the client raises it
        await _release_there(there.key)
        return _Prepared(error)
    return _Prepared(None)


def _run_there(there: _There, blocks: "list[RecipeBlock]", race: "Race | None") -> "Outcome | AutoMergeError":
    """One trial on this Dask worker. Errors are returned: those that are raised Dask takes for defects, and logs."""
    pool = _pool(there)
    try:
        pool.wait_until_ready()
    except AutoMergeError as error:  # of a worker that came later
        _release(there.key)
        return LostWorkersError.of(error)
    try:
        return pool.submit(blocks, race).result()
    except AutoMergeError as error:
        return error

"""Real processes that sleep, fail, hang and die; a real Dask cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client

from automerge.errors import MissingExtraError, ModelError, SearchError, TaskError
from automerge.searching.evaluator import Outcome
from automerge.searching.workers import DaskWorkers, InProcess, LostWorkersError, ProcessWorkers, gpus
from tests.searching.worker_factories import Evaluator, Factory, Seen, UnportableError, command, noted, scores_factory

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
"""Seconds that a busy machine may take for what takes one."""


def is_alive(pid: int) -> bool:
    """Also while threads of a process whose first thread is a zombie hold its files open."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z" or threads > 1


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def wait_for_file(folder: Path, pattern: str) -> Path:
    wait_for(lambda: any(folder.glob(pattern)))
    return next(folder.glob(pattern))


def seen(future: "Future[Outcome]") -> Seen:
    found = future.result(PATIENCE)
    assert isinstance(found, Seen)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[ProcessWorkers]:
    """A worker that no test may wear out."""
    with ProcessWorkers(Factory(folder), 1) as workers:
        yield workers


class TestInProcess:
    def test_runs_at_once(self, tmp_path: Path) -> None:
        with InProcess(Evaluator(tmp_path, 0)) as workers:
            future = workers.submit(command("echo"), None)
            assert workers.capacity == 1
            assert future.done()
            assert seen(future).pid == os.getpid()

    def test_errors_are_the_futures(self, tmp_path: Path) -> None:
        workers = InProcess(Evaluator(tmp_path, 0))
        with pytest.raises(TaskError, match="the loss is not finite"):
            workers.submit(command("fail"), None).result()
        for out_of_memory in ("allocate", "allocate-torch"):
            with pytest.raises(SearchError, match="out of memory") as caught:
                workers.submit(command(out_of_memory), None).result()
            assert caught.value.__context__ is None, "the trial's tensors would live as long as the error"
        with pytest.raises(ZeroDivisionError):
            workers.submit(command("defect"), None).result()

    def test_out_of_memory_of_a_gpu(self) -> None:
        def evaluate(blocks: object, race: object) -> Outcome:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        with pytest.raises(SearchError, match=r"^out of memory"):
            InProcess(evaluate).submit(command("echo"), None).result()

    def test_an_interrupt_passes(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            InProcess(Evaluator(tmp_path, 0)).submit(command("interrupt"), None)


class TestTrials:
    """In a process, nothing lost."""

    def test_real_outcomes_travel(self) -> None:
        with ProcessWorkers(scores_factory, 1) as workers:
            outcome = workers.submit(command("0.5"), None).result(PATIENCE)
            with pytest.raises(SearchError, match=r"^out of memory"):
                workers.submit(command("allocate"), None).result(PATIENCE)
        assert isinstance(outcome, Outcome)
        assert (outcome.samples, outcome.fidelity) == (4, 0.25)
        np.testing.assert_array_equal(outcome.scores["low"].losses.numerator, np.full(4, 0.5))

    def test_one_process_lives_from_trial_to_trial(self, one: ProcessWorkers) -> None:
        first, second = (seen(one.submit(command("echo"), ("any", "race"))) for _ in range(2))  # type: ignore[arg-type]
        assert first.pid == second.pid != os.getpid()
        assert second.trials == first.trials + 1
        assert first.race == ("any", "race")

    def test_errors(self, one: ProcessWorkers) -> None:
        """They are this trial's: the process goes on."""
        pid = seen(one.submit(command("echo"), None)).pid
        failures = {name: one.submit(command(name), None) for name in ("fail", "fail-extra", "fail-unportable")}
        with pytest.raises(TaskError) as caught:
            failures["fail"].result(PATIENCE)
        assert str(caught.value) == "task 'low': the loss is not finite; check the data"
        with pytest.raises(MissingExtraError) as caught_extra:
            failures["fail-extra"].result(PATIENCE)
        assert str(caught_extra.value) == str(MissingExtraError("text data", "transformers"))
        with pytest.raises(SearchError) as caught_unportable:
            failures["fail-unportable"].result(PATIENCE)
        assert str(caught_unportable.value) == "1 and 2; not 3"
        assert seen(one.submit(command("echo"), None)).pid == pid

    def test_out_of_memory(self, one: ProcessWorkers) -> None:
        pid = seen(one.submit(command("echo"), None)).pid
        with pytest.raises(SearchError, match=r"^out of memory; lower the tasks' batch_size"):
            one.submit(command("allocate"), None).result(PATIENCE)
        assert seen(one.submit(command("echo"), None)).pid == pid

    def test_defects_bring_their_traceback(self, one: ProcessWorkers) -> None:
        with pytest.raises(ZeroDivisionError) as caught:
            one.submit(command("defect"), None).result(PATIENCE)
        assert "in defect" in "".join(caught.value.__notes__)
        with pytest.raises(RuntimeError, match=r"(?s)in defect_unportable.*1 and 2") as caught_unportable:
            one.submit(command("defect-unportable"), None).result(PATIENCE)
        assert not isinstance(caught_unportable.value, UnportableError)

    def test_a_trial_that_waits_can_be_cancelled(self, one: ProcessWorkers, folder: Path) -> None:
        one.submit(command("say running 0.3"), None)
        waiting = one.submit(command("say waiting 0"), None)
        wait_for_file(folder, "running.*")
        assert waiting.cancel()
        seen(one.submit(command("echo"), None))
        assert not list(folder.glob("waiting.*"))

    def test_what_cannot_be_sent_is_refused(self, one: ProcessWorkers) -> None:
        with pytest.raises((AttributeError, TypeError), match="pickle"):
            one.submit(command("echo"), lambda: None)  # type: ignore[arg-type]
        seen(one.submit(command("echo"), None))


class TestSeveral:
    def test_throughput(self, tmp_path: Path) -> None:
        trials, seconds = 8, {}
        for count in (1, 2):
            with ProcessWorkers(Factory(tmp_path), count) as workers:
                assert workers.capacity == count
                workers.wait_until_ready()
                start = time.monotonic()
                found = [seen(each) for each in [workers.submit(command("sleep 0.3"), None) for _ in range(trials)]]
                seconds[count] = time.monotonic() - start
            assert {each.index for each in found} == set(range(count))
        ratio = seconds[1] / seconds[2]
        print(f"\n{trials} trials of 0.3 s: {seconds[1]:.2f} s by one worker, {seconds[2]:.2f} s by two: {ratio:.2f}x")
        assert ratio > 1.3

    def test_each_sees_its_own_gpu_from_the_start(self, tmp_path: Path) -> None:
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        with ProcessWorkers(Factory(tmp_path), 2, devices=["3", "GPU-5a"]) as workers:
            found = [seen(each) for each in [workers.submit(command("sleep 0.2"), None) for _ in range(4)]]
        assert {(each.index, each.gpus) for each in found} == {(0, "3"), (1, "GPU-5a")}
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before

    def test_devices_are_as_many_as_workers(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="2 workers"):
            ProcessWorkers(Factory(tmp_path), 2, devices=["0"])


class TestLostWorkers:
    def test_a_trial_whose_process_is_killed_is_tried_again(self, tmp_path: Path) -> None:
        with ProcessWorkers(Factory(tmp_path), 2) as workers:
            running = [workers.submit(command(f"say trial-{number} 1"), None) for number in range(4)]
            victim = wait_for_file(tmp_path, "trial-0.*")
            bystander = wait_for_file(tmp_path, "trial-1.*")
            os.kill(int(victim.suffix[1:]), signal.SIGKILL)
            pids = [seen(future).pid for future in running]
        assert pids[0] != int(victim.suffix[1:])
        assert pids[1] == int(bystander.suffix[1:]), "the other worker goes on"
        assert len(noted(tmp_path)) == 3, "only the lost one was replaced"

    def test_a_trial_that_kills_its_process_twice_has_failed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with ProcessWorkers(Factory(tmp_path), 1) as workers:
            futures = [workers.submit(command(text), None) for text in ("die 9", "exit 3", "echo")]
            for future, how in zip(futures, ("signal 9", "exit status 3"), strict=False):
                with pytest.raises(SearchError, match=rf"^the worker that ran it died twice \({how}\); ") as caught:
                    future.result(PATIENCE)
                assert not isinstance(caught.value, LostWorkersError)
            assert seen(futures[-1]).trials == 1
        assert "worker 0 died (signal 9); its trial is tried once more" in caplog.text
        assert len(noted(tmp_path)) == 1 + 4, "each death costs one process"

    def test_a_process_that_dies_idle_costs_no_attempt(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with ProcessWorkers(Factory(tmp_path), 1) as workers:
            pid = seen(workers.submit(command("echo"), None)).pid
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not is_alive(pid))
            assert seen(workers.submit(command("die-once x"), None)).trials == 1
        assert len(noted(tmp_path)) == 3

    def test_an_idle_process_ends_and_comes_back(self, tmp_path: Path) -> None:
        with ProcessWorkers(Factory(tmp_path), 1, idle_seconds=0.2) as workers:
            first = seen(workers.submit(command("echo"), None)).pid
            wait_for(lambda: not is_alive(first))
            assert seen(workers.submit(command("echo"), None)).pid != first

    def test_a_hanging_trial_is_ended_with_what_it_started(self, tmp_path: Path) -> None:
        """Building takes longer than the limit, which is for the trial alone."""
        with ProcessWorkers(Factory(tmp_path, seconds=1.5), 1, trial_seconds=1.0) as workers:
            hanging = workers.submit(command("start-and-hang"), None)
            after = workers.submit(command("echo"), None)
            with pytest.raises(SearchError) as caught:
                hanging.result(PATIENCE)
            assert str(caught.value) == (
                "the trial took longer than search.trial_seconds (1 s) and was ended; "
                "raise the limit if trials need more"
            )
            first, started, second = (seen(after), noted(tmp_path))[1]
            assert seen(after).pid == second
            wait_for(lambda: not is_alive(first) and not is_alive(started))


class TestFactories:
    """Errors of the factory are the user's, once; they are no trial's."""

    def test_the_error_as_it_is(self, tmp_path: Path) -> None:
        with ProcessWorkers(Factory(tmp_path, problem="error"), 2) as workers:
            for _ in range(2):
                with pytest.raises(ModelError) as caught:
                    workers.submit(command("echo"), None)
                assert str(caught.value) == "source 'low': the checkpoint has no tensor 'w'; check sources.low.uri"
        assert len(noted(tmp_path)) <= 2, "it is not tried again"

    def test_missing_extra(self, tmp_path: Path) -> None:
        with (
            ProcessWorkers(Factory(tmp_path, problem="extra"), 1) as workers,
            pytest.raises(MissingExtraError) as caught,
        ):
            workers.wait_until_ready()
        assert str(caught.value) == str(MissingExtraError("model.kind 'transformers'", "transformers"))

    def test_a_defect(self, tmp_path: Path) -> None:
        with ProcessWorkers(Factory(tmp_path, problem="defect"), 1) as workers:
            with pytest.raises(ZeroDivisionError) as caught:
                workers.submit(command("echo"), None)
            assert "in __call__" in "".join(caught.value.__notes__)

    def test_death_in_building(self, tmp_path: Path) -> None:
        with ProcessWorkers(Factory(tmp_path, problem="9"), 1) as workers, pytest.raises(LostWorkersError) as caught:
            workers.submit(command("echo"), None)
        assert str(caught.value).startswith("worker 0 died twice while it loaded the models (signal 9); ")
        assert len(noted(tmp_path)) == 2

    def test_a_lost_worker_that_cannot_be_replaced(self, tmp_path: Path) -> None:
        """The trial is not to blame, and no further one is taken."""
        with ProcessWorkers(Factory(tmp_path, problem="error", since=1), 1) as workers:
            dying = workers.submit(command("die 9"), None)
            waiting = workers.submit(command("echo"), None)
            for future in (dying, waiting):
                with pytest.raises(LostWorkersError, match=r"^source 'low': the checkpoint has no tensor 'w'; check"):
                    future.result(PATIENCE)
            with pytest.raises(LostWorkersError):
                workers.submit(command("echo"), None)
        assert len(noted(tmp_path)) == 2


class TestClosing:
    def test_in_mid_trial(self, tmp_path: Path) -> None:
        workers = ProcessWorkers(Factory(tmp_path), 2)
        futures = [workers.submit(command("hang"), None) for _ in range(3)]
        wait_for(lambda: futures[0].running() and futures[1].running())
        start = time.monotonic()
        workers.close()
        seconds = time.monotonic() - start
        print(f"\nclosed in {seconds:.2f} s")
        for future in futures:
            with pytest.raises(LostWorkersError, match=r"^the workers were closed before the trial ended"):
                future.result(0)
        assert not any(is_alive(pid) for pid in noted(tmp_path))
        assert seconds < 2
        workers.close()
        with pytest.raises(RuntimeError, match="closed"):
            workers.submit(command("echo"), None)

    def test_in_mid_building(self, tmp_path: Path) -> None:
        with ProcessWorkers(Factory(tmp_path, seconds=60), 1) as workers:
            wait_for(lambda: len(noted(tmp_path)) == 1)
        with pytest.raises(LostWorkersError, match="closed"):
            workers.wait_until_ready()
        assert not is_alive(noted(tmp_path)[0])


OWNER = """
import signal, sys
from pathlib import Path
from automerge.searching.workers import ProcessWorkers
from tests.searching.worker_factories import Factory, command

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job, and its children, ignore
with ProcessWorkers(Factory(Path(sys.argv[1])), 2) as workers:
    futures = [workers.submit(command("say trial 600"), None) for _ in range(4)]
    try:
        futures[0].result()
    except KeyboardInterrupt:
        print("interrupted")
print("closed")
"""
"""No guard of ``__main__``: the workers do not run it again."""


class TestOwners:
    """The process that started the workers is interrupted, or dies."""

    @contextmanager
    def owner(self, folder: Path) -> Iterator["subprocess.Popen[str]"]:
        """In mid-trial, in a process group of its own like a terminal's foreground job."""
        with subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                wait_for(lambda: len(list(folder.glob("trial.*"))) == 2)
                assert all(is_alive(pid) for pid in noted(folder))
                yield process
            finally:
                process.kill()

    def test_ctrl_c(self, tmp_path: Path) -> None:
        with self.owner(tmp_path) as process:
            start = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
            print(f"\ngone {time.monotonic() - start:.2f} s after Ctrl-C")
        assert (output, errors, process.returncode) == ("interrupted\nclosed\n", "", 0)
        assert not any(is_alive(pid) for pid in noted(tmp_path))

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_no_worker_outlives_its_owner(self, tmp_path: Path, number: signal.Signals) -> None:
        with self.owner(tmp_path) as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
            wait_for(lambda: not any(is_alive(pid) for pid in noted(tmp_path)))
        assert errors == ""


@contextmanager
def dask_command(*arguments: str, path: Path = ROOT, failures: int = 3) -> Iterator["subprocess.Popen[bytes]"]:
    """A command line of Dask's; ended with all processes of its group."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(path),
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(failures),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def dask_scheduler(folder: Path, failures: int = 3) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A scheduler: its host and port, and its process."""
    file = folder / "scheduler.json"
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    with dask_command("distributed.cli.dask_scheduler", *arguments, failures=failures) as process:
        wait_for(lambda: file.exists() and file.stat().st_size > 0)
        yield json.loads(file.read_text())["address"].removeprefix("tcp://"), process


def dask_worker(
    address: str, folder: Path, *arguments: str, path: Path = ROOT
) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    """One or several workers; with a nanny, they come back when they are killed."""
    where = ["--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(folder)]
    return dask_command("distributed.cli.dask_worker", f"tcp://{address}", *where, *arguments, path=path)


class TestDask:
    @pytest.fixture(scope="class")
    def address(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        """A scheduler with two workers, which come back when they are killed."""
        folder = tmp_path_factory.mktemp("dask")
        with (
            dask_scheduler(folder) as (address, _),
            dask_worker(address, folder, "--nworkers", "2", "--nthreads", "2"),
        ):
            with Client(f"tcp://{address}", set_as_default=False) as client:
                client.wait_for_workers(2, timeout=PATIENCE)
            yield f"dask://{address}"

    def test_trials(self, address: str, tmp_path: Path) -> None:
        """One model on each worker, though it has two threads; errors and limits as in a process of one's own."""
        with DaskWorkers(address, Factory(tmp_path), trial_seconds=2.0) as workers:
            assert workers.capacity == 2
            found = [seen(each) for each in [workers.submit(command("sleep 0.3"), ("race",)) for _ in range(6)]]  # type: ignore[arg-type]
            assert {each.pid for each in found} == set(noted(tmp_path))
            assert len(noted(tmp_path)) == 2
            for pid in noted(tmp_path):
                mine = sorted((each.began, each.ended) for each in found if each.pid == pid)
                assert all(before[1] <= after[0] for before, after in pairwise(mine))
            assert found[0].race == ("race",)
            failing = {text: workers.submit(command(text), None) for text in ("fail", "die 9", "hang", "defect")}
            with pytest.raises(TaskError, match=r"^task 'low': the loss is not finite; check the data$"):
                failing["fail"].result(PATIENCE)
            with pytest.raises(SearchError, match="died twice"):
                failing["die 9"].result(PATIENCE)
            with pytest.raises(SearchError, match="took longer"):
                failing["hang"].result(PATIENCE)
            with pytest.raises(ZeroDivisionError):
                failing["defect"].result(PATIENCE)
        wait_for(lambda: not any(is_alive(pid) for pid in noted(tmp_path)))

    def test_a_killed_worker_loses_no_trial(self, address: str, tmp_path: Path) -> None:
        with DaskWorkers(address, Factory(tmp_path)) as workers:
            futures = [workers.submit(command(f"say trial-{number} 0.7"), None) for number in range(6)]
            trial = int(wait_for_file(tmp_path, "trial-*").suffix[1:])
            worker = int(Path(f"/proc/{trial}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(worker, signal.SIGKILL)
            pids = [seen(future).pid for future in futures]
            assert len(pids) == 6
            assert trial not in pids
            wait_for(lambda: not is_alive(trial))
        wait_for(lambda: not any(is_alive(pid) for pid in noted(tmp_path)))

    def test_errors_of_the_factory(self, address: str, tmp_path: Path) -> None:
        with (
            DaskWorkers(address, Factory(tmp_path, problem="error")) as workers,
            pytest.raises(
                ModelError, match=r"^source 'low': the checkpoint has no tensor 'w'; check sources\.low\.uri$"
            ),
        ):
            workers.submit(command("echo"), None)
        assert len(noted(tmp_path)) <= 2

    def test_closed_in_mid_trial(self, address: str, tmp_path: Path) -> None:
        workers = DaskWorkers(address, Factory(tmp_path))
        futures = [workers.submit(command(f"say trial-{number} 600"), None) for number in range(4)]
        wait_for(lambda: len(list(tmp_path.glob("trial-*"))) == 2)
        start = time.monotonic()
        workers.close()
        print(f"\nclosed in {time.monotonic() - start:.2f} s")
        for future in futures:
            with pytest.raises(LostWorkersError, match="closed"):
                future.result(PATIENCE)
        wait_for(lambda: not any(is_alive(pid) for pid in noted(tmp_path)))
        assert len(list(tmp_path.glob("trial-*"))) == 2, "those that waited were not begun"

    @pytest.fixture(scope="class")
    def bare_scheduler(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
        """Without workers; it gives up a trial of which two die."""
        with dask_scheduler(tmp_path_factory.mktemp("bare"), failures=1) as scheduler:
            yield scheduler

    @pytest.fixture
    def bare(self, bare_scheduler: tuple[str, object]) -> str:
        return bare_scheduler[0]

    def test_no_workers(self, bare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("automerge.searching.workers.CONNECT_SECONDS", 1.0)
        with pytest.raises(SearchError, match=f"has no workers; start some: dask worker tcp://{bare}$"):
            DaskWorkers(f"dask://{bare}", Factory(tmp_path))

    def test_workers_that_cannot_import(self, bare: str, tmp_path: Path) -> None:
        with (
            dask_worker(bare, tmp_path, "--no-nanny", path=tmp_path),
            DaskWorkers(f"dask://{bare}", Factory(tmp_path)) as workers,
            pytest.raises(SearchError) as caught,
        ):
            workers.submit(command("echo"), None)
        assert str(caught.value).startswith(f"the Dask workers at dask://{bare} cannot run trials (")
        assert str(caught.value).endswith(
            "No module named 'tests'\")); install this package there, in the same version"
        )

    def test_a_trial_of_which_many_workers_die(self, bare: str, tmp_path: Path) -> None:
        with (
            dask_worker(bare, tmp_path, "--nworkers", "2"),
            DaskWorkers(f"dask://{bare}", Factory(tmp_path)) as workers,
        ):
            with pytest.raises(
                SearchError, match=r"^2 Dask workers died while they ran it; look into the logs"
            ) as caught:
                workers.submit(command("kill-parent"), None).result(PATIENCE)
            assert not isinstance(caught.value, LostWorkersError)

    def test_nobody_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("automerge.searching.workers.CONNECT_SECONDS", 1.0)
        with pytest.raises(SearchError, match=r"^no Dask scheduler answers at dask://127\.0\.0\.1:9 "):
            DaskWorkers("dask://127.0.0.1:9", Factory(tmp_path))

    @pytest.mark.parametrize(
        "address", ["dask://", "dask://host", "tcp://host:8786", "dask://host:many", "dask://a:1/b"]
    )
    def test_no_address(self, address: str, tmp_path: Path) -> None:
        with pytest.raises(SearchError, match=r"is no address of a Dask scheduler; give it as dask://host:port$"):
            DaskWorkers(address, Factory(tmp_path))

    def test_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(MissingExtraError, match=r"\[dask\]"):
            DaskWorkers("dask://127.0.0.1:9", partial(Factory(tmp_path)))

    def test_a_lost_scheduler(
        self,
        bare_scheduler: tuple[str, "subprocess.Popen[bytes]"],
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """The last one of the class: nobody uses this scheduler any more."""
        address, scheduler = bare_scheduler
        with (
            dask_worker(address, tmp_path, "--no-nanny"),
            DaskWorkers(f"dask://{address}", Factory(tmp_path)) as workers,
        ):
            future = workers.submit(command("say trial 600"), None)
            wait_for_file(tmp_path, "trial.*")
            scheduler.kill()
            with pytest.raises(LostWorkersError) as caught:
                future.result(PATIENCE)
            assert str(caught.value) == (
                f"the connection to the Dask scheduler at dask://{address} was lost; "
                "start it again, then resume the search"
            )
            with pytest.raises(LostWorkersError, match="was lost"):
                workers.submit(command("echo"), None)
        wait_for(lambda: not any(is_alive(pid) for pid in noted(tmp_path)))
        assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("visible", "found"), [(None, ["0", "1"]), ("", ["0", "1"]), ("3,GPU-5", ["3", "GPU-5"])])
def test_gpus_are_those_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, found: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == found

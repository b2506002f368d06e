"""Evaluators for the tests of the workers: what one does stands in the name of the first block that it is given."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from automerge.errors import MissingExtraError, ModelError, TaskError
from automerge.merging.recipe import RecipeBlock


def command(text: str) -> list[RecipeBlock]:
    """The blocks that make an evaluator do something."""
    return [RecipeBlock(name=text, technique="linear", weights={"low": 0.5, "high": 0.5})]


@dataclass(frozen=True)
class Seen:
    """What an evaluator saw."""

    pid: int
    index: int
    trials: int
    began: float
    ended: float
    race: object
    gpus: str | None


class UnportableError(Exception):
    """It cannot be read by another process: its constructor takes something else than it passes on."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class UnportablePluginError(TaskError):
    """Likewise, of a plug-in."""

    def __init__(self, one: int, two: int, three: int) -> None:
        super().__init__(f"{one} and {two}", f"not {three}")


@dataclass
class Evaluator:
    folder: Path
    index: int
    trials: int = 0

    def __call__(self, blocks: Sequence[RecipeBlock], race: object) -> Seen:
        began = time.monotonic()
        self.trials += 1
        verb, *arguments = blocks[0].name.split()
        getattr(self, verb.replace("-", "_"))(*arguments)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        return Seen(os.getpid(), self.index, self.trials, began, time.monotonic(), race, gpus)

    def _once(self, name: str) -> bool:
        """Whether it is the first time, in all processes."""
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def echo(self) -> None:
        pass

    def sleep(self, seconds: str) -> None:
        time.sleep(float(seconds))

    def say(self, name: str, seconds: str) -> None:
        """Sleep, and let the test know when that begins."""
        (self.folder / f"{name}.{os.getpid()}").touch()
        time.sleep(float(seconds))

    def die(self, number: str) -> None:
        os.kill(os.getpid(), int(number))

    def die_once(self, name: str) -> None:
        if self._once(name):
            self.die("9")

    def kill_parent(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        self.hang()

    def exit(self, status: str) -> None:
        sys.exit(int(status))

    def hang(self) -> None:
        while True:
            time.sleep(60)

    def start_and_hang(self) -> None:
        if (pid := os.fork()) == 0:
            self.hang()
        _note(self.folder, pid)
        self.hang()

    def fail(self) -> None:
        raise TaskError("task 'low': the loss is not finite", "check the data")

    def fail_extra(self) -> None:
        raise MissingExtraError("text data", "transformers")

    def fail_unportable(self) -> None:
        raise UnportablePluginError(1, 2, 3)

    def defect(self) -> None:
        raise ZeroDivisionError("a defect")

    def defect_unportable(self) -> None:
        raise UnportableError(1, 2)

    def allocate(self) -> None:
        bytearray(10**15)

    def allocate_torch(self) -> None:
        import torch

        torch.empty(2**50)

    def interrupt(self) -> None:
        raise KeyboardInterrupt


def _note(folder: Path, pid: int) -> None:
    with (folder / "pids").open("a") as file:
        file.write(f"{pid}\n")


def noted(folder: Path) -> list[int]:
    """The processes that were started, in their order."""
    file = folder / "pids"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@dataclass(frozen=True)
class Factory:
    """Builds an `Evaluator`.

    Attributes:
        folder: where processes leave notes.
        seconds: how long it takes.
        problem: what comes of it instead, from the build of this number on.
        since: that number.
    """

    folder: Path
    seconds: float = 0.0
    problem: str = ""
    since: int = 0

    def __call__(self, index: int) -> Evaluator:
        assert "torch" not in sys.modules, "what GPUs are seen is set before"
        earlier = len(noted(self.folder))
        _note(self.folder, os.getpid())
        time.sleep(self.seconds)
        if self.problem and earlier >= self.since:
            if self.problem == "error":
                raise ModelError("source 'low': the checkpoint has no tensor 'w'", "check sources.low.uri")
            if self.problem == "extra":
                raise MissingExtraError("model.kind 'transformers'", "transformers")
            if self.problem == "defect":
                raise ZeroDivisionError("a defect")
            os.kill(os.getpid(), int(self.problem))
        return Evaluator(self.folder, index)


def scores_factory(index: int):  # type: ignore[no-untyped-def]
    """An evaluator of real outcomes."""
    import numpy as np
    import torch

    from automerge.searching.evaluator import Outcome
    from automerge.tasks.task import Ratio, Scores

    torch.set_num_threads(1)

    def evaluate(blocks: Sequence[RecipeBlock], race: object) -> Outcome:
        loss = blocks[0].name
        losses = torch.empty(2**50) if loss == "allocate" else torch.full((4,), float(loss), dtype=torch.float64)
        return Outcome({"low": Scores(Ratio(losses.numpy(), np.ones(4)), {})}, samples=4, fidelity=0.25)

    return evaluate

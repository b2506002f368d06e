"""The command line in a process of its own, forked from one that has already imported what takes seconds."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from automerge.cli import main

IMPORTED = ["automerge.stages.run", "automerge.searching.search", "scipy.stats", "torch._dynamo", "mlflow"]
"""What `automerge run` imports on its way."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


def automerge(
    *arguments: str, folder: Path, environment: Mapping[str, str], seconds: float = 120
) -> "subprocess.CompletedProcess[str]":
    """`automerge` with these arguments in a folder, and what it said: the process has this environment alone."""
    files = [folder / f".{name}-of-automerge" for name in ("stdout", "stderr")]
    process = _FORKS.Process(target=_run, args=(arguments, folder, dict(environment), files))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(arguments, seconds)
    said = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _run(arguments: tuple[str, ...], folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["automerge", *arguments]
    main()

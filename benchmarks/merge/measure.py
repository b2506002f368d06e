"""What one whole process costs: wall, processor seconds, peak memory."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """One run.

    Attributes:
        wall: seconds.
        cpu: user and system seconds of the process and its children.
        peak: largest resident memory, bytes; pages of files that are mapped count.
    """

    wall: float
    cpu: float
    peak: float


def run(command: Sequence[str | Path], log: Path) -> Cost:
    """Run a command to its end.

    Raises:
        SystemExit: it fails; its output is in the log.
    """
    # A process is charged with the memory of the one that started it, up to its exec: so a small one starts it.
    starter = [sys.executable, "-S", __file__, str(log), *map(str, command)]
    # As after an installation: nothing is compiled anew at every start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    code, wall, cpu, peak = json.loads(done.stdout)
    if code != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {code}; see {log}")
    return Cost(wall, cpu, peak)


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure by itself."""
    return Cost(
        statistics.median(cost.wall for cost in costs),
        statistics.median(cost.cpu for cost in costs),
        statistics.median(cost.peak for cost in costs),
    )


def _start(log: str, command: list[str]) -> None:
    """Run a command, and print its exit code and cost."""
    with Path(log).open("w") as file:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps([os.waitstatus_to_exitcode(status), wall, cpu, usage.ru_maxrss * 1024]))


if __name__ == "__main__":
    _start(sys.argv[1], sys.argv[2:])

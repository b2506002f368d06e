"""How many trials a second two workers do on two cores, against one: one torch thread each.

The digits example's transformer with its validation images repeated until a trial takes about a second. Both searches
have the same Sobol points, so that the optimiser's time is next to nothing; the clock runs from the first finished
trial to the last, when all workers have long loaded their model.

Run as ``python -m benchmarks.search.parallel_trials FOLDER``.
"""

import argparse
import logging
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from automerge.searching.search import SearchProgress
from automerge.spec import Spec, load_spec
from automerge.stages.fetch import fetch
from automerge.stages.search import search
from automerge.stages.segment import segment
from digits.train import prepare

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.parallel_trials")
    parser.add_argument("folder", type=Path, help="for models, data and searches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=60, help="how often the validation images are repeated")
    arguments = parser.parse_args()
    logging.getLogger("automerge").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = arguments.folder.resolve()
    spec = _spec(folder, arguments.repeat, arguments.trials)
    fetch(spec, folder / "fetch")
    segment(spec, folder / "fetch", folder / "segment")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(arguments.rounds):
        for workers, found in rates.items():
            found.append(_trials_per_second(spec, folder, workers))
            print(f"round {number}: {workers} workers, {found[-1]:.3f} trials a second", flush=True)
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    print(
        f"medians: 1 worker {statistics.median(rates[1]):.3f}, 2 workers {statistics.median(rates[2]):.3f} trials a "
        f"second; ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def _spec(folder: Path, repeat: int, trials: int) -> Spec:
    prepared = prepare(folder / "models")
    spec = load_spec(ROOT / "examples" / "digits" / "spec.yaml", environment={"DIGITS": str(prepared.folder)})
    tasks = []
    for task in spec.tasks:
        data = load_file(prepared.validation[task.name])
        file = folder / f"{task.name}-repeated.safetensors"
        save_file({name: torch.cat([tensor] * repeat) for name, tensor in data.items()}, file)
        tasks.append({**task.model_dump(), "validation": str(file)})
    plain = {"preset": "paper", "trials": trials, "initial": trials}
    return Spec.model_validate({**spec.model_dump(), "tasks": tasks, "search": plain})


def _trials_per_second(spec: Spec, folder: Path, workers: int) -> float:
    place = folder / f"search-{workers}"
    shutil.rmtree(place, ignore_errors=True)
    # A time limit that no trial meets: it puts one worker, too, into a process of its own.
    changes = {
        "compute": {"device": "cpu", "threads": 1, "workers": workers},
        "search": {**spec.search.model_dump(), "trial_seconds": 600.0},
    }
    times: list[float] = []

    def note(event: SearchProgress) -> None:
        times.append(time.perf_counter())

    changed = Spec.model_validate({**spec.model_dump(), **changes})
    search(changed, folder / "fetch", folder / "segment", place, progress=note)
    return (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    main()

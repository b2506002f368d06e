"""The optimiser's share of a search by preset ``paper`` on the digits network, with 512 validation images.

    python -m benchmarks.search.optimiser_share FOLDER [--rounds 3]

Trains the example's networks in FOLDER (once), then repeats the search on one thread. A trial merges and evaluates; the
optimiser's time is that of asking for a point, in which it also learns from the last one, and of telling it the cost.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from rich.console import Console

from automerge.searching.optimiser import Optimiser
from automerge.spec import Spec, load_spec
from automerge.stages.fetch import fetch
from automerge.stages.search import search
from automerge.stages.segment import segment

ROOT = Path(__file__).parents[2]
VALIDATION_SHARE = 0.4749
"""Of the images that are not for testing: 512."""

IMAGES = 512
TARGET = 0.10


def main() -> None:
    """Print a row for each round, and the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from digits.train import prepare

    models = prepare(options.folder / "models", validation_share=VALIDATION_SHARE).folder
    plain = load_spec(ROOT / "examples" / "digits" / "spec.yaml", environment={"DIGITS": str(models)})
    compute = {"device": "cpu", "threads": 1}
    spec = Spec.model_validate({**plain.model_dump(), "search": {"preset": "paper"}, "compute": compute})
    inputs, blocks = options.folder / "fetch", options.folder / "segment"
    fetch(spec, inputs)
    segment(spec, inputs, blocks)
    console = Console()
    shares, costs, trials = [], [], []
    for number in range(options.rounds):
        share, cost, trial = measured(spec, inputs, blocks, options.folder / f"search-{time.time_ns()}")
        console.print(f"round {number}: optimiser {cost:.1f} ms a trial, the trial {trial:.1f} ms, share {share:.1%}")
        shares.append(share)
        costs.append(cost)
        trials.append(trial)
    share = statistics.median(shares)
    verdict = "below" if share < TARGET else "[bold red]not below[/bold red]"
    console.print(
        f"medians of {options.rounds}: optimiser {statistics.median(costs):.1f} ms, trial "
        f"{statistics.median(trials):.1f} ms, share of the search {share:.1%}, {verdict} {TARGET:.0%}"
    )


def measured(spec: Spec, inputs: Path, blocks: Path, folder: Path) -> tuple[float, float, float]:
    """The optimiser's share of a search's wall time, its milliseconds a trial, and those of the rest."""
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            begun = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent += time.perf_counter() - begun

        return call

    methods = {name: getattr(Optimiser, name) for name in ("ask", "tell")}
    for name, method in methods.items():
        setattr(Optimiser, name, timed(method))
    begun = time.perf_counter()
    try:
        found = search(spec, inputs, blocks, folder)
    finally:
        for name, method in methods.items():
            setattr(Optimiser, name, method)
    whole = time.perf_counter() - begun
    asked = [trial for trial in found.trials if trial.phase == "search"]
    images = {trial.samples for trial in asked if trial.status == "ok"}
    assert images == {IMAGES}, images  # noqa: S101 - what the figure is about
    return spent / whole, 1000 * spent / len(asked), 1000 * (whole - spent) / len(asked)


if __name__ == "__main__":
    main()

"""What to tell the surrogate about pending trials: the lies of Ginsbourger, Le Riche and Carraro (2010), and none.

Each search keeps a number of trials pending, in two ways: in batches (all are asked, then all are told) and one by one
(the oldest is told, another is asked). Printed are the best costs, means over seeds and the two landscapes, how far
apart the proposals of a batch lie, and Wilcoxon's signed-rank test against no lie, paired by landscape and seed.

Run by ``python -m benchmarks.search.lies --help``.
"""

import argparse
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from ConfigSpace import Configuration, ConfigurationSpace
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import wilcoxon

from automerge.searching import optimiser
from automerge.searching.optimiser import Optimiser
from benchmarks.search.landscapes import LANDSCAPES, Landscape, make_space

Array = npt.NDArray[np.float64]

LIES: dict[str, Callable[[Array], Any] | None] = {"none": None, "min": np.min, "mean": np.mean, "max": np.max}
INITIAL = 14


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.lies", description=__doc__)
    parser.add_argument("--pending", type=int, default=6, help="trials that are pending at once")
    parser.add_argument("--trials", type=int, default=80, help=f"of a search, {INITIAL} of them initial")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    console = Console()
    table = Table(
        title=f"best cost of {arguments.trials} trials, {arguments.pending} pending; means of {arguments.seeds} seeds "
        f"and {len(LANDSCAPES)} landscapes",
        title_justify="left",
    )
    for column in ("lie", "in batches", "p against none", "one by one", "p against none", "distance in a batch"):
        table.add_column(column, justify="left" if column == "lie" else "right")
    blind: list[list[float]] = []
    for name, lie in LIES.items():
        found: list[list[float]] = [[], []]
        distances: list[float] = []
        with lying(lie):
            for landscape in LANDSCAPES.values():
                for seed in track(range(arguments.seeds), name, console=console, transient=True):
                    for way, run in enumerate((in_batches, one_by_one)):
                        space = make_space(seed)
                        search = Optimiser(space, trials=arguments.trials, initial=INITIAL, warm_starts=[], seed=seed)
                        costs, spread = run(search, space, landscape(seed), arguments.trials, arguments.pending)
                        search.close()
                        found[way].append(min(costs))
                        distances += spread
        blind = blind or found
        cells = []
        for mine, other in zip(found, blind, strict=True):
            p = "" if mine is other else f"{wilcoxon(np.subtract(mine, other)).pvalue:.3f}"
            cells += [f"{statistics.mean(mine):.4f}", p]
        table.add_row(name, *cells, f"{statistics.mean(distances):.2f}")
    console.print(table)


def in_batches(
    search: Optimiser, space: ConfigurationSpace, cost: Landscape, trials: int, pending: int
) -> tuple[list[float], list[float]]:
    """Ask for all, tell all, and so on: the costs, and the mean distance between the proposals of each batch."""
    costs: list[float] = []
    distances: list[float] = []
    while len(costs) < trials:
        batch = [search.ask() for _ in range(min(pending, trials - len(costs)))]
        proposals = [config for _, origin, config in batch if origin == "surrogate"]
        if len(proposals) > 1:
            distances.append(_distance(space, proposals))
        for number, _, config in batch:
            costs.append(cost(config))
            search.tell(number, costs[-1])
    return costs, distances


def one_by_one(
    search: Optimiser, space: ConfigurationSpace, cost: Landscape, trials: int, pending: int
) -> tuple[list[float], list[float]]:
    """Tell the oldest, ask for another, and so on: the costs."""
    costs: list[float] = []
    open_ = deque(search.ask() for _ in range(pending))
    while open_:
        number, _, config = open_.popleft()
        costs.append(cost(config))
        search.tell(number, costs[-1])
        if len(costs) + len(open_) < trials:
            open_.append(search.ask())
    return costs, []


@contextmanager
def lying(lie: Callable[[Array], Any] | None) -> Iterator[None]:
    """Optimisers tell this lie, or none."""
    selector = optimiser._Selector
    lies, retrain = selector._lie, selector._retrain

    def blindly(self: Any) -> None:
        pending, self._runhistory._running_trials = self._runhistory._running_trials, []
        try:
            retrain(self)
        finally:
            self._runhistory._running_trials = pending

    if lie is None:
        selector._retrain = blindly  # type: ignore[method-assign]
    else:
        selector._lie = lambda self, costs: float(lie(costs))  # type: ignore[method-assign]
    try:
        yield
    finally:
        selector._lie, selector._retrain = lies, retrain  # type: ignore[method-assign]


def _distance(space: ConfigurationSpace, points: list[dict[str, Any]]) -> float:
    """Mean distance between points as the surrogate sees them; what is inactive is at -1."""
    arrays = np.array([Configuration(space, values=point).get_array() for point in points])
    arrays = np.nan_to_num(arrays, nan=-1.0)
    pairs = np.triu_indices(len(arrays), 1)
    return float(np.linalg.norm(arrays[:, None] - arrays, axis=2)[pairs].mean())


if __name__ == "__main__":
    main()

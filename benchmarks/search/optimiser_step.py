"""What a search's optimiser costs a trial, and whether it finds as good a point, beside SMAC as it comes.

Three optimisers on the same space of 20 hyperparameters (:mod:`benchmarks.search.landscapes`), each retrained after
every observation, on one core:

``ours``
    ``automerge.searching.optimiser.Optimiser``.
``SMAC``
    its facade of hyperparameter optimisation with ``retrain_after=1`` and otherwise its defaults.
``SMAC, bounded``
    the same with a forest of at most 1024 leaves a tree, which makes the same proposals.

The first part alternates between them trial by trial, in turn, and prints seconds of the processor and of the clock for
one ask and one tell. The second runs ours and SMAC on two landscapes over seeds, each seed a problem of its own, and
compares the best cost that each found by Wilcoxon's signed-rank test. It assumes that the differences between the pairs
are symmetric about their median; nothing about their distribution.

All begin with the same number of Sobol points. SMAC is not asked to save its state, which would make it slower.

Run by ``python -m benchmarks.search.optimiser_step --help``.
"""

import argparse
import contextlib
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ConfigSpace import ConfigurationSpace
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import wilcoxon
from smac import HyperparameterOptimizationFacade, Scenario
from smac.model.random_forest import RandomForest
from smac.runhistory import TrialValue

from automerge.searching.optimiser import Optimiser
from automerge.searching.surrogate import MAX_LEAVES, TREES
from benchmarks.search.landscapes import LANDSCAPES, Landscape, make_space

INITIAL = 20
"""Sobol points before the surrogate is used, as published."""

TARGET = 0.08
"""Seconds a trial that the optimiser may take."""


class Contestant(Protocol):
    """An optimiser under measurement."""

    def step(self, landscape: Landscape) -> tuple[dict[str, Any], float]:
        """Ask, evaluate, tell: the point and its cost."""


@dataclass
class Ours:
    """Our optimiser."""

    space: ConfigurationSpace
    trials: int
    seed: int
    optimiser: Optimiser = field(init=False)

    def __post_init__(self) -> None:
        self.optimiser = Optimiser(self.space, trials=self.trials, initial=INITIAL, warm_starts=[], seed=self.seed)

    def step(self, landscape: Landscape) -> tuple[dict[str, Any], float]:
        number, _, config = self.optimiser.ask()
        cost = landscape(config)
        self.optimiser.tell(number, cost)
        return config, cost


@dataclass
class Smac:
    """SMAC's facade; its forest bounded or as it comes."""

    space: ConfigurationSpace
    trials: int
    seed: int
    bounded: bool
    facade: Any = field(init=False)

    def __post_init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="optimiser-step-")
        scenario = Scenario(
            self.space, deterministic=True, n_trials=self.trials, seed=self.seed, output_directory=Path(folder)
        )
        forest = None  # its default
        if self.bounded:
            forest = RandomForest(
                self.space,
                log_y=True,
                n_trees=TREES,
                ratio_features=1.0,
                min_samples_split=2,
                min_samples_leaf=1,
                max_leaf_nodes=MAX_LEAVES,
                n_jobs=1,
                seed=self.seed,
            )
        self.facade = HyperparameterOptimizationFacade(
            scenario,
            model=forest,
            initial_design=HyperparameterOptimizationFacade.get_initial_design(
                scenario, n_configs=INITIAL, max_ratio=1.0
            ),
            config_selector=HyperparameterOptimizationFacade.get_config_selector(scenario, retrain_after=1),
            logging_level=False,
            overwrite=True,
        )

    def step(self, landscape: Landscape) -> tuple[dict[str, Any], float]:
        info = self.facade.ask()
        cost = landscape(info.config)
        self.facade.tell(info, TrialValue(cost=cost), save=False)
        return dict(info.config), cost


MAKERS: dict[str, Callable[[int, int], Contestant]] = {
    "ours": lambda trials, seed: Ours(make_space(seed), trials, seed),
    "SMAC": lambda trials, seed: Smac(make_space(seed), trials, seed, bounded=False),
    "SMAC, bounded": lambda trials, seed: Smac(make_space(seed), trials, seed, bounded=True),
}


@dataclass
class Run:
    """One optimiser's trials: processor and wall seconds of each, its point and its cost."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.optimiser_step", description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of the part that measures time; 0 leaves it out")
    parser.add_argument("--seeds", type=int, default=10, help="of the part that compares costs; 0 leaves it out")
    parser.add_argument("--seed-trials", type=int, default=80, help="trials of each of these seeds")
    parser.add_argument(
        "--against", choices=["SMAC", "SMAC, bounded"], default="SMAC", help="whose costs ours are compared with"
    )
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="which core to run on")
    arguments = parser.parse_args()
    for name, least in (("trials", arguments.trials), ("seed-trials", arguments.seed_trials)):
        if 0 < least <= INITIAL:
            parser.error(f"--{name}: more than the {INITIAL} initial points")
    os.sched_setaffinity(0, {arguments.core})
    for name in ("smac", "ConfigSpace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Mean of empty slice|invalid value", RuntimeWarning)  # SMAC's own local search
    console = Console()
    with _scratch():
        if arguments.trials:
            seconds(arguments.trials, console)
        if arguments.seeds:
            for landscape in LANDSCAPES:
                objectives(landscape, arguments.seeds, arguments.seed_trials, arguments.against, console)


def seconds(trials: int, console: Console) -> None:
    """Alternate trial by trial, and print the medians of what one costs."""
    landscape = LANDSCAPES["interacting"](0)
    contestants = {name: make(trials, 0) for name, make in MAKERS.items()}
    runs = {name: Run() for name in contestants}
    names = list(contestants)
    for trial in track(range(trials), "seconds", console=console, transient=True):
        for turn in range(len(names)):
            name = names[(trial + turn) % len(names)]
            _timed(contestants[name], landscape, runs[name])
    modelled = slice(INITIAL, None)
    last = slice(-20, None)
    table = Table(
        title=f"optimiser seconds a trial, {trials} trials, {INITIAL} of them initial; one core", title_justify="left"
    )
    for column in ("", "CPU median", "wall median", "CPU, last 20", "wall, last 20", "CPU / ours"):
        table.add_column(column, justify="left" if not column else "right")
    ours = statistics.median(runs["ours"].cpu[modelled])
    for name, run in runs.items():
        cpu = statistics.median(run.cpu[modelled])
        table.add_row(
            name,
            f"{cpu:.3f}",
            f"{statistics.median(run.wall[modelled]):.3f}",
            f"{statistics.median(run.cpu[last]):.3f}",
            f"{statistics.median(run.wall[last]):.3f}",
            f"[bold]{cpu / ours:.1f}x[/bold]",
        )
    console.print(table)
    verdict = "within" if ours <= TARGET else "[bold red]above[/bold red]"
    console.print(f"ours: {ours:.3f} CPU s a trial, {verdict} {TARGET}")
    same = sum(one == other for one, other in zip(runs["SMAC"].points, runs["SMAC, bounded"].points, strict=True))
    console.print(f"proposals that SMAC makes with a bounded forest as well: {same} of {trials}")


def objectives(landscape: str, seeds: int, trials: int, against: str, console: Console) -> None:
    """Run two optimisers over seeds, and print the best costs with a paired test."""
    found: dict[str, list[float]] = {"ours": [], against: []}
    for seed in track(range(seeds), landscape, console=console, transient=True):
        problem = LANDSCAPES[landscape](seed)
        contestants = {name: MAKERS[name](trials, seed) for name in found}
        for name, contestant in contestants.items():
            found[name].append(min(contestant.step(problem)[1] for _ in range(trials)))
    table = Table(
        title=f"best cost of {trials} trials, landscape '{landscape}'; 1 is nothing lost", title_justify="left"
    )
    for column in ("seed", *found, "ours - other"):
        table.add_column(column, justify="right")
    differences = [mine - other for mine, other in zip(*found.values(), strict=True)]
    for seed, (mine, other) in enumerate(zip(*found.values(), strict=True)):
        table.add_row(str(seed), f"{mine:.4f}", f"{other:.4f}", f"{mine - other:+.4f}")
    means = [statistics.mean(costs) for costs in found.values()]
    table.add_section()
    table.add_row("mean", *(f"{mean:.4f}" for mean in means), f"[bold]{means[0] - means[1]:+.4f}[/bold]")
    console.print(table)
    console.print(test(differences))


def test(differences: Sequence[float]) -> str:
    """Wilcoxon's signed-rank test of costs, ours minus the other's, two-sided and against ours being the worse."""
    two_sided, worse = (
        wilcoxon(differences, alternative=alternative, method="exact").pvalue
        for alternative in ("two-sided", "greater")
    )
    better = sum(difference < 0 for difference in differences)
    return (
        f"ours is better on {better} of {len(differences)} seeds; Wilcoxon's signed-rank test, paired by seed: "
        f"p = {two_sided:.3f} two-sided, p = {worse:.3f} against 'ours is worse'"
    )


def _timed(contestant: Contestant, landscape: Landscape, run: Run) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    point, cost = contestant.step(landscape)
    run.cpu.append(time.process_time() - cpu)
    run.wall.append(time.perf_counter() - wall)
    run.points.append(point)
    run.costs.append(cost)


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """A folder for what SMAC writes, removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield
        finally:
            tempfile.tempdir = before


if __name__ == "__main__":
    main()

"""Do the presets keep what they promise? Over pairs of specialists and seeds, beside their rivals.

Each seed resplits a pair's data, and trains its base and both specialists anew. Then one model is made of them by each
of these ways, from the same validation data; test data give the figures and decide nothing:

    base                the specialists' common ancestor, not merged
    average             the plain average of the specialists
    <technique>         each of the paper's techniques for the whole model, at its defaults (weight 0.5, density 0.65)
    paper               preset `paper`: the published search, 200 trials
    fast_paper          preset `fast`, in the space and with the objective of `paper`
    fast                preset `fast`
    best                preset `best`, the default
    best_soft           preset `best` with the stand-ins of the metrics as its objective
    best_ratio          preset `best` with the objective of the paper, to tell the objective's part from the search's
    tuned_average       the average, fine-tuned on the validation data (`studies.fine_tuning`), with the samples that
                        `best` took, or what one epoch of all attempts needs, if that is more
    tuned_best          the model of `best`, fine-tuned likewise
    tuned_specialist    the first specialist, fine-tuned likewise

Run as ``python -m studies.presets FOLDER --pair digits --seeds 0 1 2``; rows that are there are not made again, so
seeds may run side by side as processes of their own. ``python -m studies.presets FOLDER --report`` prints the tables.
"""

import argparse
import importlib
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from automerge.errors import MergeError
from automerge.merging.recipe import BASE, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.statistics import Statistics
from automerge.merging.technique import load_technique
from automerge.models.heads import Heads
from automerge.preservation import Measurement, MetricInfo, Role, TaskInfo, preservation
from automerge.searching.evaluator import measure_tasks
from automerge.searching.objective import SMALLEST_CP, Measure, Name, Objective, TaskReference, harmonic_mean
from automerge.searching.store import read_trials
from automerge.searching.trial import Trial
from automerge.spec import PAPER_TECHNIQUES, Spec, load_spec
from automerge.stages.documents import RECIPE, STATISTICS, TRIALS
from automerge.stages.fetch import fetch
from automerge.stages.loading import mergeable_blocks
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.stages.trials import TrialRun
from automerge.tasks.task import Scores
from studies.comparison import claims_table, compare, correlations_table, rank_correlation, seeds_table, ways_table
from studies.fine_tuning import fine_tune
from studies.results import Row, add_row, open_results, paired_values, read_rows, row_of

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ("digits", "emoji", "prose_code")
SEARCHES: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "fast_paper": {
        "preset": "fast",
        "objective": "loss_ratio",
        "epsilon": 0.0,
        "weights": "simplex",
        "weight_range": [0.0, 1.0],
    },
    "fast": {"preset": "fast"},
    "best": {"preset": "best"},
    "best_soft": {"preset": "best", "objective": "soft_metric"},
    "best_ratio": {"preset": "best", "objective": "loss_ratio", "epsilon": 0.0},
}
TUNED = ("tuned_average", "tuned_best", "tuned_specialist")
WAYS = ("base", "average", *PAPER_TECHNIQUES, *SEARCHES, *TUNED)

RANDOM_RECIPES = 60
OBJECTIVES: tuple[Name, ...] = ("soft_metric", "metric", "gap", "loss_ratio")
PERFECT = "the harmonic mean of the test PRs themselves"
SPACES = ("paper", "best")

REACHED = 0.99
"""Of the paper's final objective: what `fast_paper` has to reach."""


@dataclass(frozen=True)
class Setting:
    """One seed of one pair: the fetched inputs, and what measures models on test data."""

    pair: str
    seed: int
    spec: Spec
    folder: Path

    @classmethod
    def make(cls, folder: Path, pair: str, seed: int) -> "Setting":
        """Train, fetch and segment, unless that is done."""
        place = folder / pair / f"seed-{seed}"
        prepared = importlib.import_module(f"{pair}.train").prepare(place / "models", seed=seed)
        file = ROOT / "examples" / pair / "spec.yaml"
        spec = load_spec(file, environment={pair.upper(): str(prepared.folder)})
        setting = cls(pair, seed, changed(spec, {"seed": seed}), place)
        fetch(setting.spec, setting.inputs)
        segment(setting.spec, setting.inputs, setting.blocks)
        return setting

    @property
    def inputs(self) -> Path:
        return self.folder / "fetch"

    @property
    def blocks(self) -> Path:
        return self.folder / "segment"

    def run(self, search: Mapping[str, Any], name: str) -> TrialRun:
        """Everything that trials of a search need."""
        return TrialRun.load(changed(self.spec, {**search, "seed": self.seed}), self.inputs, self.blocks, self.at(name))

    def at(self, name: str) -> Path:
        """The folder of one search."""
        return self.folder / name


def changed(spec: Spec, search: Mapping[str, Any]) -> Spec:
    """The spec on one thread, with another search."""
    compute = {"device": "cpu", "threads": 1}
    return Spec.model_validate({**spec.model_dump(), "search": dict(search), "compute": compute})


class Bench:
    """Measures models of one setting on test data."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.plain = setting.run({"preset": "paper"}, "plain")
        self.loaded = self.plain.loaded
        self.test = self.loaded.measured("test")
        self.specialists: dict[str, dict[str, Scores]] = {name: {} for name in self.test}
        for source in self.loaded.sources:
            heads = self.loaded.heads(self.loaded.shared(source), like=source)
            for name, scores in self._scores(heads).items():
                self.specialists[name][source] = scores

    def row(self, heads: Heads, way: str, **figures: Any) -> Row:
        """The row of the live model."""
        scores = {name: {**self.specialists[name], way: found} for name, found in self._scores(heads).items()}
        measurements = [
            Measurement(
                TaskInfo(
                    name=name,
                    kind=task.task.spec.kind,
                    reference=task.reference,
                    guard=task.task.spec.guard,
                    validation_samples=len(self.plain.tasks[name].data),
                    test_samples=len(task.data),
                    metrics=[
                        MetricInfo(
                            name=metric.name,
                            higher_is_better=metric.higher_is_better,
                            chance=task.task.chance(metric.name, task.data),
                        )
                        for metric in task.task.metrics
                    ],
                ),
                scores[name],
            )
            for name, task in self.test.items()
        ]
        roles: dict[str, Role] = {way: "merged", **dict.fromkeys(self.loaded.sources, "source")}
        found = preservation(measurements, roles, confidence=0.95, resamples=200, seed=0)
        return row_of(found.models[0], pair=self.setting.pair, seed=self.setting.seed, way=way, **figures)

    def heads_of(self, recipe: Recipe, statistics: Path | None = None) -> Heads:
        """The merged model of a recipe, with its recalibrated statistics."""
        found = None
        if recipe.statistics is not None and statistics is not None:
            with Statistics.open(statistics, recipe.statistics) as opened:
                found = opened.resident(self.loaded.device)
        heads = self.loaded.heads(self.loaded.shared(self.loaded.inputs.spec.sources[0].name, fitted=True))
        ResidentMerger(self.loaded.base, self.loaded.sources, self.loaded.device, found).apply(recipe, heads.live)
        return heads

    def uniform(self, technique: str) -> Recipe:
        """One technique for the whole model, at the paper's defaults."""
        defaults = load_technique(technique).declaration.defaults()
        values = {**defaults, "density": 0.65} if "density" in defaults else defaults
        sources = list(self.loaded.sources)
        blocks = [
            RecipeBlock(
                name=block.name,
                technique=technique,
                weights=dict.fromkeys(sources, 1 / len(sources)),
                hyperparameters=values,
                parameters=block.parameters,
                buffers=block.buffers,
            )
            for block in mergeable_blocks(self.plain.segmentation, self.loaded.private)
        ]
        return self.loaded.recipe(self.plain.segmentation, blocks)

    def _scores(self, heads: Heads) -> dict[str, Scores]:
        return measure_tasks(self.test, heads.module, self.loaded.inputs.architecture, self.loaded.device)


def run_seed(folder: Path, pair: str, seed: int, ways: list[str]) -> None:
    """Make the rows of one seed that are not there yet."""
    results = open_results(folder, pair, seed, {})
    missing = [way for way in ways if way not in results.ways]
    if not missing:
        return
    setting = Setting.make(folder, pair, seed)
    bench = Bench(setting)
    for way in missing:
        started = time.perf_counter()
        try:
            row = _made(bench, way)
        except MergeError as error:
            print(f"{pair}, seed {seed}, {way}: {error}", file=sys.stderr)
            continue
        results = add_row(folder, results, row)
        took = time.perf_counter() - started
        print(f"{pair} {seed} {way}: {row.mean_pr:.1f} / {row.worst_pr:.1f} / {row.pd:.1f}  {took:.1f} s", flush=True)


def _made(bench: Bench, way: str) -> Row:
    if way in SEARCHES:
        return _searched(bench, way)
    if way in TUNED:
        return _tuned(bench, way)
    if way == "base":
        return bench.row(bench.loaded.heads(bench.loaded.shared(BASE)), way)
    recipe = bench.uniform("linear" if way == "average" else way)
    return bench.row(bench.heads_of(recipe), way)


def _searched(bench: Bench, way: str) -> Row:
    setting = bench.setting
    folder = setting.at(way)
    spec = changed(setting.spec, {**SEARCHES[way], "seed": setting.seed})
    if not (folder / "seconds").exists():
        shutil.rmtree(folder, ignore_errors=True)
        started, processor = time.perf_counter(), time.process_time()
        result = search(spec, setting.inputs, setting.blocks, folder)
        if result.stopped == "interrupted":  # its recipe is the best so far, and not what the preset finds
            raise KeyboardInterrupt
        (folder / "seconds").write_text(f"{time.perf_counter() - started} {time.process_time() - processor}")
    seconds, processor = map(float, (folder / "seconds").read_text().split())
    trials = read_trials(folder / TRIALS)
    recipe = Recipe.read(folder / RECIPE)
    best = max(trial.objective or 0.0 for trial in trials if trial.is_candidate)
    figures = {
        "objective": best,
        "cpu_seconds": processor,
        "optimiser_seconds": sum(trial.optimiser_seconds for trial in trials),
        "trials": float(len(trials)),
    }
    if way == "fast_paper":
        figures["share"] = _share_of_paper(setting, trials)
    heads = bench.heads_of(recipe, folder / STATISTICS)
    return bench.row(heads, way, seconds=seconds, samples=sum(trial.samples for trial in trials), figures=figures)


def _share_of_paper(setting: Setting, trials: list[Trial]) -> float:
    """The samples until the paper's final objective is reached (within 1 %), as a share of the paper's; 9: never."""
    paper = read_trials(setting.at("paper") / TRIALS)
    goal = REACHED * max(trial.objective or 0.0 for trial in paper if trial.is_candidate)
    spent = 0
    for trial in trials:
        spent += trial.samples
        if trial.is_candidate and (trial.objective or 0.0) >= goal:
            return spent / sum(each.samples for each in paper)
    return 9.0


def _tuned(bench: Bench, way: str) -> Row:
    setting = bench.setting
    samples = sum(trial.samples for trial in read_trials(setting.at("best") / TRIALS))
    if way == "tuned_best":
        heads = bench.heads_of(Recipe.read(setting.at("best") / RECIPE), setting.at("best") / STATISTICS)
    elif way == "tuned_average":
        heads = bench.heads_of(bench.uniform("linear"))
    else:
        heads = bench.loaded.heads(bench.loaded.shared(setting.spec.sources[0].name))
    # Four learning rates (with BatchNorm twice) and the last training want an epoch each.
    least = 3 * 10 * sum(len(task.data) for task in bench.plain.tasks.values())
    found = fine_tune(
        heads,
        bench.plain.tasks,
        bench.loaded.inputs.architecture,
        bench.loaded.device,
        seed=setting.seed,
        budget_samples=max(samples, least),
        # What the task's metrics are: a language model's perplexity is its loss.
        criterion="loss"
        if any(task.task.spec.kind == "language_modelling" for task in bench.plain.tasks.values())
        else "soft_metric",
    )
    chosen = found.chosen.setting.learning_rate if found.chosen.setting is not None else 0.0
    return bench.row(heads, way, seconds=found.seconds, samples=found.samples, figures={"learning_rate": chosen})


def run_alignment(folder: Path, pair: str, seed: int) -> None:
    """Random recipes of a seed: each objective on validation data, and mean and worst-task PR on test data."""
    results = open_results(folder, f"{pair}_recipes", seed, {})
    setting = Setting.make(folder, pair, seed)
    bench = Bench(setting)
    for space in SPACES:
        search_of = {**SEARCHES[space], "objective": "metric"}
        run = setting.run(search_of, f"random-{space}")
        objectives = _objectives(run)
        configs = run.space.configuration_space(seed).sample_configuration(RANDOM_RECIPES)
        for index, config in enumerate(configs):
            way = f"{space}_{index}"
            if way in results.ways:
                continue
            point = {key: np.asarray(value).item() for key, value in dict(config).items()}
            outcome = run.evaluator(run.space.recipe_blocks(point))
            measures = {name: Measure.of(scores) for name, scores in outcome.scores.items()}
            figures = {name: each.value(each.preservation(measures)) for name, each in objectives.items()}
            row = bench.row(run.heads, way, figures=figures)
            results = add_row(folder, results, row.model_copy(update={"pair": results.pair}))


def _objectives(run: TrialRun) -> dict[str, Objective]:
    scores = run.reference_scores()
    references = {
        name: TaskReference.of(task.task, task.data, scores[name], task.task.guess_loss(task.data))
        for name, task in run.tasks.items()
    }
    found: dict[str, Objective] = {name: Objective(name=name, epsilon=0.0, tasks=references) for name in OBJECTIVES}
    for each in found.values():
        each.check()
    return found


def perfect(row: Row) -> float:
    """What an objective would say that knew the test data: the harmonic mean over the tasks of what is kept there.

    Its rank correlation with mean PR is what any objective with this aggregate can have.
    """
    return harmonic_mean({task: max(rate / 100, SMALLEST_CP) for task, rate in row.rates.items()})


def report(folder: Path) -> str:
    """All tables, of the rows that are there."""
    rows = read_rows(folder)
    parts = []
    for pair in PAIRS:
        own = [row for row in rows if row.pair == pair]
        seeds = {row.seed for row in own}
        ways = [way for way in WAYS if {row.seed for row in own if row.way == way} == seeds]
        if own:
            parts += [f"## {pair}", ways_table(rows, pair, ways), seeds_table(rows, pair, ways)]
    for rival, title in (("paper", "Claims: `best` over `paper`"), ("tuned_average", "Beside few-shot fine-tuning")):
        claims = {
            f"{pair}: {'mean' if figure == 'mean_pr' else 'worst-task'} PR": compare(
                *paired_values(rows, pair, "best", rival, figure)
            )
            for pair, figure in itertools.product(PAIRS, ("mean_pr", "worst_pr"))
            if any(row.pair == pair and row.way == rival for row in rows)
        }
        if claims:
            parts += [f"## {title}", claims_table(claims)]
    correlations = {}
    for pair, space, name, figure in itertools.product(PAIRS, SPACES, (*OBJECTIVES, PERFECT), ("mean_pr", "worst_pr")):
        own = [row for row in rows if row.pair == f"{pair}_recipes" and row.way.startswith(f"{space}_")]
        for seed in sorted({row.seed for row in own}):
            chosen = [row for row in own if row.seed == seed]
            label = f"{pair}, seed {seed}, space of `{space}`: {name} with {figure}"
            correlations[label] = rank_correlation(
                [perfect(row) if name == PERFECT else row.value(name) for row in chosen],
                [row.value(figure) for row in chosen],
                resamples=999,
            )
    if correlations:
        parts += ["## Alignment", correlations_table(correlations)]
    return "\n\n".join(parts)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m studies.presets", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pair", choices=PAIRS, nargs="+", default=list(PAIRS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--alignment", action="store_true", help="measure random recipes instead")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(arguments.folder))
        return
    logging.getLogger("automerge").setLevel(logging.ERROR)
    jobs: Callable[[str, int], None] = (
        (lambda pair, seed: run_alignment(arguments.folder, pair, seed))
        if arguments.alignment
        else (lambda pair, seed: run_seed(arguments.folder, pair, seed, arguments.ways))
    )
    for seed, pair in itertools.product(arguments.seeds, arguments.pair):
        jobs(pair, seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Does the search beat single techniques, a grid, and a search over the whole model? On the digits pair, over seeds.

Each seed resplits the digits, trains the base and both specialists anew, and merges them in each of these ways:

    search        blocks by transition, the default preset
    whole         the same search with granularity `whole`
    grid          the best point on validation data of a full grid for the whole model: weight in steps of 0.1 for
                  linear and task arithmetic; weight in steps of 0.2 and density in steps of 0.1 (0.5 to 1) for the rest
    <technique>   each single technique at the paper's defaults: weight 0.5, density 0.65

The test split is used once, for the figures. Run as ``python studies/digits_pair.py FOLDER --seeds 0 1 2 3 4``; a seed
that is done is not run again, so seeds may also run side by side as processes of their own.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from automerge.documents import write_atomically
from automerge.merging.recipe import Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.technique import load_technique
from automerge.models.heads import Heads
from automerge.preservation import Measurement, MetricInfo, Role, TaskInfo, preservation
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator, mean_losses
from automerge.searching.trial import capability_preservation, harmonic_mean
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import PAPER_TECHNIQUES, Spec, load_spec
from automerge.stages.documents import RECIPE, SEGMENTATION
from automerge.stages.fetch import fetch
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded, mergeable_blocks, prepare_compute
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.tasks.run import evaluate_task
from automerge.tasks.task import Scores
from digits.train import prepare

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        result = arguments.folder / f"seed-{seed}.json"
        if not result.exists():
            rows = run_seed(arguments.folder / f"seed-{seed}", seed, arguments.trials)
            write_atomically(result, (json.dumps(rows, indent=2) + "\n").encode())
    print(
        markdown({seed: json.loads((arguments.folder / f"seed-{seed}.json").read_text()) for seed in arguments.seeds})
    )


def run_seed(folder: Path, seed: int, trials: int) -> dict[str, dict[str, float]]:
    """Mean PR, worst PR and PD on test data, in percent and points, by way of merging."""
    prepared = prepare(folder / "models", seed=seed)
    spec = load_spec(ROOT / "examples" / "digits" / "spec.yaml", environment={"DIGITS": str(prepared.folder)})
    # One run of its own for each of several processes: more threads than that gain nothing on a model of this size.
    spec = _changed(spec, compute={"device": "cpu", "threads": 1}, search={"trials": trials, "seed": seed})
    whole = _changed(spec, segmentation={"granularity": "whole"})
    fetch(spec, folder / "fetch")
    recipes: dict[str, Recipe] = {}
    for name, variant in (("search", spec), ("whole", whole)):
        segment(variant, folder / "fetch", folder / name)
        search(variant, folder / "fetch", folder / name, folder / name, resume=True)
        recipes[name] = Recipe.read(folder / name / RECIPE)

    device = prepare_compute(spec)
    loaded = Loaded.load(Inputs.open(spec, folder / "fetch"), device)
    segmentation = Segmentation.read(folder / "whole" / SEGMENTATION)
    merger = ResidentMerger(loaded.base, loaded.sources, device)
    heads = loaded.heads(loaded.shared("low"))
    for technique in PAPER_TECHNIQUES:
        recipes[technique] = _uniform(loaded, segmentation, technique, 0.5, 0.65)
    recipes["grid"] = _best_of_grid(loaded, segmentation, merger, heads)
    return _measure(loaded, merger, heads, recipes)


def _changed(spec: Spec, **parts: Mapping[str, object]) -> Spec:
    value = spec.model_dump()
    for part, changes in parts.items():
        value[part] |= changes
    return Spec.model_validate(value)


def _uniform(loaded: Loaded, segmentation: Segmentation, technique: str, weight: float, density: float) -> Recipe:
    """One technique with one setting for the whole model; ``weight`` is that of ``low``."""
    defaults = load_technique(technique).declaration.defaults()
    block = mergeable_blocks(segmentation, loaded.private)[0]
    return loaded.recipe(
        segmentation,
        [
            RecipeBlock(
                name=block.name,
                technique=technique,
                weights={"low": weight, "high": 1 - weight},
                hyperparameters={**defaults, "density": density} if "density" in defaults else defaults,
                parameters=block.parameters,
                buffers=block.buffers,
            )
        ],
    )


def _grid() -> Iterator[tuple[str, float, float]]:
    for technique, tenths in itertools.product(("linear", "task_arithmetic"), range(11)):
        yield technique, tenths / 10, 1.0
    for technique, fifths, tenths in itertools.product(("ties", "dare_linear", "dare_ties"), range(6), range(5, 11)):
        yield technique, fifths / 5, tenths / 10


def _best_of_grid(loaded: Loaded, segmentation: Segmentation, merger: ResidentMerger, heads: Heads) -> Recipe:
    """The grid's point with the highest objective of the search on validation data."""
    spec, architecture = loaded.inputs.spec, loaded.inputs.architecture
    tasks = loaded.measured("validation")
    references: dict[str, float] = {}
    for name, task in tasks.items():
        own = loaded.heads(loaded.shared(task.reference), [task.reference])
        references |= mean_losses({name: task}, own.module, architecture, loaded.device)
    points = [_uniform(loaded, segmentation, *point) for point in _grid()]
    evaluator = RecipeEvaluator(points[0], merger, heads, architecture, tasks, loaded.device)

    def objective(recipe: Recipe) -> float:
        losses = evaluator(recipe.blocks)
        epsilon = spec.search.effective_epsilon
        return harmonic_mean(
            {name: capability_preservation(references[name], losses[name], epsilon, name) for name in tasks}
        )

    return max(points, key=objective)


def _measure(
    loaded: Loaded, merger: ResidentMerger, heads: Heads, recipes: Mapping[str, Recipe]
) -> dict[str, dict[str, float]]:
    tasks = loaded.measured("test")
    scores: dict[str, dict[str, Scores]] = {name: {} for name in tasks}

    def score(label: str, task_name: str, task: MeasuredTask) -> None:
        scores[task_name][label] = evaluate_task(
            loaded.inputs.architecture,
            heads.module(task.reference),
            task.task,
            task.data,
            task.batch_size,
            loaded.device,
        )

    for label, recipe in recipes.items():
        merger.apply(recipe, heads.live)
        for name, task in tasks.items():
            score(label, name, task)
    for source in loaded.sources:
        heads.load(loaded.shared(source))
        for name, task in tasks.items():
            score(source, name, task)
    measurements = [
        Measurement(
            TaskInfo(
                name=name,
                kind="classification",
                reference=task.reference,
                guard=False,
                validation_samples=0,
                test_samples=len(task.data),
                metrics=[MetricInfo(name="top1", higher_is_better=True, chance=task.task.chance("top1", task.data))],
            ),
            scores[name],
        )
        for name, task in tasks.items()
    ]
    roles: dict[str, Role] = {**dict.fromkeys(recipes, "technique"), **dict.fromkeys(loaded.sources, "source")}
    found = preservation(measurements, roles, confidence=0.95, resamples=100, seed=0)
    return {
        row.name: {"mean": row.mean_pr or 0.0, "worst": row.worst_pr or 0.0, "pd": row.pd or 0.0}
        for row in found.models
        if row.role == "technique"
    }


def markdown(seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """A table: mean PR / worst-task PR / PD by way of merging and seed, and the means over the seeds."""
    ways = ["search", "whole", "grid", *PAPER_TECHNIQUES]
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |", "|---" * (len(seeds) + 2) + "|"]
    for way in ways:
        rows = [seeds[seed][way] for seed in seeds]
        cells = [_cell(row) for row in rows]
        mean = _cell({key: sum(row[key] for row in rows) / len(rows) for key in ("mean", "worst", "pd")})
        lines.append(f"| {way} | " + " | ".join([*cells, mean]) + " |")
    best_single = [max((seeds[seed][name] for name in PAPER_TECHNIQUES), key=lambda row: row["mean"]) for seed in seeds]
    mean = _cell({key: sum(row[key] for row in best_single) / len(best_single) for key in ("mean", "worst", "pd")})
    lines.append("| best single, chosen on test data | " + " | ".join([*map(_cell, best_single), mean]) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, float]) -> str:
    return f"{row['mean']:.1f} / {row['worst']:.1f} / {row['pd']:.1f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""evaluate: what the merged model kept of its sources, on test data that no earlier stage has seen.

Measured side by side under the same code: the merged model, the base, every source, and every single technique at the
defaults of arXiv 2601.22748 (equal weights, density 0.65), each as one more merge of the same inputs. A row that cannot
be measured is left out with a warning in the result; only the merged model and the references must be measurable.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from automerge.checkpoint.open import open_checkpoint
from automerge.documents import digest_of
from automerge.errors import MergeError, MissingExtraError, ModelError, SpecError, TaskError
from automerge.merging.recipe import BASE, Recipe, RecipeBlock, merged_names
from automerge.merging.resident import ResidentMerger
from automerge.merging.statistics import Statistics
from automerge.merging.streamed import HEADS
from automerge.merging.technique import Declaration, usable_techniques
from automerge.models.heads import Heads
from automerge.models.onnx import check_onnx, export_onnx
from automerge.preservation import (
    Evaluation,
    Measurement,
    MetricInfo,
    OnnxResult,
    Role,
    TaskInfo,
    check_gate,
    preservation,
    shared_samples,
)
from automerge.report.alignment import alignment
from automerge.report.report import write_report
from automerge.searching.evaluator import MeasuredTask
from automerge.searching.store import read_cuts, read_trials
from automerge.searching.trial import Trial
from automerge.segmenting.segmentation import Block, Segmentation
from automerge.spec import PAPER_TECHNIQUES, Spec
from automerge.stages.documents import EVALUATION, MERGED, RECIPE, REPORT, STATISTICS, TRIALS, Manifest, Merged
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded, mergeable_blocks, prepare_compute, read_segmentation
from automerge.tasks.run import evaluate_task
from automerge.tasks.task import Scores, TaskData
from automerge.telemetry.metrics import StageMetrics, observe_stage

log = logging.getLogger(__name__)

BASELINE_DENSITY = 0.65
"""Density of the single-technique baselines: the paper's default. Their weights are equal: its 0.5 for two sources."""

ONNX_SAMPLES = 512
"""Most validation samples of a task on which the ONNX file is compared with torch."""


def evaluate(spec: Spec, inputs: Path, segmentation: Path, search: Path, model: Path, folder: Path) -> Evaluation:
    """Measure, and write ``evaluation.json``, ``report.html`` and the ONNX files.

    Args:
        spec: the spec.
        inputs, segmentation, search, model: folders that the earlier stages wrote.
        folder: where the results are written.

    Raises:
        SpecError: a document is missing, the merged model was not made by this recipe, or the recipe is not of these
            inputs, this segmentation and this granularity.
        TaskError: test data are unusable, or a loss of the merged model or of a task's reference is not finite.
        SearchError: the search's log is missing or damaged.
        MergeError: the statistics file beside the recipe is missing, or is another one than the recipe's.
    """
    with observe_stage("evaluate", pipeline=spec.name, family=spec.model.target, folder=folder) as metrics:
        device = prepare_compute(spec)
        opened = Inputs.open(spec, inputs)
        blocks = read_segmentation(segmentation, spec)
        recipe = Recipe.read(search / RECIPE)
        _check_inputs(recipe, opened.manifest, search / RECIPE)
        _check_origin(recipe, Merged.read(model / MERGED), model)
        # Only the report needs them, but a damaged log shall not be found when all has been measured.
        trials, cuts = read_trials(search / TRIALS), read_cuts(search / TRIALS)
        loaded = Loaded.load(opened, device)
        _check_tensors(recipe, mergeable_blocks(blocks, loaded.private), search / RECIPE)
        validation, test = loaded.measured("validation"), loaded.measured("test")

        merged = _merged_heads(loaded, recipe, model)
        roles: dict[str, Role] = {}
        scores: dict[str, dict[str, Scores]] = {name: {} for name in test}
        left_out: list[str] = []
        statistics = _statistics(search / STATISTICS, recipe, device) if spec.evaluation.baselines else None
        for name, role, heads in _models(loaded, blocks, merged, statistics, left_out):
            log.info("measuring %s", name)
            problems: list[str] = []
            for task_name, task in test.items():
                try:
                    scores[task_name][name] = evaluate_task(
                        opened.architecture,
                        heads.module(task.reference),
                        task.task,
                        task.data,
                        task.batch_size,
                        device,
                    )
                except TaskError as error:
                    if role == "merged" or name == task.reference:
                        raise
                    problems.append(error.problem)
            # A source without a row still gives the reference figures of its own task.
            if problems:
                left_out.append(f"{name!r} is left out of the table: {'; '.join(problems)}")
            else:
                roles[name] = role
            del heads  # before the next row's model is built
        measurements = [
            Measurement(_task_info(spec, name, task, validation[name].data), scores[name])
            for name, task in test.items()
        ]
        found = preservation(
            measurements,
            roles,
            confidence=spec.evaluation.confidence,
            resamples=spec.evaluation.resamples,
            seed=spec.evaluation.seed,
        )
        onnx = _export(loaded, merged, validation, folder) if spec.evaluation.onnx else OnnxResult(status="off")
        evaluation = Evaluation(
            recipe=recipe.digest(),
            tasks=found.tasks,
            models=found.models,
            warnings=[
                *_shared_sample_warnings(validation, test),
                *found.warnings,
                *left_out,
                *_alignment_warning(trials),
            ],
            gate=check_gate(spec.gate, found.models[0], found.tasks),
            onnx=onnx,
            confidence=spec.evaluation.confidence,
            resamples=spec.evaluation.resamples,
        )
        for warning in evaluation.warnings:
            log.warning("%s", warning)
        write_report(
            folder / REPORT,
            spec=spec,
            segmentation=blocks,
            recipe=recipe,
            trials=trials,
            cuts=cuts,
            evaluation=evaluation,
            manifest=opened.manifest,
        )
        evaluation.write(folder / EVALUATION)
        _observe(metrics, evaluation)
    return evaluation


def _models(
    loaded: Loaded, segmentation: Segmentation, merged: Heads, statistics: Statistics | None, left_out: list[str]
) -> Iterator[tuple[str, Role, Heads]]:
    """Every row of the table: name, role, and the model, which is valid until the next one is asked for.

    A single technique that cannot be applied adds a sentence to ``left_out`` instead.
    """
    yield "merged", "merged", merged
    spec = loaded.inputs.spec
    for owner in loaded.tensors:
        yield owner, "base" if owner == BASE else "source", loaded.heads(loaded.shared(owner), like=owner)
    if not spec.evaluation.baselines:
        return
    heads = loaded.heads(loaded.shared(spec.sources[0].name, fitted=True), dtype=spec.merge.dtype)
    merger = ResidentMerger(loaded.base, loaded.sources, loaded.device, statistics)
    techniques, _ = usable_techniques(
        list(dict.fromkeys([*PAPER_TECHNIQUES, *spec.search.techniques])),
        sources=len(spec.sources),
        has_base=loaded.base is not None,
    )
    blocks = mergeable_blocks(segmentation, loaded.private)
    sources = [source.name for source in spec.sources]
    for name, declaration in techniques.items():
        recipe = loaded.recipe(
            segmentation,
            [
                RecipeBlock(
                    name=block.name,
                    technique=name,
                    weights=dict.fromkeys(sources, 1.0 / len(sources)),
                    hyperparameters=_baseline_hyperparameters(declaration),
                    parameters=block.parameters,
                    buffers=block.buffers,
                )
                for block in blocks
            ],
        )
        try:
            merger.apply(recipe, heads.live)
        except MergeError as error:
            left_out.append(f"technique {name!r} is left out of the table: {error.problem}")
            continue
        yield name if name not in sources else f"{name} (technique)", "technique", heads


def _statistics(path: Path, recipe: Recipe, device: torch.device) -> Statistics | None:
    """What the search gathered, for the single techniques that need it; None where it gathered nothing.

    Raises:
        MergeError: it is not the file of the recipe.
    """
    if not path.exists() and recipe.statistics is None:
        return None
    with Statistics.open(path, recipe.statistics) as statistics:
        return statistics.resident(device)


def _baseline_hyperparameters(declaration: Declaration) -> dict[str, bool | int | float | str]:
    defaults = declaration.defaults()
    return {**defaults, "density": BASELINE_DENSITY} if "density" in defaults else defaults


def _merged_heads(loaded: Loaded, recipe: Recipe, model: Path) -> Heads:
    """The merged model as it lies on disk, under the heads that were written beside it."""
    private: dict[str, dict[str, torch.Tensor]] = {reference: {} for reference in loaded.inputs.references}
    for reference in private:
        if recipe.private.get(reference):
            with open_checkpoint(model / HEADS / f"{reference}.safetensors") as head:
                private[reference] = {name: head.read(name) for name in head.tensors}
    with open_checkpoint(model) as checkpoint:
        shared = {name: checkpoint.read(name) for name in checkpoint.tensors}
    inputs = loaded.inputs
    return Heads(
        lambda reference: inputs.build(reference, shared),
        private,
        shared,
        loaded.device,
    )


def _check_inputs(recipe: Recipe, manifest: Manifest, path: Path) -> None:
    """The specialists must be what was merged: a source fetched anew can be another under the old name."""
    fetched = manifest.digests()
    for item in [*([recipe.base] if recipe.base is not None else []), *recipe.sources]:
        if fetched.get(item.name) != item.digest:
            raise SpecError(
                f"{path}: the recipe is of another {item.name!r} than the one that was fetched",
                "run `automerge search` and `automerge merge` again in a new folder, or fetch the old one",
            )


def _check_tensors(recipe: Recipe, blocks: Sequence[Block], path: Path) -> None:
    cut = {name for block in blocks for name in block.tensors()}
    differ = sorted(cut.symmetric_difference(merged_names(recipe)))
    if differ:
        raise SpecError(
            f"{path}: the recipe does not merge the tensors of the segmentation ({differ[0]!r} is in only one of them)",
            "run `automerge segment`, then `automerge search` and `automerge merge` again",
        )


def _check_origin(recipe: Recipe, merged: Merged, model: Path) -> None:
    if merged.recipe != recipe.digest():
        raise SpecError(
            f"{model}: was merged by another recipe than the one of this search", "run `automerge merge` again"
        )
    with open_checkpoint(model) as checkpoint:
        if checkpoint.digest() != merged.weights:
            raise SpecError(
                f"{model}: the merged weights were changed since they were written", "run `automerge merge` again"
            )


def _task_info(spec: Spec, name: str, task: MeasuredTask, validation: TaskData) -> TaskInfo:
    declared = next(item for item in spec.tasks if item.name == name)
    return TaskInfo(
        name=name,
        kind=declared.kind,
        reference=task.reference,
        guard=declared.guard,
        validation_samples=len(validation),
        test_samples=len(task.data),
        test_data=digest_of(task.data.sample_digests()),
        metrics=[
            MetricInfo(
                name=metric.name,
                higher_is_better=metric.higher_is_better,
                chance=task.task.chance(metric.name, task.data),
            )
            for metric in task.task.metrics
        ],
    )


def _shared_sample_warnings(validation: dict[str, MeasuredTask], test: dict[str, MeasuredTask]) -> list[str]:
    """Test samples that the search has seen, of the same task or another, make the figures too good."""
    warnings = []
    digests = {name: task.data.sample_digests() for name, task in validation.items()}
    for name, task in test.items():
        own = task.data.sample_digests()
        for other, seen in digests.items():
            count = shared_samples(seen, own)
            if count:
                warnings.append(
                    f"task {name!r}: {count} of {len(own)} test samples are also among the validation data of task "
                    f"{other!r}, so its figures may be too good"
                )
    return warnings


def _alignment_warning(trials: Sequence[Trial]) -> list[str]:
    """Whether the search's objective was a poor guide to what it was to keep."""
    found = alignment(trials)
    return [found.warning] if found is not None and found.warning is not None else []


def _export(loaded: Loaded, merged: Heads, validation: dict[str, MeasuredTask], folder: Path) -> OnnxResult:
    """Export the merged model, one file a head, and compare it with torch on validation data."""
    architecture = loaded.inputs.architecture
    by_module: dict[int, list[str]] = {}
    for reference in loaded.inputs.references:
        by_module.setdefault(id(merged.module(reference)), []).append(reference)
    files: dict[str, str] = {}
    written: list[Path] = []
    largest = 0.0
    try:
        for references in by_module.values():
            module = merged.module(references[0])
            key = "merged" if len(by_module) == 1 else references[0]
            path = folder / ("model.onnx" if key == "merged" else f"model-{key}.onnx")
            tasks = [task for task in validation.values() if task.reference in references]
            written += export_onnx(
                architecture,
                module,
                tasks[0].data.subset(range(min(2, len(tasks[0].data)))).to(loaded.device).inputs,
                path,
            )
            for task in tasks:
                data = task.data.subset(range(min(ONNX_SAMPLES, len(task.data))))
                batches = (batch.to(loaded.device).inputs for batch in data.batches(task.batch_size))
                largest = max(largest, check_onnx(path, architecture, module, batches))
            files |= dict.fromkeys(["merged"] if key == "merged" else references, path.name)
    except (ModelError, MissingExtraError) as error:
        log.warning("no ONNX file: %s", error)
        for path in written:
            path.unlink(missing_ok=True)
        return OnnxResult(status="failed", reason=str(error))
    return OnnxResult(
        status="exported", files=files, written=[path.name for path in written], max_abs_difference=largest
    )


def _observe(metrics: StageMetrics, evaluation: Evaluation) -> None:
    merged = evaluation.merged
    for name, result in merged.tasks.items():
        if result.pr is not None:
            metrics.set("automerge_preservation_rate_ratio", result.pr.value / 100, task=name)
            metrics.set("automerge_preservation_rate_low_ratio", result.pr.low / 100, task=name)
    for metric, value in (
        ("automerge_preservation_mean_ratio", merged.mean_pr),
        ("automerge_preservation_worst_ratio", merged.worst_pr),
        ("automerge_preservation_discrepancy_ratio", merged.pd),
    ):
        if value is not None:
            metrics.set(metric, value / 100)
    metrics.set("automerge_gate_passed", float(evaluation.gate.verdict == "pass"))
    metrics.set("automerge_onnx_exported", float(evaluation.onnx.status == "exported"))

"""search: find the recipe with the highest objective on validation data."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from automerge.checkpoint.info import info_of
from automerge.errors import AutoMergeError, SearchError
from automerge.merging.derivative import LAMBDA, refinable, scalars_of
from automerge.merging.random import mask_key
from automerge.merging.recipe import Recipe, RecipeBlock
from automerge.merging.statistics import Statistics, recalibrated_key, write_statistics
from automerge.searching.fidelity import make_slices, stratified_order
from automerge.searching.objective import Measure, Objective
from automerge.searching.recalibration import recalibrate
from automerge.searching.refinement import Refined, Split, refine, tensor_gradients
from automerge.searching.search import Plan, SearchProgress, SearchResult, search_identity
from automerge.searching.search import search as run_search
from automerge.searching.store import refuse_begun
from automerge.searching.workers import DaskWorkers, InProcess, ProcessWorkers, Workers, gpus
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import RefineSpec, Spec
from automerge.stages.cache import SearchFiles, StatisticsFile
from automerge.stages.documents import (
    FRONT,
    MANIFEST,
    RECIPE,
    REFINEMENT,
    STATISTICS,
    TRIALS,
    Front,
    FrontPoint,
    Manifest,
)
from automerge.stages.front import POINTS, point_folder
from automerge.stages.mirror import Mirror, statistics_key
from automerge.stages.process import interrupted_by_sigterm
from automerge.stages.segment import segmentation_of
from automerge.stages.trials import EvaluatorFactory, TrialRun, identity_of
from automerge.storage import download
from automerge.tasks.task import Scores
from automerge.telemetry.metrics import StageMetrics, observe_stage

log = logging.getLogger(__name__)


def search(
    spec: Spec,
    inputs: Path,
    segmentation: Path,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[[SearchProgress], None] | None = None,
) -> SearchResult:
    """Search, and write ``trials.jsonl`` as it goes and ``recipe.json`` at the end.

    ``statistics.safetensors`` is written before the search if a technique of the space needs statistics, and again at
    the end if the recipe has recalibrated buffers. A search for the Pareto front also writes ``front.json``, and the
    recipe of each of its points in a folder of its own below ``front``.

    Where ``AUTOMERGE_MIRROR`` names a place, a copy of what the search has reached is kept there, and one that is there
    already is gone on from (`automerge.stages.mirror`). SIGTERM interrupts the search as Ctrl-C does.

    Args:
        spec: the spec.
        inputs: folder that `fetch` wrote.
        segmentation: folder that `segment` wrote.
        folder: where trials and recipe are written.
        resume: go on with the search that was begun in ``folder`` or is in the mirror; without one, begin it.
        progress: called after each trial.

    Raises:
        AutoMergeError: the inputs do not fit each other, or the search cannot start, go on or be resumed.
    """
    observed = observe_stage("search", pipeline=spec.name, family=spec.model.target, folder=folder)
    with interrupted_by_sigterm(), observed as metrics:
        store = folder / TRIALS
        if not resume:
            refuse_begun(store)
        if not store.exists():
            for checkpoint in folder.glob(REFINEMENT.format("*")):  # of a search whose log is gone
                checkpoint.unlink()
        mirror = Mirror.of_environment(metrics)
        if mirror is not None:
            mirror.restore_statistics(_statistics_key(spec, inputs), folder)
        run = TrialRun.load(spec, inputs, segmentation, folder)
        scores = run.reference_scores()
        objective = run.objective(scores)
        if run.recalibration_pays(objective):
            run.recalibrate_trials()
        space = replace(run.space, start_points=_start_points(spec, run))
        if mirror is not None and run.statistics is not None:
            mirror.hold_statistics(_statistics_key(spec, inputs), folder / STATISTICS)
        workers = _workers(spec, run, inputs, segmentation, folder, mirror)
        try:
            identity = identity_of(spec, run.loaded.inputs.manifest, run.statistics)
            if mirror is not None:
                mirror.restore(search_identity(space, workers, identity), folder, resume=resume)
            with mirror.kept(folder) if mirror is not None else nullcontext():
                result = run_search(
                    space,
                    workers,
                    objective,
                    store_path=store,
                    identity=identity,
                    hardware=f"{run.loaded.device.type} with {torch.get_num_threads()} threads",
                    resume=resume and store.exists(),
                    progress=_observed(progress, metrics, mirror),
                    plan=_plan(spec, run, objective, scores, folder),
                )
        finally:
            workers.close()
        # After an interrupt no pass more than is needed: for a recipe that was measured recalibrated it is.
        recalibrates = result.stopped != "interrupted" or run.evaluator.recalibrate is not None
        if result.front:
            _write_front(spec, run, objective, result, folder, recalibrates=recalibrates)
        _write_recipe(run, objective, result.blocks, folder, recalibrates=recalibrates)
        assert result.best.objective is not None  # noqa: S101 - the best trial succeeded
        metrics.set("automerge_search_best_objective", result.best.objective)
    return result


def _start_points(spec: Spec, run: TrialRun) -> list[tuple[str, Mapping[str, object]]]:
    """The points of the recipes that the spec wants to be tried at the start.

    Raises:
        StorageError: there is none.
        SearchError: one is no recipe, of another model, or uses what this space does not have.
    """
    points: list[tuple[str, Mapping[str, object]]] = []
    with tempfile.TemporaryDirectory(prefix="automerge-recipes-") as folder:
        for index, uri in enumerate(spec.search.start_from):
            path = Path(folder) / f"{index}.json"
            download(uri, path)
            try:
                points.append((f"recipe:{index}", run.space.from_recipe(Recipe.read(path).blocks)))
            except AutoMergeError as error:
                problem = error.problem.removeprefix(f"{path}: ")
                raise SearchError(f"search.start_from.{index}: {problem}", error.remedy) from None
    return points


def _statistics_key(spec: Spec, inputs: Path) -> str:
    """Names the statistics in the mirror."""
    return statistics_key(identity_of(spec, Manifest.read(inputs / MANIFEST), None), spec)


def _workers(
    spec: Spec, run: TrialRun, inputs: Path, segmentation: Path, folder: Path, mirror: Mirror | None
) -> Workers:
    """Where the trials run: here, in processes of their own, or on a cluster."""
    compute = spec.compute
    devices: list[str] = gpus() if run.loaded.device.type == "cuda" and run.loaded.device.index is None else []
    count = compute.workers or max(1, len(devices))
    if compute.scheduler is None and count == 1 and spec.search.trial_seconds is None:
        return InProcess(run.evaluator)
    folder.mkdir(parents=True, exist_ok=True)
    threads = compute.threads or max(1, torch.get_num_threads() // count)
    statistics = None
    if run.statistics is not None:
        uri = mirror.statistics_uri(_statistics_key(spec, inputs)) if mirror is not None else None
        statistics = StatisticsFile.of(run.statistics, folder / STATISTICS, uri)
    factory = EvaluatorFactory(
        spec.model_dump_json(),
        SearchFiles.of(inputs, segmentation, folder, statistics),
        threads,
        recalibrates=run.evaluator.recalibrate is not None,
    )
    if compute.scheduler is not None:
        if mirror is not None:
            mirror.copy_statistics()  # the workers may have no other way to them
        return DaskWorkers(compute.scheduler, factory, compute.workers, trial_seconds=spec.search.trial_seconds)
    return ProcessWorkers(
        factory, count, trial_seconds=spec.search.trial_seconds, devices=devices if count > 1 and devices else None
    )


def _plan(spec: Spec, run: TrialRun, objective: Objective, scores: Mapping[str, Scores], folder: Path) -> Plan:
    """What the phases beyond plain Bayesian optimisation need."""
    search = spec.search
    refines = search.refine is not None and any(
        declaration.differentiable for declaration in run.space.techniques.values()
    )
    if search.refine is not None and not refines:
        log.warning("no technique of the search has a derivative, so nothing is refined")
    layers = None
    if search.split is not None or (refines and search.refine is not None and search.refine.granularity == "layer"):
        layers = segmentation_of(run.loaded.inputs, "layer")
    slices = None
    if search.fidelity is not None:
        data = {name: task.data for name, task in run.tasks.items()}
        slices = make_slices(data, search.fidelity.slices, search.seed)

    def refined(number: int, blocks: Sequence[RecipeBlock]) -> Refined:
        assert search.refine is not None  # noqa: S101 - nothing is refined without it
        return refine(
            run.evaluator,
            blocks,
            lambda block: _groups(block, search.refine, layers),
            objective,
            _split(run, scores, search.refine, search.seed),
            search.refine,
            free=lambda block: _free(block, run),
            seed=search.seed,
            checkpoint=folder / REFINEMENT.format(number),
            batch_statistics=run.batch_statistics,
        )

    return Plan(
        slices=slices,
        layers=layers if search.split is not None else None,
        gradients=lambda blocks: tensor_gradients(run.evaluator, blocks, objective, run.batch_statistics),
        refine=refined if refines else None,
    )


def _split(run: TrialRun, scores: Mapping[str, Scores], spec: RefineSpec, seed: int) -> Split:
    """The validation data in two stratified parts: what the gradient sees, and what the early stopping sees."""
    fit: dict[str, list[int]] = {}
    held_back: dict[str, list[int]] = {}
    for name, task in run.tasks.items():
        order = stratified_order(task.data, mask_key(seed, "refinement", name)).tolist()
        kept = min(len(order) - 1, max(1, round(len(order) * (1 - spec.held_back))))
        fit[name], held_back[name] = order[:kept], order[kept:]
    return Split(fit, held_back, run.objective(scores, held_back))


def _free(block: RecipeBlock, run: TrialRun) -> RecipeBlock | None:
    """The block in the form in which the refinement moves its weights; None where its technique or a constraint does
    not let it.
    """
    choice = next(
        choice
        for choice in run.space.choices
        if any(block.name == own.name or block.name.startswith(f"{own.name}/") for own in choice.blocks)
    )
    if choice.shared or choice.weights:
        return None
    form = refinable(block, has_base=run.loaded.base is not None and "task_arithmetic" in choice.techniques)
    if form is None or form.technique not in choice.techniques:
        return None
    fixed = choice.hyperparameters[form.technique]
    moves_what_is_fixed = LAMBDA in fixed and LAMBDA in scalars_of(form)
    if moves_what_is_fixed or any(form.hyperparameters.get(name) != value for name, value in fixed.items()):
        return None
    return form


def _groups(block: RecipeBlock, spec: RefineSpec | None, layers: Segmentation | None) -> list[tuple[str, list[str]]]:
    """How a block's parameters are grouped, each group with weights of its own."""
    assert spec is not None  # noqa: S101 - nothing is refined without it
    if spec.granularity == "tensor":
        return [(name, [name]) for name in block.parameters]
    if spec.granularity == "block" or layers is None:
        return [(block.name, list(block.parameters))]
    layer_of = {name: layer.name for layer in layers.blocks for name in layer.parameters}
    groups: dict[str, list[str]] = {}
    for name in block.parameters:
        groups.setdefault(layer_of.get(name, "rest").partition("/")[2] or "rest", []).append(name)
    return list(groups.items())


def _write_recipe(
    run: TrialRun, objective: Objective, blocks: list[RecipeBlock], folder: Path, *, recalibrates: bool
) -> Recipe:
    """Recalibrate where that is asked for, and write the recipe with its statistics."""
    recipe = run.loaded.recipe(run.segmentation, blocks)
    recalibrated: dict[str, torch.Tensor] = {}
    if recalibrates and run.loaded.inputs.spec.recalibrates:
        run.merger.forget()  # its buffers may have been recalibrated in the live model
        run.merger.apply(recipe, run.heads.live)

        def value() -> float:
            found = run.evaluator.measure(None).scores
            return objective.value(objective.preservation({name: Measure.of(each) for name, each in found.items()}))

        inputs = run.loaded.inputs
        recalibrated = recalibrate(run.heads, run.tasks, inputs.architecture, run.loaded.device, value)
    made = _with_statistics(recipe, run.statistics, recalibrated, folder / STATISTICS)
    made.write(folder / RECIPE)
    return made


def _write_front(
    spec: Spec, run: TrialRun, objective: Objective, result: SearchResult, folder: Path, *, recalibrates: bool
) -> None:
    """The front's points, each with its recipe and statistics in a folder of its own."""
    shutil.rmtree(folder / POINTS, ignore_errors=True)
    points = []
    for trial, blocks in result.front:
        place = point_folder(folder, trial.number)
        _write_recipe(run, objective, blocks, place, recalibrates=recalibrates)
        points.append(FrontPoint(number=trial.number, cp=trial.cp, rates=trial.rates))
    Front(tasks=[task.name for task in spec.tasks], points=points).write(folder / FRONT)


def _with_statistics(
    recipe: Recipe, gathered: Statistics | None, recalibrated: Mapping[str, torch.Tensor], path: Path
) -> Recipe:
    """The recipe with the digest of its statistics file, if it needs one, which then is at ``path``."""
    recipe = recipe.model_copy(update={"recalibrated": sorted(recalibrated)})
    keys = gathered.gathered() if gathered is not None else []
    if not keys and not recalibrated:
        path.unlink(missing_ok=True)  # of an earlier end of this search
        return recipe
    tensors = {recalibrated_key(name): tensor for name, tensor in recalibrated.items()}
    if gathered is not None and set(gathered.infos) == set(keys) and not tensors and path.exists():
        digest = gathered.digest
    else:
        infos = {key: gathered.infos[key] for key in keys} if gathered is not None else {}
        infos |= {key: info_of(tensor) for key, tensor in tensors.items()}

        def read(key: str) -> torch.Tensor:
            return tensors[key] if gathered is None or key in tensors else gathered.read(key)

        path.parent.mkdir(parents=True, exist_ok=True)
        digest = write_statistics(
            path,
            infos,
            ((key, read(key)) for key in infos),
            gathered.metadata if gathered is not None else {},
        )
    return recipe.model_copy(update={"statistics": digest}) if recipe.needs_statistics else recipe


def _observed(
    progress: Callable[[SearchProgress], None] | None, metrics: StageMetrics, mirror: Mirror | None
) -> Callable[[SearchProgress], None]:
    """Counts each trial of this process in the metrics, has each phase copied, then passes the trial on."""
    phase: str | None = None

    def observe(event: SearchProgress) -> None:
        nonlocal phase
        if not event.replayed:
            if mirror is not None and phase is not None and event.trial.phase != phase:
                mirror.copy_soon()
            phase = event.trial.phase
            metrics.add("automerge_search_trials_total", status=event.trial.status)
            if event.trial.status != "cached":
                metrics.observe("automerge_search_trial_duration_seconds", event.trial.seconds)
            if event.best is not None and event.best.objective is not None:
                metrics.set("automerge_search_best_objective", event.best.objective)
            metrics.publish()
        if progress is not None:
            progress(event)

    return observe

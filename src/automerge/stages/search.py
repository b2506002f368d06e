"""search: find the recipe with the highest objective on validation data."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from automerge.checkpoint.info import info_of
from automerge.documents import digest_of
from automerge.errors import MissingExtraError, SearchError
from automerge.merging.recipe import Recipe
from automerge.merging.resident import ResidentMerger
from automerge.merging.statistics import Statistics, read_metadata, recalibrated_key, write_statistics
from automerge.merging.technique import Statistic, usable_techniques
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator, mean_losses
from automerge.searching.gathering import (
    FISHER_SAMPLES,
    GRAM_SAMPLES,
    gather,
    needed_statistics,
    refuse_sources_without_tasks,
)
from automerge.searching.recalibration import recalibrate
from automerge.searching.search import SearchProgress, SearchResult
from automerge.searching.search import search as run_search
from automerge.searching.store import refuse_begun
from automerge.searching.trial import capability_preservation, harmonic_mean
from automerge.spec import Spec
from automerge.stages.documents import RECIPE, STATISTICS, TRIALS
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded, mergeable_blocks, prepare_compute, read_segmentation
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
    the end if the recipe has recalibrated buffers.

    Args:
        spec: the spec.
        inputs: folder that `fetch` wrote.
        segmentation: folder that `segment` wrote.
        folder: where trials and recipe are written.
        resume: go on with the search that was begun in ``folder``; without one there, begin it.
        progress: called after each trial.

    Raises:
        AutoMergeError: the inputs do not fit each other, or the search cannot start, go on or be resumed.
    """
    with observe_stage("search", pipeline=spec.name, family=spec.model.target, folder=folder) as metrics:
        try:
            from automerge.searching.space import SearchSpace
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"the search ({error.name})", "search") from None
        device = prepare_compute(spec)
        opened = Inputs.open(spec, inputs)
        blocks_document = read_segmentation(segmentation, spec)
        techniques, notices = usable_techniques(
            spec.search.techniques,
            sources=len(spec.sources),
            has_base=spec.base is not None,
            unnormalised=spec.search.weights == "independent",
        )
        for notice in notices:
            log.warning("%s", notice)
        kinds = needed_statistics(techniques.values())
        refuse_sources_without_tasks(kinds, [source.name for source in spec.sources], opened.references)
        store = folder / TRIALS
        if not resume:
            refuse_begun(store)
        loaded = Loaded.load(opened, device)
        blocks = mergeable_blocks(blocks_document, loaded.private)
        if not any(block.parameters for block in blocks):
            raise SearchError(
                "every parameter is private, so there is nothing to merge", "narrow 'private' in the spec"
            )
        space = SearchSpace(blocks, [source.name for source in spec.sources], techniques, spec.search)

        average = loaded.recipe(blocks_document, space.recipe_blocks(space.average()))
        tasks = loaded.measured("validation")
        statistics = _gathered(folder, loaded, kinds, average, tasks) if kinds else None
        # In the output dtype: what is measured is what `merge` will write.
        heads = loaded.heads(loaded.shared(spec.sources[0].name, fitted=True), dtype=spec.merge.dtype)
        merger = ResidentMerger(loaded.base, loaded.sources, device, statistics)
        merger.apply(average, heads.live)
        reference_losses: dict[str, float] = {}
        for reference in opened.references:
            own = {name: task for name, task in tasks.items() if task.reference == reference}
            specialist = loaded.heads(loaded.shared(reference), [reference])
            reference_losses |= mean_losses(own, specialist.module, opened.architecture, device)
        evaluator = RecipeEvaluator(average, merger, heads, opened.architecture, tasks, device)

        result = run_search(
            space,
            evaluator,
            {task.name: reference_losses[task.name] for task in spec.tasks},
            store_path=store,
            identity=_identity(spec, opened, statistics),
            hardware=f"{device.type} with {torch.get_num_threads()} threads",
            resume=resume and store.exists(),
            progress=_observed(progress, metrics),
        )
        recipe = loaded.recipe(blocks_document, result.blocks)
        recalibrated: dict[str, torch.Tensor] = {}
        if spec.recalibrates and result.stopped != "interrupted":
            merger.apply(recipe, heads.live)

            def objective(losses: Mapping[str, float]) -> float:
                epsilon = spec.search.effective_epsilon
                return harmonic_mean(
                    {
                        name: capability_preservation(reference_losses[name], loss, epsilon, name)
                        for name, loss in losses.items()
                    }
                )

            recalibrated = recalibrate(heads, tasks, opened.architecture, device, objective)
        _with_statistics(recipe, statistics, recalibrated, folder / STATISTICS).write(folder / RECIPE)
        assert result.best.objective is not None  # noqa: S101 - the best trial succeeded
        metrics.set("automerge_search_best_objective", result.best.objective)
    return result


def _gathered(
    folder: Path, loaded: Loaded, kinds: Sequence[Statistic], recipe: Recipe, tasks: Mapping[str, MeasuredTask]
) -> Statistics:
    """The sources' statistics, on the device: of an earlier attempt at the same search, or gathered and written.

    Raises:
        SearchError: they cannot be gathered, or there are those of another search whose trials are in the folder.
    """
    path = folder / STATISTICS
    spec, device = loaded.inputs.spec, loaded.device
    names = [name for block in recipe.blocks for name in block.parameters]
    made_from = digest_of(
        {
            "inputs": _identity(spec, loaded.inputs, None),
            "kinds": list(kinds),
            "names": sorted(names),
            "samples": [FISHER_SAMPLES, GRAM_SAMPLES],
            "seed": spec.search.seed,
        }
    )
    if read_metadata(path).get("gathered") == made_from:
        with Statistics.open(path) as written:
            return written.resident(device)
    if path.exists() and (folder / TRIALS).exists():
        raise SearchError(
            f"{path}: belongs to another search, or is damaged",
            "start in another folder, or remove it to have the statistics of this search gathered again",
        )

    def module_of(source: str) -> nn.Module:
        shared = loaded.shared(source, fitted=True)
        double = any(tensor.dtype == torch.float64 for tensor in shared.values())
        return loaded.heads(shared, [source], dtype="same" if double else "float32").module(source)

    log.info("gathering the %s statistics of %d sources", " and ".join(kinds), len(spec.sources))
    tensors = gather(
        kinds,
        [source.name for source in spec.sources],
        tasks,
        module_of,
        names,
        loaded.inputs.architecture,
        device,
        spec.search.seed,
    )
    infos = {key: info_of(tensor) for key, tensor in tensors.items()}
    digest = write_statistics(path, infos, tensors.items(), {"gathered": made_from})
    return Statistics(infos, tensors.__getitem__, where=str(path), digest=digest, metadata={"gathered": made_from})


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
    if gathered is not None and set(gathered.infos) == set(keys) and not tensors:
        digest = gathered.digest
    else:
        infos = {key: gathered.infos[key] for key in keys} if gathered is not None else {}
        infos |= {key: info_of(tensor) for key, tensor in tensors.items()}

        def read(key: str) -> torch.Tensor:
            return tensors[key] if gathered is None or key in tensors else gathered.read(key)

        digest = write_statistics(
            path,
            infos,
            ((key, read(key)) for key in infos),
            gathered.metadata if gathered is not None else {},
        )
    return recipe.model_copy(update={"statistics": digest}) if recipe.needs_statistics else recipe


def _identity(spec: Spec, opened: Inputs, statistics: Statistics | None) -> str:
    """Digest of what shapes the losses: what is merged, how the model runs, on which data, and the statistics of it."""
    digests = opened.manifest.digests()
    return digest_of(
        {
            **({"statistics": statistics.gathered_digest()} if statistics is not None else {}),
            "inputs": {name: digest for name, digest in digests.items() if not name.endswith("/test")},
            "model": spec.model.model_dump(mode="json", exclude={"python_path"}),
            "arguments": {source.name: source.arguments for source in spec.sources},
            "tasks": [task.model_dump(mode="json", exclude={"validation", "test", "metrics"}) for task in spec.tasks],
            "private": spec.private,
            "merge": spec.merge.model_dump(mode="json", exclude={"max_shard_bytes", "recalibrate"}),
        }
    )


def _observed(
    progress: Callable[[SearchProgress], None] | None, metrics: StageMetrics
) -> Callable[[SearchProgress], None]:
    """Counts each trial of this process in the metrics, then passes it on."""

    def observe(event: SearchProgress) -> None:
        if not event.replayed:
            metrics.add("automerge_search_trials_total", status=event.trial.status)
            if event.trial.status != "cached":
                metrics.observe("automerge_search_trial_duration_seconds", event.trial.seconds)
            if event.best is not None and event.best.objective is not None:
                metrics.set("automerge_search_best_objective", event.best.objective)
            metrics.publish()
        if progress is not None:
            progress(event)

    return observe

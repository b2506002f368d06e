"""search: find the recipe with the highest objective on validation data."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from automerge.documents import digest_of
from automerge.errors import MissingExtraError, SearchError
from automerge.merging.resident import ResidentMerger
from automerge.merging.technique import usable_techniques
from automerge.searching.evaluator import RecipeEvaluator, mean_losses
from automerge.searching.search import SearchProgress, SearchResult
from automerge.searching.search import search as run_search
from automerge.spec import Spec
from automerge.stages.documents import RECIPE, TRIALS
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
        loaded = Loaded.load(opened, device)
        blocks = mergeable_blocks(blocks_document, loaded.private)
        if not any(block.parameters for block in blocks):
            raise SearchError(
                "every parameter is private, so there is nothing to merge", "narrow 'private' in the spec"
            )
        space = SearchSpace(blocks, [source.name for source in spec.sources], techniques, spec.search)

        average = loaded.recipe(blocks_document, space.recipe_blocks(space.average()))
        # In the output dtype: what is measured is what `merge` will write.
        heads = loaded.heads(loaded.shared(spec.sources[0].name), dtype=spec.merge.dtype)
        merger = ResidentMerger(loaded.base, loaded.sources, device)
        merger.apply(average, heads.live)
        tasks = loaded.measured("validation")
        reference_losses: dict[str, float] = {}
        for reference in opened.references:
            own = {name: task for name, task in tasks.items() if task.reference == reference}
            specialist = loaded.heads(loaded.shared(reference), [reference])
            reference_losses |= mean_losses(own, specialist.module, opened.architecture, device)
        evaluator = RecipeEvaluator(average, merger, heads, opened.architecture, tasks, device)

        store = folder / TRIALS
        result = run_search(
            space,
            evaluator,
            {task.name: reference_losses[task.name] for task in spec.tasks},
            store_path=store,
            identity=_identity(spec, opened),
            hardware=f"{device.type} with {torch.get_num_threads()} threads",
            resume=resume and store.exists(),
            progress=_observed(progress, metrics),
        )
        loaded.recipe(blocks_document, result.blocks).write(folder / RECIPE)
        assert result.best.objective is not None  # noqa: S101 - the best trial succeeded
        metrics.set("automerge_search_best_objective", result.best.objective)
    return result


def _identity(spec: Spec, opened: Inputs) -> str:
    """Digest of what shapes the losses: what is merged, how the model runs, and on which data."""
    digests = opened.manifest.digests()
    return digest_of(
        {
            "inputs": {name: digest for name, digest in digests.items() if not name.endswith("/test")},
            "model": spec.model.model_dump(mode="json", exclude={"python_path"}),
            "arguments": {source.name: source.arguments for source in spec.sources},
            "tasks": [task.model_dump(mode="json", exclude={"validation", "test", "metrics"}) for task in spec.tasks],
            "private": spec.private,
            "merge": spec.merge.model_dump(mode="json", exclude={"max_shard_bytes"}),
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

"""What the trials of a search run on: loaded inputs, live model and evaluator; in this process or another."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from automerge.checkpoint.info import info_of
from automerge.documents import digest_of
from automerge.errors import AutoMergeError, MissingExtraError, SearchError
from automerge.merging.recipe import BASE, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.statistics import Statistics, read_metadata, write_statistics
from automerge.merging.technique import Statistic
from automerge.models.heads import Heads
from automerge.searching.evaluator import MeasuredTask, Outcome, RecipeEvaluator, measure_tasks
from automerge.searching.fidelity import Race
from automerge.searching.gathering import (
    FISHER_SAMPLES,
    GRAM_SAMPLES,
    gather,
    needed_statistics,
    refuse_sources_without_tasks,
)
from automerge.searching.objective import TEMPERATURES, Measure, Objective, TaskReference
from automerge.searching.recalibration import batch_norms, batch_statistics, recalibrate_live
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import SearchSpec, Spec
from automerge.stages.cache import SearchFiles
from automerge.stages.documents import STATISTICS, TRIALS, Manifest
from automerge.stages.inputs import Inputs, techniques_of
from automerge.stages.loading import Loaded, mergeable_blocks, prepare_compute, read_segmentation
from automerge.tasks.task import Scores

if TYPE_CHECKING:
    from automerge.searching.space import SearchSpace

log = logging.getLogger(__name__)


RECALIBRATION_GAIN = 1.05
"""By how much the average's objective must rise for trials to be measured with recalibrated BatchNorm statistics."""


@dataclass(frozen=True)
class TrialRun:
    """Everything that trials need, loaded and ready.

    Attributes:
        loaded: the checkpoints.
        segmentation: the blocks.
        space: what is searched.
        average: the recipe of the plain average.
        tasks: the tasks with their validation data.
        statistics: what the techniques of the space need, or None.
        heads: the live model.
        merger: merges into it.
        evaluator: merges and measures.
    """

    loaded: Loaded
    segmentation: Segmentation
    space: "SearchSpace"
    average: Recipe
    tasks: dict[str, MeasuredTask]
    statistics: Statistics | None
    heads: Heads
    merger: ResidentMerger
    evaluator: RecipeEvaluator

    @classmethod
    def load(cls, spec: Spec, inputs: Path, segmentation: Path, folder: Path) -> "TrialRun":
        """Load the inputs, and gather the statistics that some technique needs, unless ``folder`` has them.

        Args:
            spec: the spec.
            inputs: folder that `fetch` wrote.
            segmentation: folder that `segment` wrote.
            folder: of the search.

        Raises:
            AutoMergeError: the inputs do not fit each other, or the space is empty.
        """
        try:
            from automerge.searching.space import SearchSpace
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"the search ({error.name})", "search") from None
        device = prepare_compute(spec)
        opened = Inputs.open(spec, inputs)
        document = read_segmentation(segmentation, spec)
        techniques, notices = techniques_of(spec)
        for notice in notices:
            log.warning("%s", notice)
        kinds = needed_statistics(techniques.values())
        refuse_sources_without_tasks(kinds, [source.name for source in spec.sources], opened.references)
        loaded = Loaded.load(opened, device)
        blocks = mergeable_blocks(document, loaded.private)
        if not any(block.parameters for block in blocks):
            raise SearchError(
                "every parameter is private, so there is nothing to merge", "narrow 'private' in the spec"
            )
        space = SearchSpace(
            blocks, [source.name for source in spec.sources], techniques, spec.search, has_base=spec.base is not None
        )
        average = loaded.recipe(document, space.recipe_blocks(space.average()))
        tasks = loaded.measured("validation")
        statistics = gathered_statistics(folder, loaded, kinds, average, tasks) if kinds else None
        # In the output dtype: what is measured is what `merge` will write.
        heads = loaded.heads(loaded.shared(spec.sources[0].name, fitted=True), dtype=spec.merge.dtype)
        merger = ResidentMerger(loaded.base, loaded.sources, device, statistics)
        evaluator = RecipeEvaluator(
            average,
            merger,
            heads,
            opened.architecture,
            tasks,
            device,
            soft=needs_soft(spec.search),
            temperatures=TEMPERATURES if spec.search.objective == "metric" else (),
        )
        return cls(loaded, document, space, average, tasks, statistics, heads, merger, evaluator)

    def objective(self, scores: Mapping[str, Scores], rows: Mapping[str, Sequence[int]] | None = None) -> Objective:
        """The spec's objective, with the references on all validation data or on some rows of each task.

        Args:
            scores: the references', by `reference_scores`.
            rows: by task.

        Raises:
            TaskError: a task's kind does not say the loss of a guess, which the objective needs.
        """
        search = self.loaded.inputs.spec.search
        nothing = self._nothing() if search.objective == "gap" else {}
        references = {}
        for name, task in self.tasks.items():
            whole = TaskReference.of(task.task, task.data, scores[name], nothing.get(name))
            if rows is not None:  # which metrics are defined, all data say
                own = scores[name].subset(rows[name])
                whole = whole.model_copy(update={"specialist": Measure.of(own), "samples": len(own)})
            references[name] = whole
        return Objective(name=search.objective, aggregate=search.aggregate, epsilon=search.epsilon, tasks=references)

    def reference_scores(self) -> dict[str, Scores]:
        """The specialists' scores (of a guard task: the base's) on the validation data, by task.

        Raises:
            TaskError: one is not finite.
        """
        found: dict[str, Scores] = {}
        for reference in self.loaded.inputs.references:
            own = {name: task for name, task in self.tasks.items() if task.reference == reference}
            found |= self._scores_with(self.loaded.shared(reference), reference, own)
        return {name: found[name] for name in self.tasks}

    def recalibrate_trials(self) -> None:
        """From now on, bring BatchNorm's statistics to what fits after each merge of a trial."""
        self.evaluator.recalibrate = partial(
            recalibrate_live, self.heads, self.tasks, self.loaded.inputs.architecture, self.loaded.device
        )

    def recalibration_pays(self, objective: Objective) -> bool:
        """Whether trials are to be measured with recalibrated BatchNorm statistics: the average is much better so.

        Where the sources lie close together the average of their statistics serves, and depends on no data; so it is
        given up only for a gain that is more than noise. With multi-fidelity, whose trials see a part of the data, it
        is never given up.
        """
        spec = self.loaded.inputs.spec
        if not spec.recalibrates or spec.search.fidelity is not None or not batch_norms(self.heads, self.tasks):
            return False

        def value() -> float:
            scores = self.evaluator.measure(None).scores
            return objective.value(objective.preservation({name: Measure.of(each) for name, each in scores.items()}))

        try:
            self.evaluator.merge(self.average.blocks)
            plain = value()
            recalibrate_live(self.heads, self.tasks, self.loaded.inputs.architecture, self.loaded.device)
            found = value()
        except AutoMergeError as error:  # the trials may do better
            log.warning("trials are measured with averaged BatchNorm statistics: the average failed: %s", error.problem)
            return False
        finally:
            self.merger.forget()  # the live buffers are not what it wrote
        pays = found > RECALIBRATION_GAIN * plain
        log.info(
            "trials are measured with %s BatchNorm statistics: the average's objective is %.4f with averaged and %.4f "
            "with recalibrated ones",
            "recalibrated" if pays else "averaged",
            plain,
            found,
        )
        return pays

    def batch_statistics(self) -> AbstractContextManager[None]:
        """For passes with a gradient: BatchNorm normalises by its batch, where the trials recalibrate it."""
        return batch_statistics(self.heads, self.tasks) if self.evaluator.recalibrate is not None else nullcontext()

    def _nothing(self) -> dict[str, float]:
        """The loss that counts as nothing kept, by task."""
        spec = self.loaded.inputs.spec
        if spec.search.gap_reference == "chance":
            return {name: task.task.guess_loss(task.data) for name, task in self.tasks.items()}
        if spec.search.gap_reference == "base" and spec.base is None:
            raise SearchError(
                "search.gap_reference: 'base', and the spec names no base", "set it to 'chance' or 'other'"
            )
        found: dict[str, float] = {}
        for name, task in self.tasks.items():
            others = (
                [BASE]
                if spec.search.gap_reference == "base"
                else [source.name for source in spec.sources if source.name != task.reference]
            )
            losses = []
            for other in others:
                shared = self.loaded.shared(other, fitted=True)
                losses.append(self._scores_with(shared, task.reference, {name: task}, like=other)[name].mean_loss)
            found[name] = min(losses)
        return found

    def _scores_with(
        self,
        shared: Mapping[str, torch.Tensor],
        reference: str,
        tasks: Mapping[str, MeasuredTask],
        like: str | None = None,
    ) -> dict[str, Scores]:
        """The scores of a checkpoint's shared tensors under the head of a reference.

        In the live model, if that is of the checkpoint's form: a device that just holds the search holds no second one.
        """
        if self.loaded.inputs.spec.merge.dtype == "same" and self.heads.fits(shared):
            self.merger.forget()
            self.heads.load(shared)
            return self._scores_of(self.heads, tasks)
        return self._scores_of(self.loaded.heads(shared, [reference], like=like), tasks)

    def _scores_of(self, heads: Heads, tasks: Mapping[str, MeasuredTask]) -> dict[str, Scores]:
        search = self.loaded.inputs.spec.search
        return measure_tasks(
            tasks,
            heads.module,
            self.loaded.inputs.architecture,
            self.loaded.device,
            soft=needs_soft(search),
            temperatures=TEMPERATURES if search.objective == "metric" else (),
        )


@dataclass(frozen=True)
class EvaluatorFactory:
    """Makes the evaluator in a worker's process, here or elsewhere; picklable.

    Attributes:
        spec: the spec as JSON, with absolute paths. Of its ``python_path`` a worker takes the folders that it has.
        files: what the earlier stages wrote.
        threads: CPU threads of torch in the worker.
        recalibrates: whether trials are measured with recalibrated BatchNorm statistics.
    """

    spec: str
    files: SearchFiles
    threads: int
    recalibrates: bool = False

    def __call__(self, index: int) -> Callable[[Sequence[RecipeBlock], Race | None], Outcome]:
        """The evaluator of worker ``index``."""
        spec = Spec.model_validate_json(self.spec)
        compute = spec.compute.model_copy(update={"threads": self.threads})
        python_path = [folder for folder in spec.model.python_path if Path(folder).is_dir()]
        model = spec.model.model_copy(update={"python_path": python_path})
        run = TrialRun.load(spec.model_copy(update={"compute": compute, "model": model}), *self.files.here())
        if self.recalibrates:
            run.recalibrate_trials()
        return run.evaluator


def needs_soft(search: SearchSpec) -> bool:
    """Whether the probability of the right answer is measured: for the objective, or for the gradient in its place."""
    return search.objective in ("soft_metric", "metric")


def gathered_statistics(
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
            "inputs": identity_of(spec, loaded.inputs.manifest, None),
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


def identity_of(spec: Spec, manifest: Manifest, statistics: Statistics | None) -> str:
    """Digest of what shapes the losses: what is merged, how the model runs, on which data, and the statistics of it."""
    digests = manifest.digests()
    return digest_of(
        {
            **({"statistics": statistics.gathered_digest()} if statistics is not None else {}),
            "inputs": {name: digest for name, digest in digests.items() if not name.endswith("/test")},
            "model": spec.model.model_dump(mode="json", exclude={"python_path"}),
            "arguments": {source.name: source.arguments for source in spec.sources},
            "tasks": [task.model_dump(mode="json", exclude={"validation", "test", "metrics"}) for task in spec.tasks],
            "private": spec.private,
            "merge": spec.merge.model_dump(mode="json", exclude={"max_shard_bytes"}),
        }
    )

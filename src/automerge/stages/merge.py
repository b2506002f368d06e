"""merge: rebuild the merged checkpoint from a recipe and the checkpoints; needs no data."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from automerge.checkpoint.digest import checkpoint_digest, sha256_file
from automerge.checkpoint.layout import INDEX_FILE
from automerge.checkpoint.open import open_checkpoint
from automerge.merging.recipe import Recipe
from automerge.merging.statistics import Statistics
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.vocabulary import fit_checkpoints, origin_of
from automerge.spec import Spec
from automerge.stages.documents import MERGED, STATISTICS, FileRecord, Merged
from automerge.stages.inputs import Inputs
from automerge.stages.loading import device_of
from automerge.telemetry.metrics import observe_stage


def merge(spec: Spec, inputs: Path, recipe: Path, folder: Path) -> Merged:
    """Write the merged checkpoint and ``merged.json``.

    The files that make a folder of weights loadable (a transformers configuration and tokenizer) are copied from the
    first source; where vocabularies differ in size, from the first checkpoint that has the merged one's.

    Args:
        spec: the spec.
        inputs: folder that `fetch` wrote.
        recipe: the recipe's file; the statistics file that it may name lies beside it.
        folder: where the checkpoint is written.

    Raises:
        SpecError: the recipe cannot be read.
        MergeError: it is a recipe of other checkpoints, its statistics file is missing or another one, or it cannot be
            applied.
        ModelError: the spec's device is not there.
    """
    with ExitStack() as stack:
        metrics = stack.enter_context(
            observe_stage("merge", pipeline=spec.name, family=spec.model.target, folder=folder)
        )
        document = Recipe.read(recipe)
        statistics = None
        if document.statistics is not None:
            statistics = stack.enter_context(Statistics.open(recipe.parent / STATISTICS, document.statistics))
        opened = Inputs.open(spec, inputs)
        base, sources = opened.open_checkpoints(stack)
        fitted_base, fitted_sources = fit_checkpoints(document, base if document.base is not None else None, sources)
        written = merge_checkpoints(
            document,
            fitted_base,
            fitted_sources,
            folder,
            max_shard_bytes=spec.merge.max_shard_bytes,
            threads=spec.compute.threads,
            device=str(device_of(spec)),
            statistics=statistics,
        )
        for companion in opened.companion_files(origin_of(document, base, sources)):
            copy = folder / companion.name
            shutil.copyfile(companion, copy)
            written.append(copy)
        if document.vocabulary is not None:
            opened.architecture.set_vocabulary(folder, document.vocabulary.rows)
        index = folder / INDEX_FILE
        if index.exists():
            written.append(index)
        written = sorted(written)
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = dict(zip(written, pool.map(sha256_file, written), strict=True))
        with open_checkpoint(folder) as merged:
            weights = {path.relative_to(folder).as_posix(): digests[path] for path in merged.files}
            document_out = Merged(
                recipe=document.digest(),
                weights=checkpoint_digest(weights),
                parameter_count=sum(info.numel for info in merged.tensors.values()),
                files=[
                    FileRecord(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=digest)
                    for path, digest in digests.items()
                ],
            )
        document_out.write(folder / MERGED)
        metrics.set("automerge_merge_parameters", document_out.parameter_count)
        metrics.set("automerge_merge_size_bytes", sum(record.bytes for record in document_out.files))
    return document_out

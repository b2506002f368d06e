"""merge: rebuild the merged checkpoint from a recipe and the checkpoints; needs no data."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from automerge.checkpoint.digest import sha256_file
from automerge.checkpoint.layout import INDEX_FILE
from automerge.checkpoint.open import open_checkpoint
from automerge.merging.recipe import Recipe
from automerge.merging.streamed import merge_checkpoints
from automerge.spec import Spec
from automerge.stages.documents import MERGED, FileRecord, Merged
from automerge.stages.inputs import Inputs
from automerge.telemetry.metrics import observe_stage


def merge(spec: Spec, inputs: Path, recipe: Path, folder: Path) -> Merged:
    """Write the merged checkpoint and ``merged.json``.

    The files that make a folder of weights loadable (a transformers configuration and tokenizer) are copied from the
    first source.

    Args:
        spec: the spec.
        inputs: folder that `fetch` wrote.
        recipe: the recipe's file.
        folder: where the checkpoint is written.

    Raises:
        SpecError: the recipe cannot be read.
        MergeError: it is a recipe of other checkpoints, or cannot be applied.
    """
    with ExitStack() as stack:
        metrics = stack.enter_context(
            observe_stage("merge", pipeline=spec.name, family=spec.model.target, folder=folder)
        )
        document = Recipe.read(recipe)
        opened = Inputs.open(spec, inputs)
        base, sources = opened.open_checkpoints(stack)
        written = merge_checkpoints(
            document,
            base if document.base is not None else None,
            sources,
            folder,
            max_shard_bytes=spec.merge.max_shard_bytes,
        )
        origin = opened.manifest.path(opened.folder, spec.sources[0].name)
        for companion in opened.architecture.companion_files(origin):
            copy = folder / companion.name
            shutil.copyfile(companion, copy)
            written.append(copy)
        index = folder / INDEX_FILE
        if index.exists():
            written.append(index)
        with open_checkpoint(folder) as merged:
            document_out = Merged(
                recipe=document.digest(),
                weights=merged.digest(),
                parameter_count=sum(info.numel for info in merged.tensors.values()),
                files=[
                    FileRecord(
                        path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256_file(path)
                    )
                    for path in sorted(written)
                ],
            )
        document_out.write(folder / MERGED)
        metrics.set("automerge_merge_parameters", document_out.parameter_count)
        metrics.set("automerge_merge_size_bytes", sum(record.bytes for record in document_out.files))
    return document_out

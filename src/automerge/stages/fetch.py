"""fetch: bring every checkpoint and data set of a spec to local disk, verified.

What can be refused early is: the checkpoints' headers are read by ranges and compared before any large download.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from automerge import storage
from automerge.checkpoint.adapter import Adapter
from automerge.checkpoint.compatibility import check_compatibility, shared_tensors
from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.layout import is_adapter
from automerge.checkpoint.open import open_checkpoint
from automerge.checkpoint.peek import peek_tensors
from automerge.documents import digest_of
from automerge.errors import CheckpointError, ModelError, SpecError, TaskError
from automerge.merging.apply import refuse_non_finite
from automerge.merging.recipe import BASE
from automerge.models.architecture import Architecture, load_architecture
from automerge.models.state import state_names
from automerge.plugins import nearest
from automerge.spec import Spec
from automerge.stages.documents import MANIFEST, FileRecord, Input, Manifest, Role, place_of
from automerge.stages.inputs import (
    check_plugins,
    model_paths,
    open_inputs,
    tokenizer_folder,
    vocabulary_names,
    vocabulary_of,
    vocabulary_rows,
)
from automerge.stages.tokens import check_added_tokens
from automerge.storage import FetchRecord, ObjectInfo, list_objects, read_range
from automerge.tasks.task import load_task
from automerge.telemetry.metrics import observe_stage

log = logging.getLogger(__name__)

Tensors = Mapping[str, TensorInfo]


def fetch(spec: Spec, folder: Path) -> Manifest:
    """Fetch all inputs of a spec into ``folder`` and write its manifest.

    Files that an earlier call brought are kept where their digests still fit, and what they were made of is unchanged
    by its etag and size, or is pinned by the spec's sha256. A broken download goes on where it stopped.

    Raises:
        StorageError: an object is missing, not readable, or damaged on the way.
        CheckpointError: a checkpoint is damaged or unsafe, the checkpoints do not fit each other, or a digest in the
            spec does not fit.
        MergeError: a checkpoint has NaN or infinite values, or no technique fits the inputs.
        ModelError: the checkpoints have different names, and the model that says which are tied cannot be built.
        PluginError, TaskError: a plug-in that the spec names is unknown, or a task's data are unusable.
        SpecError: `merge.vocabulary` does not fit the model or `private`.
    """
    with observe_stage("fetch", pipeline=spec.name, family=spec.model.target, folder=folder) as metrics:
        listings = _listings(spec)
        inputs: list[Input] = []
        downloaded = 0
        for item in _wanted(spec):
            log.info("fetching %s from %s", item.name, item.uri)
            base = folder / inputs[0].path if inputs and inputs[0].role == "base" else None
            fetched, transferred = _fetch_one(item, listings[item.name], folder, base)
            inputs.append(fetched)
            downloaded += transferred
        metrics.set("automerge_fetch_downloaded_bytes", downloaded)
        metrics.set("automerge_fetch_size_bytes", sum(record.bytes for item in inputs for record in item.files))
        _check_expected(spec, inputs)
        _check_fetched(spec, inputs, folder)
        manifest = Manifest(spec=spec.digest(), inputs=inputs)
        manifest.write(folder / MANIFEST)
    return manifest


def resolve(spec: Spec) -> dict[str, str]:
    """Find out what each input of a spec is now, and refuse what can be refused, without reading more than headers.

    Returns:
        By the input's name (as in the manifest) its version: a digest (hex) of its objects' names, sizes and etags. It
        changes whenever the content does.

    Raises:
        AutoMergeError: as :func:`fetch`.
    """
    return {
        name: digest_of([[item.key, item.size, item.etag] for item in listing])
        for name, listing in _listings(spec).items()
    }


def fetch_input(spec: Spec, name: str, folder: Path) -> None:
    """Bring the files of one input to where :func:`fetch` takes them up, which checks them.

    Raises:
        SpecError: the spec has no input of that name.
        StorageError: an object is missing, not readable, or damaged on the way.
    """
    found = {item.name: item for item in _wanted(spec)}
    if name not in found:
        raise SpecError(f"the spec has no input {name!r}", nearest(name, list(found)))
    item = found[name]
    log.info("fetching %s from %s", name, item.uri)
    storage.fetch_all(list_objects(item.uri), folder / item.place, record=_record(folder, item), sha256=item.sha256)


def _listings(spec: Spec) -> dict[str, list[ObjectInfo]]:
    """The objects of each input; the spec's plug-ins and the checkpoints' headers are checked."""
    check_plugins(spec)
    architecture = load_architecture(spec.model, {})
    architecture.check()
    wanted = _wanted(spec)
    listings = {item.name: list_objects(item.uri) for item in wanted}
    _check_headers(spec, architecture, {item.name: listings[item.name] for item in wanted if item.is_checkpoint})
    return listings


@dataclass(frozen=True)
class _Wanted:
    """One input of the spec."""

    name: str
    role: Role
    uri: str
    sha256: str | None = None

    @property
    def place(self) -> str:
        """Its folder, relative to that of all inputs."""
        return place_of(self.role, self.name)

    @property
    def is_checkpoint(self) -> bool:
        return self.role in ("base", "source")


def _wanted(spec: Spec) -> list[_Wanted]:
    wanted = []
    if spec.base is not None:
        wanted.append(_Wanted(BASE, "base", spec.base.uri, spec.base.sha256))
    wanted += [_Wanted(each.name, "source", each.uri, each.sha256) for each in spec.sources]
    for task in spec.tasks:
        wanted.append(_Wanted(f"{task.name}/validation", "validation", task.validation))
        wanted.append(_Wanted(f"{task.name}/test", "test", task.test))
    return wanted


def _check_headers(spec: Spec, architecture: Architecture, listings: Mapping[str, Sequence[ObjectInfo]]) -> None:
    """Compare the checkpoints by their headers alone; those without a header are compared once they are here.

    So are the adapters of a base without one.

    So are names that may be tied in a model that cannot be built before its checkpoint is here.
    """
    tensors: dict[str, Tensors] = {}
    for name, listing in listings.items():
        if is_adapter([item.key for item in listing]):
            _check_base(spec, name)
        uris = {item.key: item.uri for item in listing}
        found = peek_tensors(
            {item.key: item.size for item in listing},
            lambda key, start, stop, uris=uris: read_range(uris[key], start, stop),  # type: ignore[misc]
            f"checkpoint {name!r}",
            tensors.get(BASE),
        )
        if found is not None:
            tensors[name] = found
    try:
        tied: Mapping[str, str] | None = _tied(spec, architecture, tensors)
    except (ModelError, KeyError):  # the folder that the kind builds the model from is not among the architecture's
        tied = None
    _check_tensors(spec, tensors, tied, () if spec.merge.vocabulary == "error" else None)


def _check_base(spec: Spec, name: str) -> None:
    """An adapter is a source, and has a base."""
    if name == BASE:
        raise CheckpointError(
            "the base is a LoRA adapter",
            "name the model that it was trained on as the base, and the adapter as a source",
        )
    if spec.base is None:
        raise CheckpointError(
            f"source {name!r} is a LoRA adapter, and the spec names no base", "name the model that it was trained on"
        )


def _check_fetched(spec: Spec, inputs: Sequence[Input], folder: Path) -> None:
    """Everything that can be said of the inputs before a GPU is paid for: fit, finite values, usable data."""
    tensors: dict[str, Tensors] = {}
    with ExitStack() as stack:
        for owner, checkpoint in open_inputs(inputs, folder, stack).items():
            tensors[owner] = checkpoint.tensors
            label = "base" if owner == BASE else f"source {owner!r}"
            # The rest of an adapter is the base's, which comes first.
            for name in checkpoint.changed if isinstance(checkpoint, Adapter) else checkpoint.tensors:
                refuse_non_finite(label, name, checkpoint.read(name))
    paths = {item.name: folder / item.path for item in inputs}
    architecture = load_architecture(spec.model, model_paths(inputs, folder))
    _check_tensors(
        spec,
        tensors,
        _tied(spec, architecture, tensors),
        _vocabulary_tensors(spec, architecture, tensors, inputs, folder),
    )
    for task in spec.tasks:
        plugin = load_task(task, tokenizer_folder(inputs, folder, spec.reference_of(task)))
        for split in ("validation", "test"):
            try:
                plugin.load(paths[f"{task.name}/{split}"])
            except TaskError as error:
                raise TaskError(f"tasks.{task.name}.{split}: {error.problem}", error.remedy) from error


def _tied(spec: Spec, architecture: Architecture, tensors: Mapping[str, Tensors]) -> Mapping[str, str]:
    """The model's tied names, if the checkpoints have different ones: of a tied tensor each may hold any.

    A PyTorch file has all of them, safetensors only one.
    """
    names = {frozenset(shared_tensors(infos, spec.private)) for infos in tensors.values()}
    if len(names) < 2:
        return {}
    source = spec.sources[0]
    with torch.device("meta"):
        return state_names(architecture.build(source.name, source.arguments)).tied


def _vocabulary_tensors(
    spec: Spec, architecture: Architecture, tensors: Mapping[str, Tensors], inputs: Sequence[Input], folder: Path
) -> list[str]:
    """The names of the tensors that may differ in their number of rows, once their tokens were compared."""
    if spec.merge.vocabulary == "error":
        return []
    source = spec.sources[0]
    with torch.device("meta"):
        module = architecture.build(source.name, source.arguments)
    groups = vocabulary_names(spec, architecture, module)
    rows = vocabulary_rows(groups, tensors)
    vocabulary = vocabulary_of(spec, groups, rows)
    private = sorted(vocabulary_names(spec, architecture, module, private=True))
    if vocabulary is not None and private:
        raise SpecError(
            f"private: {', '.join(map(repr, private))} {'is' if len(private) == 1 else 'are'} of the vocabulary, whose "
            "other tensors change their number of rows",
            "make all of them private, or none",
        )
    if rows:
        folders = {owner: tokenizer_folder(inputs, folder, owner) for owner in rows}
        check_added_tokens(folders, min(rows.values()), vocabulary.rows if vocabulary else max(rows.values()))
    return [name for group in groups.values() for name in group]


def _check_tensors(
    spec: Spec, tensors: Mapping[str, Tensors], tied: Mapping[str, str] | None, vocabulary: Sequence[str] | None
) -> None:
    if len(tensors) < 2:
        return
    first = next(source.name for source in spec.sources if source.name in tensors)
    sources = {name: infos for name, infos in tensors.items() if name not in (first, BASE)}
    base = {name: infos for name, infos in tensors.items() if name == BASE}
    # The merge computes in the widest dtype and writes in that of the sources, or in the one that the spec names.
    mixed = spec.merge.dtype != "same"
    for others, floats in ((sources, mixed), (base, True)):
        check_compatibility(
            tensors[first],
            others,
            first,
            spec.private,
            tied=tied,
            allow_mixed_floats=floats,
            vocabulary=vocabulary,
        )


def _fetch_one(item: _Wanted, listing: Sequence[ObjectInfo], folder: Path, base: Path | None) -> tuple[Input, int]:
    """One input on local disk, and how many bytes of it had to be transferred; ``base`` is where the base is."""
    target = folder / item.place
    files = storage.fetch_all(listing, target, record=_record(folder, item), sha256=item.sha256)
    for stale in sorted(
        path for path in target.rglob("*") if path.is_file() and path not in {file.path for file in files}
    ):
        stale.unlink()  # of an earlier fetch from another place: it would be taken for a part of this input
    path = files[0].path if len(files) == 1 else target
    records = [FileRecord(path=_relative(file.path, folder), bytes=file.size, sha256=file.sha256) for file in files]
    if item.is_checkpoint:
        with ExitStack() as stack:
            needed = base is not None and is_adapter([entry.key for entry in listing])
            opened = stack.enter_context(open_checkpoint(base)) if base is not None and needed else None
            digest = stack.enter_context(open_checkpoint(path, opened)).digest()
    else:
        digest = digest_of({_relative(file.path, target): file.sha256 for file in files})
    fetched = Input(
        name=item.name, role=item.role, uri=item.uri, path=_relative(path, folder), digest=digest, files=records
    )
    return fetched, sum(file.transferred for file in files)


def _record(folder: Path, item: _Wanted) -> FetchRecord:
    """What was fetched of an input before."""
    target = folder / item.place
    return FetchRecord(target.with_name(f".{target.name}.fetched.json"))


def _check_expected(spec: Spec, inputs: Sequence[Input]) -> None:
    """Compare with the digests that the spec names."""
    expected = {source.name: source.sha256 for source in spec.sources}
    if spec.base is not None:
        expected["base"] = spec.base.sha256
    for item in inputs:
        wanted = expected.get(item.name)
        if wanted is not None and wanted.lower() != item.digest:
            raise CheckpointError(
                f"checkpoint {item.name!r} at {item.uri} has digest {item.digest}, the spec expects {wanted}",
                "correct the spec's sha256, or find out who replaced the checkpoint",
            )


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()

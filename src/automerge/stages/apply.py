"""apply: merge checkpoints on disk by a recipe, or by one technique for all tensors. No spec, no data, no run."""

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

from automerge.checkpoint.checkpoint import Checkpoint
from automerge.checkpoint.companions import companion_files
from automerge.checkpoint.layout import ADAPTER_CONFIG, INDEX_FILE
from automerge.checkpoint.open import open_checkpoint
from automerge.checkpoint.write import MAX_SHARD_BYTES
from automerge.errors import MergeError, SpecError, StorageError
from automerge.merging.buffers import is_buffer_name
from automerge.merging.recipe import BASE, SOURCE_NAME, InputDigest, IntegerBuffers, OutputDtype, Recipe, RecipeBlock
from automerge.merging.statistics import Statistics
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import Settings, Value, load_technique, validate_settings
from automerge.merging.vocabulary import fit_checkpoints, origin_of
from automerge.plugins import nearest
from automerge.stages.documents import RECIPE, STATISTICS


@dataclass(frozen=True)
class Checkpoints:
    """The inputs of a merge, opened. A base and the sources by name, in the order in which they are summed."""

    base: Checkpoint | None
    sources: Mapping[str, Checkpoint]

    @classmethod
    def open(cls, base: Path | None, sources: Mapping[str, Path], stack: ExitStack) -> "Checkpoints":
        """Open them, adapters upon the base; ``stack`` closes them.

        Raises:
            CheckpointError: one is not there, or not readable.
        """
        opened = None if base is None else stack.enter_context(open_checkpoint(base))
        return cls(opened, {name: stack.enter_context(open_checkpoint(path, opened)) for name, path in sources.items()})


def apply(
    recipe: Recipe,
    base: Path | None,
    sources: Mapping[str, Path],
    folder: Path,
    *,
    statistics: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int | None = None,
    verify: bool = True,
) -> list[Path]:
    """Write the merged checkpoint and ``recipe.json``.

    The files that make a folder of weights loadable (a transformers configuration and tokenizer) are copied from the
    first source, or from the base where it has none; an adapter's tokenizer goes before its base's.

    Args:
        recipe: the merge. An input whose digest it names is refused if it has another; one without is taken as it is.
        base: the base's file or folder, where the recipe has a base.
        sources: the sources' by name.
        folder: where the checkpoint is written.
        statistics: the recipe's statistics file, where it names one.
        max_shard_bytes: largest size of one weight file.
        threads: how many; by default one for each processor that this process may use.
        verify: read the inputs once more, to check their digests.

    Returns:
        the files written.

    Raises:
        MergeError: the checkpoints are not those of the recipe, or cannot be merged so.
        CheckpointError, StorageError: an input cannot be read, or the output cannot be written.
    """
    with ExitStack() as stack:
        opened = Checkpoints.open(base, sources, stack)
        file = None
        if recipe.statistics is not None:
            if statistics is None:
                raise MergeError(f"the recipe needs its {STATISTICS}", "pass it with the recipe")
            file = stack.enter_context(Statistics.open(statistics, recipe.statistics))
        checked = recipe if verify else _without_digests(recipe)
        written = merge_checkpoints(
            checked,
            *fit_checkpoints(checked, opened.base, opened.sources),
            folder,
            max_shard_bytes=max_shard_bytes,
            statistics=file,
            threads=threads,
        )
        if (folder / INDEX_FILE).exists():
            written.append(folder / INDEX_FILE)
        origin = origin_of(recipe, opened.base, opened.sources)
        companions = _companions(sources.get(origin), base)
        if file is not None and statistics is not None:
            companions.append(statistics)
        written += [_copied(companion, folder) for companion in companions]
        return [*written, recipe.write(folder / RECIPE)]


def _companions(origin: Path | None, base: Path | None) -> list[Path]:
    """What makes the merged weights loadable, by name; the origin's, completed by the base's where it is an adapter."""
    files = {file.name: file for file in companion_files(origin)} if origin is not None else {}
    if base is not None and (origin is None or not files or (origin / ADAPTER_CONFIG).is_file()):
        own = {name: file for name, file in files.items() if name != "config.json"}
        files = {file.name: file for file in companion_files(base)} | own
    return [files[name] for name in sorted(files)]


def _copied(file: Path, folder: Path) -> Path:
    """Copy a file beside the result, whole or not at all; a merge into an input's own folder has it there already.

    Raises:
        StorageError: it cannot be written.
    """
    target = folder / file.name
    if file.resolve() == target.resolve():
        return target
    temporary = folder / f".{file.name}.tmp"
    try:
        shutil.copyfile(file, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{target}: cannot be written ({error.strerror or error})", "pass a folder that can be written"
        ) from None
    return target


def recipe_of_technique(
    technique: str,
    base: Path | None,
    sources: Mapping[str, Path],
    weights: Mapping[str, float],
    *,
    hyperparameters: Mapping[str, Value] | None = None,
    private: Sequence[str] = (),
    seed: int = 0,
    dtype: OutputDtype = "same",
    integer_buffers: IntegerBuffers = "error",
    digests: bool = True,
) -> Recipe:
    """The recipe of one technique with one set of hyperparameters for all tensors.

    Nothing runs the model here, so what is a buffer is told by name and dtype: BatchNorm's running statistics, and
    integer or boolean tensors, follow the buffer policy.

    Args:
        technique: its name.
        base, sources: files or folders.
        weights: the weight of each source.
        hyperparameters: those that are not to have their default.
        private: glob patterns of tensors that every checkpoint keeps for itself.
        seed, dtype, integer_buffers: as in `Recipe`.
        digests: name each input by its digest, which reads it once.

    Raises:
        PluginError, MergeError: the technique, a hyperparameter or a weight is not valid.
        CheckpointError: an input cannot be read.
    """
    declaration = load_technique(technique).declaration
    values = declaration.defaults()
    for key in hyperparameters or {}:
        if key not in values:
            raise MergeError(f"technique {technique!r} has no hyperparameter {key!r}", nearest(key, list(values)))
    values |= hyperparameters or {}
    settings = validate_settings(
        Settings(technique, dict(weights), values),
        sources=list(sources),
        has_base=base is not None,
        where=f"technique {technique!r}",
    )
    with ExitStack() as stack:
        opened = Checkpoints.open(base, sources, stack)
        every = {**opened.sources, **({BASE: opened.base} if opened.base is not None else {})}
        kept = {
            owner: [name for name in each.tensors if any(fnmatchcase(name, pattern) for pattern in private)]
            for owner, each in every.items()
        }
        first = next(iter(opened.sources.values()))
        own = kept[next(iter(sources))]
        # Of two names for one tensor of which one is private, the other is merged by itself.
        tied = {alias: name for alias, name in first.aliases.items() if alias not in own and name not in own}
        names = [name for name in first.tensors if name not in tied and name not in own]
        infos = first.tensors
        buffers = [name for name in names if not infos[name].is_floating_point or is_buffer_name(name)]

        def digest(checkpoint: Checkpoint) -> str:
            return checkpoint.digest() if digests else ""

        return Recipe(
            release=version("automerge-models"),
            base=InputDigest(name=BASE, digest=digest(opened.base)) if opened.base is not None else None,
            sources=[InputDigest(name=name, digest=digest(each)) for name, each in opened.sources.items()],
            seed=seed,
            dtype=dtype,
            integer_buffers=integer_buffers,
            blocks=[
                RecipeBlock(
                    name="all",
                    technique=technique,
                    weights=settings.weights,
                    hyperparameters=settings.hyperparameters,
                    parameters=[name for name in names if name not in buffers],
                    buffers=buffers,
                )
            ],
            tied=tied,
            private={owner: found for owner, found in kept.items() if found},
        )


def apply_command(
    *,
    recipe: Path | None,
    technique: str | None,
    base: Path | None,
    sources: Mapping[str, str],
    weights: Mapping[str, str],
    values: Mapping[str, str],
    private: Sequence[str],
    dtype: str | None,
    seed: int | None,
    output: Path,
    max_shard_bytes: int | None,
    threads: int | None,
    verify: bool,
) -> list[Path]:
    """What `automerge apply` does; every option as its user wrote it."""
    for name in sources:
        if name == BASE or not re.fullmatch(SOURCE_NAME, name):
            raise SpecError(
                f"--source {name}=...: is no name of a source",
                "use up to 63 letters, digits, '_', '.' and '-', and another name than 'base'",
            )
    if (recipe is None) == (technique is None):
        raise SpecError("a merge is by a recipe or by one technique", "pass either --recipe or --technique")
    paths = {name: Path(path) for name, path in sources.items()}
    if recipe is not None:
        of_technique = {"--weight": weights, "--set": values, "--private": private, "--dtype": dtype, "--seed": seed}
        meaningless = [option for option, value in of_technique.items() if value is not None and value not in ((), {})]
        if meaningless:
            raise SpecError(f"{meaningless[0]} says nothing beside --recipe", "the recipe says it")
        document = Recipe.read(recipe)
    else:
        assert technique is not None  # noqa: S101 - checked above
        document = recipe_of_technique(
            technique,
            base,
            paths,
            _weights(paths, weights),
            hyperparameters={key: _value(text) for key, text in values.items()},
            private=private,
            seed=seed or 0,
            dtype=dtype or "same",  # type: ignore[arg-type]
            digests=verify,
        )
    return apply(
        document,
        base,
        paths,
        output,
        statistics=recipe.parent / STATISTICS if recipe is not None else None,
        max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES,
        threads=threads,
        verify=verify and recipe is not None,  # the digests of a new recipe are those of these very files
    )


def _without_digests(recipe: Recipe) -> Recipe:
    nameless = [each.model_copy(update={"digest": ""}) for each in recipe.sources]
    base = recipe.base.model_copy(update={"digest": ""}) if recipe.base is not None else None
    return recipe.model_copy(update={"sources": nameless, "base": base})


def _weights(sources: Mapping[str, Path], texts: Mapping[str, str]) -> dict[str, float]:
    """Equal weights that sum to 1 unless there are some."""
    if not texts:
        return dict.fromkeys(sources, 1 / len(sources))
    weights = {}
    for name, text in texts.items():
        try:
            weights[name] = float(text)
        except ValueError:
            raise MergeError(f"--weight {name}={text}: is not a number", "write one, such as 0.3") from None
    return weights


def _value(text: str) -> Value:
    """A hyperparameter's value as its type is written: true or false, a number, or a word."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

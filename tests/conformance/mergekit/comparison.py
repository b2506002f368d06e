"""How ours and mergekit merge the same fixtures, and how far apart two results are."""

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.merging.apply import merge_tensor
from automerge.merging.random import lanes, mask_key
from automerge.merging.recipe import InputDigest, OutputDtype, Recipe, RecipeBlock
from automerge.merging.streamed import merge_checkpoints

BASE = "base"
SEED = 3
"""Of our random bits, which mergekit is given."""

Model = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merge:
    """One merge, in our terms: what stands in a block of a recipe."""

    technique: str
    weights: dict[str, float]
    hyperparameters: dict[str, bool | float | str] = field(default_factory=dict)

    def block(self, tensors: Sequence[str], buffers: Sequence[str] = ()) -> RecipeBlock:
        return RecipeBlock(
            name="all",
            technique=self.technique,
            weights=self.weights,
            hyperparameters=self.hyperparameters,
            parameters=list(tensors),
            buffers=list(buffers),
        )


@dataclass(frozen=True)
class Job:
    """One merge, in mergekit's terms; see runner.py."""

    name: str
    fixture: str
    models: list[str]
    method: str
    base: str | None
    parameters: dict[str, object]
    bits: str | None = None
    seed: int = 0
    dtype: str | None = None


def as_job(merge: Merge, name: str, fixture: str, **options: object) -> Job:
    """Our settings in mergekit's terms: the table of docs/mergekit.md.

    Raises:
        ValueError: mergekit has no counterpart.
    """
    values = merge.hyperparameters
    sources = list(merge.weights)
    if merge.technique == "linear":
        return Job(name, fixture, sources, "linear", None, {"weight": merge.weights}, **options)
    if merge.technique == "slerp":
        t = merge.weights[sources[1]] / sum(merge.weights.values())
        return Job(name, fixture, sources, "slerp", sources[0], {"t": t}, **options)
    models = [BASE, *sources]
    if merge.technique == "sce":
        if len(set(merge.weights.values())) > 1:
            raise ValueError("mergekit's sce has no weights")
        return Job(name, fixture, models, "sce", BASE, dict(values), **options)
    parameters: dict[str, object] = {"weight": merge.weights}
    parameters |= {key: value for key, value in values.items() if key != "rescale"}
    if values.get("rescale") == "l1":
        parameters["rescale"] = True
    elif values.get("rescale") == "inverse_density":
        if merge.technique not in ("dare_linear", "dare_ties"):
            raise ValueError("mergekit does not divide each element by its own probability")
        parameters |= {"rescale": False, "lambda": values["lambda"] / values["density"]}
    return Job(name, fixture, models, merge.technique, BASE, parameters, **options)


def merge_ours(merge: Merge, models: Mapping[str, Model], *, seed: int = SEED, dtype: OutputDtype = "same") -> Model:
    """Every tensor by `merge_tensor`, the function that both engines call."""
    sources = list(merge.weights)
    block = merge.block(list(models[sources[0]]))
    return {
        name: merge_tensor(
            name,
            block,
            models[BASE][name] if BASE in models else None,
            {source: models[source][name] for source in sources},
            seed=seed,
            dtype=dtype,
        )
        for name in models[sources[0]]
    }


def merge_on_disk(
    merge: Merge, models: Mapping[str, Model], folder: Path, *, buffers: Sequence[str] = (), **fields: object
) -> Model:
    """The same by `merge_checkpoints`, from files to files.

    Args:
        merge: how.
        models: the base, if there is one, and the sources.
        folder: for the files.
        buffers: names of the tensors that the buffer policy merges.
        fields: others of the recipe.
    """
    checkpoints = {}
    for model, state in models.items():
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"{model}.safetensors")
        checkpoints[model] = open_checkpoint(folder / f"{model}.safetensors")
    digests = {model: InputDigest(name=model, digest=of.digest()) for model, of in checkpoints.items()}
    tied = fields.get("tied", {})
    assert isinstance(tied, dict)
    names = [name for name in models[next(iter(merge.weights))] if name not in tied]
    block = merge.block([name for name in names if name not in buffers], buffers)
    recipe = Recipe(base=digests.pop(BASE, None), sources=list(digests.values()), blocks=[block], seed=SEED, **fields)
    base = checkpoints.pop(BASE, None)
    files = merge_checkpoints(recipe, base, checkpoints, folder / "merged", max_shard_bytes=100_000)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def random_bits(merge: Merge, tensor: str, shape: Sequence[int]) -> Model:
    """The 16 random bits of each element that ours compares with a probability, by source."""
    count = math.prod(shape)
    return {source: lanes(mask_key(SEED, source, tensor), 0, count).view(*shape) for source in merge.weights}


class MergekitError(Exception):
    """mergekit refused a job; the message is its own."""


class Mergekit:
    """mergekit in a process of its own environment, until it is closed."""

    def __init__(self, interpreter: Path, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "mergekit.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [interpreter, Path(__file__).with_name("runner.py"), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def save(self, fixture: str, models: Mapping[str, Model]) -> None:
        """Write a fixture, and our random bits for each of its sources' tensors as ``<fixture>.bits``."""
        tensors = {f"{model}/{name}": tensor for model, state in models.items() for name, tensor in state.items()}
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, self._file(fixture))
        bits = {
            f"{model}/{name}": lanes(mask_key(SEED, model, name), 0, tensor.numel()).to(torch.int32)
            for model, state in models.items()
            for name, tensor in state.items()
            if model != BASE
        }
        save_file(bits, self._file(f"{fixture}.bits"))

    def merge(self, job: Job) -> Model:
        """The merged tensors by name.

        Raises:
            MergekitError: mergekit refused.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(asdict(job))}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text()
        if answer.strip():
            raise MergekitError(answer.strip())
        return load_file(self._file(f"{job.name}.merged"))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def ulp(magnitude: torch.Tensor) -> torch.Tensor:
    """The distance of float32 numbers at these magnitudes, as float64."""
    single = magnitude.abs().to(torch.float32)
    return (torch.nextafter(single, torch.full_like(single, torch.inf)) - single).to(torch.float64)


def largest_operand(name: str, models: Mapping[str, Model], merged: torch.Tensor) -> torch.Tensor:
    """Per element the largest magnitude among base, sources, task vectors and result."""
    operands = [merged, *(state[name] for state in models.values())]
    if BASE in models:
        operands += [state[name] - models[BASE][name] for key, state in models.items() if key != BASE]
    return torch.stack([operand.to(torch.float64).abs() for operand in operands]).amax(0)

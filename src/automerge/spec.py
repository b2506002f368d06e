"""The spec: what a user writes, and the contract of the whole product.

A spec names the model, the sources and their base, the tasks that measure them, and how to search, merge, check and
register. This module checks *form* only; the names of plug-ins (techniques, task kinds, model kinds, registries) are
resolved by the stages, so that a spec can be read where torch is not installed.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from automerge.documents import digest_of
from automerge.errors import SpecError
from automerge.plugins import nearest
from automerge.secrets import SECRET_NAME
from automerge.written import WrittenModel, decode, read_text, validate, with_texts

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
_SCHEDULER = r"^dask://[^/\s:]+:\d+$"
_PATTERNS = {
    _SCHEDULER: "dask://host:port",
    _NAME: "up to 63 letters, digits, '_', '.' and '-', beginning with a letter or digit",
    _DEVICE: "auto, cpu, cuda or cuda:N",
}
"""What each pattern asks for, in words."""

Name = Annotated[str, StringConstraints(pattern=_NAME)]
Json = Any

_CREDENTIALS = re.compile(r"://[^/\s@]+@|[?&](X-Amz-(Signature|Credential|Security-Token)|sig|token)=", re.IGNORECASE)


def _without_credentials(uri: str) -> str:
    if _CREDENTIALS.search(uri):
        raise ValueError(
            "this URI carries credentials, and a spec is logged and registered; leave them in the environment, where "
            "storage and registries read theirs"
        )
    return uri


Uri = Annotated[str, AfterValidator(_without_credentials)]


class ExampleInput(WrittenModel):
    """Shape and dtype of one model input; used to trace the model without data."""

    shape: list[Annotated[int, Field(ge=1)]] = Field(description="Shape with a batch of 1, e.g. [1, 3, 224, 224].")
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"] = "float32"


class ModelSpec(WrittenModel):
    """How a checkpoint is made to run."""

    kind: str = Field(description="Model kind: 'factory' (a Python callable), 'transformers', or a plug-in's name.")
    target: str = Field(
        description="factory: 'module:callable' that returns a torch.nn.Module; "
        "transformers: the class, e.g. 'AutoModelForCausalLM'."
    )
    arguments: dict[str, Json] = Field(default_factory=dict, description="Keyword arguments of the target.")
    python_path: list[str] = Field(
        default_factory=list,
        description="Folders from which the factory's module may be imported, relative to the spec file. "
        "Code from these folders is executed: name only folders that you trust.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="transformers: run Python code that comes with the checkpoint. Off unless you say so.",
    )
    example: dict[str, ExampleInput] | None = Field(
        default=None, description="Model inputs by name, for tracing; by default one sample of the first task is used."
    )


class BaseSpec(WrittenModel):
    """The common ancestor of the sources."""

    uri: Uri = Field(description="Checkpoint: s3://, file:// or a path; a file or a folder.")
    sha256: str | None = Field(default=None, description="Expected digest of the weights; refused if it differs.")


class SourceSpec(WrittenModel):
    """One fine-tuned checkpoint to be merged."""

    name: Name
    uri: Uri = Field(description="Checkpoint: s3://, file:// or a path; a file or a folder.")
    sha256: str | None = Field(default=None, description="Expected digest of the weights; refused if it differs.")
    arguments: dict[str, Json] = Field(
        default_factory=dict,
        description="Arguments of the model's target that differ for this source (e.g. its number of classes).",
    )


class TaskSpec(WrittenModel):
    """One capability to be preserved, and the data that measure it."""

    name: Name
    kind: str = Field(description="Task kind: 'classification', 'language_modelling', or a plug-in's name.")
    specialist: str | None = Field(default=None, description="Name of the source that is good at this task.")
    guard: bool = Field(default=False, description="The reference is the base: a capability that must not be lost.")
    loss: str = Field(default="cross_entropy", description="The loss the search minimises, by the task kind's names.")
    metrics: list[str] = Field(
        default_factory=list, description="Metrics by the task kind's names; empty: the kind's default metrics."
    )
    validation: Uri = Field(description="Data that the search sees: s3://, file:// or a path.")
    test: Uri = Field(description="Data that only the evaluation sees: s3://, file:// or a path.")
    batch_size: int = Field(default=256, ge=1, description="Samples a forward pass.")
    arguments: dict[str, Json] = Field(default_factory=dict, description="Further arguments of the task kind.")

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.guard == (self.specialist is not None):
            raise ValueError("a task needs exactly one reference: set 'specialist: <source name>' or 'guard: true'")
        return self


class SegmentationSpec(WrittenModel):
    """How the architecture is cut into blocks."""

    granularity: Literal["transition", "layer", "tensor", "whole"] = Field(
        default="transition", description="transition: by changes of the tensors' layout; whole: one block."
    )


PAPER_TECHNIQUES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
"""The five of arXiv 2601.22748: what a search chooses from by default, and the baselines of every evaluation."""

DEFAULT_EPSILON = 0.3
"""Nats. At a loss of 0.3 the right answer still has a probability of 0.74: below lies confidence, not capability.

Compared with 0.001, 0.03 and 0.1 on six seeds of the digits pair that no study reports, it kept most, most evenly."""

DEFAULT_OBJECTIVE: Literal["metric"] = "metric"
"""Chosen by how well it ranks recipes by what they keep on test data: docs/studies/presets.md."""


class EarlyStopSpec(WrittenModel):
    """Ends a search whose best objective has stopped rising."""

    patience: int = Field(ge=1, description="Trials without an improvement after which the search ends.")
    min_improvement: float = Field(default=0.0, ge=0, description="What counts as an improvement of the objective.")


class ConstraintSpec(WrittenModel):
    """What is fixed, forbidden or shared in some blocks."""

    blocks: str = Field(description="Glob pattern of block names, as `automerge segment` prints them.")
    techniques: list[str] | None = Field(default=None, min_length=1, description="Only these techniques.")
    forbid: list[str] = Field(default_factory=list, description="None of these techniques.")
    weights: dict[str, float] | None = Field(default=None, description="These weights, by source.")
    hyperparameters: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="These values, where the technique has them; such as {density: 0.5}."
    )
    share: bool = Field(default=False, description="One choice of everything for all these blocks.")


class SplitSpec(WrittenModel):
    """Coarse to fine: the blocks that matter most are cut into layers, which start from their block's best settings."""

    rounds: int = Field(default=1, ge=1, description="How often blocks are cut.")
    blocks: int = Field(default=2, ge=1, description="Blocks cut in each round: those of the largest importance.")
    trials: int = Field(default=30, ge=1, description="Trials after each cut.")
    importance: Literal["surrogate", "gradient"] = Field(
        default="gradient",
        description="surrogate: how much of the trials' variance a block explains; "
        "gradient: how much layers of a block disagree on its weights.",
    )


class RefineSpec(WrittenModel):
    """Gradient refinement of the sources' weights. No parameter of the model is trained, only these scalars."""

    granularity: Literal["block", "layer", "tensor"] = Field(
        default="layer", description="What has weights of its own."
    )
    steps: int = Field(default=300, ge=1, description="Most steps from each start.")
    batch_size: int = Field(
        default=32, ge=1, description="Samples of each task in a step; at most the task's own size."
    )
    learning_rate: float = Field(default=0.03, gt=0, description="Of Adam, in units of a weight.")
    starts: int = Field(
        default=2, ge=1, description="Recipes to start from: the best trials, and the average among them."
    )
    held_back: float = Field(
        default=0.5, gt=0, lt=1, description="Share of the validation data that only the early stopping sees."
    )
    pull: float = Field(default=0.5, ge=0, description="Cost of a mean squared distance of 1 from the start's weights.")
    patience: int = Field(default=8, ge=1, description="Checks without an improvement after which a start ends.")


class FidelitySpec(WrittenModel):
    """Multi-fidelity: a trial is measured slice by slice, and stopped when it cannot reach the best one any more."""

    slices: list[float] = Field(
        default=[0.125, 0.25, 0.5, 1.0],
        min_length=1,
        description="Shares of the validation data, rising to 1; each contains the one before.",
    )
    confidence: float = Field(
        default=0.9, gt=0.5, lt=1.0, description="With which a stopped trial is worse, however often that is asked."
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if (
            any(low >= high for low, high in zip([0.0, *self.slices], self.slices, strict=False))
            or self.slices[-1] != 1
        ):
            raise ValueError(f"slices: the shares must rise from above 0 to 1, got {self.slices}")
        return self


Range = Annotated[list[float], Field(min_length=2, max_length=2)]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "trials": 200,
        "objective": "loss_ratio",
        "epsilon": 0.0,
        "weights": "simplex",
        "weight_range": [0.0, 1.0],
        "warm_start": False,
    },
    "fast": {
        "trials": 30,
        "objective": DEFAULT_OBJECTIVE,
        "epsilon": DEFAULT_EPSILON,
        "weights": "simplex",
        "weight_range": [0.0, 1.0],
        "warm_start": True,
        "fidelity": {},
        "refine": {"steps": 60, "batch_size": 16},
    },
    "best": {
        "trials": 60,
        "objective": DEFAULT_OBJECTIVE,
        "epsilon": DEFAULT_EPSILON,
        "weights": "independent",
        "weight_range": [-0.5, 1.5],
        "warm_start": True,
        "split": {},
        "refine": {},
    },
}
"""What a search takes where the spec says nothing, by preset."""


class SearchSpec(WrittenModel):
    """The search for the best recipe. A value left out is taken from the preset (`PRESETS`)."""

    preset: Literal["paper", "fast", "best"] = Field(
        default="best",
        description="paper: the protocol of arXiv 2601.22748 as published; fast: few trials of rising fidelity, "
        "then refined by gradient in a few steps; "
        "best: a wider space, coarse to fine, then refined by gradient.",
    )
    trials: int = Field(
        default=60, ge=1, description="Evaluations by Bayesian optimisation, the initial ones included."
    )
    max_seconds: float | None = Field(default=None, gt=0, description="Wall time after which no trial is begun.")
    max_samples: int | None = Field(
        default=None, ge=1, description="Forward passes of single samples after which no trial is begun."
    )
    trial_seconds: float | None = Field(
        default=None, gt=0, description="Time limit of one trial; trials then run in processes of their own."
    )
    initial: int = Field(default=20, ge=1, description="Sobol points before the surrogate is used.")
    techniques: list[str] = Field(
        default_factory=lambda: list(PAPER_TECHNIQUES),
        min_length=1,
        description="Techniques to choose from, for each block.",
    )
    weights: Literal["simplex", "independent"] = Field(
        default="independent",
        description="simplex: the sources' weights sum to 1 (w and 1-w for two); "
        "independent: a weight of its own for each source, unnormalised. Without a base always simplex.",
    )
    weight_range: Range = Field(default=[-0.5, 1.5], description="Lowest and highest weight.")
    density_range: Range = Field(default=[0.5, 1.0], description="Lowest and highest density.")
    constraints: list[ConstraintSpec] = Field(
        default_factory=list, description="What is fixed, forbidden or shared in some blocks."
    )
    objective: Literal["loss_ratio", "gap", "metric", "soft_metric"] = Field(
        default=DEFAULT_OBJECTIVE,
        description="What a task keeps. loss_ratio: L_specialist / L_merged; gap: by the excess loss, as a part of "
        "what the specialist is better than the reference; metric: its metrics relative to the specialist's; "
        "soft_metric: the same of stand-ins that have a gradient.",
    )
    aggregate: Literal["harmonic", "worst", "pareto"] = Field(
        default="harmonic",
        description="Over the tasks. harmonic: their harmonic mean; worst: the worst; pareto: the front of trade-offs.",
    )
    gap_reference: Literal["chance", "base", "other"] = Field(
        default="chance", description="Whose loss counts as nothing kept: a guess's, the base's, or the other sources'."
    )
    epsilon: float = Field(
        default=DEFAULT_EPSILON,
        ge=0,
        description="loss_ratio: nats added to both losses, so that confidence which the merge loses beyond that is "
        "not taken for lost capability.",
    )
    warm_start: bool = Field(
        default=True, description="Also try each unmerged source, their average and the base at the start."
    )
    start_from: list[Uri] = Field(
        default_factory=list, description="recipe.json files of earlier runs, or of your own, to try at the start."
    )
    fidelity: FidelitySpec | None = Field(
        default=None, description="Multi-fidelity; null: every trial is measured whole."
    )
    split: SplitSpec | None = Field(default=None, description="Coarse to fine; null: no block is cut.")
    refine: RefineSpec | None = Field(default=None, description="Gradient refinement; null: none.")
    seed: int = Field(default=0, ge=0, lt=2**31)
    early_stop: EarlyStopSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        preset = PRESETS.get(value.get("preset", "best"), {}) if isinstance(value.get("preset", "best"), str) else {}
        if "weights" in value and "weight_range" not in value:
            preset = {**preset, "weight_range": [0.0, 1.0] if value["weights"] == "simplex" else [-0.5, 1.5]}
        return {**preset, **value}

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for key, (low, high) in (("weight_range", self.weight_range), ("density_range", self.density_range)):
            if not low < high:
                raise ValueError(f"{key}: the lowest value must be below the highest, got {low} and {high}")
        if not (self.density_range[0] > 0 and self.density_range[1] <= 1):
            raise ValueError(f"density_range: a density lies above 0 and at most at 1, got {self.density_range}")
        if self.weights == "simplex" and not (self.weight_range[0] >= 0 and self.weight_range[1] <= 1):
            raise ValueError(f"weight_range: simplex weights lie between 0 and 1, got {self.weight_range}")
        if len(set(self.techniques)) != len(self.techniques):
            raise ValueError("techniques: a technique is named twice")
        return self


class MergeSpec(WrittenModel):
    """How the merged weights are written."""

    dtype: Literal["same", "float32", "float16", "bfloat16"] = Field(
        default="same", description="dtype of the merged floating-point tensors; same: as the sources."
    )
    integer_buffers: Literal["error", "base"] = Field(
        default="error", description="What to do with integer or boolean buffers that differ between the sources."
    )
    recalibrate: bool | None = Field(
        default=None,
        description="After the search, measure the BatchNorm statistics of the merged model on validation data, and "
        "keep them if the objective is not lower; by default off in preset 'paper', on otherwise.",
    )
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1_000_000, description="Largest size of one weight file.")
    vocabulary: Literal["error", "base", "largest"] = Field(
        default="error",
        description="What to do where tokens were added, so that embeddings differ in their number of rows: refuse; "
        "keep the base's rows; or keep those of the largest vocabulary.",
    )
    vocabulary_tensors: list[str] = Field(
        default_factory=list,
        description="Glob patterns of the tensors with one row per token; by default the input and output embeddings "
        "that the model names.",
    )

    @model_validator(mode="after")
    def _vocabulary(self) -> Self:
        if self.vocabulary_tensors and self.vocabulary == "error":
            raise ValueError(
                "vocabulary_tensors: has no effect while vocabulary is 'error'; set vocabulary to 'base' or 'largest'"
            )
        return self


class EvaluationSpec(WrittenModel):
    """How the result is measured."""

    resamples: int = Field(default=2000, ge=100, description="Bootstrap resamples.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="Level of the intervals.")
    baselines: bool = Field(default=True, description="Also evaluate every single technique at the paper's defaults.")
    onnx: bool = Field(default=True, description="Export the merged model to ONNX and check it against torch.")
    seed: int = Field(default=0, ge=0, lt=2**31)


class PromotionSpec(WrittenModel):
    """When the registered version takes an alias from the present one.

    It must have passed the gate. It is compared with the version that carries the alias, by each of that one's tasks
    on the same test data, as a preservation rate is formed: 100 is as good, more is better.
    """

    alias: Name = Field(default="champion", description="What the best version is called.")
    min_gain: float = Field(
        default=0.0, ge=0, description="Points above 100 that the mean over the tasks must exceed to take the alias."
    )
    max_loss: float = Field(default=1.0, ge=0, description="Most points below 100 of any one task.")


class RegistrySpec(WrittenModel):
    """Where the merged model is registered."""

    kind: str = Field(default="mlflow", description="Registry kind: 'mlflow', 'kubeflow', or a plug-in's name.")
    model: Name | None = Field(default=None, description="Registered model's name; by default the spec's name.")
    uri: Uri | None = Field(
        default=None,
        description="mlflow: tracking server; by default MLFLOW_TRACKING_URI, else SQLite in the working folder. "
        "kubeflow: the Model Registry's server.",
    )
    artifacts: Uri | None = Field(
        default=None,
        description="kubeflow: folder (s3://, file:// or a path) below which the merged weights and documents are put; "
        "MLflow has its own place.",
    )
    promote: PromotionSpec | None = Field(
        default=None, description="Give the registered version an alias if it beats the one that has it."
    )

    @model_validator(mode="after")
    def _kubeflow(self) -> Self:
        if self.kind != "kubeflow":
            return self
        if not (self.uri or "").startswith(("http://", "https://")):
            raise ValueError("kind 'kubeflow' needs 'uri', the registry's address (http://host or https://host)")
        if self.artifacts is None:
            raise ValueError(
                "kind 'kubeflow' needs 'artifacts', a folder for the merged models (e.g. s3://models/merged), since "
                "the registry keeps no files"
            )
        return self


class GateSpec(WrittenModel):
    """What a merged model must keep to be registered."""

    min_worst_pr: float | None = Field(
        default=None,
        ge=0,
        description="Least preservation rate of the worst task, percent, by its interval's lower end.",
    )
    max_pd: float | None = Field(default=None, ge=0, description="Largest preservation discrepancy, points.")


class ComputeSpec(WrittenModel):
    """Where the models run."""

    device: str = Field(default="auto", pattern=_DEVICE, description="auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of torch, of each worker; a search repeats exactly only on the same number.",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        description="Trials at a time: processes on this machine, each pinned to a GPU where there are some. "
        "By default one for each GPU, one without any, and on a Dask cluster as many as it has workers at the start.",
    )
    scheduler: str | None = Field(
        default=None, pattern=_SCHEDULER, description="dask://host:port of a Dask cluster whose workers run the trials."
    )


class Spec(WrittenModel):
    """The whole job."""

    name: Name = Field(
        description="Name of the merge; also the registered model's name unless 'registry.model' is set."
    )
    model: ModelSpec
    base: BaseSpec | None = Field(
        default=None, description="The sources' common ancestor; without it the task-vector techniques are left out."
    )
    sources: list[SourceSpec] = Field(min_length=2)
    tasks: list[TaskSpec] = Field(min_length=1)
    private: list[str] = Field(
        default_factory=list,
        description="Glob patterns of tensors that every source keeps for itself, e.g. 'head.*'.",
    )
    segmentation: SegmentationSpec = SegmentationSpec()
    search: SearchSpec = SearchSpec()
    merge: MergeSpec = MergeSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    registry: RegistrySpec = RegistrySpec()
    gate: GateSpec = GateSpec()
    compute: ComputeSpec = ComputeSpec()

    @model_validator(mode="after")
    def _references(self) -> Self:
        names = [source.name for source in self.sources]
        for kind, values in (("sources", names), ("tasks", [task.name for task in self.tasks])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{kind}: the name {twice[0]!r} is used twice; give each its own")
        for reserved in ("base", "merged"):
            if reserved in names:
                raise ValueError(
                    f"sources: {reserved!r} means another model in every table; call the source something else"
                )
        if len(names) > 2 and self.search.weights == "simplex" and self.search.weight_range != [0.0, 1.0]:
            raise ValueError(
                "search.weight_range: with simplex weights a range is for two sources; leave it out, or set "
                "'weights: independent'"
            )
        if self.merge.vocabulary == "base" and self.base is None:
            raise ValueError(
                "merge.vocabulary: 'base' keeps the base's rows, and the spec names no base; set 'largest'"
            )
        for index, task in enumerate(self.tasks):
            if task.specialist is not None and task.specialist not in names:
                remedy = nearest(task.specialist, names)
                raise ValueError(f"tasks.{index}.specialist: no source is called {task.specialist!r}; {remedy}")
            if task.guard and self.base is None:
                raise ValueError(f"tasks.{index}.guard: a guard task's reference is the base, and the spec names none")
        return self

    @property
    def recalibrates(self) -> bool:
        """``merge.recalibrate``, or the search preset's."""
        return self.merge.recalibrate if self.merge.recalibrate is not None else self.search.preset != "paper"

    @property
    def registered_model(self) -> str:
        """The registered model's name."""
        return self.registry.model or self.name

    def reference_of(self, task: TaskSpec) -> str:
        """The checkpoint that a task is measured against: a source's name, or ``base``."""
        return task.specialist or "base"

    def digest(self) -> str:
        """sha256 (hex) of the spec's canonical JSON, without the folders of the factory's code on this machine."""
        return digest_of(self.model_dump(mode="json", exclude={"model": {"python_path"}}))


def load_spec(path: Path, environment: Mapping[str, str] | None = None) -> Spec:
    """Read a YAML or JSON spec from a file; relative paths in it start at the file's folder.

    Raises:
        SpecError: the file cannot be read or does not say something valid; one sentence for each problem.
    """
    text = read_text(path, "pass the path of a spec; `automerge init` writes one")
    return parse_spec(text, folder=path.resolve().parent, where=str(path), environment=environment)


def parse_spec(
    text: str, *, folder: Path | None = None, where: str = "spec", environment: Mapping[str, str] | None = None
) -> Spec:
    """Read a spec from YAML or JSON text.

    Args:
        text: the spec; JSON is YAML too.
        folder: where relative paths start; None leaves them as they are.
        where: names the spec in errors.
        environment: values of ``${NAME}``; by default the process's environment.

    Raises:
        SpecError: one sentence for each problem, with its path in the spec.
    """
    value = decode(text, where, "spec", "start from `automerge init`")
    value = _substitute(value, os.environ if environment is None else environment, where)
    spec = validate(value, Spec, where, _PATTERNS)
    return _anchored(spec, folder) if folder is not None else spec


def json_schema() -> dict[str, Any]:
    """JSON schema of the spec, for editors and forms."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _substitute(value: Any, environment: Mapping[str, str], where: str) -> Any:
    """Replace ``${NAME}`` in every string; refuse secrets, since the spec is logged and registered."""

    def variable(name: str, path: str) -> str:
        if SECRET_NAME.search(name):
            raise SpecError(
                f"{where}: {path}: ${{{name}}} looks like a secret, and a spec is logged and registered",
                "leave it in the environment: storage and registries read their credentials there",
            )
        if name not in environment:
            close = difflib.get_close_matches(name, sorted(environment), n=1, cutoff=0.75)
            remedy = f"did you mean ${{{close[0]}}}?" if close else f"set it, e.g. `export {name}=...`"
            raise SpecError(f"{where}: {path}: the environment variable {name} is not set", remedy)
        return environment[name]

    return with_texts(value, lambda text, path: _VARIABLE.sub(lambda match: variable(match.group(1), path), text))


def _anchored(spec: Spec, folder: Path) -> Spec:
    """The spec with every relative path made absolute."""

    def uri(value: str) -> str:
        return value if "://" in value or Path(value).is_absolute() else os.path.normpath(folder / value)

    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"python_path": [uri(item) for item in spec.model.python_path]}),
            "base": spec.base and spec.base.model_copy(update={"uri": uri(spec.base.uri)}),
            "sources": [source.model_copy(update={"uri": uri(source.uri)}) for source in spec.sources],
            "registry": spec.registry.model_copy(
                update={"artifacts": uri(spec.registry.artifacts) if spec.registry.artifacts else None}
            ),
            "search": spec.search.model_copy(update={"start_from": [uri(item) for item in spec.search.start_from]}),
            "tasks": [
                task.model_copy(update={"validation": uri(task.validation), "test": uri(task.test)})
                for task in spec.tasks
            ],
        }
    )

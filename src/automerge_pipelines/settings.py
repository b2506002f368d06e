"""The deployment settings: what a platform team decides once for its cluster, in one YAML file.

What Kubeflow Pipelines lets a run decide is a parameter of the pipeline, and its default is set here; the rest is
compiled in.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from automerge.written import WrittenModel, decode, read_text, validate
from automerge_pipelines.flow import FlowTask, TaskName

_QUANTITY = r"^(0|[1-9]\d*)(\.\d+)?(m|Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?$"
_LABEL = r"^(([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?)$"
_OBJECT = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_PATTERNS = {
    _QUANTITY: "a quantity of Kubernetes, e.g. 4, 500m, 16Gi",
    _LABEL: "up to 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit",
    _OBJECT: "the name of a Kubernetes object: small letters, digits, '-' and '.'",
}

Quantity = Annotated[str, StringConstraints(pattern=_QUANTITY)]
LabelValue = Annotated[str, StringConstraints(pattern=_LABEL)]
ObjectName = Annotated[str, StringConstraints(pattern=_OBJECT)]


class SettingsModel(WrittenModel):
    """A part of the settings; a number is taken for a quantity."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Toleration(SettingsModel):
    """A taint that the pods tolerate, as Kubernetes has it."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    seconds: int | None = Field(default=None, ge=0, description="For NoExecute: how long it is tolerated.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a toleration with operator Exists has no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration without a key needs the operator Exists")
        if self.seconds is not None and self.effect != "NoExecute":
            raise ValueError("seconds belong to the effect NoExecute")
        return self


class TaskSettings(SettingsModel):
    """Where a task runs and what it gets; what is left out is taken from `defaults`."""

    cpu: Quantity | None = Field(default=None, description="CPU request.")
    cpu_limit: Quantity | None = Field(default=None, description="CPU limit; none by default.")
    memory: Quantity | None = Field(default=None, description="Memory request and limit.")
    accelerator_type: str | None = Field(default=None, description="Resource name, e.g. nvidia.com/gpu.")
    accelerator_count: int | None = Field(default=None, ge=0, description="0 for none.")
    shared_memory: Quantity | None = Field(
        default=None, description="Size of /dev/shm, which parallel trials on several GPUs use; it counts as memory."
    )
    node_selector: dict[str, LabelValue] | None = None
    tolerations: list[Toleration] | None = None
    retries: int | None = Field(default=None, ge=0, description="How often a failed task is started again.")
    timeout_seconds: int | None = Field(default=None, ge=1, description="The task fails after this time.")
    cache: bool | None = Field(default=None, description="false: never take an earlier run's outputs.")
    env: dict[str, str] | None = Field(default=None, description="Environment variables; never secrets.")


_MODEL_TASK = TaskSettings(cpu="4", memory="16Gi", accelerator_type="nvidia.com/gpu", accelerator_count=0)
_SMALL_TASK = TaskSettings(cpu="1", memory="4Gi", accelerator_type="nvidia.com/gpu", accelerator_count=0)


class Workspace(SettingsModel):
    """A volume that the tasks of a run share, so that large checkpoints are written once and never copied."""

    size: Quantity
    storage_class: ObjectName | None = None
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"] = Field(
        default="ReadWriteMany", description="ReadWriteOnce keeps all tasks on one node."
    )


class Settings(SettingsModel):
    """The deployment settings."""

    name: ObjectName = Field(default="automerge-merge", description="Of the pipeline.")
    image: str = Field(default="automerge:0.1.0", min_length=1, description="Of all tasks; name it by digest.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: list[ObjectName] = Field(default_factory=list)
    s3_secret: ObjectName = Field(default="automerge-s3", description="May be missing: workload identity works too.")
    registry_secret: ObjectName = Field(default="automerge-registry", description="May be missing.")
    config_map: ObjectName = Field(default="automerge", description="Endpoints and log settings; may be missing.")
    service_account: ObjectName | None = Field(
        default=None,
        description="Of the pods, unless a run or a schedule says another; the cluster's default if left out.",
    )
    labels: dict[str, LabelValue] = Field(
        default_factory=dict, description="Of every pod, e.g. kueue.x-k8s.io/queue-name."
    )
    annotations: dict[str, str] = Field(default_factory=dict, description="Of every pod.")
    defaults: TaskSettings = Field(default_factory=TaskSettings, description="For every task.")
    tasks: dict[TaskName, TaskSettings] = Field(default_factory=dict, description="For one task; wins over defaults.")
    workspace: Workspace | None = Field(
        default=None, description="Hand the inputs over on a shared volume instead of as artifacts."
    )
    parallel_fetch: bool = Field(
        default=True, description="With a workspace: a pod for each input, instead of one for all."
    )
    exit_handler: bool = Field(default=True, description="Report how the run ended, whatever happened.")
    ttl_seconds: int | None = Field(default=None, ge=0, description="A finished run's pods are removed after this.")
    deadline_seconds: int | None = Field(default=None, ge=1, description="A run is stopped after this time.")

    def given(self, task: FlowTask) -> TaskSettings:
        """What `tasks` says of one task."""
        return next((given for name, given in self.tasks.items() if name == task.name), TaskSettings())

    def of(self, task: FlowTask) -> TaskSettings:
        """The settings of one task, with everything filled in that has a default."""
        layers = (
            TaskSettings(retries=task.retries, cache=task.cached),
            _MODEL_TASK if task.runs_models else _SMALL_TASK,
            self.defaults,
            self.given(task),
        )
        values: dict[str, object] = {}
        for layer in layers:
            given = {name: getattr(layer, name) for name in layer.model_fields_set}
            values |= {name: value for name, value in given.items() if value is not None}
        if not task.runs_models:
            values["accelerator_count"] = 0  # `defaults` give it to those that can use it
        return TaskSettings.model_validate(values)


def load_settings(path: Path | None) -> Settings:
    """Read the settings from a YAML file; without one, all defaults.

    Raises:
        SpecError: the file cannot be read, is no YAML mapping, or breaks the schema.
    """
    if path is None:
        return Settings()
    text = read_text(path, "pass the path of the deployment settings")
    value = decode(text, str(path), "file of settings", "leave the option out for the defaults")
    return validate(value, Settings, str(path), _PATTERNS)

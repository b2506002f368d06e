"""The flow as a table: which tasks there are, what each runs and reads, and what it needs of a cluster.

The Kubeflow pipeline and the Argo workflow are both made from it.
"""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["fetch", "segment", "search-merge", "evaluate", "register"]


@dataclass(frozen=True)
class FlowTask:
    """One task of the flow.

    Attributes:
        name: of the task.
        commands: the stages that it runs in one pod, each as its command ``automerge <command> <spec> --output <run>``.
        inputs: the stages whose folders it reads; ``<run>/<stage>`` for the commands.
        outputs: the stages whose folders it writes.
        runs_models: it needs the accelerator, if there is one, and the memory for a model.
        reads_s3: it needs the storage's credentials.
        uses_registry: it needs the registry's credentials.
        retries: how often it is started again if the settings do not say, with a growing pause.
        cached: an earlier run's outputs may be taken where spec, image and inputs are the same.
    """

    name: str
    commands: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runs_models: bool = False
    reads_s3: bool = False
    uses_registry: bool = False
    retries: int = 1
    cached: bool = True


FLOW = (
    FlowTask("fetch", ("fetch",), (), ("fetch",), reads_s3=True, retries=3),
    FlowTask("segment", ("segment",), ("fetch",), ("segment",)),
    FlowTask(
        "search-merge",
        ("search", "merge"),
        ("fetch", "segment"),
        ("search", "merge"),
        runs_models=True,
        reads_s3=True,  # the mirror of its trials
        retries=2,
    ),
    FlowTask(
        "evaluate",
        ("evaluate",),
        ("fetch", "segment", "search", "merge"),
        ("evaluate",),
        runs_models=True,
    ),
    FlowTask(
        "register",
        ("register",),
        ("fetch", "segment", "search", "merge", "evaluate"),
        ("register",),
        reads_s3=True,  # a registry without a proxy keeps its artifacts there
        uses_registry=True,
        retries=3,
        cached=False,  # the registry may have lost the version since; it recognises a repeated recipe itself
    ),
)

# The tasks around those of the flow. None is cached: what they find or leave ends with the run.
RESOLVE = FlowTask("resolve", (), (), (), reads_s3=True, retries=3, cached=False)
REPORT_STATUS = FlowTask("report-status", (), (), (), cached=False)

S3_SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REGISTRY_SECRET_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
CONFIG_KEYS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AUTOMERGE_MIRROR",
    "AUTOMERGE_MIRROR_SECONDS",
    "AUTOMERGE_PUSHGATEWAY",
    "AUTOMERGE_LOG_FORMAT",
    "AUTOMERGE_LOG_LEVEL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)
"""Keys of the secrets and the config map are the names of the environment variables; each of them may be missing."""

MODEL_ENVIRONMENT = {
    # Segments that grow keep the allocator from failing on fragments, after hundreds of trials of different techniques.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
}
"""Environment of the tasks that run models."""

"""The merge pipeline: from checkpoints in S3 to a registered model, one task a stage.

Run this module to compile ``merge_pipeline.yaml`` beside it. The same function runs on one machine without a cluster by
:func:`automerge_pipelines.local.run_local`, where resources, secrets and volumes have no effect.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kfp import compiler, dsl, kubernetes

from automerge_components.evaluate import evaluate
from automerge_components.fetch import fetch
from automerge_components.register import register
from automerge_components.search_merge import search_merge
from automerge_components.segment import segment

COMPILED = Path(__file__).with_name("merge_pipeline.yaml")

S3_SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REGISTRY_SECRET_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
CONFIG_KEYS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AUTOMERGE_PUSHGATEWAY",
    "AUTOMERGE_LOG_FORMAT",
    "AUTOMERGE_LOG_LEVEL",
)
"""Keys of the secrets and the config map are the names of the environment variables; each of them may be missing."""


@dataclass(frozen=True)
class Policy:
    """What a cluster has to know of a task.

    Attributes:
        retries: how often a failed task is started again, with a growing pause.
        cache: whether an earlier run's outputs may be taken, if spec, image and input artifacts are the same.
    """

    retries: int
    cache: bool


POLICIES = {
    # Not cached: the objects behind the URIs can change while the spec stays the same.
    "fetch": Policy(retries=3, cache=False),
    "segment": Policy(retries=1, cache=True),
    "search-merge": Policy(retries=2, cache=True),
    "evaluate": Policy(retries=1, cache=True),
    # Not cached: the registry may have lost the version since; it recognises a repeated recipe itself.
    "register": Policy(retries=3, cache=False),
}


class Outputs(NamedTuple):
    """What a run leaves whatever the verdict; the registration is an output of its task."""

    verdict: str
    evaluation: dsl.Artifact
    model: dsl.Model


@dsl.pipeline(name="automerge-merge", display_name="AutoMerge")  # type: ignore[untyped-decorator]
def merge_pipeline(
    spec: str,
    image: str = "automerge:0.1.0",
    cpu: str = "4",
    memory: str = "16Gi",
    accelerator_type: str = "nvidia.com/gpu",
    accelerator_count: str = "0",
    s3_secret: str = "automerge-s3",  # noqa: S107 - the name of a secret
    registry_secret: str = "automerge-registry",  # noqa: S107
    config_map: str = "automerge",
) -> Outputs:
    """Merge the sources of a spec and register the result if it passes the spec's quality gate.

    A run whose model the gate refuses succeeds with the verdict `fail` and registers nothing.

    Args:
        spec: The spec as JSON or YAML text. A digest that is known belongs in it (`sha256`): it is verified.
        image: Image of all tasks; name it by digest, since equal names count as equal for the cache.
        cpu: CPU request of the tasks that run models.
        memory: Memory request and limit of the tasks that run models.
        accelerator_type: Resource name of the accelerator.
        accelerator_count: Accelerators for the tasks that run models; 0 for none.
        s3_secret: Secret with the storage's credentials; may be missing.
        registry_secret: Secret with the registry's credentials; may be missing.
        config_map: Config map with endpoints and log settings; may be missing.
    """
    fetched = fetch(spec=spec)
    segmented = segment(spec=spec, inputs=fetched.outputs["inputs"])
    found = search_merge(spec=spec, inputs=fetched.outputs["inputs"], segmentation=segmented.outputs["segmentation"])
    evaluated = evaluate(
        spec=spec,
        inputs=fetched.outputs["inputs"],
        segmentation=segmented.outputs["segmentation"],
        search=found.outputs["search"],
        model=found.outputs["model"],
    )
    # The verdict is a plain return value, "Output": the local runner finds no other name of a task in a condition.
    with dsl.If(evaluated.outputs["Output"] == "pass", name="gate-passed"):
        registered = register(
            spec=spec,
            inputs=fetched.outputs["inputs"],
            segmentation=segmented.outputs["segmentation"],
            search=found.outputs["search"],
            model=found.outputs["model"],
            evaluation=evaluated.outputs["evaluation"],
        )

    for task in (fetched, segmented, found, evaluated, registered):
        policy = POLICIES[task.name]
        task.set_container_image(image)
        task.set_caching_options(policy.cache)
        task.set_retry(policy.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        kubernetes.set_security_context(task, run_as_non_root=True)
        kubernetes.empty_dir_mount(task, volume_name="tmp", mount_path="/tmp")  # noqa: S108 - of the pod alone
        kubernetes.use_config_map_as_env(task, config_map, {key: key for key in CONFIG_KEYS}, optional=True)
    for task in (fetched, segmented, registered):
        task.set_cpu_request("1").set_memory_request("4Gi").set_memory_limit("4Gi")
    for task in (found, evaluated):
        task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
        task.set_accelerator_type(accelerator_type).set_accelerator_limit(accelerator_count)
    for task in (fetched, registered):  # a registry without a proxy keeps its artifacts in S3
        kubernetes.use_secret_as_env(task, s3_secret, {key: key for key in S3_SECRET_KEYS}, optional=True)
    kubernetes.use_secret_as_env(registered, registry_secret, {key: key for key in REGISTRY_SECRET_KEYS}, optional=True)

    return Outputs(evaluated.outputs["Output"], evaluated.outputs["evaluation"], found.outputs["model"])


def compile_pipeline(path: Path = COMPILED) -> Path:
    """Write the compiled pipeline: ASCII, and the same bytes every time; returns ``path``."""
    compiler.Compiler().compile(merge_pipeline, str(path))
    return path


def main(arguments: list[str] | None = None) -> None:
    """``python -m automerge_pipelines.merge_pipeline [--output FILE]``."""
    parser = argparse.ArgumentParser(
        prog="python -m automerge_pipelines.merge_pipeline", description="Compile the merge pipeline."
    )
    parser.add_argument("--output", type=Path, default=COMPILED, help="the YAML file to write")
    print(compile_pipeline(parser.parse_args(arguments).output))


if __name__ == "__main__":
    main()

"""The merge pipeline: from checkpoints in S3 to a registered model, one task a stage.

``automerge compile`` writes it as YAML; the compiled one beside this module has the default settings. The same function
runs on one machine without a cluster by :func:`automerge_pipelines.local.run_local`, where resources, secrets and most
other settings have no effect.
"""

import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kfp import compiler, dsl, kubernetes
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from automerge.documents import write_atomically
from automerge.telemetry.traces import RUN_VARIABLE
from automerge_components import (
    evaluate,
    fetch,
    fetch_input,
    register,
    report_status,
    resolve,
    search_merge,
    segment,
)
from automerge_pipelines.flow import (
    CONFIG_KEYS,
    FLOW,
    MODEL_ENVIRONMENT,
    REGISTRY_SECRET_KEYS,
    REPORT_STATUS,
    RESOLVE,
    S3_SECRET_KEYS,
    FlowTask,
)
from automerge_pipelines.settings import Settings, Workspace

COMPILED = Path(__file__).with_name("merge_pipeline.yaml")

Format = Literal["kfp", "kubernetes"]


class Outputs(NamedTuple):
    """What a run leaves whatever the verdict; the registration is an output of its task."""

    verdict: str
    evaluation: dsl.Artifact
    model: dsl.Model


@dataclass(frozen=True)
class _Run:
    """What a run may decide: the pipeline's parameters."""

    spec: Any
    image: Any
    cpu: Any
    memory: Any
    accelerator_type: Any
    accelerator_count: Any
    s3_secret: Any
    registry_secret: Any
    config_map: Any


def build_pipeline(settings: Settings) -> Any:
    """The pipeline with these settings compiled in, as a graph component of ``kfp``.

    A setting that a run may decide is the default of a parameter: the image, the resources of the tasks that run
    models, and the names of secrets and config map. What the settings say of one task in ``tasks`` holds whatever the
    parameters say. With an exit handler the pipeline has no outputs: Kubeflow Pipelines lets none out of one.
    """
    default = Settings(defaults=settings.defaults).of(_FLOW["search-merge"])

    def merge_pipeline(  # type: ignore[no-untyped-def]  # what it returns depends on the settings
        spec: str,
        image: str = settings.image,
        cpu: str = str(default.cpu),
        memory: str = str(default.memory),
        accelerator_type: str = str(default.accelerator_type),
        accelerator_count: str = str(default.accelerator_count),
        s3_secret: str = settings.s3_secret,
        registry_secret: str = settings.registry_secret,
        config_map: str = settings.config_map,
    ):
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
        run = _Run(
            spec,
            image,
            cpu,
            memory,
            accelerator_type,
            accelerator_count,
            s3_secret,
            registry_secret,
            config_map,
        )
        if not settings.exit_handler:
            return _flow(settings, run)
        reported = report_status(spec=spec)
        _configure(reported, REPORT_STATUS, settings, run)
        with dsl.ExitHandler(reported, name="merge"):
            _flow(settings, run)
        return None

    if not settings.exit_handler:
        merge_pipeline.__annotations__["return"] = Outputs
    return dsl.pipeline(name=settings.name, display_name="AutoMerge", pipeline_config=_config(settings))(merge_pipeline)


_FLOW = {task.name: task for task in FLOW}

_FETCH_INPUT = replace(_FLOW["fetch"], cached=False)


def _flow(settings: Settings, run: _Run) -> Outputs:
    """The tasks, inside a pipeline that is being built."""
    spec, on_volume = run.spec, settings.workspace is not None
    workspace = dsl.WORKSPACE_PATH_PLACEHOLDER if on_volume else ""
    resolved = resolve(spec=spec)
    _configure(resolved, RESOLVE, settings, run)
    fetched = fetch(spec=spec, versions=resolved.output, workspace=workspace)
    if on_volume and settings.parallel_fetch:
        with dsl.ParallelFor(resolved.output, name="inputs") as version:
            each = fetch_input(spec=spec, version=version, workspace=workspace)
            _configure(each, _FETCH_INPUT, settings, run)
        fetched.after(each)
    given = {"spec": spec, "workspace": workspace, "inputs": fetched.outputs["inputs"]}
    segmented = segment(**given)
    given["segmentation"] = segmented.outputs["segmentation"]
    found = search_merge(**given)
    given |= {"search": found.outputs["search"], "model": found.outputs["model"]}
    evaluated = evaluate(**given)
    # The verdict is a plain return value, "Output": the local runner finds no other name of a task in a condition.
    with dsl.If(evaluated.outputs["Output"] == "pass", name="gate-passed"):
        registered = register(**given, evaluation=evaluated.outputs["evaluation"])
    _configure(fetched, _FETCH_INPUT if on_volume else _FLOW["fetch"], settings, run)
    for task in (segmented, found, evaluated, registered):
        _configure(task, _FLOW[task.name], settings, run)
    return Outputs(evaluated.outputs["Output"], evaluated.outputs["evaluation"], found.outputs["model"])


def _configure(task: Any, row: FlowTask, settings: Settings, run: _Run) -> None:
    """Give a task what the table, the settings and the run say of it."""
    own = settings.of(row)
    fixed = settings.given(row)
    task.set_container_image(run.image)
    task.set_caching_options(bool(own.cache and row.cached))
    task.set_retry(own.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    if own.timeout_seconds is not None:
        kubernetes.set_timeout(task, own.timeout_seconds)

    if row.runs_models:
        # kfp 2.17 itself lets a resource's parameter into no condition, loop or exit handler.
        task.register_pipeline_channels([run.cpu, run.memory, run.accelerator_type, run.accelerator_count])
    memory = run.memory if row.runs_models and fixed.memory is None else own.memory
    task.set_cpu_request(run.cpu if row.runs_models and fixed.cpu is None else own.cpu)
    task.set_memory_request(memory).set_memory_limit(memory)
    if own.cpu_limit is not None:
        task.set_cpu_limit(own.cpu_limit)
    if row.runs_models and fixed.accelerator_count != 0:
        task.set_accelerator_type(fixed.accelerator_type or run.accelerator_type)
        count = run.accelerator_count if fixed.accelerator_count is None else str(fixed.accelerator_count)
        task.set_accelerator_limit(count)
    if own.shared_memory is not None:
        shm = {"volume_name": "shm", "mount_path": "/dev/shm", "medium": "Memory"}  # noqa: S108 - of the pod alone
        kubernetes.empty_dir_mount(task, **shm, size_limit=own.shared_memory)

    for key, value in sorted((own.node_selector or {}).items()):
        kubernetes.add_node_selector(task, label_key=key, label_value=value)
    for each in own.tolerations or []:
        kubernetes.add_toleration(
            task,
            key=each.key,
            operator=each.operator,
            value=each.value,
            effect=each.effect,
            toleration_seconds=each.seconds,
        )
    for key, value in sorted(settings.labels.items()):
        kubernetes.add_pod_label(task, key, value)
    for key, value in sorted(settings.annotations.items()):
        kubernetes.add_pod_annotation(task, key, value)

    if settings.image_pull_policy is not None:
        kubernetes.set_image_pull_policy(task, settings.image_pull_policy)
    if settings.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, settings.image_pull_secrets)
    kubernetes.set_security_context(task, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, volume_name="tmp", mount_path="/tmp")  # noqa: S108 - of the pod alone

    for key, value in sorted({**(MODEL_ENVIRONMENT if row.runs_models else {}), **(own.env or {})}.items()):
        task.set_env_variable(key, value)
    kubernetes.use_config_map_as_env(task, run.config_map, {key: key for key in CONFIG_KEYS}, optional=True)
    if row.reads_s3:
        kubernetes.use_secret_as_env(task, run.s3_secret, {key: key for key in S3_SECRET_KEYS}, optional=True)
    if row.uses_registry:
        keys = {key: key for key in REGISTRY_SECRET_KEYS}
        kubernetes.use_secret_as_env(task, run.registry_secret, keys, optional=True)
    kubernetes.use_field_path_as_env(task, RUN_VARIABLE, "metadata.labels['pipeline/runid']")


def _config(settings: Settings) -> Any:
    return dsl.PipelineConfig(
        workspace=_workspace(settings.workspace) if settings.workspace is not None else None,
        ttl_seconds_after_finished=settings.ttl_seconds,
        active_deadline_seconds=settings.deadline_seconds,
    )


def _workspace(workspace: Workspace) -> Any:
    patch: dict[str, Any] = {"accessModes": [workspace.access_mode]}
    if workspace.storage_class is not None:
        patch["storageClassName"] = workspace.storage_class
    return dsl.WorkspaceConfig(size=workspace.size, kubernetes=dsl.KubernetesWorkspaceConfig(pvcSpecPatch=patch))


def compile_pipeline(settings: Settings, path: Path, form: Format = "kfp", *, namespace: str | None = None) -> Path:
    """Write the compiled pipeline: ASCII, and the same bytes every time; returns ``path``.

    Args:
        settings: of the deployment.
        path: the YAML file to write.
        form: ``kfp`` is what Kubeflow Pipelines takes as an upload; ``kubernetes`` are the objects `Pipeline` and
            `PipelineVersion`, for a server that keeps its pipelines in the Kubernetes API.
        namespace: of the Kubernetes objects.
    """
    pipeline = build_pipeline(settings)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(compiled))
        if form == "kubernetes":
            options = KubernetesManifestOptions(
                pipeline_version_name=f"{settings.name}-{version_name(compiled.read_bytes())}",
                namespace=namespace,
                include_pipeline_manifest=True,
            )
            compiler.Compiler().compile(
                pipeline, str(compiled), kubernetes_manifest_format=True, kubernetes_manifest_options=options
            )
        content = compiled.read_bytes()
    content.decode("ascii")  # a description with another letter would be a defect of ours
    write_atomically(path, content)
    return path


def version_name(compiled: bytes) -> str:
    """The name of the pipeline version with this compiled content: this release and the content's digest."""
    release = version("automerge-models").replace("+", "-")  # of a local version, which Kubernetes takes in no name
    return f"{release}-{sha256(compiled).hexdigest()[:12]}"

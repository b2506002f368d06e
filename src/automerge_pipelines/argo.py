"""The flow for Argo Workflows without Kubeflow: a `WorkflowTemplate`, and a `CronWorkflow` that runs it on a schedule.

Hera makes both from the same table and settings as the Kubeflow pipeline. Each task runs the commands of its stages in
the same image, on a run's folder: that of a volume which the tasks share, or else one of the pod's own, between which
Argo carries the stages' folders as artifacts. The spec is a parameter of the workflow that Argo writes to a file, so no
text of a user is ever part of a command.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from hera.workflows import (
    DAG,
    Artifact,
    ConfigMapEnv,
    Container,
    CronWorkflow,
    Env,
    Parameter,
    RawArtifact,
    SecretEnv,
    TarArchiveStrategy,
    Task,
    WorkflowTemplate,
)
from hera.workflows import models as argo

from automerge.documents import write_atomically
from automerge.errors import SpecError
from automerge.spec import load_spec
from automerge.telemetry.traces import RUN_VARIABLE
from automerge_pipelines.arguments import spec_argument
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
from automerge_pipelines.schedules import Schedule
from automerge_pipelines.settings import Settings, TaskSettings, Toleration, Workspace

# Importing Hera changes how PyYAML writes every text of the process, and so the bytes of the Kubeflow pipeline.
for _class in (yaml.Dumper, yaml.representer.SafeRepresenter):
    _class.add_representer(str, yaml.representer.SafeRepresenter.represent_str)

COMPILED = Path(__file__).with_name("argo_workflow_template.yaml")

SPEC = "/spec/spec.yaml"
WORKSPACE = "/workspace"
RUN = f"{WORKSPACE}/run"
TEMPORARY = "/tmp"  # noqa: S108 - of the pod alone
VERDICT = f"{TEMPORARY}/verdict"
NAMES = f"{TEMPORARY}/names.json"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - where Kubernetes puts a token

USER = 65532
"""The images' user and group. Argo's own containers in the pod run as it too, so it must be a number."""

LONGEST_NAME = 63

STARTING_DEADLINE_SECONDS = 300
"""A start that the controller missed by more than this is left out."""

_FETCH = next(row for row in FLOW if row.name == "fetch")
_FETCH_INPUT = "fetch-input"

_IMAGE = "image"
"""What a run may decide besides its spec."""

_JUDGE = "evaluate"
"""The stage whose verdict decides whether those that read it run."""

_LABELS = {"app.kubernetes.io/name": "automerge"}

_OPTIONS = {
    "search": ("--resume",),  # a pod that is started again goes on where the last one stopped
    "evaluate": ("--verdict", VERDICT),
}


def workflow_template(settings: Settings) -> WorkflowTemplate:
    """The flow as a `WorkflowTemplate` with the parameters ``spec`` (required) and ``image``.

    Raises:
        SpecError: the settings' name is too long for one.
    """
    if len(settings.name) > LONGEST_NAME:
        raise SpecError(
            f"name: {settings.name!r} has {len(settings.name)} characters, and Argo Workflows takes {LONGEST_NAME}",
            "shorten it in the deployment settings",
        )
    on_volume = settings.workspace is not None
    parallel = on_volume and settings.parallel_fetch
    ttl = settings.ttl_seconds
    templates = [_template(settings, row, on_volume=on_volume) for row in FLOW]
    if parallel:
        templates += [_resolve_template(settings), _fetch_input_template(settings)]
    if settings.exit_handler:
        templates.append(_report_status_template(settings))
    return WorkflowTemplate(
        name=settings.name,
        labels=_LABELS,
        entrypoint="merge",
        on_exit=REPORT_STATUS.name if settings.exit_handler else None,
        service_account_name=settings.service_account,
        arguments=[
            Parameter(name="spec", description="The spec as JSON or YAML text."),
            Parameter(name=_IMAGE, value=settings.image, description="Image of all tasks; name it by digest."),
        ],
        templates=[_dag(on_volume=on_volume, parallel=parallel), *templates],
        volume_claim_templates=[_claim(settings.workspace)] if settings.workspace is not None else None,
        image_pull_secrets=[argo.LocalObjectReference(name=name) for name in settings.image_pull_secrets] or None,
        pod_metadata=_pod_metadata(settings),
        security_context=argo.PodSecurityContext(
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            fs_group_change_policy="OnRootMismatch",  # not a walk through a large volume for each pod
            seccomp_profile=argo.SeccompProfile(type="RuntimeDefault"),
        ),
        active_deadline_seconds=settings.deadline_seconds,
        ttl_strategy=argo.TTLStrategy(seconds_after_completion=ttl) if ttl is not None else None,
        # Where runs are kept longer, their pods are not.
        pod_gc=argo.PodGC(strategy="OnWorkflowCompletion", delete_delay_duration=f"{ttl}s")
        if ttl is not None
        else None,
    )


def cron_workflow(settings: Settings, schedule: Schedule, *, timezone: str | None = None) -> CronWorkflow:
    """A `CronWorkflow` that runs a spec by the settings' workflow template: one run at a time, no catching up.

    Args:
        settings: of the deployment.
        schedule: from the schedules file.
        timezone: of the schedule, e.g. Europe/Berlin; by default the controller's.

    Raises:
        SpecError: the spec cannot be read or is too large to be a parameter, or the schedule asks for what Argo
            Workflows cannot do.
    """
    where = f"schedule {schedule.name!r}"
    second, *fields = schedule.cron.split()
    if second != "0":
        raise SpecError(f"{where}: Argo Workflows starts nothing at second {second!r}", "write a cron of five fields")
    unknown = sorted(set(schedule.parameters) - {_IMAGE})
    if unknown:
        raise SpecError(
            f"{where}: the workflow template has no parameter {unknown[0]!r}",
            f"it has {_IMAGE!r}; put the rest into the deployment settings",
        )
    given = {name: str(value) for name, value in schedule.parameters.items()}
    given["spec"] = spec_argument(load_spec(schedule.spec))
    return CronWorkflow(
        name=schedule.name,
        labels=_LABELS,
        schedules=[" ".join(fields)],
        timezone=timezone,
        concurrency_policy="Forbid",
        starting_deadline_seconds=STARTING_DEADLINE_SECONDS,
        cron_suspend=not schedule.enabled,
        workflow_template_ref=argo.WorkflowTemplateRef(name=settings.name),
        service_account_name=schedule.service_account,
        arguments=[Parameter(name=name, value=value) for name, value in given.items()],
    )


def write_argo(
    settings: Settings,
    path: Path = COMPILED,
    *,
    namespace: str | None = None,
    schedules: Sequence[Schedule] = (),
    timezone: str | None = None,
) -> Path:
    """Write the YAML for ``kubectl apply``: the `WorkflowTemplate`, and a `CronWorkflow` for each schedule.

    The file is ASCII, and has the same bytes every time; returns ``path``.

    Args:
        settings: of the deployment.
        path: the file to write.
        namespace: of the objects.
        schedules: of the schedules file.
        timezone: of the schedules; by default the controller's.

    Raises:
        SpecError: as :func:`workflow_template` and :func:`cron_workflow`.
    """
    workflows: list[WorkflowTemplate | CronWorkflow] = [workflow_template(settings)]
    workflows += [cron_workflow(settings, schedule, timezone=timezone) for schedule in schedules]
    for workflow in workflows:
        workflow.namespace = namespace
    write_atomically(path, "---\n".join(to_yaml(each) for each in workflows).encode("ascii"))
    return path


def to_yaml(workflow: WorkflowTemplate | CronWorkflow) -> str:
    """One object as YAML."""
    return yaml.dump(workflow.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if text in ("y", "Y", "n", "N") else None  # for kubectl these are truth values
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dag(*, on_volume: bool, parallel: bool) -> DAG:
    """The tasks in their order; ``register`` runs only if the gate let the model pass."""
    maker = {stage: row.name for row in FLOW for stage in row.outputs}
    tasks: list[Task | argo.DAGTask] = []
    if parallel:
        names = f"{{{{tasks.{RESOLVE.name}.outputs.parameters.inputs}}}}"
        tasks = [
            Task(name=RESOLVE.name, template=RESOLVE.name),
            Task(
                name=_FETCH_INPUT,
                template=_FETCH_INPUT,
                dependencies=[RESOLVE.name],
                with_param=names,
                arguments=[Parameter(name="input", value="{{item}}")],
            ),
        ]
    for row in FLOW:
        before = list(dict.fromkeys(maker[stage] for stage in row.inputs))
        if parallel and not before:
            before = [_FETCH_INPUT]
        tasks.append(
            Task(
                name=row.name,
                template=row.name,
                dependencies=before or None,
                when=f"{{{{tasks.{maker[_JUDGE]}.outputs.parameters.verdict}}}} == pass"
                if _JUDGE in row.inputs
                else None,
                arguments=[
                    Artifact(name=stage, from_=f"{{{{tasks.{maker[stage]}.outputs.artifacts.{stage}}}}}")
                    for stage in row.inputs
                    if not on_volume
                ],
            )
        )
    return DAG(name="merge", tasks=tasks)


def _template(settings: Settings, row: FlowTask, *, on_volume: bool) -> Container:
    """A task of the flow: the commands of its stages, in one pod."""
    commands = [_argv(stage, "--output", RUN, *_OPTIONS.get(stage, ())) for stage in row.commands]
    inputs = [] if on_volume else [Artifact(name=stage, path=f"{RUN}/{stage}") for stage in row.inputs]
    # Weights do not get smaller by compression, which takes longer than the transfer.
    archive = TarArchiveStrategy(compression_level=0)
    outputs = [] if on_volume else [Artifact(name=each, path=f"{RUN}/{each}", archive=archive) for each in row.outputs]
    verdict = [_file_parameter("verdict", VERDICT)] if _JUDGE in row.commands else []
    return _container(settings, row, commands, inputs=inputs, outputs=[*outputs, *verdict], on_volume=on_volume)


def _resolve_template(settings: Settings) -> Container:
    """Finds out the names of the inputs, each of which then gets a pod."""
    command = _argv("resolve", "--names", NAMES)
    return _container(settings, RESOLVE, [command], outputs=[_file_parameter("inputs", NAMES)])


def _fetch_input_template(settings: Settings) -> Container:
    """Brings one input to the volume, where ``fetch`` finds and checks it."""
    command = _argv("fetch", "--output", RUN, "--input={{inputs.parameters.input}}")
    return _container(settings, _FETCH, [command], name=_FETCH_INPUT, inputs=[Parameter(name="input")], on_volume=True)


def _report_status_template(settings: Settings) -> Container:
    """The exit handler."""
    command = _argv("report-status", "{{workflow.status}}", "--run={{workflow.name}}")
    return _container(settings, REPORT_STATUS, [command])


def _container(
    settings: Settings,
    row: FlowTask,
    commands: Sequence[Sequence[str]],
    *,
    name: str | None = None,
    inputs: Sequence[Artifact | Parameter] = (),
    outputs: Sequence[Artifact | Parameter] = (),
    on_volume: bool | None = None,
) -> Container:
    """A pod that runs commands in a row.

    Args:
        settings: of the deployment.
        row: what it needs.
        commands: argument lists.
        name: of the template, if it is not the row's.
        inputs, outputs: besides the spec.
        on_volume: the folder of the run is on the shared volume, or on one of the pod's own; None: it needs none.
    """
    own = settings.of(row)
    volumes = {TEMPORARY: argo.Volume(name="tmp", empty_dir=argo.EmptyDirVolumeSource())}
    # A mount here keeps the token, which only Argo's own containers need, out of ours.
    volumes[TOKEN] = argo.Volume(name="no-token", empty_dir=argo.EmptyDirVolumeSource())
    if own.shared_memory is not None:
        size = argo.Quantity(root=own.shared_memory)
        shm = argo.EmptyDirVolumeSource(medium="Memory", size_limit=size)
        volumes["/dev/shm"] = argo.Volume(name="shm", empty_dir=shm)  # noqa: S108 - of the pod alone
    if on_volume is False:
        volumes[WORKSPACE] = argo.Volume(name="workspace", empty_dir=argo.EmptyDirVolumeSource())
    mounts = [argo.VolumeMount(name=each.name, mount_path=path) for path, each in volumes.items()]
    if on_volume:
        mounts.append(argo.VolumeMount(name="workspace", mount_path=WORKSPACE))  # the claim's
    command, arguments = _command(commands)
    return Container(
        name=name if name is not None else row.name,
        image=f"{{{{workflow.parameters.{_IMAGE}}}}}",
        image_pull_policy=settings.image_pull_policy,
        command=command,
        args=arguments,
        inputs=[RawArtifact(name="spec", path=SPEC, data="{{workflow.parameters.spec}}"), *inputs],
        outputs=list(outputs),
        env=_environment(settings, row, own),
        resources=_resources(own),
        volumes=list(volumes.values()),
        volume_mounts=mounts,
        node_selector=own.node_selector or None,
        tolerations=[_toleration(each) for each in own.tolerations or []] or None,
        retry_strategy=_retries(own.retries or 0),
        active_deadline_seconds=own.timeout_seconds,
        security_context=argo.SecurityContext(
            allow_privilege_escalation=False,
            capabilities=argo.Capabilities(drop=["ALL"]),
            read_only_root_filesystem=True,
        ),
    )


def _argv(command: str, *options: str) -> list[str]:
    return ["automerge", command, SPEC, *options]


def _command(commands: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Command and arguments of a container; the shell's text is ours alone, so nothing can be injected into it."""
    if len(commands) == 1:
        return [commands[0][0]], list(commands[0][1:])
    # Argo ends the whole process group; the shell must live on until the command has come to its end.
    return ["sh", "-ec"], ["\n".join(["trap : TERM", *map(shlex.join, commands)])]


def _file_parameter(name: str, path: str) -> Parameter:
    """An output parameter whose value is the content of a file."""
    return Parameter(name=name, value_from=argo.ValueFrom(path=path))


def _environment(settings: Settings, row: FlowTask, own: TaskSettings) -> list[Env | SecretEnv | ConfigMapEnv]:
    """By name, so that a variable of the settings stands in place of the config map's."""
    # The root is read-only, and libraries write caches to the home folder.
    variables: dict[str, Env | SecretEnv | ConfigMapEnv] = {"HOME": Env(name="HOME", value=TEMPORARY)}
    variables[RUN_VARIABLE] = Env(name=RUN_VARIABLE, value="{{workflow.name}}")
    for key in CONFIG_KEYS:
        variables[key] = ConfigMapEnv(name=key, config_map_name=settings.config_map, config_map_key=key, optional=True)
    secrets = [(settings.s3_secret, key) for key in S3_SECRET_KEYS if row.reads_s3]
    secrets += [(settings.registry_secret, key) for key in REGISTRY_SECRET_KEYS if row.uses_registry]
    for secret, key in secrets:
        variables[key] = SecretEnv(name=key, secret_name=secret, secret_key=key, optional=True)
    given = {**(MODEL_ENVIRONMENT if row.runs_models else {}), **(own.env or {})}
    variables |= {key: Env(name=key, value=value) for key, value in sorted(given.items())}
    return list(variables.values())


def _resources(own: TaskSettings) -> argo.ResourceRequirements:
    requests = {"cpu": own.cpu, "memory": own.memory}
    limits = {"cpu": own.cpu_limit, "memory": own.memory}
    if own.accelerator_count:
        limits[str(own.accelerator_type)] = str(own.accelerator_count)
    return argo.ResourceRequirements(
        requests={name: argo.Quantity(root=value) for name, value in requests.items() if value is not None},
        limits={name: argo.Quantity(root=value) for name, value in limits.items() if value is not None},
    )


def _toleration(own: Toleration) -> argo.Toleration:
    return argo.Toleration(
        key=own.key, operator=own.operator, value=own.value, effect=own.effect, toleration_seconds=own.seconds
    )


def _retries(count: int) -> argo.RetryStrategy | None:
    """`Always`: a preempted pod counts as failed or as an error, by who noticed first.

    The pause has a cap and no ``maxDuration``: that would end the retries by the time since the first start, so that a
    pod lost after an hour would not be started again.
    """
    if not count:
        return None
    backoff = argo.Backoff(duration="30s", factor=argo.IntOrString(root="2"), cap="600s")
    return argo.RetryStrategy(limit=argo.IntOrString(root=str(count)), retry_policy="Always", backoff=backoff)


def _pod_metadata(settings: Settings) -> argo.Metadata | None:
    if not settings.labels and not settings.annotations:
        return None
    return argo.Metadata(labels=settings.labels or None, annotations=settings.annotations or None)


def _claim(workspace: Workspace) -> argo.PersistentVolumeClaim:
    return argo.PersistentVolumeClaim(
        metadata=argo.ObjectMeta(name="workspace"),
        spec=argo.PersistentVolumeClaimSpec(
            access_modes=[workspace.access_mode],
            storage_class_name=workspace.storage_class,
            resources=argo.VolumeResourceRequirements(requests={"storage": argo.Quantity(root=workspace.size)}),
        ),
    )

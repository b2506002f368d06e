"""The command line: one command a stage, and `automerge run`, which is all of them in a row.

Heavy imports happen inside the commands, so that `automerge --help` answers at once.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from automerge.documents import write_atomically
from automerge.errors import AutoMergeError, MissingExtraError, SpecError
from automerge.stages.process import INTERRUPTED
from automerge.telemetry.logs import configure_logs, redact

if TYPE_CHECKING:
    from automerge.searching.search import SearchProgress
    from automerge.spec import Spec

GATE_FAILED = 3
"""Exit code of a run whose merged model the quality gate refused."""

_SPEC = click.argument("spec", type=click.Path(path_type=Path))
_OUTPUT = click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the run; each stage has a folder of its own in it. Default: runs/<name>.",
)


def main() -> None:
    """Entry point: every error a user can cause is one sentence on stderr."""
    try:
        cli(standalone_mode=False)
    except AutoMergeError as error:
        for sentence in redact(str(error)).splitlines():  # a spec can have several problems
            click.echo(f"error: {sentence}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        problem = _lower_first(error.format_message()).rstrip(".")
        remedy = f"; see `{context.command_path} --help`" if context is not None and not problem.endswith("?") else ""
        click.echo(f"error: {problem}{remedy}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors", "numpy"):
            raise
        click.echo(
            f"error: {error.name} is not installed; run this where the whole package is, as in the image `automerge`",
            err=True,
        )
        sys.exit(AutoMergeError.exit_code)
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(
            f"error: {error.filename}: {_lower_first(error.strerror or 'failed')}; "
            "check the path, its permissions and the free space",
            err=True,
        )
        sys.exit(AutoMergeError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("automerge-models"), prog_name="automerge")
@click.option("--log-format", type=click.Choice(["human", "json"]), default="human", envvar="AUTOMERGE_LOG_FORMAT")
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    default="INFO",
    envvar="AUTOMERGE_LOG_LEVEL",
)
def cli(log_format: str, log_level: str) -> None:
    """Merge N fine-tuned models of one architecture into one multi-task model, without training."""
    configure_logs("json" if log_format == "json" else "human", log_level.upper())


@cli.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), default=Path("automerge.yaml"))
def init(path: Path) -> None:
    """Write a commented spec to start from."""
    if path.exists():
        raise SpecError(f"{path}: exists already", "name another file")
    template = Path(__file__).with_name("spec_template.yaml").read_text()
    write_atomically(path, template.encode())
    click.echo(f"wrote {path}; edit it, then: automerge validate {path}")


@cli.command()
@_SPEC
def validate(spec: Path) -> None:
    """Check a spec: its form, and that every plug-in, loss and metric in it exists."""
    from automerge.spec import load_spec
    from automerge.stages.inputs import check_plugins

    loaded = load_spec(spec)
    for notice in check_plugins(loaded):
        click.echo(f"notice: {notice}", err=True)
    click.echo(f"{spec}: valid ({len(loaded.sources)} sources, {len(loaded.tasks)} tasks)")


@cli.command()
@click.option("--all", "folder", type=click.Path(path_type=Path, file_okay=False), help="Write every schema here.")
def schema(folder: Path | None) -> None:
    """Print the spec's JSON schema, or write those of all documents."""
    if folder is None:
        from automerge.spec import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        return
    from automerge.stages.schemas import write_schemas

    for path in write_schemas(folder):
        click.echo(path)


@cli.command()
@_SPEC
@click.option("--names", type=click.Path(path_type=Path, dir_okay=False), help="Write the inputs' names here, as JSON.")
def resolve(spec: Path, names: Path | None) -> None:
    """Find out what each input is now, and refuse what can be refused, without downloading it."""
    from automerge.spec import load_spec
    from automerge.stages.fetch import resolve as stage

    versions = stage(load_spec(spec))
    if names is not None:
        write_atomically(names, json.dumps(list(versions)).encode())
    for name, found in versions.items():
        click.echo(f"{name:24} {found[:16]}")


@cli.command()
@_SPEC
@_OUTPUT
@click.option(
    "--input",
    "name",
    help="Only download this one, by its name in the manifest; a `fetch` without this option then checks all.",
)
def fetch(spec: Path, output: Path | None, name: str | None) -> None:
    """Bring all checkpoints and data to local disk, verified."""
    from automerge.stages.fetch import fetch as stage
    from automerge.stages.fetch import fetch_input

    loaded, run = _begin(spec, output)
    if name is not None:
        fetch_input(loaded, name, run / "fetch")
        return
    manifest = stage(loaded, run / "fetch")
    for item in manifest.inputs:
        click.echo(
            f"{item.name:24} {item.digest[:16]}  {sum(file.bytes for file in item.files):>14,} bytes  {item.uri}"
        )


@cli.command()
@_SPEC
@_OUTPUT
@click.option(
    "--granularity",
    type=click.Choice(["transition", "layer", "tensor", "whole"]),
    help="Instead of the spec's; then the blocks are only printed.",
)
def segment(spec: Path, output: Path | None, granularity: str | None) -> None:
    """Cut the architecture into blocks and print them."""
    from automerge.report.console import print_segmentation
    from automerge.stages.segment import segment as stage

    loaded, run = _begin(spec, output)
    if granularity is None or granularity == loaded.segmentation.granularity:
        print_segmentation(stage(loaded, run / "fetch", run / "segment"))
        return
    other = type(loaded).model_validate({**loaded.model_dump(), "segmentation": {"granularity": granularity}})
    with tempfile.TemporaryDirectory() as elsewhere:  # the later stages take what lies in the run's folder
        print_segmentation(stage(other, run / "fetch", Path(elsewhere)))
    click.echo(
        f"only printed: the spec says {loaded.segmentation.granularity!r}; change it there to merge by these blocks",
        err=True,
    )


@cli.command()
@_SPEC
@_OUTPUT
@click.option("--resume", is_flag=True, help="Go on with a search that was interrupted.")
def search(spec: Path, output: Path | None, resume: bool) -> None:
    """Search for the best recipe."""
    from automerge.stages.search import search as stage

    loaded, run = _begin(spec, output)
    with _live_progress() as progress:
        result = stage(loaded, run / "fetch", run / "segment", run / "search", resume=resume, progress=progress)
    click.echo(
        f"best: trial {result.best.number} of {len(result.trials)}, objective {result.best.objective:.4f}; "
        f"recipe in {run / 'search' / 'recipe.json'}"
    )
    if result.stopped == "interrupted":
        click.echo("interrupted: nothing is lost; go on with --resume", err=True)
        sys.exit(INTERRUPTED)


@cli.command()
@_SPEC
@_OUTPUT
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="A recipe instead of the one that the search of this run found."
)
@click.option(
    "--point",
    type=click.IntRange(min=0),
    metavar="TRIAL",
    help="A point of the Pareto front (search/front.json), by its trial; it becomes the recipe of this run.",
)
def merge(spec: Path, output: Path | None, recipe: Path | None, point: int | None) -> None:
    """Write the merged checkpoint that a recipe describes; needs no data."""
    from automerge.stages.front import choose_point
    from automerge.stages.merge import merge as stage

    if recipe is not None and point is not None:
        raise click.UsageError("--recipe and --point exclude each other")
    loaded, run = _begin(spec, output)
    if point is not None:
        choose_point(run / "search", point)
    merged = stage(loaded, run / "fetch", recipe or run / "search" / "recipe.json", run / "merge")
    click.echo(f"merged {merged.parameter_count:,} parameters into {run / 'merge'} (digest {merged.weights[:16]})")


@cli.command()
@click.option("--recipe", type=click.Path(path_type=Path), help="Merge by this recipe.json ...")
@click.option("--technique", help="... or by this technique, the same for all tensors.")
@click.option("--base", type=click.Path(path_type=Path), help="The sources' common ancestor: a weight file or folder.")
@click.option(
    "--source", "sources", multiple=True, required=True, metavar="NAME=PATH", help="A source; once for each, in order."
)
@click.option("--weight", "weights", multiple=True, metavar="NAME=WEIGHT", help="With --technique: of each source.")
@click.option("--set", "values", multiple=True, metavar="KEY=VALUE", help="With --technique: a hyperparameter.")
@click.option("--private", multiple=True, metavar="PATTERN", help="With --technique: tensors that are not merged.")
@click.option("--dtype", type=click.Choice(["same", "float32", "float16", "bfloat16"]), help="With --technique.")
@click.option("--seed", type=click.IntRange(min=0), help="With --technique: of random masks.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path, file_okay=False), help="Where to write.")
@click.option("--max-shard-bytes", type=click.IntRange(min=1), help="Largest size of one weight file.")
@click.option("--threads", type=click.IntRange(min=1), help="By default one for each processor.")
@click.option(
    "--no-verify", is_flag=True, help="Do not read the inputs once more to check (or to record) their digests."
)
def apply(
    recipe: Path | None,
    technique: str | None,
    base: Path | None,
    sources: tuple[str, ...],
    weights: tuple[str, ...],
    values: tuple[str, ...],
    private: tuple[str, ...],
    dtype: str | None,
    seed: int | None,
    output: Path,
    max_shard_bytes: int | None,
    threads: int | None,
    no_verify: bool,
) -> None:
    """Merge checkpoints on disk by a recipe or one technique: no spec, no data, no model code.

    The files are read and written piece by piece, in memory that does not grow with the model.
    """
    from automerge.stages.apply import apply_command

    written = apply_command(
        recipe=recipe,
        technique=technique,
        base=base,
        sources=_pairs("--source", sources),
        weights=_pairs("--weight", weights),
        values=_pairs("--set", values),
        private=private,
        dtype=dtype,
        seed=seed,
        output=output,
        max_shard_bytes=max_shard_bytes,
        threads=threads,
        verify=not no_verify,
    )
    click.echo(f"merged into {output}: {', '.join(path.name for path in written)}")


@cli.command()
@_SPEC
@_OUTPUT
@click.option(
    "--verdict",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the gate's verdict, pass or fail, to this file; a refused model then is no failure of the command.",
)
def evaluate(spec: Path, output: Path | None, verdict: Path | None) -> None:
    """Measure the merged model on the test data: PR and PD against its sources and the baselines."""
    from automerge.report.console import print_evaluation
    from automerge.stages.evaluate import evaluate as stage

    loaded, run = _begin(spec, output)
    evaluation = stage(loaded, run / "fetch", run / "segment", run / "search", run / "merge", run / "evaluate")
    print_evaluation(evaluation, run / "evaluate" / "report.html")
    if verdict is not None:
        write_atomically(verdict, evaluation.gate.verdict.encode())
    elif evaluation.gate.verdict == "fail":
        sys.exit(GATE_FAILED)


@cli.command()
@_SPEC
@_OUTPUT
def register(spec: Path, output: Path | None) -> None:
    """Register the merged model with its lineage."""
    from automerge.stages.register import register as stage

    loaded, run = _begin(spec, output)
    version = stage(
        loaded, run / "fetch", run / "segment", run / "search", run / "merge", run / "evaluate", run / "register"
    )
    state = "registered" if version.created else "already registered"
    click.echo(f"{state}: {version.model} version {version.version} ({version.uri})")


@cli.command()
@_SPEC
@_OUTPUT
@click.option("--resume", is_flag=True, help="Go on in a folder where a run was interrupted.")
def run(spec: Path, output: Path | None, resume: bool) -> None:
    """Run all stages: fetch, segment, search, merge, evaluate, register."""
    from automerge.report.console import print_evaluation
    from automerge.stages.run import run as run_stages

    loaded, folder = _begin(spec, output)
    with _live_progress() as progress:
        outcome = run_stages(loaded, folder, resume=resume, progress=progress)
    if outcome.search.stopped == "interrupted":
        click.echo("interrupted: nothing is lost; go on with --resume", err=True)
        sys.exit(INTERRUPTED)
    assert outcome.evaluation is not None  # noqa: S101 - only an interrupted run has none
    print_evaluation(outcome.evaluation, folder / "evaluate" / "report.html")
    if outcome.registration is None:
        sys.exit(GATE_FAILED)
    state = "registered" if outcome.registration.created else "already registered"
    click.echo(f"{state}: {outcome.registration.model} version {outcome.registration.version}")


@cli.command("report-status")
@_SPEC
@click.argument("state")
@click.option("--run", default="", help="The engine's name of the run.")
@click.option("--message", default="", help="What the engine says of a failure.")
def report_status(spec: Path, state: str, run: str, message: str) -> None:
    """Report how a run of a pipeline ended: a log line, and metrics on the Pushgateway.

    STATE is the engine's word for it; only `succeeded` is a success.
    """
    from automerge.spec import load_spec
    from automerge.stages.status import report_status as report

    report(load_spec(spec), state, run=run, message=message)


@cli.command("compile")
@click.option("--settings", type=click.Path(path_type=Path, dir_okay=False), help="The deployment settings (YAML).")
@click.option(
    "--format",
    "form",
    type=click.Choice(["kfp", "kubernetes", "argo"]),
    default="kfp",
    help="kfp: an upload for Kubeflow Pipelines; kubernetes: its objects Pipeline and PipelineVersion; argo: a "
    "WorkflowTemplate for Argo Workflows without Kubeflow.",
)
@click.option("--namespace", help="Of the Kubernetes objects.")
@click.option(
    "--schedules",
    type=click.Path(path_type=Path, dir_okay=False),
    help="argo: a CronWorkflow for each schedule of this file (YAML).",
)
@click.option("--timezone", help="argo: of the schedules, e.g. Europe/Berlin; by default the controller's.")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Default: <pipeline>.yaml.")
def compile_command(
    settings: Path | None,
    form: str,
    namespace: str | None,
    schedules: Path | None,
    timezone: str | None,
    output: Path | None,
) -> None:
    """Write the pipeline as YAML for a cluster."""
    from automerge_pipelines.schedules import load_schedules
    from automerge_pipelines.settings import load_settings

    loaded = load_settings(settings)
    path = output if output is not None else Path(f"{loaded.name}.yaml")
    if form != "argo" and (schedules is not None or timezone is not None):
        raise click.UsageError("--schedules and --timezone need --format argo; `automerge deploy` makes recurring runs")
    if form == "argo":
        with _extra("compiling for Argo Workflows", "argo"):
            from automerge_pipelines.argo import write_argo
        planned = load_schedules(schedules, loaded.service_account) if schedules is not None else []
        write_argo(loaded, path, namespace=namespace, schedules=planned, timezone=timezone)
    else:
        with _extra("compiling the pipeline", "kfp"):
            from automerge_pipelines.merge_pipeline import compile_pipeline
        compile_pipeline(loaded, path, "kfp" if form == "kfp" else "kubernetes", namespace=namespace)
    click.echo(f"wrote {path}")


_SETTINGS = click.option(
    "--settings", type=click.Path(path_type=Path, dir_okay=False), help="The deployment settings (YAML)."
)
_ENDPOINT = click.option(
    "--endpoint", envvar="AUTOMERGE_KFP_ENDPOINT", help="Address of Kubeflow Pipelines, or AUTOMERGE_KFP_ENDPOINT."
)
_NAMESPACE = click.option(
    "--namespace",
    envvar="AUTOMERGE_KFP_NAMESPACE",
    help="Where the runs' pods start, or AUTOMERGE_KFP_NAMESPACE; needed where the server has several users.",
)
_EXPERIMENT = click.option("--experiment", default="automerge", show_default=True, help="Where the runs are grouped.")


@cli.command()
@_SETTINGS
@_ENDPOINT
@_NAMESPACE
@_EXPERIMENT
@click.option(
    "--schedules",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Make the recurring runs those of this YAML file.",
)
@click.option("--prune-schedules", is_flag=True, help="Delete recurring runs of ours that the file no longer lists.")
@click.option(
    "--prune",
    type=click.IntRange(min=1),
    metavar="N",
    help="Delete versions of ours but the newest N and those in use.",
)
@click.option("--list", "only_list", is_flag=True, help="Change nothing; print versions and recurring runs.")
def deploy(
    settings: Path | None,
    endpoint: str | None,
    namespace: str | None,
    experiment: str,
    schedules: Path | None,
    prune_schedules: bool,
    prune: int | None,
    only_list: bool,
) -> None:
    """Upload the pipeline to Kubeflow Pipelines, if its content is not there yet, and set up its recurring runs.

    A token is taken from AUTOMERGE_KFP_TOKEN, inside a cluster from the service account's volume.
    """
    with _extra("deploying to Kubeflow Pipelines", "kfp"):
        from automerge_pipelines.client import connect
        from automerge_pipelines.deployed import list_deployed, prune_versions
        from automerge_pipelines.experiments import find_experiment
        from automerge_pipelines.recurring_runs import apply_schedules, prepare_schedules
        from automerge_pipelines.versions import compile_package, list_versions, upload
    from automerge_pipelines.schedules import load_schedules
    from automerge_pipelines.settings import load_settings

    if prune_schedules and schedules is None:
        raise click.UsageError("--prune-schedules needs --schedules")
    loaded = load_settings(settings)
    if only_list:
        listing = list_deployed(connect(endpoint, namespace), loaded.name)
        for name, created in listing.versions:
            click.echo(f"version        {name:40} {created}")
        for name, cron, enabled, version in listing.recurring_runs:
            click.echo(f"recurring run  {name:40} {'enabled ' if enabled else 'disabled'}  {cron}  ({version})")
        return
    package = compile_package(loaded)
    wanted = (
        prepare_schedules(package, load_schedules(schedules, loaded.service_account)) if schedules is not None else None
    )
    server = connect(endpoint, namespace)
    deployed, uploaded = upload(server, package)
    click.echo(
        f"pipeline {deployed.pipeline}: version {deployed.name} {'uploaded' if uploaded else 'is there already'}"
    )
    newest = next(list_versions(server, deployed.pipeline_id)).display_name
    if newest != deployed.name:
        click.echo(
            f"notice: version {newest} is newer, and what `automerge submit` takes without --version {deployed.name}",
            err=True,
        )
    if wanted is not None:
        group = find_experiment(server, experiment)
        for change in apply_schedules(server, deployed, wanted, group, prune=prune_schedules):
            if change.action == "waits":
                click.echo(
                    f"notice: recurring run {change.name}: disabled, since one of its runs goes on; a later deployment "
                    "deletes it",
                    err=True,
                )
            elif change.action == "not listed":
                click.echo(
                    f"notice: recurring run {change.name}: no longer in {schedules}, and left as it is; "
                    "--prune-schedules deletes it",
                    err=True,
                )
            else:
                click.echo(f"recurring run {change.name}: {change.action}")
    if prune is not None:
        for name in prune_versions(server, deployed, prune):
            click.echo(f"version {name}: deleted")


@cli.command()
@_SPEC
@_SETTINGS
@_ENDPOINT
@_NAMESPACE
@_EXPERIMENT
@click.option("--pipeline", help="Name of the deployed pipeline; by default that of the settings.")
@click.option("--version", "version_name", help="Version of the pipeline; by default the newest.")
@click.option(
    "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="Of the pipeline, e.g. memory=32Gi."
)
@click.option("--service-account", help="Of the pods; by default that of the settings.")
@click.option("--run-name", help="By default made of the spec's name, the digest of what is run, and the version.")
@click.option("--again", is_flag=True, help="Start a run even if one of this name goes on or has succeeded.")
@click.option("--without-secret", is_flag=True, help="Do not look whether the secret for the storage exists.")
@click.option("--wait", "waits", is_flag=True, help="Follow the run to its end.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="With --wait: no longer than this.")
@click.option("--poll", type=click.FloatRange(min=0.05), default=10, show_default=True, metavar="SECONDS", hidden=True)
def submit(
    spec: Path,
    settings: Path | None,
    endpoint: str | None,
    namespace: str | None,
    experiment: str,
    pipeline: str | None,
    version_name: str | None,
    parameters: tuple[str, ...],
    service_account: str | None,
    run_name: str | None,
    again: bool,
    without_secret: bool,
    waits: bool,
    timeout: float | None,
    poll: float,
) -> None:
    """Run a spec on the deployed pipeline, unless it goes on there already or has succeeded.

    With --wait it exits with 0 if the model was registered, 3 if the quality gate refused it, 1 if the run failed.
    """
    with _extra("submitting to Kubeflow Pipelines", "kfp"):
        from automerge_pipelines import submit as submitting
        from automerge_pipelines.client import connect
        from automerge_pipelines.experiments import find_experiment
        from automerge_pipelines.versions import find_version
    from automerge.spec import load_spec
    from automerge_pipelines.arguments import spec_argument
    from automerge_pipelines.parameters import run_parameters
    from automerge_pipelines.settings import load_settings

    loaded, given = load_spec(spec), _pairs("--parameter", parameters)
    deployment = load_settings(settings)
    argument, name = spec_argument(loaded), pipeline or deployment.name
    server = connect(endpoint, namespace)
    version = find_version(server, name, version_name)
    values = run_parameters(version.parameters, argument, given, "--parameter")
    if not without_secret:
        submitting.check_secret(server, version, values)
    run = submitting.submit(
        server,
        version,
        values,
        run_name or submitting.run_name(loaded.name, values, version.name),
        find_experiment(server, experiment),
        service_account=service_account or deployment.service_account,
        again=again,
    )
    if run.started:
        click.echo(f"started: {run.name} ({run.id})")
    else:
        click.echo(f"there already, {run.state.lower()}: {run.name} ({run.id}); --again starts another")
    click.echo(run.url)
    if not waits:
        return
    try:
        verdict = submitting.wait(
            server,
            run,
            lambda name, state: click.echo(f"{name}: {state.lower()}", err=True),
            timeout=timeout,
            poll=poll,
        )
    except KeyboardInterrupt:
        click.echo("the run goes on; the same command follows it again", err=True)
        raise
    if verdict == "refused":
        click.echo("refused: the quality gate let the model not pass, and nothing was registered", err=True)
        sys.exit(GATE_FAILED)
    click.echo("passed: the model is registered")


@cli.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/automerge/trigger.yaml"),
    show_default=True,
    help="Registries, rules and the runner (YAML).",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
def serve(config: Path, host: str, port: int) -> None:
    """Watch registries, and start a run when a rule has enough candidates.

    Secrets come from the environment: AUTOMERGE_WEBHOOK_SECRET, AUTOMERGE_ADMIN_TOKEN, AUTOMERGE_KFP_TOKEN.
    """
    from automerge.trigger.serve import serve as serve_until_signal

    serve_until_signal(config, host, port)


@contextmanager
def _extra(feature: str, extra: str) -> Iterator[None]:
    """Importing what an extra brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("automerge"):
            raise
        raise MissingExtraError(feature, extra) from None


def _begin(spec: Path, output: Path | None) -> "tuple[Spec, Path]":
    from automerge.spec import load_spec

    loaded = load_spec(spec)
    folder = output if output is not None else Path("runs") / loaded.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SpecError(
            f"{folder}: the folder of the run cannot be written ({_lower_first(error.strerror or 'failed')})",
            "name another one with --output",
        ) from None
    return loaded, folder


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (separator and name and value):
            raise click.UsageError(f"{option} {text!r} is not of the form NAME=VALUE")
        if name in pairs:
            raise click.UsageError(f"{option} names {name!r} twice")
        pairs[name] = value
    return pairs


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


@contextmanager
def _live_progress() -> "Iterator[Callable[[SearchProgress], None]]":
    """A live line on a terminal (trial, best, time left, CP by task); elsewhere one log line for every tenth trial."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from automerge.stages.process import best_text, log_progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield log_progress
        return
    columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        handle: list[Any] = []

        def update(event: "SearchProgress") -> None:
            if not handle:
                handle.append(bar.add_task("", total=event.total))
            bar.update(handle[0], completed=event.done, description=best_text(event))

        yield update

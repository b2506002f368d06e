"""The component ``report_status``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def report_status(spec: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Report how the run ended, as the exit task of a pipeline: a log line, and metrics on the Pushgateway.

    Args:
        spec: The spec as JSON or YAML text.
        status: How the run ended; the engine fills it in.
    """
    from automerge.spec import parse_spec
    from automerge.stages.process import stage_process
    from automerge.stages.status import report_status as report_status_stage

    with stage_process():
        run = status.pipeline_job_resource_name
        report_status_stage(parse_spec(spec), status.state, run=run, message=status.error_message)

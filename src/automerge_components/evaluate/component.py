"""The component ``evaluate``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate(
    spec: str,
    inputs: dsl.Input[dsl.Artifact],
    segmentation: dsl.Input[dsl.Artifact],
    search: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    workspace: str = "",
) -> str:
    """Measure the merged model on the test data against its sources and the baselines, and judge it by the gate.

    A model that the gate refuses is a result and no error: the task succeeds with the verdict `fail`.

    Args:
        spec: The spec as JSON or YAML text.
        inputs: What `fetch` wrote.
        segmentation: What `segment` wrote.
        search: The search's folder that `search_merge` wrote.
        model: The merged model that `search_merge` wrote.
        evaluation: Folder with `evaluation.json`, `report.html` and the ONNX files.
        report: The report, for the user interface.
        metrics: Preservation rates in percent and preservation discrepancy in points; 1 or 0 for the gate.
        workspace: Folder of the run's shared volume, if `fetch` put the inputs there; else empty.

    Returns:
        The verdict of the spec's quality gate: `pass` or `fail`.
    """
    import shutil
    from pathlib import Path

    from automerge.spec import parse_spec
    from automerge.stages.documents import REPORT
    from automerge.stages.evaluate import evaluate as evaluate_stage
    from automerge.stages.inputs import inputs_folder
    from automerge.stages.process import stage_process

    with stage_process():
        folders = [Path(artifact.path) for artifact in (segmentation, search, model, evaluation)]
        result = evaluate_stage(parse_spec(spec), inputs_folder(inputs.path, workspace), *folders)
    shutil.copyfile(folders[-1] / REPORT, report.path)
    merged = result.merged
    rates = {f"pr.{task}": measured.pr.value if measured.pr else None for task, measured in merged.tasks.items()}
    for name, value in {**rates, "pr.mean": merged.mean_pr, "pr.worst": merged.worst_pr, "pd": merged.pd}.items():
        if value is not None:
            metrics.log_metric(name, value)
    metrics.log_metric("gate_passed", int(result.gate.verdict == "pass"))
    return result.gate.verdict

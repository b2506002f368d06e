"""The component ``segment``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def segment(
    spec: str,
    inputs: dsl.Input[dsl.Artifact],
    segmentation: dsl.Output[dsl.Artifact],
    workspace: str = "",
) -> None:
    """Cut the architecture into blocks by one inference on fake tensors; no weights are read.

    Args:
        spec: The spec as JSON or YAML text.
        inputs: What `fetch` wrote.
        segmentation: Folder with `segmentation.json`.
        workspace: Folder of the run's shared volume, if `fetch` put the inputs there; else empty.
    """
    from pathlib import Path

    from automerge.spec import parse_spec
    from automerge.stages.inputs import inputs_folder
    from automerge.stages.process import stage_process
    from automerge.stages.segment import segment as segment_stage

    with stage_process():
        result = segment_stage(parse_spec(spec), inputs_folder(inputs.path, workspace), Path(segmentation.path))
        segmentation.metadata.update(blocks=len(result.blocks), granularity=result.granularity)

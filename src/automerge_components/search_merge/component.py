"""The component ``search_merge``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def search_merge(
    spec: str,
    inputs: dsl.Input[dsl.Artifact],
    segmentation: dsl.Input[dsl.Artifact],
    search: dsl.Output[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    workspace: str = "",
) -> None:
    """Search for the best recipe on validation data, and write the merged model that it describes.

    Both stages run in one pod, so that the checkpoints stay on its disk and accelerator. A search that finds an earlier
    attempt's trials in its folder goes on from them.

    Args:
        spec: The spec as JSON or YAML text.
        inputs: What `fetch` wrote.
        segmentation: What `segment` wrote.
        search: Folder with `trials.jsonl`, `recipe.json`, and the `statistics.safetensors` that a recipe may name.
        model: Folder with the merged checkpoint and `merged.json`.
        workspace: Folder of the run's shared volume, if `fetch` put the inputs there; else empty.
    """
    from pathlib import Path

    from automerge.spec import parse_spec
    from automerge.stages.documents import RECIPE
    from automerge.stages.inputs import inputs_folder
    from automerge.stages.merge import merge as merge_stage
    from automerge.stages.process import log_progress, stage_process
    from automerge.stages.search import search as search_stage

    with stage_process():
        parsed = parse_spec(spec)
        fetched = inputs_folder(inputs.path, workspace)
        blocks, found = Path(segmentation.path), Path(search.path)
        result = search_stage(parsed, fetched, blocks, found, resume=True, progress=log_progress)
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        merged = merge_stage(parsed, fetched, found / RECIPE, Path(model.path))
        search.metadata.update(recipe=merged.recipe, trials=len(result.trials), objective=result.best.objective)
        model.metadata.update(recipe=merged.recipe, weights=merged.weights, parameters=merged.parameter_count)

"""The component ``register``."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def register(
    spec: str,
    inputs: dsl.Input[dsl.Artifact],
    segmentation: dsl.Input[dsl.Artifact],
    search: dsl.Input[dsl.Artifact],
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    registration: dsl.Output[dsl.Artifact],
    workspace: str = "",
) -> NamedTuple("Outputs", [("version", str), ("uri", str)]):  # type: ignore[valid-type]
    """Register the merged model with everything that proves it; the same recipe is registered once.

    Credentials of the registry and of its artifact store are read from the environment.

    Args:
        spec: The spec as JSON or YAML text.
        inputs: What `fetch` wrote.
        segmentation: What `segment` wrote.
        search: The search's folder that `search_merge` wrote.
        model: The merged model that `search_merge` wrote.
        evaluation: What `evaluate` wrote.
        registration: Folder with `registration.json`.
        workspace: Folder of the run's shared volume, if `fetch` put the inputs there; else empty.

    Returns:
        version: The registered version.
        uri: The version's name for the registry's own tools.
    """
    from pathlib import Path

    from automerge.spec import parse_spec
    from automerge.stages.inputs import inputs_folder
    from automerge.stages.process import stage_process
    from automerge.stages.register import register as register_stage

    with stage_process():
        folders = [Path(artifact.path) for artifact in (segmentation, search, model, evaluation, registration)]
        registered = register_stage(parse_spec(spec), inputs_folder(inputs.path, workspace), *folders)
    registration.metadata.update(model=registered.model, version=registered.version, uri=registered.uri)
    return registered.version, registered.uri

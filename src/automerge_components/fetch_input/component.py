"""The component ``fetch_input``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def fetch_input(spec: str, version: str, workspace: str) -> None:
    """Download one input of a spec to the run's shared volume, for a pipeline that gives each input a pod.

    `fetch` then finds the files there, checks them and writes the manifest. Storage credentials are read from the
    environment. Never let the engine cache this task: the volume ends with the run.

    Args:
        spec: The spec as JSON or YAML text.
        version: One item of what `resolve` returns.
        workspace: Folder of the run's shared volume.
    """
    from automerge.spec import parse_spec
    from automerge.stages.fetch import fetch_input as fetch_input_stage
    from automerge.stages.inputs import inputs_folder
    from automerge.stages.process import stage_process

    with stage_process():
        fetch_input_stage(parse_spec(spec), version.rpartition("@")[0], inputs_folder("", workspace))

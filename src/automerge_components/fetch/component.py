"""The component ``fetch``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def fetch(spec: str, inputs: dsl.Output[dsl.Artifact], versions: list = [], workspace: str = "") -> None:  # type: ignore[type-arg]  # noqa: B006
    """Bring all checkpoints and data of a spec to where the next tasks read them, verified.

    The checkpoints' headers are compared before any large download; every file is checked against its digest. Storage
    credentials are read from the environment.

    Args:
        spec: The spec as JSON or YAML text.
        inputs: Folder with `manifest.json` and all fetched files; only the manifest, if the files are in `workspace`.
        versions: What `resolve` found. It changes when an input does, and so does the key of the engine's cache.
        workspace: Folder of the run's shared volume, for large inputs: they are put there and not into the artifact.
    """
    import shutil
    from pathlib import Path

    from automerge.spec import parse_spec
    from automerge.stages.documents import MANIFEST
    from automerge.stages.fetch import fetch as fetch_stage
    from automerge.stages.inputs import inputs_folder
    from automerge.stages.process import stage_process

    with stage_process():
        folder = inputs_folder(inputs.path, workspace)
        manifest = fetch_stage(parse_spec(spec), folder)
    if workspace:
        Path(inputs.path).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / MANIFEST, Path(inputs.path) / MANIFEST)
    inputs.metadata.update(manifest.digests())

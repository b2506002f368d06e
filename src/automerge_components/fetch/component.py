"""The component ``fetch``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def fetch(spec: str, inputs: dsl.Output[dsl.Artifact]) -> None:
    """Bring all checkpoints and data of a spec into one artifact, verified.

    The checkpoints' headers are compared before any large download; every file is checked against its digest. Storage
    credentials are read from the environment.

    Args:
        spec: The spec as JSON or YAML text.
        inputs: Folder with `manifest.json` and all fetched files.
    """
    from pathlib import Path

    from automerge.spec import parse_spec
    from automerge.stages.fetch import fetch as fetch_stage
    from automerge.stages.process import stage_process

    with stage_process():
        manifest = fetch_stage(parse_spec(spec), Path(inputs.path))
        inputs.metadata.update(manifest.digests())

"""The component ``resolve``."""

from kfp import dsl


@dsl.component(base_image="automerge:0.1.0", install_kfp_package=False)  # type: ignore[untyped-decorator]
def resolve(spec: str) -> list:  # type: ignore[type-arg]
    """Find out what every input of a spec is now, and refuse what can be refused, before anything is downloaded.

    Only listings and headers are read. Storage credentials are read from the environment. Never let the engine cache
    this task: it is what the cache keys of the others come from.

    Args:
        spec: The spec as JSON or YAML text.

    Returns:
        `<input>@<version>` for each input; the version is a digest of its objects' names, sizes and etags.
    """
    from automerge.spec import parse_spec
    from automerge.stages.fetch import resolve as resolve_stage
    from automerge.stages.process import stage_process

    with stage_process():
        return [f"{name}@{version}" for name, version in resolve_stage(parse_spec(spec)).items()]

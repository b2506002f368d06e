"""The pipeline's versions on a server: one for each content of the compiled pipeline."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from automerge.plugins import nearest
from automerge_pipelines.client import KubeflowError, Server
from automerge_pipelines.merge_pipeline import compile_pipeline, version_name
from automerge_pipelines.parameters import declared_parameters
from automerge_pipelines.settings import Settings


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        pipeline: the pipeline's name.
        version: the version's name, which says the content.
        content: the compiled YAML.
        parameters: what a run may set, by name.
    """

    pipeline: str
    version: str
    content: bytes
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Version:
    """A version on the server.

    Attributes:
        pipeline, name: of pipeline and version.
        pipeline_id, id: what the server calls them.
        parameters: what a run may set, by name.
    """

    pipeline: str
    name: str
    pipeline_id: str
    id: str
    parameters: Mapping[str, Any]


def compile_package(settings: Settings) -> Package:
    """Compile the pipeline with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        content = compile_pipeline(settings, Path(folder) / "pipeline.yaml").read_bytes()
    pipeline = next(yaml.safe_load_all(content))
    return Package(settings.name, version_name(content), content, declared_parameters(pipeline))


def upload(server: Server, package: Package) -> tuple[Version, bool]:
    """The version with this content, and whether it was uploaded now.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    pipeline_id = _find_pipeline(server, package.pipeline) or _create_pipeline(server, package.pipeline)
    found = _find_version(server, pipeline_id, package.version)
    uploaded = found is None
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pipeline.yaml"
            path.write_bytes(package.content)
            try:
                found = server.ask(
                    server.uploads.upload_pipeline_version, str(path), name=package.version, pipelineid=pipeline_id
                )
            except KubeflowError as error:
                found = _find_version(server, pipeline_id, package.version) if error.status == 409 else None
                if found is None:
                    raise
                uploaded = False  # someone else was faster
    return (
        Version(package.pipeline, package.version, pipeline_id, found.pipeline_version_id, package.parameters),
        uploaded,
    )


def find_version(server: Server, pipeline: str, name: str | None = None) -> Version:
    """A version of a deployed pipeline, by default the newest.

    Raises:
        KubeflowError: the server does not answer or refuses, or has no such pipeline or version.
    """
    pipeline_id = _find_pipeline(server, pipeline)
    if pipeline_id is None:
        others = [item.display_name for item in _pipelines(server)]
        raise KubeflowError(
            f"{server.endpoint}: there is no pipeline {pipeline!r}",
            f"{nearest(pipeline, others)} or run `automerge deploy` first"
            if others
            else "run `automerge deploy` first",
        )
    names = []
    for found in list_versions(server, pipeline_id):
        if name is None or found.display_name == name:
            get = server.pipelines.pipeline_service_get_pipeline_version
            document = found.pipeline_spec or server.ask(get, pipeline_id, found.pipeline_version_id).pipeline_spec
            return Version(
                pipeline,
                found.display_name,
                pipeline_id,
                found.pipeline_version_id,
                declared_parameters(document or {}),
            )
        names.append(found.display_name)
    if not names:
        raise KubeflowError(
            f"{server.endpoint}: the pipeline {pipeline!r} has no version", "run `automerge deploy` first"
        )
    raise KubeflowError(
        f"{server.endpoint}: the pipeline {pipeline!r} has no version {name!r}", nearest(str(name), names[:10])
    )


def list_versions(server: Server, pipeline_id: str) -> Iterator[Any]:
    """The versions of a pipeline as the server's API has them, the newest first.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    listed = server.pipelines.pipeline_service_list_pipeline_versions
    return server.pages(listed, "pipeline_versions", pipeline_id, sort_by="created_at desc")


def _pipelines(server: Server) -> Iterator[Any]:
    return server.pages(server.pipelines.pipeline_service_list_pipelines, "pipelines", **server.own())


def _find_pipeline(server: Server, name: str) -> str | None:
    listed = server.pipelines.pipeline_service_list_pipelines
    found = next(server.named(listed, "pipelines", name, **server.own()), None)
    return None if found is None else str(found.pipeline_id)


def _create_pipeline(server: Server, name: str) -> str:
    pipeline = kfp_server_api.V2beta1Pipeline(
        display_name=name, name=name, description="Merges models; made by `automerge deploy`.", **server.own()
    )
    try:
        return str(server.ask(server.pipelines.pipeline_service_create_pipeline, pipeline).pipeline_id)
    except KubeflowError as error:
        found = _find_pipeline(server, name) if error.status == 409 else None
        if found is None:
            raise
        return found  # someone else was faster


def _find_version(server: Server, pipeline_id: str, name: str) -> Any:
    listed = server.pipelines.pipeline_service_list_pipeline_versions
    return next(server.named(listed, "pipeline_versions", name, pipeline_id), None)

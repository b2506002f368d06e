"""The parameters of a compiled pipeline, and a run's values for them."""

import json
from collections.abc import Mapping
from typing import Any

from automerge.errors import SpecError
from automerge.plugins import nearest

SPEC = "spec"
S3_SECRET = "s3_secret"  # noqa: S105 - the name of a parameter


def declared_parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a compiled pipeline by name, each as ``PipelineSpec`` has it.

    Args:
        document: the pipeline as compiled, or as a server shows it, where it lies in ``pipeline_spec``.
    """
    pipeline = document.get("pipeline_spec", document)
    found = pipeline.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    return dict(found)


def run_parameters(declared: Mapping[str, Any], spec: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a run passes to the pipeline: the spec, and the given values in the types that the pipeline declares.

    Args:
        declared: of :func:`declared_parameters`.
        spec: of :func:`automerge_pipelines.arguments.spec_argument`.
        given: further parameters, as text or as values of their own.
        where: names the given parameters in errors.

    Raises:
        SpecError: the pipeline takes no spec, has no such parameter, or a value is not of its type.
    """
    if SPEC not in declared:
        raise SpecError("the pipeline has no parameter 'spec'", "name a pipeline that `automerge deploy` has uploaded")
    for name in given:
        if name not in declared or name == SPEC:
            valid = sorted(set(declared) - {SPEC})
            raise SpecError(f"{where}: the pipeline has no parameter {name!r} to set", nearest(name, valid))
    typed = {
        name: _typed(value, declared[name].get("parameterType", "STRING"), name, where) for name, value in given.items()
    }
    return {SPEC: spec, **typed}


def _typed(value: Any, kind: str, name: str, where: str) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    if kind == "STRING":
        return text
    try:
        decoded = json.loads(text)
    except ValueError:
        decoded = None
    is_number = isinstance(decoded, int | float) and not isinstance(decoded, bool)
    fits = {
        "NUMBER_INTEGER": is_number and isinstance(decoded, int),
        "NUMBER_DOUBLE": is_number,
        "BOOLEAN": isinstance(decoded, bool),
        "LIST": isinstance(decoded, list),
        "STRUCT": isinstance(decoded, dict),
    }
    if not fits.get(kind, False):
        raise SpecError(f"{where}: {name} is {text!r}, where the pipeline takes a {kind}", "write it as JSON has it")
    return decoded

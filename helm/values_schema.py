"""``values.schema.json``: the chart's own part from ``values.schema.yaml``, the rest from the models that read it."""

from pathlib import Path
from typing import Any

import yaml

from automerge.secrets import SECRET_NAME
from automerge.trigger.config import KfpRunner, LocalRunner, Rule, WatchedRegistry
from automerge_pipelines.schedules import Schedule
from automerge_pipelines.settings import Settings

_SOURCE = Path(__file__).with_name("values.schema.yaml")
_TAKE_NUMBERS = ("Settings", "TaskSettings", "Toleration", "Workspace")


def values_schema(alerts: list[str]) -> dict[str, Any]:
    """The JSON schema of ``values.yaml``; every mapping whose keys are known refuses others.

    Args:
        alerts: the names that may be left out.
    """
    schema = yaml.safe_load(_SOURCE.read_text(encoding="utf-8"))
    definitions = schema["$defs"]
    definitions["Alert"] = {"enum": alerts}
    definitions["SecretName"] = {"pattern": SECRET_NAME.pattern}
    for model in (Settings, Schedule, Rule, WatchedRegistry, KfpRunner, LocalRunner):
        found = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= found.pop("$defs", {}) | {model.__name__: found}
    for name in _TAKE_NUMBERS:
        definitions[name] = _with_numbers(definitions[name])
    # A file beside the schedules: the chart writes it from the spec itself.
    definitions["Schedule"]["properties"]["spec"] = {"type": "object", "minProperties": 1}
    # The template itself, or the path of a file that extraVolumes brings.
    definitions["Rule"]["properties"]["spec"] = {"type": ["object", "string"], "minProperties": 1, "minLength": 1}
    _leave_out(definitions["KfpRunner"], "endpoint", "namespace", "experiment", "pipeline")
    _leave_out(definitions["LocalRunner"], "folder")
    config_map = schema["properties"]["tasks"]["properties"]["configMap"]["properties"]["data"]
    config_map["patternProperties"][SECRET_NAME.pattern] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_closed(schema)}


def _leave_out(schema: dict[str, Any], *names: str) -> None:
    """The chart itself fills these in."""
    for name in names:
        del schema["properties"][name]
    schema["required"] = [name for name in schema["required"] if name not in names]


def _with_numbers(schema: Any) -> Any:
    """The settings take a number for a text: `cpu: 4`."""
    if isinstance(schema, list):
        return [_with_numbers(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_numbers(value) for key, value in schema.items()}
    if found.get("type") == "string" and "enum" not in found:
        found["type"] = ["string", "number"]
    return found


def _closed(schema: Any) -> Any:
    """Each mapping with known keys has no others. A branch of a condition describes no mapping of its own."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _closed(value) for key, value in schema.items()}
    if "enum" in found.get("propertyNames", ()):  # Helm names a wrong place where such a name is refused
        kind = found.pop("additionalProperties")
        found["properties"] = dict.fromkeys(found.pop("propertyNames")["enum"], kind)
    if found.get("type") == "object" and isinstance(found.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found

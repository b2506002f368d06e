"""What users write, read strictly: YAML or JSON into a pydantic model, and every problem one sentence with its path."""

import json
import re
import types
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from automerge.errors import SpecError
from automerge.plugins import nearest

_Model = TypeVar("_Model", bound=BaseModel)


class WrittenModel(BaseModel):
    """A part of a file that a user writes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def read_text(path: Path, remedy: str) -> str:
    """The text of a file that the user named.

    Raises:
        SpecError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise SpecError(f"{path}: cannot be read ({reason})", remedy) from None


def with_texts(value: Any, change: Callable[[str, str], str], path: str = "") -> Any:
    """A decoded value with each text in it changed; keys stay as they are.

    Args:
        value: mappings, lists, texts and plain values, nested.
        change: called with a text and its path, e.g. ``tasks.0.name``; returns the new text.
        path: of the value itself.
    """
    if isinstance(value, dict):
        return {key: with_texts(item, change, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, change, f"{path}.{index}") for index, item in enumerate(value)]
    return change(value, path) if isinstance(value, str) else value


def decode(text: str, where: str, what: str, remedy: str) -> dict[str, Any]:
    """The mapping that YAML or JSON text holds; JSON is YAML too.

    Args:
        text: what the user wrote.
        where: names the text in errors.
        what: it should be, e.g. ``spec``.
        remedy: what to do where it is empty or something else.

    Raises:
        SpecError: the text is neither, is no mapping, or has a key twice.
    """
    try:
        if text.lstrip().startswith("{"):
            value = json.loads(text, object_pairs_hook=_without_repetition)
        else:
            value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{where}: not valid YAML or JSON: {_syntax(error)}", "mend it there") from None
    if not isinstance(value, dict):
        raise SpecError(f"{where}: the {what} is empty or not a mapping", remedy)
    return value


def validate(value: dict[str, Any], model: type[_Model], where: str, patterns: Mapping[str, str]) -> _Model:
    """The mapping as a model.

    Args:
        value: what was decoded.
        model: what it should be.
        where: names it in errors.
        patterns: what each pattern of the model asks for, in words.

    Raises:
        SpecError: one sentence for each problem, with its path.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise SpecError("\n".join(_sentence(where, problem, model, patterns) for problem in error.errors())) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key written twice is an error: silently the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key_node.start_mark)
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is written twice")
    return dict(pairs)


def _syntax(error: Exception) -> str:
    """What a parser has to say, and where, in the words of both formats."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {_lower_first(error.msg)}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def _sentence(where: str, problem: Any, model: type[BaseModel], patterns: Mapping[str, str]) -> str:
    """One sentence for one of pydantic's problems, with the nearest valid name where a name is wrong."""
    location = tuple(problem["loc"])
    path = ".".join(str(part) for part in location)
    prefix = f"{where}: {path}: " if path else f"{where}: "
    kind = problem["type"]
    if kind == "extra_forbidden":
        valid = _keys_at(model, location[:-1])
        return f"{prefix}unknown key; {nearest(str(location[-1]), valid)}"
    if kind == "missing":
        return f"{prefix}this key is missing; add it"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{prefix}unknown value {_shown(problem['input'])}; {nearest(str(problem['input']), valid)}"
    if kind == "value_error":
        return prefix + str(problem["ctx"]["error"])
    if kind == "string_pattern_mismatch":
        return f"{prefix}{_shown(problem['input'])} is not valid; use {patterns[problem['ctx']['pattern']]}"
    if kind == "model_type":
        keys = ", ".join(_keys_at(model, location))
        return f"{prefix}expected a mapping, got {_shown(problem['input'])}; its keys are {keys}"
    if kind in ("too_short", "too_long"):
        bound, limit = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        count = problem["ctx"][limit]
        entries = "entry" if count == 1 else "entries"
        return f"{prefix}expected {bound} {count} {entries}, got {problem['ctx']['actual_length']}"
    return f"{prefix}{_lower_first(problem['msg'])}, got {_shown(problem['input'])}"


def _shown(value: Any, limit: int = 80) -> str:
    """A value of the spec as JSON, which is how YAML would have it too; shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _keys_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """The valid keys of the mapping at one place, found by walking the models' annotations."""
    for part in location:
        # A number, or a name that the user chose, leads into a list or dict, whose model is found already.
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _inner_model(model.model_fields[part].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _inner_model(annotation: Any) -> Any:
    """The pydantic model inside ``X``, ``X | None``, ``list[X]`` or ``dict[str, X]``."""
    if get_origin(annotation) in (Union, types.UnionType, list, dict, Annotated):
        for argument in get_args(annotation):
            found = _inner_model(argument)
            if isinstance(found, type) and issubclass(found, BaseModel):
                return found
    return annotation


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]

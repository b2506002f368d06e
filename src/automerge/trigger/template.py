"""The spec of a run, from a rule's template and the candidates.

A template is a spec in which strings may hold placeholders ``$(...)``, and which may have a key ``each``: its
``source`` and its ``tasks`` are written once for every candidate.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from automerge.errors import SpecError
from automerge.spec import Spec, parse_spec
from automerge.trigger.candidate import Candidate, set_digest
from automerge.trigger.config import Rule
from automerge.trigger.rules import Group
from automerge.written import with_texts

_PLACEHOLDER = re.compile(r"\$\(([^()]*)\)")
_FIELDS = ("name", "model", "version", "uri")
_LONGEST_NAME = 63


def render(rule: Rule, group: Group, candidates: Sequence[Candidate], folder: Path | None = None) -> Spec:
    """The spec that merges these candidates.

    Args:
        rule: whose template it is.
        group: what the candidates share.
        candidates: the sources, in order.
        folder: where relative paths of the template start; None leaves them as they are.

    Raises:
        SpecError: the template names something that is not there, or the result is no valid spec.
    """
    where = f"rule {rule.name}: spec"
    shared = {"rule": rule.name, "set": set_digest(candidates)[:12], **{f"group.{key}": value for key, value in group}}
    template = dict(rule.spec)
    each = template.pop("each", {})
    if (
        not isinstance(each, dict)
        or not set(each) <= {"source", "tasks"}
        or not isinstance(each.get("tasks", []), list)
    ):
        raise SpecError(
            f"{where}: each: it has the keys 'source', a mapping, and 'tasks', a list", "see docs/trigger.md"
        )
    value = _filled(template, shared, where, "")
    names = _names(candidates)
    sources, tasks = list(value.get("sources") or []), list(value.get("tasks") or [])
    for candidate, name in zip(candidates, names, strict=True):
        values = shared | _values(candidate, name)
        if "source" in each:
            sources.append(_filled(each["source"], values, where, "each.source"))
        tasks += _filled(each.get("tasks", []), values, where, "each.tasks")
    text = json.dumps({**value, "sources": sources, "tasks": tasks})
    return parse_spec(text, folder=folder, where=where)


def check_template(rule: Rule, folder: Path | None = None) -> None:
    """Render the template with made-up candidates, so that a mistake in it shows before the first event.

    Raises:
        SpecError: as :func:`render`.
    """
    candidates = []
    for number in map(str, range(1, rule.minimum + 1)):  # what can be a number and a name
        tags = dict.fromkeys(_tags(rule.spec), number) | dict.fromkeys(rule.group_by, "1")
        candidates.append(Candidate(rule.registry, f"example-{number}", "1", f"s3://example/{number}", 1, tags))
    render(rule, tuple((key, "1") for key in rule.group_by), candidates, folder)


def _values(candidate: Candidate, name: str) -> dict[str, str]:
    values = {f"candidate.{key}": getattr(candidate, key) for key in _FIELDS if key != "name"}
    values |= {f"candidate.tags.{key}": value for key, value in candidate.tags.items()}
    return values | {"candidate.name": name}


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """A name for each candidate that a spec accepts: the model's, with the version where two would be the same."""
    plain = [_spec_name(each.model) for each in candidates]
    return [
        name if plain.count(name) == 1 else _spec_name(f"{name[:40]}-{each.version}")
        for name, each in zip(plain, candidates, strict=True)
    ]


def _spec_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("_.-")[:_LONGEST_NAME] or "model"


def _filled(value: Any, values: Mapping[str, str], where: str, path: str) -> Any:
    """The value with all placeholders replaced; what comes from the registry stands inside strings only."""

    def placed(key: str, path: str) -> str:
        if key not in values:
            raise SpecError(f"{where}: {path}: there is no $({key}) here", _remedy(key, values))
        if "${" in values[key]:  # the spec's own sign for the environment, which is not the registry's to read
            raise SpecError(f"{where}: {path}: $({key}) holds '${{'", "take it out of the registry")
        return values[key]

    return with_texts(value, lambda text, at: _PLACEHOLDER.sub(lambda match: placed(match.group(1), at), text), path)


def _remedy(key: str, values: Mapping[str, str]) -> str:
    if key.startswith("candidate.tags.") and any(name.startswith("candidate.") for name in values):
        return f"set the tag {key.removeprefix('candidate.tags.')!r} on the version or on its registered model"
    return f"there are: {', '.join(f'$({name})' for name in sorted(values))}"


def _tags(value: Any) -> set[str]:
    """The tags that a template asks for."""
    if isinstance(value, dict):
        return set().union(*(_tags(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_tags(item) for item in value))
    found = _PLACEHOLDER.findall(value) if isinstance(value, str) else []
    return {key.removeprefix("candidate.tags.") for key in found if key.startswith("candidate.tags.")}

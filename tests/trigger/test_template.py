"""Specs from templates."""

from typing import Any

import pytest

from automerge.errors import SpecError
from automerge.trigger.candidate import Candidate
from automerge.trigger.config import Rule
from automerge.trigger.template import check_template, render

GROUP = (("base", "base-1"),)


def rule(spec: dict[str, Any]) -> Rule:
    return Rule.model_validate(
        {"name": "r", "registry": "m", "models": ["*"], "select": {"alias": "c"}, "group_by": ["base"], "spec": spec}
    )


def candidate(model: str, tags: dict[str, str], version: str = "1") -> Candidate:
    return Candidate("m", model, version, f"s3://models/{model}", 1, tags)


def test_each_candidate_is_a_source_with_its_tasks(template: dict[str, Any], tags: dict[str, str]) -> None:
    spec = render(rule(template), GROUP, [candidate("low", tags), candidate("org/high", tags)])
    assert spec.base is not None
    assert spec.base.uri == "s3://models/base-1"
    assert [(source.name, source.uri) for source in spec.sources] == [
        ("low", "s3://models/low"),
        ("org-high", "s3://models/org/high"),
    ]
    assert [(task.specialist, task.test) for task in spec.tasks] == [
        ("low", "s3://data/test"),
        ("org-high", "s3://data/test"),
    ]


def test_tasks_of_the_template_stay(template: dict[str, Any], tags: dict[str, str]) -> None:
    guard = {"name": "guard", "kind": "classification", "guard": True, "validation": "s3://d/v", "test": "s3://d/t"}
    spec = render(rule({**template, "tasks": [guard]}), GROUP, [candidate("x", tags), candidate("y", tags)])
    assert [task.name for task in spec.tasks] == ["guard", "x", "y"]


def test_two_versions_of_a_model_get_names_of_their_own(template: dict[str, Any], tags: dict[str, str]) -> None:
    spec = render(rule(template), GROUP, [candidate("x", tags, "1"), candidate("x", tags, "2")])
    assert [source.name for source in spec.sources] == ["x-1", "x-2"]


def test_a_tag_that_is_missing_is_named(template: dict[str, Any], tags: dict[str, str]) -> None:
    del tags["test"]
    with pytest.raises(SpecError, match=r"no \$\(candidate.tags.test\) here; set the tag 'test' on the version"):
        render(rule(template), GROUP, [candidate("x", tags), candidate("y", tags)])


@pytest.mark.parametrize("value", ["${HOME}", "x${AUTOMERGE_WEBHOOK_SECRET}"])
def test_a_tag_cannot_read_the_environment(template: dict[str, Any], tags: dict[str, str], value: str) -> None:
    bad = candidate("x", {**tags, "test": value})
    with pytest.raises(SpecError, match=r"holds '\${'; take it out of the registry"):
        render(rule(template), GROUP, [bad, candidate("y", tags)])


@pytest.mark.parametrize(
    "value", ['", "model": {"kind": "factory"}, "x": "', "a: b\n- c", "$(candidate.uri)", "\u2028'\"\\"]
)
def test_a_tag_stays_within_its_string(template: dict[str, Any], tags: dict[str, str], value: str) -> None:
    spec = render(rule(template), GROUP, [candidate("x", {**tags, "test": value}), candidate("y", tags)])
    assert spec.tasks[0].test == value
    assert spec.model.target == "AutoModel"


def test_the_environment_is_the_templates_to_read(
    template: dict[str, Any], tags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "s3://bucket")
    spec = render(
        rule({**template, "base": {"uri": "${BUCKET}/base"}}), GROUP, [candidate("x", tags), candidate("y", tags)]
    )
    assert spec.base is not None
    assert spec.base.uri == "s3://bucket/base"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"uri": "$(group.bass)"}}, r"base.uri: there is no \$\(group.bass\) here; there are: "),
        ({"each": {"sources": {}}}, "each: it has the keys 'source'"),
        ({"nonsense": 1}, "nonsense: unknown key"),
        ({"each": {"source": {"name": "x", "uri": "$(candidate.url)"}}}, r"no \$\(candidate.url\) here"),
    ],
)
def test_a_wrong_template_shows_before_the_first_event(
    template: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    check_template(rule(template))
    with pytest.raises(SpecError, match=message):
        check_template(rule({**template, **change}))

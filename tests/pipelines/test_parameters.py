"""A run's parameters: in the types that the pipeline declares, or one sentence."""

from typing import Any

import pytest

from automerge.errors import SpecError
from automerge_pipelines.parameters import declared_parameters, run_parameters

KINDS = ("STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE", "BOOLEAN", "LIST", "STRUCT")
PIPELINE = {
    "root": {
        "inputDefinitions": {
            "parameters": {
                "spec": {"parameterType": "STRING"},
                **{kind.lower(): {"parameterType": kind} for kind in KINDS},
            }
        }
    }
}


@pytest.mark.parametrize(
    ("name", "given", "passed"),
    [
        ("string", "8", "8"),
        ("string", 8, "8"),
        ("string", True, "true"),
        ("string", '{"a": 1}', '{"a": 1}'),
        ("number_integer", "8", 8),
        ("number_integer", 8, 8),
        ("number_double", "0.5", 0.5),
        ("number_double", 1, 1),
        ("boolean", "true", True),
        ("boolean", False, False),
        ("list", "[1, 2]", [1, 2]),
        ("struct", '{"a": 1}', {"a": 1}),
    ],
)
def test_values_take_the_declared_type(name: str, given: Any, passed: Any) -> None:
    found = run_parameters(declared_parameters(PIPELINE), "{}", {name: given}, "here")
    assert found == {"spec": "{}", name: passed}
    assert type(found[name]) is type(passed)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("number_integer", "8.5"),
        ("number_integer", "true"),
        ("number_integer", "eight"),
        ("number_double", "half"),
        ("boolean", "yes"),
        ("boolean", 1),
        ("list", "{}"),
        ("struct", "[]"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, given: Any) -> None:
    with pytest.raises(SpecError, match=rf"^here: {name} is '.*', where the pipeline takes a {name.upper()}; write"):
        run_parameters(declared_parameters(PIPELINE), "{}", {name: given}, "here")


def test_a_pipeline_is_read_as_compiled_and_as_a_server_shows_it() -> None:
    assert declared_parameters({"pipeline_spec": PIPELINE, "platform_spec": {}}) == declared_parameters(PIPELINE)


def test_a_pipeline_of_someone_else_is_refused() -> None:
    with pytest.raises(
        SpecError, match="the pipeline has no parameter 'spec'; name a pipeline that `automerge deploy`"
    ):
        run_parameters(declared_parameters({"root": {}}), "{}", {}, "here")

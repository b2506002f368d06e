"""A spec as a pipeline argument: nothing in it that an engine would change."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.errors import SpecError
from automerge.spec import Spec, parse_spec
from automerge_pipelines.arguments import LONGEST_ARGUMENT, spec_argument
from tests.e2e.tiny import tiny_spec


def with_arguments(value: Any) -> Spec:
    """A spec that holds any JSON value: as an argument of the model's factory."""
    spec = tiny_spec("s3://models/tiny", "sqlite:///mlflow.db")
    return spec.model_copy(update={"model": spec.model.model_copy(update={"arguments": {"value": value}})})


hostile = st.lists(st.sampled_from(["python3", "{", "}", "$", ".", '"', "'", "\\", "é", "\U0001f600", "\n", " "])).map(
    "".join
)
values = st.recursive(
    hostile | st.integers(-(2**53), 2**53) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile, inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_arrives_as_it_was_and_holds_no_text_that_an_engine_changes(value: Any) -> None:
    spec = with_arguments(value)
    text = spec_argument(spec)
    assert "python3" not in text
    assert "{{" not in text
    assert text.isascii()
    assert "\n" not in text
    # No environment: a literal ${NAME} cannot occur, parse_spec has replaced it when the spec was read.
    if "${" not in text:
        assert parse_spec(text, environment={}) == spec
    assert json.loads(text) == spec.model_dump(mode="json")


def test_a_spec_that_is_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(SpecError, match=r"takes [\d,]+ bytes as a pipeline argument, where [\d,]+ fit; shorten"):
        spec_argument(with_arguments("x" * LONGEST_ARGUMENT))

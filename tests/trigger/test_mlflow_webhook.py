"""Who sent a delivery, and what it is about."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.trigger.delivery import Refusal
from automerge.trigger.mlflow_webhook import read, verify
from tests.trigger.service import SECRET, signed_headers

NOW = 1_790_000_000.0


def headers(body: bytes, **signed: object) -> dict[str, str]:
    made = signed_headers(body, timestamp=NOW, identity="d-1", **signed)  # type: ignore[arg-type]
    return {name.lower(): value for name, value in made.items()}


def test_our_signature_is_the_one_that_mlflow_makes() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    made = headers(b'{"a": 1}')["x-mlflow-signature"]
    assert made == _generate_hmac_signature(SECRET, "d-1", str(int(NOW)), '{"a": 1}')


@pytest.mark.parametrize("secrets", [[SECRET], ["new", SECRET]])
def test_any_of_the_secrets_will_do(secrets: list[str]) -> None:
    assert verify(headers(b"{}"), b"{}", secrets, NOW, 600) == "d-1"


@pytest.mark.parametrize("away", [-600, 600])
def test_the_window_has_two_sides(away: int) -> None:
    assert verify(headers(b"{}"), b"{}", [SECRET], NOW + away, 600) == "d-1"
    with pytest.raises(Refusal) as refusal:
        verify(headers(b"{}"), b"{}", [SECRET], NOW + away + (1 if away > 0 else -1), 600)
    assert refusal.value.outcome == "stale"


@given(st.sampled_from(["x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"]), st.text(max_size=40))
def test_any_other_header_is_refused(name: str, value: str) -> None:
    good = headers(b"{}")
    if good[name] == value:
        return
    with pytest.raises(Refusal) as refusal:
        verify({**good, name: value}, b"{}", [SECRET], NOW, 600)
    assert refusal.value.outcome == "bad_signature"


@given(st.binary(max_size=40).filter(lambda body: body != b"{}"))
def test_any_other_body_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal):
        verify(headers(b"{}"), body, [SECRET], NOW, 600)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["entity", "action", "data", "name", "version", "tags"]) | st.text(), x)
        ),
    )
)
def test_whatever_is_signed_is_read_or_refused(value: object) -> None:
    try:
        facts = read(json.dumps(value).encode())
    except Refusal as refusal:
        assert refusal.outcome == "malformed"
    else:
        assert len(facts.model) <= 200


def event(**data: object) -> bytes:
    return json.dumps({"entity": "model_version", "action": "created", "data": data}).encode()


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        (event(name="digits-low", version="3"), ""),
        (event(name="example_model", version="1"), "a test of the webhook"),
        (event(name="merged", version="1", tags={"automerge.recipe": "x"}), "a version that a merge made"),
        (event(name="merged", version="1", key="automerge.recipe", value="x"), "a version that a merge made"),
    ],
)
def test_what_needs_no_look(body: bytes, ignored: str) -> None:
    assert read(body).ignored == ignored


def test_deep_nesting_is_malformed() -> None:
    with pytest.raises(Refusal):
        read(b"[" * 100_000)

"""Which checkpoints fit together, and what a user reads when they do not."""

import pytest

from automerge.checkpoint import TensorInfo, check_compatibility
from automerge.errors import CheckpointError

LOW = {
    "body.weight": TensorInfo("float32", (8, 8)),
    "head.weight": TensorInfo("float32", (6, 64)),
    "steps": TensorInfo("int64", ()),
}


def problem(others: dict[str, dict[str, TensorInfo]], **options: object) -> str:
    with pytest.raises(CheckpointError) as error:
        check_compatibility(LOW, others, "low", **options)  # type: ignore[arg-type]
    return error.value.problem


def test_equal_checkpoints_fit() -> None:
    check_compatibility(LOW, {"high": dict(LOW), "base": dict(LOW)}, "low")


def test_every_kind_of_misfit_is_named() -> None:
    high = {
        "head.weight": TensorInfo("float32", (4, 64)),
        "steps": TensorInfo("int32", ()),
        "extra.bias": TensorInfo("float32", (1,)),
    }
    assert problem({"high": high}) == (
        "checkpoint 'high' does not fit 'low': 4 tensors: body.weight is missing; extra.bias is not in 'low'; "
        "head.weight has shape [4, 64], expected [6, 64]; steps has dtype int32, expected int64"
    )


def test_every_checkpoint_is_judged() -> None:
    text = problem({"a": {}, "b": dict(LOW), "c": {**LOW, "x": LOW["steps"]}})
    assert "checkpoint 'a' does not fit 'low': 3 tensors" in text
    assert "'b'" not in text
    assert "checkpoint 'c' does not fit 'low': 1 tensor: x is not in 'low'" in text


def test_the_first_ten_of_a_kind_and_the_count() -> None:
    high = {**LOW, **{f"layer.{i:02}": LOW["steps"] for i in range(25)}}
    text = problem({"high": high})
    assert "25 tensors" in text and "layer.09" in text and "layer.10" not in text and "and 15 more extra" in text


def test_private_parameters_are_no_misfit() -> None:
    high = {**LOW, "head.weight": TensorInfo("float32", (4, 64)), "head.bias": TensorInfo("float32", (4,))}
    check_compatibility(LOW, {"high": high}, "low", ["head.*"])
    assert "2 tensors" in problem({"high": high}, private=["HEAD.*"])


def test_mixed_floats_only_on_request() -> None:
    half = {**LOW, "body.weight": TensorInfo("bfloat16", (8, 8))}
    assert "body.weight has dtype bfloat16, expected float32" in problem({"high": half})
    check_compatibility(LOW, {"high": half}, "low", allow_mixed_floats=True)
    whole = {**LOW, "body.weight": TensorInfo("int8", (8, 8))}
    assert "dtype int8" in problem({"high": whole}, allow_mixed_floats=True)


EMBEDDING = TensorInfo("float32", (32, 8))


def test_of_a_tied_tensor_one_name_is_enough() -> None:
    tied = {"out.weight": "embed.weight"}
    forms = (
        {"embed.weight": EMBEDDING},
        {"out.weight": EMBEDDING},
        dict.fromkeys(("embed.weight", "out.weight"), EMBEDDING),
    )
    for reference in forms:
        others = {str(index): {**LOW, **form} for index, form in enumerate(forms)}
        check_compatibility({**LOW, **reference}, others, "low", tied=tied)
    with pytest.raises(CheckpointError, match=r"'b' does not fit 'a': 1 tensor: embed\.weight is missing"):
        check_compatibility({**LOW, **forms[1]}, {"b": LOW}, "a", tied=tied)


def test_before_the_ties_are_known_a_name_passes_if_its_twin_may_be_there() -> None:
    both = {**LOW, "embed.weight": EMBEDDING, "out.weight": EMBEDDING}
    one = {**LOW, "embed.weight": EMBEDDING}
    check_compatibility(both, {"b": one}, "a", tied=None)
    check_compatibility(one, {"b": both}, "a", tied=None)
    with pytest.raises(CheckpointError, match=r"1 tensor: embed\.weight is not in 'low'"):
        check_compatibility(LOW, {"b": one}, "low", tied=None)


def test_rows_of_a_vocabulary_may_differ() -> None:
    grown = {**LOW, "head.weight": TensorInfo("float32", (9, 64))}
    check_compatibility(LOW, {"high": grown}, "low", vocabulary=["head.weight"])
    check_compatibility(LOW, {"high": grown}, "low", vocabulary=None)
    wider = {**LOW, "head.weight": TensorInfo("float32", (9, 65))}
    assert "head.weight has shape [9, 65]" in problem({"high": wider}, vocabulary=["head.weight"])
    assert "head.weight has shape [9, 64]" in problem({"high": grown}, vocabulary=["body.weight"])
    for high, named in ((grown, True), (wider, False)):
        with pytest.raises(CheckpointError) as error:
            check_compatibility(LOW, {"high": high}, "low")
        assert ("merge.vocabulary" in error.value.remedy) == named
    # Before the ties are known, a grown embedding may be there under another name.
    twin = {
        **{name: info for name, info in grown.items() if name != "head.weight"},
        "emb": TensorInfo("float32", (9, 64)),
    }
    check_compatibility({**LOW, "emb": TensorInfo("float32", (6, 64))}, {"b": twin}, "a", tied=None, vocabulary=None)

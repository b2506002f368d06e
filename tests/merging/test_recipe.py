"""Recipes: equal merges have equal keys, different ones different keys, and files are read strictly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.errors import MergeError, SpecError
from automerge.merging.recipe import (
    InputDigest,
    Recipe,
    RecipeBlock,
    block_key,
    canonical,
    effective_note,
    effective_weights,
)
from automerge.merging.technique import TensorInputs, load_technique


def block(technique, weights=(0.5, 0.5), /, name="trunk", **hyperparameters):
    options = dict(load_technique(technique).declaration.defaults())
    options |= {key.rstrip("_"): value for key, value in hyperparameters.items()}
    return RecipeBlock(
        name=name,
        technique=technique,
        weights={f"s{index}": weight for index, weight in enumerate(weights)},
        hyperparameters=options,
        parameters=["w"],
    )


def recipe(*blocks, **fields):
    sources = [InputDigest(name=name, digest=name * 4) for name in ("s0", "s1")]
    return Recipe(
        **{"release": "0.1.0", "base": InputDigest(name="b", digest="b0"), "sources": sources} | fields, blocks=blocks
    )


EQUAL = [
    (block("linear", (1, 3)), block("linear", (0.25, 0.75))),
    (block("task_arithmetic", (0.3, 0.7)), block("linear", (0.3, 0.7))),
    (block("task_arithmetic", (0.3, 0.7), lambda_=2.0), block("task_arithmetic", (0.6, 1.4))),
    (block("task_arithmetic", (0.6, 1.4), lambda_=0.5), block("linear", (3, 7))),
    (block("ties", (1, 3)), block("ties", (0.25, 0.75))),
    (block("ties", (0.5, 0.5), normalize=False, lambda_=2.0), block("ties", (1, 1), normalize=False)),
    (block("dare_linear", (0.3, 0.6), density=1), block("task_arithmetic", (0.3, 0.6))),
    (block("dare_linear", (0.3, 0.7), density=1.0, rescale="l1"), block("linear", (0.3, 0.7))),
    (block("dare_linear", (0.3, 0.6), lambda_=2), block("dare_linear", (0.6, 1.2))),
    (block("dare_ties", (0.3, 0.6), density=1), block("ties", (0.3, 0.6), density=1, normalize=False)),
    (block("linear", (0.1 + 0.2, 0.7)), block("linear", (0.3, 0.7))),
    (block("linear", name="one"), block("linear", name="other")),
]
DIFFERENT = [
    (block("linear", (0.3, 0.7)), block("linear", (0.7, 0.3))),
    (block("task_arithmetic", (0.3, 0.6)), block("linear", (0.3, 0.6))),
    (block("task_arithmetic", (0.3, 0.6)), block("task_arithmetic", (0.3, 0.6), lambda_=0.9)),
    (block("task_arithmetic", (0.3, 0.6), lambda_=-1.0), block("task_arithmetic", (-0.3, -0.6))),
    (block("ties", (0.5, 0.5)), block("ties", (-0.5, -0.5))),
    (block("ties", density=0.5), block("ties", density=0.6)),
    (block("ties", density=1.0), block("linear")),
    (block("dare_linear"), block("dare_linear", rescale="l1")),
    (block("dare_ties", density=1), block("ties", density=1)),
    (block("linear"), block("linear").model_copy(update={"parameters": ["v"]})),
    (block("linear"), block("linear").model_copy(update={"parameters": [], "buffers": ["w"]})),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_merges_have_equal_keys(one, other):
    assert block_key(one) == block_key(other)
    assert recipe(one).digest() == recipe(other).digest()


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_merges_have_different_keys(one, other):
    assert block_key(one) != block_key(other)
    assert recipe(one).digest() != recipe(other).digest()


names = st.sampled_from(["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])


@given(
    names,
    st.lists(st.floats(0.01, 3), min_size=1, max_size=4),
    st.floats(0.1, 2),
    st.sampled_from([0.4, 1.0]),
    st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_the_canonical_form_is_the_same_merge_and_final(name, weights, scale, density, flag):
    options = {"lambda": scale, "density": density, "normalize": flag, "rescale": "l1" if flag else "inverse_density"}
    declared = load_technique(name).declaration.defaults()
    given_block = block(name, weights, **{key: value for key, value in options.items() if key in declared})
    simple = canonical(given_block)
    assert canonical(simple) == simple

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, generator=generator, dtype=torch.float64)
    tensors = [base + torch.randn(20, generator=generator, dtype=torch.float64) for _ in weights]
    inputs = TensorInputs("w", list(given_block.weights), base, tensors, seed=1)
    merged = [load_technique(each.technique).merge(inputs, each.settings) for each in (given_block, simple)]
    torch.testing.assert_close(*merged, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (block("linear", (1, 3)), [0.25, 0.75]),
        (block("task_arithmetic", (0.5, 1.0), lambda_=0.5), [0.25, 0.5]),
        (block("ties", (1, 3), lambda_=0.5), [0.125, 0.375]),
        (block("ties", (1, 3), lambda_=0.5, normalize=False), [0.5, 1.5]),
        (block("ties", (1, -1)), [1.0, -1.0]),
        (block("dare_ties", (0.5, 1.0), lambda_=2), [1.0, 2.0]),
    ],
)
def test_effective_weights(made, expected):
    assert list(effective_weights(made).values()) == pytest.approx(expected)


def test_the_notes():
    assert effective_note(block("linear")) == ""
    assert "all sources agree" in effective_note(block("ties"))


def test_what_the_digest_leaves_out_and_what_not():
    one, other = block("linear", name="a"), block("ties", name="b").model_copy(update={"parameters": ["v"]})
    whole = recipe(one, other)
    assert recipe(other, one, release="9.9.9").digest() == whole.digest()
    assert recipe(one, other, base=InputDigest(name="ancestor", digest="b0")).digest() == whole.digest()
    assert recipe(one, other, seed=5).digest() == whole.digest(), "nothing is random"
    assert recipe(one, other, private={"s0": []}).digest() == whole.digest()
    for change in (
        {"base": InputDigest(name="b", digest="b1")},
        {"base": None},
        {"dtype": "float16"},
        {"integer_buffers": "base"},
        {"tied": {"x": "w"}},
        {"private": {"s0": ["head"]}},
        {"sources": list(reversed(whole.sources))},
    ):
        assert recipe(one, other, **change).digest() != whole.digest(), change
    dropped = block("dare_ties")
    assert recipe(dropped, seed=5).digest() != recipe(dropped, seed=6).digest()


def test_a_file_and_back(tmp_path):
    whole = recipe(block("ties", (0.3, 0.7)), tied={"x": "w"}, private={"s1": ["head"]}, seed=3)
    again = Recipe.read(whole.write(tmp_path / "recipe.json"))
    assert again == whole
    assert again.digest() == whole.digest()
    assert again.blocks[0].hyperparameters["normalize"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{"name": "../../etc", "digest": "x"}]}, "sources.0.name"),
        ({"dtype": "int8"}, "dtype"),
        ({"blocks": [{"name": "a", "technique": "linear", "weights": {"s0": "nan"}}]}, "blocks.0.weights"),
        ({"blok": []}, "blok"),
    ],
)
def test_a_damaged_file_is_refused(change, message):
    value = recipe(block("linear")).model_dump(mode="json") | change
    with pytest.raises(SpecError, match=message):
        Recipe.parse(value, "recipe.json")


def test_an_invalid_block_has_no_key():
    with pytest.raises(MergeError, match="'density' is 7"):
        block_key(block("ties", density=7))

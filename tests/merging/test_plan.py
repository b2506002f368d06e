"""Recipe against inputs: every misfit is found before anything is computed."""

import pytest

from automerge.checkpoint.info import TensorInfo
from automerge.errors import MergeError
from automerge.merging.plan import plan_merge
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock

F32 = TensorInfo("float32", (2, 3))
STAT = TensorInfo("float32", (2,))
COUNT = TensorInfo("int64", ())
NAMES = {"w": F32, "bn.mean": STAT, "bn.num_batches_tracked": COUNT}
ARITHMETIC = {"technique": "task_arithmetic", "hyperparameters": {"lambda": 1.0}}


def make_recipe(base=True, block=None, **fields):
    trunk = {
        "name": "trunk",
        "technique": "linear",
        "weights": {"a": 0.5, "b": 0.5},
        "parameters": ["w"],
        "buffers": ["bn.mean", "bn.num_batches_tracked"],
    }
    fields = {"blocks": [RecipeBlock(**trunk | (block or {}))]} | fields
    return Recipe(
        base=InputDigest(name="base", digest="0") if base else None,
        sources=[InputDigest(name=name, digest=name) for name in "ab"],
        **fields,
    )


def plan(recipe, base=NAMES, a=NAMES, b=NAMES):
    return plan_merge(recipe, base, {"b": b, "a": a})


def test_the_steps():
    steps = plan(make_recipe(dtype="bfloat16"))
    assert [step.name for step in steps] == ["bn.mean", "bn.num_batches_tracked", "w"]
    assert [step.info.dtype for step in steps] == ["bfloat16", "int64", "bfloat16"]
    assert list(steps[2].sources.items()) == [("a", "w"), ("b", "w")]
    assert steps[2].base == "w"
    assert plan(make_recipe(base=False), base=None)[2].base is None


def test_a_tied_tensor_may_be_stored_under_its_alias():
    names = {"emb": F32}
    recipe = make_recipe(block={"parameters": ["emb"], "buffers": []}, tied={"head": "emb"})
    (step,) = plan(recipe, names, {"head": F32}, {"emb": F32, "head": F32})
    assert step.sources == {"a": "head", "b": "emb"}
    assert step.aliases == ("head",)


def test_private_tensors_differ_in_shape():
    recipe = make_recipe(private={"a": ["head"], "b": ["head"], "base": ["head", "old"]})
    base = NAMES | {"head": STAT, "old": F32}
    steps = plan(recipe, base, NAMES | {"head": TensorInfo("float32", (7,))}, NAMES | {"head": F32})
    assert len(steps) == 3


def test_a_base_whose_tensor_is_private_does_not_take_part():
    recipe = make_recipe(private={"base": ["w"]})
    steps = plan(recipe, NAMES | {"w": STAT})
    assert steps[2].base is None


EXTRA = NAMES | {"extra": F32}
FEWER = {"w": F32}


@pytest.mark.parametrize(
    ("recipe", "inputs", "message"),
    [
        (
            make_recipe(),
            {"a": EXTRA},
            "1 tensors of source 'a' that are neither in a block nor private nor tied: extra",
        ),
        (make_recipe(), {"base": EXTRA}, "1 tensors of the base that are neither"),
        (make_recipe(), {"b": FEWER}, "2 tensors of the recipe that source 'b' lacks: bn.mean, bn.num_batches_tracked"),
        (make_recipe(), {"base": None}, "the recipe has a base and no base was passed"),
        (make_recipe(base=False), {}, "the recipe has no base and a base was passed"),
        (make_recipe(block=ARITHMETIC), {"base": {"bn.mean": STAT}}, "'trunk' that the base lacks: w"),
        (
            make_recipe(block=ARITHMETIC, base=False),
            {"base": None},
            "block 'trunk': technique 'task_arithmetic' needs a base",
        ),
        (make_recipe(block={"technique": "ties"}), {}, "'density' is missing"),
        (
            make_recipe(),
            {"a": NAMES | {"w": STAT}},
            "tensor 'w' has the shapes [2] in source 'a', [2, 3] in source 'b'",
        ),
        (make_recipe(), {"base": NAMES | {"w": STAT}}, "[2] in the base"),
        (make_recipe(), {"a": NAMES | {"w": TensorInfo("float16", (2, 3))}}, "'w' is float16 in 'a', float32 in 'b'"),
        (make_recipe(block={"parameters": ["w", "bn.mean"]}), {}, "1 tensors in more than one block: bn.mean"),
        (make_recipe(blocks=[make_recipe().blocks[0]] * 2), {}, "1 blocks named twice: trunk"),
        (make_recipe(private={"a": ["w"]}), {}, "private tensors of source 'a' that are also in a block: w"),
        (make_recipe(private={"a": ["hed"]}), {}, "private tensors that source 'a' lacks: hed"),
        (make_recipe(private={"c": ["head"]}), {}, "private tensors for unknown sources: c"),
        (make_recipe(base=False, private={"base": ["x"]}), {"base": None}, "private tensors of the base and no base"),
        (make_recipe(tied={"w": "bn.mean"}), {}, "tied tensors that are also in a block: w"),
        (make_recipe(tied={"x": "y"}), {}, "neither in a block nor private: x -> y"),
    ],
)
def test_misfits(recipe, inputs, message):
    with pytest.raises(MergeError) as error:
        plan(recipe, **inputs)
    assert message in str(error.value)


def test_the_sources_must_be_the_recipes():
    with pytest.raises(MergeError, match="the recipe's sources are a, b, got a, c"):
        plan_merge(make_recipe(), NAMES, {"a": NAMES, "c": NAMES})


def test_only_ten_names_are_shown():
    many = NAMES | {f"x{index:02}": F32 for index in range(25)}
    with pytest.raises(MergeError, match=r"25 tensors of source 'a' .*: x00, .*, x09, \.\.\.;"):
        plan(make_recipe(), a=many)


def test_no_source_is_called_base():
    sources = [InputDigest(name="base", digest="0")]
    recipe = make_recipe(base=False).model_copy(update={"sources": sources})
    with pytest.raises(MergeError, match="no source can be called 'base'"):
        plan_merge(recipe, None, {"base": NAMES})

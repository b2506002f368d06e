"""The kernels' tiles against the reference in torch: the same bytes for every fused technique, or no result at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.checkpoint.info import info_of
from automerge.errors import MergeError
from automerge.merging import workers as workers_module
from automerge.merging.apply import merge_tensor
from automerge.merging.elementwise import ElementwiseMerge, fused_of
from automerge.merging.kernels import MAX_SOURCES, load_kernels
from automerge.merging.recipe import RecipeBlock, canonical, torch_dtype
from automerge.merging.technique import load_technique
from automerge.merging.workers import InMemory, Workers

FUSED = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
]
KERNELS = load_kernels()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last of them not full, from tensors that a test can afford."""
    monkeypatch.setattr(workers_module, "TILE", 4096)


def make_block(technique, weights, **changes):
    values = load_technique(technique).declaration.defaults() | changes
    return RecipeBlock(name="b", technique=technique, weights=weights, hyperparameters=values, parameters=["w"])


def by_kernels(block, base, sources, *, seed=0, output="float32", threads=2):
    """The merged tensor; None where the kernels leave it to torch."""
    block = canonical(block)
    infos = {name: info_of(tensor) for name, tensor in sources.items()}
    count = base.numel()
    result = torch.empty(base.shape, dtype=torch_dtype(output))
    fused = fused_of("w", block, info_of(base), infos, info_of(result))
    if fused is None:
        return None
    merge = ElementwiseMerge(
        KERNELS,
        "w",
        *fused,
        seed=seed,
        base=InMemory(base.data_ptr(), info_of(base).dtype),
        sources={name: InMemory(tensor.data_ptr(), infos[name].dtype) for name, tensor in sources.items()},
        output_dtype=output,
        count=count,
    )
    with Workers(threads) as workers:
        done = merge.run(
            workers,
            lambda first, count, scratch: result.data_ptr() + first * result.element_size(),
            lambda first, count, scratch: None,
        )
    return result if done else None


def draw(count, sources, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator)
    # Differences of bfloat16 numbers near each other: many equal magnitudes, and zeros.
    return base.to(dtype), {
        f"s{index}": (base + 0.01 * torch.randn(count, generator=generator)).to(dtype) for index in range(sources)
    }


def assert_same_bytes(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@given(
    st.sampled_from(FUSED),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=5),
    st.floats(0.05, 1.0),
    st.floats(-2.0, 2.0),
    st.integers(1, 12_000),
    st.booleans(),
)
@settings(deadline=None, max_examples=120)
def test_the_kernels_give_the_bytes_of_the_reference(technique, dtype, output, weights, density, scale, count, flag):
    base, sources = draw(count, len(weights), dtype, seed=count)
    named = dict(zip(sources, weights, strict=True))
    declared = {each.name for each in load_technique(technique).declaration.hyperparameters}
    changes = {"density": density, "lambda": scale, "gamma": density / 7, "normalize": flag}
    block = make_block(technique, named, **{name: value for name, value in changes.items() if name in declared})
    if technique == "linear" and abs(sum(weights)) < 1e-3:
        return
    found = by_kernels(block, base, sources, seed=7, output=output)
    assert found is not None
    assert_same_bytes(found, merge_tensor("w", block, base, sources, seed=7, dtype=output))


@pytest.mark.parametrize("technique", FUSED)
def test_the_number_of_threads_does_not_change_the_bytes(technique):
    base, sources = draw(40_001, 3, torch.bfloat16)
    block = make_block(technique, {"s0": 0.2, "s1": 0.9, "s2": -0.3})
    one, two, five = (by_kernels(block, base, sources, threads=threads) for threads in (1, 2, 5))
    assert_same_bytes(one, two)
    assert_same_bytes(one, five)


def test_inputs_of_different_dtypes():
    base, sources = draw(9_000, 3, torch.float32)
    sources = {"s0": sources["s0"].half(), "s1": sources["s1"], "s2": sources["s2"].bfloat16()}
    block = make_block("ties", {"s0": 0.2, "s1": 0.9, "s2": 0.3})
    found = by_kernels(block, base, sources, output="bfloat16")
    assert_same_bytes(found, merge_tensor("w", block, base, sources, dtype="bfloat16"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "s0", "s1"])
def test_an_input_that_is_not_finite_gives_no_result(where, value):
    base, sources = draw(9_000, 2, torch.float16)
    ({"base": base} | sources)[where][8_999] = value
    block = make_block("ties", {"s0": 0.5, "s1": 0.5})
    assert by_kernels(block, base, sources) is None
    with pytest.raises(MergeError, match=r"1 NaN|1 infinite"):
        merge_tensor("w", block, base, sources, dtype="float32")


def test_a_result_beyond_the_output_dtype_gives_no_result():
    base, sources = draw(5_000, 2, torch.float32)
    sources["s0"][4_500] = 70_000
    assert by_kernels(make_block("linear", {"s0": 1.0, "s1": 0.0}), base, sources, output="float16") is None


def test_what_is_not_elementwise_or_has_other_dtypes_is_left_to_torch():
    base, sources = draw(100, 2, torch.float32)
    infos = {name: info_of(tensor) for name, tensor in sources.items()}
    weights = {"s0": 0.5, "s1": 0.4}

    def fused(block, base=base, infos=infos):
        return fused_of("w", canonical(block), info_of(base), infos, info_of(sources["s0"]))

    assert fused(make_block("dare_ties", weights, rescale="l1")) is None
    assert fused(make_block("slerp", weights)) is None
    assert fused(make_block("ties", weights), base=base.double()) is None
    assert fused(make_block("linear", weights), base=base.double()) is not None  # which does not read the base
    many = {f"s{index}": info_of(base) for index in range(MAX_SOURCES + 1)}
    assert fused(make_block("linear", dict.fromkeys(many, 1.0)), infos=many) is None


def test_a_floating_buffer_is_averaged_and_never_a_task_vector():
    base, sources = draw(5_000, 2, torch.float32)
    block = make_block("ties", {"s0": -0.5, "s1": 0.4}).model_copy(update={"parameters": [], "buffers": ["w"]})
    assert_same_bytes(by_kernels(block, base, sources), merge_tensor("w", block, base, sources))

"""One set of shared weights under several heads: what is shared, what is not, and that nothing else is touched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from automerge.errors import ModelError
from automerge.models.heads import Heads
from automerge.models.state import state_names
from tests.models.architectures import Small, Tied

CPU = torch.device("cpu")
HEAD = ("head.weight", "head.bias")


def state_of(build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    return {name: tensor + (0.1 * seed if tensor.is_floating_point() else seed) for name, tensor in state.items()}


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shared tensors, private tensors."""
    shared = {name: tensor for name, tensor in state.items() if name not in HEAD}
    return shared, {name: state[name] for name in HEAD}


def build_small(reference: str) -> nn.Module:
    return Small(classes={"three": 3, "five": 5}[reference])


@pytest.fixture
def states() -> dict[str, dict[str, Tensor]]:
    return {"three": state_of(lambda: Small(3), 1), "five": state_of(lambda: Small(5), 2)}


@pytest.fixture
def heads(states: dict[str, dict[str, Tensor]]) -> Heads:
    private = {reference: split(state)[1] for reference, state in states.items()}
    return Heads(build_small, private, split(states["three"])[0], CPU)


def reference_logits(shared: dict[str, Tensor], own: dict[str, Tensor], classes: int, images: Tensor) -> Tensor:
    """What a module of its own, loaded by torch, says."""
    module = Small(classes)
    module.load_state_dict({**shared, **own})
    return module.eval().requires_grad_(False)(images)


def test_each_reference_runs_the_shared_weights_under_its_own_head(
    heads: Heads, states: dict[str, dict[str, Tensor]]
) -> None:
    images = torch.randn(4, 1, 6, 6)
    shared = split(states["three"])[0]
    for reference, classes in (("three", 3), ("five", 5)):
        logits = heads.module(reference)(images)
        assert logits.shape == (4, classes)
        assert torch.equal(logits, reference_logits(shared, split(states[reference])[1], classes, images))


def test_all_heads_share_one_memory(heads: Heads) -> None:
    three, five = (heads.module(name).state_dict() for name in ("three", "five"))
    for name, tensor in heads.live.items():
        assert three[name].data_ptr() == five[name].data_ptr() == tensor.data_ptr(), name
    assert set(heads.live) == set(three) - set(HEAD)
    for name in HEAD:
        assert name not in heads.live
        assert three[name].data_ptr() != five[name].data_ptr()


def test_what_is_written_into_live_runs_under_every_head(heads: Heads, states: dict[str, dict[str, Tensor]]) -> None:
    """Convolutions, BatchNorm's buffers, and a recurrent layer, which keeps references to its weights of its own."""
    images = torch.randn(4, 1, 6, 6)
    written = split(state_of(lambda: Small(3), 3))[0]
    with torch.no_grad():
        for name, tensor in heads.live.items():
            tensor.copy_(written[name])
    for reference, classes in (("three", 3), ("five", 5)):
        expected = reference_logits(written, split(states[reference])[1], classes, images)
        assert torch.equal(heads.module(reference)(images), expected)


@pytest.mark.parametrize("name", ["conv.weight", "norm.running_mean", "rnn.weight_hh_l0", "rnn.bias_ih_l0"])
def test_one_tensor_alone_changes_every_head(heads: Heads, name: str) -> None:
    images = torch.randn(4, 1, 6, 6)
    before = {reference: heads.module(reference)(images) for reference in ("three", "five")}
    heads.live[name].add_(0.5)
    for reference, logits in before.items():
        assert not torch.equal(heads.module(reference)(images), logits), f"{reference} runs on a copy of {name}"


def test_load_copies_in_place(heads: Heads, states: dict[str, dict[str, Tensor]]) -> None:
    places = {name: tensor.data_ptr() for name, tensor in heads.live.items()}
    images = torch.randn(4, 1, 6, 6)
    other = split(states["five"])[0]
    heads.load(other)
    assert {name: tensor.data_ptr() for name, tensor in heads.live.items()} == places
    expected = reference_logits(other, split(states["five"])[1], 5, images)
    assert torch.equal(heads.module("five")(images), expected)
    assert int(heads.live["norm.num_batches_tracked"]) == 2


def test_the_callers_tensors_never_change(states: dict[str, dict[str, Tensor]]) -> None:
    shared, own = split(states["three"])
    private = {"three": own, "five": split(states["five"])[1]}
    copies = {name: tensor.clone() for name, tensor in shared.items()}
    own_copies = {reference: {name: t.clone() for name, t in each.items()} for reference, each in private.items()}
    heads = Heads(build_small, private, shared, CPU)
    other = split(state_of(lambda: Small(3), 5))[0]
    other_copies = {name: tensor.clone() for name, tensor in other.items()}
    heads.load(other)
    for tensor in heads.live.values():
        tensor.add_(1)
    assert all(torch.equal(shared[name], copies[name]) for name in shared)
    assert all(torch.equal(other[name], other_copies[name]) for name in other)
    for reference, each in private.items():
        assert all(torch.equal(each[name], own_copies[reference][name]) for name in each)


def test_modules_are_for_inference(heads: Heads) -> None:
    for reference in ("three", "five"):
        module = heads.module(reference)
        assert not any(submodule.training for submodule in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_without_private_tensors_all_references_are_one_module() -> None:
    state = state_of(lambda: Small(3), 1)
    built: list[str] = []

    def build(reference: str) -> nn.Module:
        built.append(reference)
        return Small(3)

    heads = Heads(build, {"a": {}, "b": {}}, state, CPU)
    assert heads.module("a") is heads.module("b")
    assert built == ["a"]
    assert set(heads.live) == set(state)


def test_the_modules_take_the_dtype_of_the_checkpoint(states: dict[str, dict[str, Tensor]]) -> None:
    half = {
        reference: {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
        for reference, state in states.items()
    }
    private = {reference: split(state)[1] for reference, state in half.items()}
    heads = Heads(build_small, private, split(half["three"])[0], CPU)
    for reference in ("three", "five"):
        floating = [each for each in heads.module(reference).state_dict().values() if each.is_floating_point()]
        assert {tensor.dtype for tensor in floating} == {torch.bfloat16}
    assert heads.live["norm.num_batches_tracked"].dtype == torch.int64


class TestTied:
    """A tied tensor is one tensor, under whichever of its names it comes."""

    @pytest.mark.parametrize("kept", [("embed.weight", "out.weight"), ("embed.weight",), ("out.weight",)])
    def test_it_is_live_once_and_any_name_loads_it(self, kept: tuple[str, ...]) -> None:
        def given(seed: int) -> dict[str, Tensor]:
            state = state_of(Tied, seed)
            return {name: t for name, t in state.items() if name not in {"embed.weight", "out.weight"} - {*kept}}

        first, second = given(1), given(2)
        private = {reference: {"norm.bias": first["norm.bias"]} for reference in ("a", "b")}
        shared = {name: tensor for name, tensor in first.items() if name != "norm.bias"}
        heads = Heads(lambda reference: Tied(), private, shared, CPU)
        assert sorted(heads.live) == ["embed.weight", "norm.weight", "steps"]
        heads.load(second)
        for reference in ("a", "b"):
            module = heads.module(reference)
            assert isinstance(module, Tied)
            assert module.out.weight is module.embed.weight
            assert module.out.weight.data_ptr() == heads.live["embed.weight"].data_ptr()
            assert torch.equal(module.out.weight, second[kept[0]])
            assert torch.equal(module.norm.bias, first["norm.bias"])
            assert int(module.steps) == 2
        assert heads.module("a") is not heads.module("b")
        assert state_names(heads.module("b")).tied == {"out.weight": "embed.weight"}

    def test_a_missing_tensor_is_named(self) -> None:
        heads = Heads(lambda reference: Tied(), {"a": {}}, state_of(Tied, 1), CPU)
        with pytest.raises(KeyError, match=r"norm\.weight"):
            heads.load({name: tensor for name, tensor in state_of(Tied, 2).items() if name != "norm.weight"})


def test_a_head_that_does_not_fit_names_its_reference(states: dict[str, dict[str, Tensor]]) -> None:
    private = {"three": split(states["three"])[1], "five": split(states["three"])[1]}
    with pytest.raises(ModelError, match=r"under the head of 'five'.*head\.weight \[3, 5\] for \[5, 5\]"):
        Heads(build_small, private, split(states["three"])[0], CPU)

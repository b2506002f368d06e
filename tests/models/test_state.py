"""Which tensors a module holds, and bringing a checkpoint's in."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from automerge.errors import ModelError
from automerge.models.state import load_state, state_names

_SPEC = importlib.util.spec_from_file_location("state_architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(architectures)


def _state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_names():
    names = state_names(architectures.Tied())
    assert names.parameters == ["embed.weight", "norm.weight", "norm.bias"]
    assert names.buffers == ["steps"]
    assert names.tied == {"out.weight": "embed.weight"}
    with torch.device("meta"):
        assert state_names(architectures.Tied()) == names


@pytest.mark.parametrize("kind", [architectures.Tied, architectures.Small])
def test_a_loaded_module_computes_the_same(kind):
    original, other = kind().eval(), kind().eval()
    x = torch.arange(6).reshape(2, 3) if kind is architectures.Tied else torch.randn(2, 1, 4, 4)
    assert not torch.equal(original(x), other(x))
    load_state(other, _state(original), "a")
    assert torch.equal(original(x), other(x))


def test_one_name_of_a_tied_group_is_enough_and_ties_hold():
    for lone in ("embed.weight", "out.weight"):
        module = architectures.Tied()
        state = _state(architectures.Tied())
        del state["out.weight" if lone == "embed.weight" else "embed.weight"]
        load_state(module, state, "a")
        assert module.out.weight is module.embed.weight
        assert torch.equal(module.embed.weight, state[lone])


def test_tied_names_with_different_values():
    state = _state(architectures.Tied())
    state["out.weight"] += 1
    with pytest.raises(ModelError, match=r"a: embed.weight and out.weight are one tensor in the model and differ"):
        load_state(architectures.Tied(), state, "a")


def test_the_given_tensors_are_the_modules_own():
    module, state = architectures.Small(), _state(architectures.Small())
    load_state(module, state, "a")
    state["head.bias"].fill_(7.0)
    assert module.head.bias.tolist() == [7.0] * 3


def test_a_module_built_on_the_meta_device():
    with torch.device("meta"):
        module, tied = architectures.Small().eval(), architectures.Tied()
    original = architectures.Small().eval()
    load_state(module, _state(original), "a")
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(module(x), original(x))
    assert isinstance(module.head.bias, nn.Parameter)
    with pytest.raises(ModelError, match="its buffer 'scale' is in no checkpoint; build it on a real device"):
        load_state(tied, _state(architectures.Tied()), "a")


def test_the_module_takes_the_dtype_of_the_checkpoint():
    module = architectures.Tied()
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in _state(module).items()}
    load_state(module, state, "a")
    assert module.embed.weight.dtype == module.scale.dtype == torch.bfloat16
    assert module.out.weight is module.embed.weight
    assert module(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_every_misfit_is_named_with_the_count_and_nothing_is_changed():
    module = architectures.Small()
    before = copy.deepcopy(module.state_dict())
    good = _state(architectures.Small())

    missing = {name: tensor for name, tensor in good.items() if not name.startswith("rnn")}
    with pytest.raises(ModelError, match=r"a: the checkpoint lacks 4 tensors the model needs: rnn.weight_ih_l0, "):
        load_state(module, missing, "a")
    extra = {**good, **{f"extra.{index}": torch.zeros(1) for index in range(12)}}
    with pytest.raises(ModelError, match=r"has 12 tensors the model does not know: extra.0, .*extra.9, \.\.\."):
        load_state(module, extra, "a")
    misshapen = {**good, "head.bias": torch.zeros(4)}
    with pytest.raises(ModelError, match=r"has 1 tensor in another shape than the model: head.bias \[4\] for \[3\]"):
        load_state(module, misshapen, "a")
    with pytest.raises(ModelError, match=r"head.bias is int64, where the model has float32"):
        load_state(module, {**good, "head.bias": torch.zeros(3, dtype=torch.int64)}, "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_recurrent_layers_run_with_the_new_weights():
    module = nn.GRU(2, 3)
    load_state(module, {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}, "a")
    assert float(module(torch.ones(1, 1, 2))[0].detach().abs().max()) == 0.0

"""Choosing a model kind, calling a module, and example inputs."""

import pytest
import torch
from torch import nn

from automerge.errors import ModelError, PluginError
from automerge.models.architecture import load_architecture, short_reason
from automerge.models.factory import FactoryArchitecture
from automerge.spec import ModelSpec


def _architecture(**update):
    return load_architecture(ModelSpec(**{"kind": "factory", "target": "torch.nn:Identity", **update}), {})


def test_kinds_are_plugins():
    assert isinstance(_architecture(), FactoryArchitecture)
    with pytest.raises(PluginError, match=r"model.kind: unknown model kind 'transformer'; did you mean 'transformers'"):
        _architecture(kind="transformer")


class _Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, first, mask=None):
        return self.make(first if mask is None else first * mask)


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: (x, None), lambda x: {"loss": x.sum(), "logits": x}, lambda x: {"out": x}]
)
def test_logits_are_found_in_what_the_module_returns(make):
    x = torch.ones(2, 3)
    assert torch.equal(_architecture().call(_Returns(make), {"inputs": x}), x)
    assert torch.equal(_architecture().call(_Returns(make), {"first": x, "mask": 2 * x}), 2 * x)


@pytest.mark.parametrize("make", [lambda x: None, lambda x: (), lambda x: {"logits": 3}])
def test_a_module_that_returns_no_tensor(make):
    with pytest.raises(ModelError, match="where a tensor of logits is expected"):
        _architecture().call(_Returns(make), {"inputs": torch.ones(1)})


def test_a_vocabulary_that_cannot_be_resized_is_one_sentence():
    class Fixed(nn.Embedding):
        def resize_token_embeddings(self, rows):
            raise ValueError(f"{rows} is no multiple of 8")

    with pytest.raises(ModelError, match=r"model\.target: Fixed\.resize_token_embeddings\(7\) fails: ValueError: 7 is"):
        _architecture().resize_vocabulary(Fixed(8, 2), 7)


def test_example_inputs_of_the_spec():
    example = {
        "x": {"shape": [1, 3, 4, 4]},
        "ids": {"shape": [1, 5], "dtype": "int64"},
        "m": {"shape": [1], "dtype": "bool"},
    }
    architecture = _architecture(example=example)
    made = architecture.example(nn.Linear(1, 1))
    assert {name: (list(tensor.shape), tensor.dtype) for name, tensor in made.items()} == {
        "x": ([1, 3, 4, 4], torch.float32),
        "ids": ([1, 5], torch.int64),
        "m": ([1], torch.bool),
    }
    assert torch.equal(made["x"], architecture.example(nn.Linear(1, 1))["x"])
    assert architecture.example(nn.Linear(1, 1, device="meta"))["x"].device.type == "meta"
    assert _architecture().example(nn.Linear(1, 1)) is None


def test_a_quoted_exception_is_one_short_line():
    assert short_reason(ValueError("\n first \nsecond")) == "ValueError: first"
    assert short_reason(KeyError()) == "KeyError"
    assert len(short_reason(ValueError("x" * 1000))) == 200

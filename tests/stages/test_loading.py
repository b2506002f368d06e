"""Where checkpoints and models are: the weights in host memory, and the device that the spec asks for."""

from pathlib import Path

import pytest
import torch

from automerge.errors import ModelError
from automerge.spec import Spec
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded, device_of


def on(spec: Spec, device: str) -> Spec:
    return Spec.model_validate({**spec.model_dump(), "compute": {"device": device}})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_checkpoints_are_read_into_host_memory_whatever_the_device(spec: Spec, finished: Path, device: str) -> None:
    """It needs no GPU to say so: nothing is taken there before a model or a merger does."""
    loaded = Loaded.load(Inputs.open(spec, finished / "fetch"), torch.device(device))
    assert loaded.device.type == device
    assert {tensor.device.type for owned in loaded.tensors.values() for tensor in owned.values()} == {"cpu"}


@pytest.mark.parametrize(
    ("asked", "there", "given"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_the_device_that_is_asked_for(
    spec: Spec, asked: str, there: int, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert device_of(on(spec, asked)) == torch.device(given)


@pytest.mark.parametrize(
    ("asked", "there", "told"),
    [
        ("cuda", 0, "'cuda' was asked for and no CUDA device is available; use 'auto' or 'cpu'"),
        ("cuda:2", 2, "'cuda:2' was asked for and only cuda:0 to cuda:1 are available; use 'auto' or 'cpu'"),
    ],
)
def test_a_device_that_is_not_there(
    spec: Spec, asked: str, there: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ModelError) as caught:
        device_of(on(spec, asked))
    assert str(caught.value) == f"compute.device: {told}"

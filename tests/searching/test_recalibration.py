"""BatchNorm after a merge: what is measured is what the layers are given, and it is kept only where it helps."""

import logging

import pytest
import torch
from torch import nn

from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.searching.evaluator import MeasuredTask, mean_losses
from automerge.searching.recalibration import batch_norms, measure, recalibrate
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.task import TaskData

CPU = torch.device("cpu")


class Plain(Architecture):
    def build(self, reference, arguments):
        raise NotImplementedError


ARCHITECTURE = Plain(ModelSpec(kind="factory", target="nowhere:build"), {})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 3, 2)
        self.deep_norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)
        self.head_norm = nn.BatchNorm1d(5)

    def forward(self, images):
        hidden = torch.relu(self.norm(self.conv(images)))
        return self.head_norm(self.head(torch.relu(self.deep_norm(self.deep(hidden))).mean((2, 3))))


def build(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval().requires_grad_(False)


def heads_of(private=("head_norm.",), references=("a", "b"), seed=0):
    state = build(seed).state_dict()
    own = {
        reference: {
            name: tensor + at if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
            if name.startswith(private)
        }
        for at, reference in enumerate(references)
    }
    shared = {name: tensor for name, tensor in state.items() if not name.startswith(private)}
    return Heads(lambda _: build(), own, shared, CPU)


def task(name, count, offset=0.0, batch_size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = TaskData(
        {"inputs": torch.randn(count, 2, 6, 6, generator=generator) + offset},
        {"labels": torch.randint(0, 5, (count,), generator=generator)},
    )
    spec = TaskSpec(name=name, kind="classification", specialist=name, validation="v", test="t")
    return MeasuredTask(Classification(spec), name, data, batch_size)


def snapshot(heads):
    return {name: tensor.clone() for name, tensor in heads.live.items()}


@pytest.mark.parametrize("private", [(), ("head_norm.",)], ids=["one head", "heads of their own"])
def test_the_first_layer_is_given_what_it_is_given(private):
    """Mean and unbiased variance over both tasks, whatever the batches; the second's task lies far from the first's."""
    heads = heads_of(private=private)
    tasks = {"a": task("a", 33, seed=1), "b": task("b", 70, offset=5.0, seed=2)}
    before = snapshot(heads)
    values = measure(heads, tasks, ARCHITECTURE, CPU)
    assert all(torch.equal(heads.live[name], tensor) for name, tensor in before.items())
    images = torch.cat([each.data.inputs["inputs"] for each in tasks.values()])
    given = heads.module("a").conv(images).double().transpose(0, 1).reshape(4, -1)
    torch.testing.assert_close(values["norm.running_mean"], given.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["norm.running_var"], given.var(1), rtol=1e-5, atol=1e-5)
    assert values["norm.running_var"].dtype == torch.float64
    # A private layer keeps its own.
    assert ("head_norm.running_mean" in values) == (not private)
    assert not any(name.endswith("num_batches_tracked") for name in values)


def test_deeper_layers_are_those_of_the_recalibrated_model():
    """In one batch of all data the pass is exact: with its values, each layer gets what the values say."""
    heads = heads_of(private=())
    tasks = {"a": task("a", 40, seed=1, batch_size=1000), "b": task("b", 60, offset=3.0, seed=2, batch_size=1000)}
    values = measure(heads, tasks, ARCHITECTURE, CPU)
    for name, value in values.items():
        heads.live[name].copy_(value)
    given = {}
    module = heads.module("a")
    for name in ("norm", "deep_norm", "head_norm"):
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
    module(torch.cat([each.data.inputs["inputs"] for each in tasks.values()]))
    for name, activations in given.items():
        flat = activations.double().transpose(0, 1).reshape(activations.shape[1], -1)
        torch.testing.assert_close(values[f"{name}.running_mean"], flat.mean(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values[f"{name}.running_var"], flat.var(1), rtol=2e-2, atol=1e-3)


def test_measuring_is_deterministic_and_leaves_random_numbers_alone():
    tasks = {"a": task("a", 33, seed=1), "b": task("b", 20, seed=2)}
    state = torch.get_rng_state()
    one, other = (measure(heads_of(), tasks, ARCHITECTURE, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(one) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("count", [2, 3, 5, 17])
def test_a_batch_never_has_a_single_sample(count):
    """BatchNorm1d of one sample has no variance and fails."""
    values = measure(heads_of(private=()), {"a": task("a", count, batch_size=1)}, ARCHITECTURE, CPU)
    assert all((value >= 0).all() for name, value in values.items() if name.endswith("running_var"))


def test_a_constant_activation_has_a_variance_of_zero():
    heads = heads_of(private=())
    heads.live["conv.weight"].zero_()
    values = measure(heads, {"a": task("a", 20)}, ARCHITECTURE, CPU)
    assert torch.equal(values["norm.running_var"], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(values["norm.running_mean"].float(), heads.live["conv.bias"])


def shifted(heads):
    """Statistics that are wrong, as an average of far-apart sources' is."""
    heads.live["norm.running_mean"].add_(4)
    heads.live["norm.running_var"].mul_(50)
    return heads


def test_it_is_kept_where_the_objective_is_higher(caplog):
    heads, tasks = shifted(heads_of()), {"a": task("a", 60, seed=1), "b": task("b", 60, seed=2)}
    plain, scores = mean_losses(tasks, heads.module, ARCHITECTURE, CPU), iter([1.0, 2.0])
    with caplog.at_level(logging.INFO):
        values = recalibrate(heads, tasks, ARCHITECTURE, CPU, lambda: next(scores))
    assert values
    assert all(torch.equal(heads.live[name], value.float()) for name, value in values.items())
    assert mean_losses(tasks, heads.module, ARCHITECTURE, CPU) != plain
    assert "BatchNorm recalibrated in 2 layers: the objective is" in caplog.text


def test_it_is_dropped_where_the_objective_is_lower(caplog):
    heads, tasks = shifted(heads_of()), {"a": task("a", 60, seed=1)}
    before, scores = snapshot(heads), iter([2.0, 1.0])
    with caplog.at_level(logging.INFO):
        assert recalibrate(heads, tasks, ARCHITECTURE, CPU, lambda: next(scores)) == {}
    assert all(torch.equal(heads.live[name], tensor) for name, tensor in before.items())
    assert "keeps the average of the sources' statistics: the objective is 2, and 1 recalibrated" in caplog.text


def test_a_failure_keeps_the_average(caplog):
    heads, tasks = shifted(heads_of()), {"a": task("a", 1)}
    before = snapshot(heads)
    assert recalibrate(heads, tasks, ARCHITECTURE, CPU, lambda: 1.0) == {}
    assert all(torch.equal(heads.live[name], tensor) for name, tensor in before.items())
    assert "recalibration failed: a single sample has no variance" in caplog.text


def test_without_batch_norm_nothing_runs():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    heads = Heads(lambda _: model, {"a": {}}, {name: each.clone() for name, each in model.state_dict().items()}, CPU)
    tasks = {"a": task("a", 4)}
    assert batch_norms(heads, tasks) == {}

    def never():
        raise AssertionError("nothing is scored")

    assert recalibrate(heads, tasks, ARCHITECTURE, CPU, never) == {}

"""What every task kind must do: run it over yours.

def test_my_task(tmp_path):
    check_task(MyTask, TaskSpec(name="mine", kind="mine", ...), data_file, lambda data: torch.randn(len(data), 10))
"""

# ruff: noqa: S101 - a conformance suite speaks by assertions

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from automerge.errors import TaskError
from automerge.spec import TaskSpec
from automerge.tasks.task import Ratio, Scores, Task, TaskData

MakeTask = Callable[[TaskSpec, Path | None], Task]
MakeLogits = Callable[[TaskData], Tensor]


def check_task(
    make_task: MakeTask, spec: TaskSpec, path: Path, make_logits: MakeLogits, tokenizer_folder: Path | None = None
) -> None:
    """Run every check below.

    Args:
        make_task: the task kind's class.
        spec: a valid spec for it, without ``metrics``.
        path: its data, of at least three samples, not all of them equal.
        make_logits: plausible logits for data of this kind, float32 [len(data), ...]; the same at each call.
        tokenizer_folder: passed to the class.

    Raises:
        AssertionError: the kind does not keep the contract of :class:`automerge.tasks.task.Task`.
    """
    task = make_task(spec, tokenizer_folder)
    data = task.load(path)
    logits = make_logits(data)
    check_declaration(make_task, spec, tokenizer_folder)
    check_data(task, path)
    check_scores(task, data, logits)
    check_batches_add_up(task, data, logits)
    check_order_does_not_matter(task, data, logits)
    check_loss_is_differentiable(task, data, logits)
    check_half_precision_logits(task, data, logits)
    check_chance(make_task, spec, data, tokenizer_folder)
    check_bad_files(task, path)


def check_declaration(make_task: MakeTask, spec: TaskSpec, tokenizer_folder: Path | None) -> None:
    """All declared names are accepted, defaults are declared, and an unknown name is one sentence with its path."""
    task = make_task(spec, tokenizer_folder)
    declared = [metric.name for metric in task.METRICS]
    assert declared, "METRICS is empty"
    assert len(set(declared)) == len(declared), "a metric is declared twice"
    assert task.DEFAULT_METRICS and set(task.DEFAULT_METRICS) <= set(declared), "DEFAULT_METRICS are not declared"
    assert [metric.name for metric in task.metrics] == list(task.DEFAULT_METRICS), "defaults are not used"
    for name in declared:
        chosen = make_task(spec.model_copy(update={"metrics": [name]}), tokenizer_folder).metrics
        assert [metric.name for metric in chosen] == [name]
    for loss in task.LOSSES:
        make_task(spec.model_copy(update={"loss": loss}), tokenizer_folder)
    wrong = ({"metrics": ["no_such_metric"]}, {"loss": "no_such_loss"}, {"arguments": {"no_such_argument": 1}})
    for update in wrong:
        try:
            make_task(spec.model_copy(update=update), tokenizer_folder)
        except TaskError as error:
            assert f"tasks.{spec.name}.{next(iter(update))}" in str(error), f"no path in: {error}"
        else:
            raise AssertionError(f"{update} was accepted")


def check_data(task: Task, path: Path) -> None:
    """Loading is deterministic, every tensor has a row for each sample, and batches and subsets are those rows."""
    data, again = task.load(path), task.load(path)
    assert len(data) >= 3, "give at least three samples"
    assert data.sample_digests() == again.sample_digests(), "loading twice gives other samples"
    assert len(set(data.sample_digests())) > 1, "all samples have one digest"
    for tensors in (data.inputs, data.targets):
        assert tensors, "no inputs or no targets"
        for name, tensor in tensors.items():
            assert len(tensor) == len(data), f"{name} has {len(tensor)} rows for {len(data)} samples"
    batches = list(data.batches(2))
    assert [len(batch) for batch in batches[:-1]] == [2] * (len(batches) - 1)
    joined = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in data.inputs}
    assert all(torch.equal(joined[name], tensor) for name, tensor in data.inputs.items()), "batches lose samples"
    expected = data.subset([2]).sample_digests() + data.subset([0]).sample_digests()
    assert data.subset([2, 0]).sample_digests() == expected, "a subset has other samples"
    if data.keys is None:
        assert expected == [data.sample_digests()[2], data.sample_digests()[0]]
    assert [digest for batch in batches for digest in batch.sample_digests()] == data.sample_digests()


def check_scores(task: Task, data: TaskData, logits: Tensor) -> None:
    """A score has, for the loss and each chosen metric, finite float64 columns with a row for each sample."""
    scores = task.score(logits, data.targets)
    assert len(scores) == len(data)
    assert list(scores.metrics) == [metric.name for metric in task.metrics], "not the chosen metrics"
    for name, ratio in {"the loss": scores.losses, **scores.metrics}.items():
        assert isinstance(ratio, Ratio)
        assert ratio.transform in ("identity", "exp")
        for column in (ratio.numerator, ratio.denominator):
            assert column.shape == (len(data),), f"{name}: {column.shape}"
            assert column.dtype == np.float64, f"{name}: {column.dtype}"
            assert np.isfinite(column).all(), f"{name} is not finite"
        assert (ratio.denominator >= 0).all(), f"{name} has a negative denominator"
        assert ratio.denominator.sum() > 0, f"{name} has no denominator"
    assert scores.losses.transform == "identity", "a loss is a plain ratio of sums"


def check_batches_add_up(task: Task, data: TaskData, logits: Tensor) -> None:
    """Scores of batches, joined, are the scores of all."""
    whole = task.score(logits, data.targets)
    starts = range(0, len(data), 2)
    parts = [
        task.score(logits[start : start + 2], batch.targets)
        for start, batch in zip(starts, data.batches(2), strict=True)
    ]
    _assert_equal(Scores.concatenate(parts), whole)


def check_order_does_not_matter(task: Task, data: TaskData, logits: Tensor) -> None:
    """A sample's score depends on that sample only."""
    order = list(reversed(range(len(data))))
    turned = task.score(logits[order], data.subset(order).targets)
    whole = task.score(logits, data.targets)
    np.testing.assert_allclose(turned.losses.numerator[::-1], whole.losses.numerator, rtol=1e-5)
    np.testing.assert_array_equal(turned.losses.denominator[::-1], whole.losses.denominator)


def check_loss_is_differentiable(task: Task, data: TaskData, logits: Tensor) -> None:
    """The loss has a finite gradient that is not zero, and its mean is the score's."""
    leaf = logits.clone().requires_grad_(True)
    losses, weights = task.loss(leaf, data.targets), task.loss_weights(data.targets)
    assert losses.shape == weights.shape == (len(data),)
    mean = losses.sum() / weights.sum()
    (gradient,) = torch.autograd.grad(mean, leaf)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0
    expected = task.score(logits, data.targets).mean_loss
    assert math.isclose(float(mean.detach()), expected, rel_tol=1e-5), f"{float(mean)} is not {expected}"


def check_half_precision_logits(task: Task, data: TaskData, logits: Tensor) -> None:
    """Half-precision logits are scored in float32: as their float32 copies."""
    half = logits.to(torch.bfloat16)
    _assert_equal(task.score(half, data.targets), task.score(half.float(), data.targets))


def check_chance(make_task: MakeTask, spec: TaskSpec, data: TaskData, tokenizer_folder: Path | None) -> None:
    """Every declared metric has a finite chance value, and it does not depend on the samples' order."""
    names = [metric.name for metric in make_task(spec, tokenizer_folder).METRICS]
    task = make_task(spec.model_copy(update={"metrics": names}), tokenizer_folder)
    turned = data.subset(list(reversed(range(len(data)))))
    for name in names:
        chance = task.chance(name, data)
        assert math.isfinite(chance), f"chance of {name} is {chance}"
        assert math.isclose(chance, task.chance(name, turned), rel_tol=1e-9)


def check_bad_files(task: Task, path: Path) -> None:
    """A file that is missing, or cut off, is a TaskError that names it."""
    for wrong in (path.with_name("missing" + path.suffix), path.parent / "no such folder"):
        try:
            task.load(wrong)
        except TaskError as error:
            assert str(wrong) in str(error), f"{wrong} is not named in: {error}"
        else:
            raise AssertionError(f"{wrong} was loaded")


def _assert_equal(first: Scores, second: Scores) -> None:
    assert list(first.metrics) == list(second.metrics)
    pairs = [(first.losses, second.losses), *zip(first.metrics.values(), second.metrics.values(), strict=True)]
    for one, other in pairs:
        np.testing.assert_allclose(one.numerator, other.numerator, rtol=1e-5)
        np.testing.assert_allclose(one.denominator, other.denominator, rtol=1e-5)
        assert one.transform == other.transform

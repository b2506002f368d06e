"""Classification against closed forms."""

import math

import numpy as np
import pytest
import torch

from automerge.errors import TaskError
from automerge.spec import TaskSpec
from automerge.tasks.task import TaskData, load_task


def _task(**update):
    return load_task(
        TaskSpec(name="digits", kind="classification", specialist="a", validation="v", test="t", **update), None
    )


def _data(labels):
    return TaskData({"inputs": torch.zeros(len(labels), 1)}, {"labels": torch.tensor(labels)})


def test_loss_and_accuracies():
    task = _task(metrics=["top1", "top5"])
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 0], [3.0, 2.9, 2.8, 2.7, 2.6, 0], [0.0, 5, 0, 0, 0, 0]])
    scores = task.score(logits, {"labels": torch.tensor([0, 5, 1])})
    assert scores.metrics["top1"].value == pytest.approx(2 / 3)
    assert scores.metrics["top5"].value == pytest.approx(2 / 3)
    assert scores.losses.numerator[2] == pytest.approx(math.log(math.exp(5) + 5) - 5, rel=1e-5)


def test_a_constant_output_scores_as_one_guess():
    task = _task(metrics=["top1"])
    labels = torch.arange(10)
    assert task.score(torch.zeros(10, 10), {"labels": labels}).metrics["top1"].value == pytest.approx(0.1)


def test_chance_is_the_share_of_the_most_frequent_classes():
    task = _task(metrics=["top1", "top5"])
    data = _data([0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
    assert task.chance("top1", data) == pytest.approx(0.3)
    assert task.chance("top5", data) == pytest.approx(0.7)
    assert task.chance("top5", _data([0, 1, 2])) == 1.0


def test_names_are_checked_with_the_nearest():
    with pytest.raises(TaskError, match=r"tasks.digits.metrics: .*'top_1'; did you mean 'top1'"):
        _task(metrics=["top_1"])
    with pytest.raises(TaskError, match=r"tasks.digits.loss: .* choose one of: cross_entropy"):
        _task(loss="mse")
    with pytest.raises(TaskError, match=r"tasks.digits.arguments: .*takes none"):
        _task(arguments={"shift": True})


def test_labels_beyond_the_outputs_and_wrong_shapes():
    task = _task()
    with pytest.raises(TaskError, match="task 'digits': the data have the label 7 and the model only 5 outputs"):
        task.score(torch.zeros(1, 5), {"labels": torch.tensor([7])})
    with pytest.raises(TaskError, match=r"returned \[1, 3, 5\]"):
        task.score(torch.zeros(1, 3, 5), {"labels": torch.tensor([0])})


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"inputs": np.zeros((2, 1))}, "there are no labels"),
        ({"inputs": np.zeros((2, 1)), "labels": np.zeros((2, 3), int)}, r"shape \[2, 3\]"),
        ({"inputs": np.zeros((2, 1)), "labels": np.array([0, -1])}, "-1 is negative"),
    ],
)
def test_unusable_labels(tmp_path, arrays, sentence):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(TaskError, match=sentence):
        _task().load(tmp_path / "d.npz")


def test_digests_are_of_the_inputs_alone():
    inputs = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.bfloat16)
    first = TaskData({"inputs": inputs}, {"labels": torch.tensor([0, 1, 2])}).sample_digests()
    assert first[0] == first[2] != first[1]
    assert TaskData({"inputs": torch.tensor([5, 6])}, {}).sample_digests()[0] != first[0]

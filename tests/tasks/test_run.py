"""Running a module on a task's data."""

import pytest
import torch
from torch import nn

from automerge.errors import TaskError
from automerge.models.factory import FactoryArchitecture
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.run import evaluate_task
from automerge.tasks.task import TaskData, load_task

ARCHITECTURE = FactoryArchitecture(ModelSpec(kind="factory", target="torch.nn:Linear"), {})
TASK = load_task(TaskSpec(name="blobs", kind="classification", specialist="a", validation="v", test="t"), None)


def _data(n=11):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 4, generator=generator)
    return TaskData({"inputs": inputs}, {"labels": torch.randint(0, 3, (n,), generator=generator)})


def test_batches_make_no_difference_and_the_order_is_kept():
    module, data = nn.Linear(4, 3).eval(), _data()
    expected = TASK.score(module(data.inputs["inputs"]), data.targets)
    for batch_size in (1, 4, 100):
        scores = evaluate_task(ARCHITECTURE, module, TASK, data, batch_size, "cpu")
        assert len(scores) == 11
        torch.testing.assert_close(
            torch.from_numpy(scores.losses.numerator), torch.from_numpy(expected.losses.numerator), rtol=1e-5, atol=1e-6
        )
    assert not any(parameter.grad is not None for parameter in module.parameters())


def test_half_precision_modules_take_float32_inputs():
    module = nn.Linear(4, 3).to(torch.bfloat16).eval()
    assert 0 < evaluate_task(ARCHITECTURE, module, TASK, _data(), 4, torch.device("cpu")).mean_loss < 10


def test_a_loss_that_is_not_finite_names_task_and_sample():
    module, data = nn.Linear(4, 3).eval(), _data()
    data.inputs["inputs"][6] = torch.inf
    with pytest.raises(TaskError, match="task 'blobs': the loss of sample 6 is not finite"):
        evaluate_task(ARCHITECTURE, module, TASK, data, 4, "cpu")


class _Embedded(nn.Embedding):
    def get_input_embeddings(self):
        return self

    def forward(self, input_ids):
        raise AssertionError("on a GPU a token beyond the rows would end the process")


class _Unembedded(_Embedded):
    def get_input_embeddings(self):
        raise NotImplementedError

    def forward(self, input_ids):
        return nn.functional.one_hot(input_ids[:, 0] % 3, 3).float()


def test_a_token_beyond_the_models_rows_is_refused_before_the_model_runs():
    ids = torch.tensor([[1, 2], [19, 0], [3, 3]])
    data = TaskData({"input_ids": ids}, {"labels": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(TaskError, match="task 'blobs': the data have the token 19 and the model only 16 rows; "):
        evaluate_task(ARCHITECTURE, _Embedded(16, 3).eval(), TASK, data, 1, "cpu")
    data.inputs["input_ids"] = ids - 3
    with pytest.raises(TaskError, match="task 'blobs': the data have the token -3 and the model only 16"):
        evaluate_task(ARCHITECTURE, _Embedded(16, 3).eval(), TASK, data, 1, "cpu")
    data.inputs["input_ids"] = ids
    assert len(evaluate_task(ARCHITECTURE, _Unembedded(16, 3).eval(), TASK, data, 1, "cpu")) == 3


def test_a_model_that_does_not_take_the_inputs():
    with pytest.raises(TaskError, match=r"task 'blobs': the model fails on the inputs inputs \[4, 4\]: RuntimeError"):
        evaluate_task(ARCHITECTURE, nn.Linear(5, 3), TASK, _data(), 4, "cpu")


class _Greedy(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 50)  # a pebibyte


def test_memory_that_is_too_small_is_called_so():
    sentence = "task 'blobs': out of memory when the model ran on 4 samples; lower the tasks' batch_size"
    with pytest.raises(TaskError, match=sentence):
        evaluate_task(ARCHITECTURE, _Greedy(), TASK, _data(), 4, "cpu")

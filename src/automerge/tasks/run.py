"""Running a model on a task's data."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from automerge.errors import AutoMergeError, TaskError, is_out_of_memory
from automerge.models.architecture import Architecture, short_reason
from automerge.tasks.task import Scores, Task, TaskData


def evaluate_task(
    architecture: Architecture,
    module: nn.Module,
    task: Task,
    data: TaskData,
    batch_size: int,
    device: torch.device | str,
    *,
    soft: bool = False,
    temperatures: Sequence[float] = (),
) -> Scores:
    """Loss and metrics of a model on every sample of a task, in the order of the data.

    Args:
        architecture: knows how the module is called.
        module: in evaluation mode, on ``device``.
        task: the loss and the metrics.
        data: the samples, on any device.
        batch_size: samples a forward pass.
        device: where the module is.
        soft, temperatures: what else to score, as of ``Task.score``.

    Returns:
        Scores of ``len(data)`` samples; losses and metrics are computed in float32 from the module's logits.

    Raises:
        TaskError: the loss of a sample is not finite, the logits do not fit the targets, the model fails on the inputs,
            or it has no embedding for a token of the data.
    """
    check_tokens(module, task, data)
    parts: list[Scores] = []
    start = 0
    # Not in inference mode: what a model keeps from here must do for a pass with a gradient.
    with torch.no_grad():
        for batch in data.batches(batch_size):
            moved = batch.to(device)
            logits = run_on(architecture, module, task, moved)
            scores = task.score(logits, moved.targets, soft=soft, temperatures=temperatures)
            if not bool(np.isfinite(scores.losses.numerator).all()):
                sample = start + int(np.flatnonzero(~np.isfinite(scores.losses.numerator))[0])
                raise TaskError(
                    f"task {task.spec.name!r}: the loss of sample {sample} is not finite",
                    "check the weights and the inputs",
                )
            parts.append(scores)
            start += len(batch)
    return Scores.concatenate(parts)


def run_on(architecture: Architecture, module: nn.Module, task: Task, batch: TaskData) -> torch.Tensor:
    """The logits of a model on a batch that is on its device.

    Raises:
        TaskError: the model fails on the inputs, or memory is too small for them.
    """
    try:
        return architecture.call(module, batch.inputs)
    except AutoMergeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise TaskError(
                f"task {task.spec.name!r}: out of memory when the model ran on {len(batch)} samples",
                "lower the tasks' batch_size, or run fewer trials at once",
            ) from None  # the traceback would keep the activations
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.inputs.items())
        raise TaskError(
            f"task {task.spec.name!r}: the model fails on the inputs {shapes}: {short_reason(error)}",
            "check the names, shapes and dtypes of the data's inputs, and tasks.batch_size",
        ) from error


def check_tokens(module: nn.Module, task: Task, data: TaskData) -> None:
    """Refuse tokens that the model has no embedding for: on a GPU they would end the process, not only the call.

    Raises:
        TaskError: there are some.
    """
    ids = data.inputs.get("input_ids")
    if ids is None or not ids.numel() or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        return
    try:
        rows = len(module.get_input_embeddings().weight)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < rows:
            raise TaskError(
                f"task {task.spec.name!r}: the data have the token {token} and the model only {rows} rows",
                "tokenise the data for this model, or merge with the vocabulary that they need by merge.vocabulary",
            )

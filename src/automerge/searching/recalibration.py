"""Recalibration of BatchNorm: the statistics of the merged model's own activations, in place of the sources' average.

A merged layer's activations have another mean and another variance than the sources' layers had, mostly a smaller one;
an average of the sources' statistics then normalises them wrongly, layer after layer. One forward pass over the
validation data measures what they are. While it runs each layer normalises by its batch, as in training; what is kept
is the mean and the variance over all samples of all tasks, of which each counts alike.

Batches mix all tasks that run under one head with inputs of one form, in proportion to their data. Tasks under heads of
their own are normalised by batches of their own while the pass runs, which is an approximation for the layers after the
first; whether it is good enough, the objective says.

Relatives: Izmailov et al., https://arxiv.org/abs/1803.05407 (after weight averaging); Jordan et al., "REPAIR",
https://arxiv.org/abs/2211.08403 (after merging).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from automerge.errors import AutoMergeError, SearchError
from automerge.merging.apply import narrow
from automerge.models.architecture import Architecture, short_reason
from automerge.models.heads import Heads
from automerge.models.state import state_names
from automerge.searching.evaluator import MeasuredTask, tasks_by_form
from automerge.tasks.task import TaskData

log = logging.getLogger(__name__)


def recalibrate(
    heads: Heads,
    tasks: Mapping[str, MeasuredTask],
    architecture: Architecture,
    device: torch.device,
    objective: Callable[[], float],
) -> dict[str, Tensor]:
    """Recalibrate the live model, and keep that if it is not worse on the validation data.

    Does nothing, and runs nothing, where the shared tensors have no BatchNorm statistics.

    Args:
        heads: the merged model; afterwards its live tensors hold the statistics that were kept.
        tasks: all tasks with their validation data.
        architecture: how the model is called.
        device: where it runs.
        objective: the objective of the live model.

    Returns:
        the values kept, float64 by the name of the buffer; empty: the buffers stay as they were merged.
    """
    layers = batch_norms(heads, tasks)
    if not layers:
        return {}
    before = {name: heads.live[name].clone() for pair in layers.items() for name in pair}
    try:
        plain = objective()
        values = recalibrate_live(heads, tasks, architecture, device)
        found = objective()
    except AutoMergeError as error:
        _restore(heads, before)
        log.warning("BatchNorm keeps the average of the sources' statistics: recalibration failed: %s", error)
        return {}
    if found >= plain:
        log.info(
            "BatchNorm recalibrated in %d layers: the objective is %.6g, and %.6g with the sources' average",
            len(layers),
            found,
            plain,
        )
        return values
    _restore(heads, before)
    log.info(
        "BatchNorm keeps the average of the sources' statistics: the objective is %.6g, and %.6g recalibrated",
        plain,
        found,
    )
    return {}


def recalibrate_live(
    heads: Heads, tasks: Mapping[str, MeasuredTask], architecture: Architecture, device: torch.device
) -> dict[str, Tensor]:
    """Bring the live BatchNorm statistics to what the live model's activations have; returns the values.

    Raises:
        SearchError, TaskError: as `measure`.
        MergeError: a value does not fit the buffer's dtype.
    """
    values = measure(heads, tasks, architecture, device)
    for name, value in values.items():
        live = heads.live[name]
        live.copy_(narrow(name, value.to(live.device), live.dtype))
    return values


@contextmanager
def batch_statistics(heads: Heads, tasks: Mapping[str, MeasuredTask]) -> Iterator[None]:
    """While it is entered, shared BatchNorm layers normalise by their batch, as in training, and update nothing."""
    layers = [
        layer
        for reference in dict.fromkeys(task.reference for task in tasks.values())
        for layer, _, _ in _layers(heads.module(reference), heads.live)
    ]
    with _without_running_statistics(layers):
        yield


def batch_norms(heads: Heads, tasks: Mapping[str, MeasuredTask]) -> dict[str, str]:
    """The shared BatchNorm layers: the name of the running mean -> that of the running variance."""
    return {
        mean: variance
        for reference in dict.fromkeys(task.reference for task in tasks.values())
        for _, mean, variance in _layers(heads.module(reference), heads.live)
    }


def measure(
    heads: Heads, tasks: Mapping[str, MeasuredTask], architecture: Architecture, device: torch.device
) -> dict[str, Tensor]:
    """The mean and the (unbiased) variance of what each shared BatchNorm layer is given, float64 on the CPU.

    The live tensors are as before afterwards. Layers that the pass does not reach are left out.

    Raises:
        SearchError: the model fails on its inputs, an activation is not finite, or there is a single sample.
    """
    moments: dict[str, _Moments] = {}
    variances: dict[str, str] = {}
    for module, names in tasks_by_form(heads.module, tasks):
        data = [tasks[name].data for name in names]
        batch_size = min(tasks[name].batch_size for name in names)
        layers = _layers(module, heads.live)
        variances |= {mean: variance for _, mean, variance in layers}
        with _observed(layers, moments), torch.no_grad():
            for inputs in _mixed_batches(data, batch_size):
                try:
                    architecture.call(module, {name: tensor.to(device) for name, tensor in inputs.items()})
                except AutoMergeError:
                    raise
                except Exception as error:
                    raise SearchError(
                        f"the model fails in the pass: {short_reason(error)}", "set merge.recalibrate to false"
                    ) from error
    values: dict[str, Tensor] = {}
    for name, found in moments.items():
        if not bool(torch.isfinite(found.mean).all() and torch.isfinite(found.squares).all()):
            raise SearchError(f"the activations at {name!r} are not finite", "set merge.recalibrate to false")
        values[name] = found.mean.cpu()
        values[variances[name]] = (found.squares / max(1, found.count - 1)).clamp_(min=0).cpu()
    return values


class _Moments:
    """Mean and sum of squared deviations, float64 [channels], merged batch by batch (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Take in activations [n, channels, ...]."""
        over = [0, *range(2, inputs.dim())]
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        variance, mean = torch.var_mean(wide, over, correction=0)
        count = inputs.numel() // inputs.shape[1]
        total = self.count + count
        apart = mean.double() - self.mean
        self.squares += variance.double() * count + apart.square() * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total


@contextmanager
def _observed(layers: list[tuple[_BatchNorm, str, str]], moments: dict[str, _Moments]) -> Iterator[None]:
    """Let the layers normalise by their batch, and add what they are given to ``moments``, by the mean's name."""

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            inputs: Tensor = args[0]
            if inputs.numel():
                moments.setdefault(name, _Moments(inputs.shape[1], inputs.device)).add(inputs.detach())

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for layer, name, _ in layers]
    try:
        with _without_running_statistics([layer for layer, _, _ in layers]):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_running_statistics(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Without them a layer in evaluation mode takes the batch's, and updates nothing."""
    kept = [(layer, layer.running_mean, layer.running_var) for layer in dict.fromkeys(layers)]
    try:
        for layer, _, _ in kept:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, mean, variance in kept:
            layer.running_mean, layer.running_var = mean, variance


def _layers(module: nn.Module, live: Mapping[str, Tensor]) -> list[tuple[_BatchNorm, str, str]]:
    """The BatchNorm layers of a module whose statistics are shared, with the names of mean and variance."""
    tied = state_names(module).tied
    found = []
    for prefix, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
            continue
        names = [f"{prefix}.{leaf}".lstrip(".") for leaf in ("running_mean", "running_var")]
        mean, variance = (tied.get(name, name) for name in names)
        if mean in live and variance in live:
            found.append((layer, mean, variance))
    return found


def _mixed_batches(data: list[TaskData], batch_size: int) -> Iterator[Mapping[str, Tensor]]:
    """All samples in batches in which each data set has its share; of two samples or more."""
    places = sorted(
        ((index + 0.5) / len(each), which, index) for which, each in enumerate(data) for index in range(len(each))
    )
    if len(places) < 2:
        raise SearchError(
            "a single sample has no variance", "give more validation data, or set merge.recalibrate to false"
        )
    count = min(-(-len(places) // batch_size), len(places) // 2)
    for number in range(count):
        rows = places[number * len(places) // count : (number + 1) * len(places) // count]
        parts = [each.subset([index for _, which, index in rows if which == at]).inputs for at, each in enumerate(data)]
        yield {name: torch.cat([part[name] for part in parts]) for name in data[0].inputs}


@torch.no_grad()
def _restore(heads: Heads, before: Mapping[str, Tensor]) -> None:
    for name, tensor in before.items():
        heads.live[name].copy_(tensor)

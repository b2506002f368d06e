"""Gathering what some techniques need to know of each source, in a pass over the validation data of its own tasks.

Nothing is trained. The source runs under its own head and in float32 (float64 if it is); what a kind of statistics is,
`automerge.merging.statistics` says. The result depends on the sources, the data and the seed only, not on torch's
global random state; on another device or number of threads it may differ in the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automerge.errors import AutoMergeError, SearchError
from automerge.merging.random import lanes, mask_key
from automerge.merging.statistics import statistic_key
from automerge.merging.technique import STATISTICS as STATISTIC_KINDS
from automerge.merging.technique import Declaration, Statistic
from automerge.models.architecture import Architecture, short_reason
from automerge.searching.evaluator import MeasuredTask
from automerge.tasks.language_modelling import IGNORED
from automerge.tasks.run import check_tokens, run_on

FISHER_SAMPLES = 512
"""Most samples of a source for its Fisher information, spread evenly over its tasks; each needs a backward pass."""

GRAM_SAMPLES = 4096
"""Most samples of a source for its Gram matrices, spread evenly over its tasks."""

_CHUNK_ELEMENTS = 2**22
"""Inputs of a layer turned into rows at a time: 16 MB of float32, whatever the batch."""


def needed_statistics(techniques: Iterable[Declaration]) -> list[Statistic]:
    """The kinds of statistics that some of these techniques need."""
    needed = {kind for declaration in techniques for kind in declaration.statistics}
    return [kind for kind in STATISTIC_KINDS if kind in needed]


def refuse_sources_without_tasks(
    kinds: Sequence[Statistic], sources: Sequence[str], specialists: Sequence[str]
) -> None:
    """Raise where a source has no data of its own to gather statistics from.

    Args:
        kinds: the kinds of statistics that the techniques need; none: nothing is wrong.
        sources: the sources.
        specialists: the references of the tasks.

    Raises:
        SearchError: a source is no task's specialist.
    """
    without = [source for source in sources if source not in specialists]
    if kinds and without:
        raise SearchError(
            f"source {without[0]!r} is the specialist of no task, and search.techniques has one that needs statistics "
            f"({', '.join(kinds)}) of every source on its own data",
            "give it a task, or leave out 'fisher', 'regmean' and the like",
        )


def gather(
    kinds: Sequence[Statistic],
    sources: Sequence[str],
    tasks: Mapping[str, MeasuredTask],
    module_of: Callable[[str], nn.Module],
    names: Sequence[str],
    architecture: Architecture,
    device: torch.device,
    seed: int,
) -> dict[str, Tensor]:
    """The statistics of all sources, by the keys of `automerge.merging.statistics`.

    Args:
        kinds: the kinds wanted.
        sources: the sources; each is the reference of a task or more.
        tasks: all tasks with their validation data, by name.
        module_of: the model of a source under its own head, in evaluation mode, on the device; called once for each.
        names: the merged parameters.
        architecture: how a model is called.
        device: where it runs.
        seed: of the labels that the models draw.

    Raises:
        SearchError: a model cannot be differentiated, a statistic is not finite, or no merged parameter can have one.
        TaskError: a model fails on its data, or has no embedding for a token of them.
    """
    found: dict[Statistic, dict[str, dict[str, Tensor]]] = {kind: {} for kind in kinds}
    for source in sources:
        own = {name: task for name, task in tasks.items() if task.reference == source}
        module = module_of(source)
        for task in own.values():
            check_tokens(module, task.task, task.data)
        if "gram" in kinds:
            found["gram"][source] = gram_matrices(module, own, names, architecture, device)
        if "fisher" in kinds:
            found["fisher"][source] = fisher_diagonals(module, own, names, architecture, device, source, seed)
    gathered: dict[str, Tensor] = {}
    for kind, by_source in found.items():
        common = [name for name in names if all(name in each for each in by_source.values())]
        if not common:
            raise SearchError(
                f"search.techniques has one that needs {kind!r} statistics, and no merged parameter has any",
                "leave it out",
            )
        gathered |= {
            statistic_key(kind, source, name): each[name] for source, each in by_source.items() for name in common
        }
    for key, tensor in gathered.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SearchError(f"the statistics {key!r} are not finite", "check the weights and the validation data")
    return gathered


def fisher_diagonals(
    module: nn.Module,
    tasks: Mapping[str, MeasuredTask],
    names: Sequence[str],
    architecture: Architecture,
    device: torch.device,
    source: str,
    seed: int,
) -> dict[str, Tensor]:
    """The diagonal of a model's Fisher information, float32 by parameter, divided by its L2 norm over all of them.

    The mean over samples of the squared gradient of log p(y | x), y drawn from the model's own softmax over the last
    axis of its logits: one draw a sample, and for each position that has a target where there are several (their
    gradients are uncorrelated, so the square of their sum has the right expectation). Source: Matena and Raffel,
    https://arxiv.org/abs/2111.09832, section 3; the expectation over y is replaced by a draw.

    Raises:
        SearchError: a backward pass fails, or the output depends on no parameter.
    """
    state = module.state_dict(keep_vars=True)
    wanted = {name: state[name] for name in names if name in state and state[name].is_floating_point()}
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(each, dtype=torch.float32, requires_grad=False) for name, each in wanted.items()}
    for task_name, task, indices in _shares(tasks, FISHER_SAMPLES):
        for index in indices:
            sample = task.data.subset([index]).to(device)
            key = mask_key(seed, source, f"fisher/{task_name}/{index}")
            try:
                logits = run_on(architecture, module, task.task, sample)
                loss = _drawn_loss(logits, sample.targets, key)
                gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            except AutoMergeError:
                raise
            except Exception as error:
                raise SearchError(
                    f"source {source!r}: its Fisher information on task {task_name!r} cannot be gathered: "
                    f"{short_reason(error)}",
                    "leave 'fisher' out of search.techniques",
                ) from error
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    # Not in place: the gradient is autograd's, and several parameters may share one.
                    wide = gradient.to(torch.float32)
                    total.addcmul_(wide, wide)
    for parameter in wanted.values():
        parameter.requires_grad_(False)
    norm = math.sqrt(math.fsum(float(total.double().square().sum()) for total in sums.values()))
    if norm == 0:
        raise SearchError(
            f"source {source!r}: its Fisher information is zero: no merged parameter changes its logits",
            "leave 'fisher' out of search.techniques",
        )
    return {name: total.div_(norm) for name, total in sums.items()}


def gram_matrices(
    module: nn.Module,
    tasks: Mapping[str, MeasuredTask],
    names: Sequence[str],
    architecture: Architecture,
    device: torch.device,
) -> dict[str, Tensor]:
    """The mean of x x' over the inputs x of every linear layer and ungrouped convolution, float32 [n, n] by weight.

    A weight that several modules share has one only if all of them are such layers; a layer that is never called has
    none. Where the data have an attention mask, what it masks is left out of inputs that are laid out as it is.
    Products are summed in float64. Source: Jin et al., https://arxiv.org/abs/2212.09849, section 3.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: Tensor | None = None

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for part in _input_rows(layer, args[0] if args else kwargs["input"], mask):
                total = sums.setdefault(
                    name, torch.zeros(part.shape[1], part.shape[1], dtype=torch.float64, device=part.device)
                )
                total.add_(part.T @ part)
                rows[name] = rows.get(name, 0) + len(part)

        return hook

    handles = [
        layer.register_forward_pre_hook(observe(name), with_kwargs=True)
        for name, layers in linear_layers(module, names).items()
        for layer in layers
    ]
    try:
        with torch.no_grad():
            for _, task, indices in _shares(tasks, GRAM_SAMPLES):
                for batch in task.data.subset(indices).batches(task.batch_size):
                    moved = batch.to(device)
                    mask = moved.inputs.get("attention_mask")
                    run_on(architecture, module, task.task, moved)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / rows[name]).to(torch.float32) for name, total in sums.items() if rows[name]}


def linear_layers(module: nn.Module, names: Sequence[str]) -> dict[str, list[nn.Module]]:
    """By the name of their weight, the modules that multiply their input with it and do nothing else with it."""
    state = module.state_dict(keep_vars=True)
    wanted = {id(state[name]): name for name in names if name in state}
    holders: dict[str, list[nn.Module]] = {}
    for each in module.modules():
        for parameter in each.parameters(recurse=False):
            if id(parameter) in wanted:
                holders.setdefault(wanted[id(parameter)], []).append(each)
    return {
        name: layers
        for name, layers in holders.items()
        if all(_is_linear(layer) and layer.weight is state[name] for layer in layers)
    }


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    return isinstance(layer, nn.Linear)


def _input_rows(layer: nn.Module, inputs: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """What the layer multiplies with its weight [m, n], as rows [k, n] in pieces of a bounded size."""
    inputs = inputs.detach()
    if isinstance(layer, nn.Conv2d):
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(0)
        padding = (0, 0) if isinstance(layer.padding, str) else layer.padding
        one = F.unfold(inputs[:1], layer.kernel_size, layer.dilation, padding, layer.stride).numel()
        for images in torch.split(inputs, max(1, _CHUNK_ELEMENTS // max(1, one))):
            patches = F.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride)
            yield _wide(patches.transpose(1, 2).reshape(-1, patches.shape[1]))
        return
    if mask is not None and inputs.dim() == 3 and mask.shape == inputs.shape[:2]:
        inputs = inputs[mask.bool()]
    flat = inputs.reshape(-1, inputs.shape[-1])
    for part in torch.split(flat, max(1, _CHUNK_ELEMENTS // max(1, flat.shape[1]))):
        yield _wide(part)


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.to(torch.float32)


def _drawn_loss(logits: Tensor, targets: Mapping[str, Tensor], key: int) -> Tensor:
    """-log p(y | x) summed over positions, y drawn from softmax(logits) by random numbers that only the key decides."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    bits = lanes(key, 0, 4 * len(flat)).reshape(-1, 4)
    uniform = (bits[:, 0] * 65536 + bits[:, 1] + 0.5) / 2**32
    drawn = torch.empty(len(flat), dtype=torch.int64)
    step = max(1, _CHUNK_ELEMENTS // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        # On the CPU, where a running sum is the same every time.
        ends = torch.softmax(flat[start : start + step].detach().cpu().double(), dim=-1).cumsum(-1)
        wanted = uniform[start : start + step, None].double() * ends[:, -1:]
        drawn[start : start + step] = torch.searchsorted(ends, wanted, right=True)[:, 0].clamp_(max=flat.shape[1] - 1)
    labels = targets.get("labels")
    if labels is not None and labels.shape == logits.shape[:-1]:
        drawn[labels.reshape(-1).cpu() == IGNORED] = IGNORED
    return F.cross_entropy(flat, drawn.to(flat.device), ignore_index=IGNORED, reduction="sum")


def _shares(tasks: Mapping[str, MeasuredTask], samples: int) -> Iterator[tuple[str, MeasuredTask, list[int]]]:
    """Each task with its share of the samples, evenly spaced, since data are often sorted."""
    share = max(1, samples // len(tasks))
    for name, task in tasks.items():
        total = len(task.data)
        count = min(total, share)
        yield name, task, [index * total // count for index in range(count)]

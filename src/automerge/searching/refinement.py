"""Gradient refinement: the sources' weights of every block, layer or tensor, moved along the gradient of the objective.

No parameter of the model is trained. What moves are the few scalars of the recipe; the merged model is rebuilt from the
recipe at every step, and only such a rebuilt model is ever scored and chosen. A backward pass gives the gradient of the
cost in the merged tensors; each is contracted with its derivative in the scalars (`automerge.merging.derivative`) as
soon as it is there, and freed, so beside the weights and the activations there is one tensor's gradient and task
vectors in memory.

The validation data are split in two by a stratified order: the gradient sees one part, and the early stopping the
other. The scalars are drawn back to where they started. Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980) takes the
steps, in float64, and the batches are a function of the seed and the step, so a run repeats exactly on the same device
and number of threads, and goes on exactly from a checkpoint.

Relatives: AdaMerging (Yang et al., https://arxiv.org/abs/2310.02575) moves such weights by the entropy of unlabelled
data, aTLAS (Zhang et al., https://arxiv.org/abs/2407.02880) scales task vectors anisotropically.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from automerge.documents import write_atomically
from automerge.errors import AutoMergeError, SearchError
from automerge.merging.derivative import refinable, scalar_gradient, scalar_values, scalars_of, with_scalars
from automerge.merging.recipe import Recipe, RecipeBlock
from automerge.merging.technique import load_technique
from automerge.models.architecture import short_reason
from automerge.models.state import state_names
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator, tasks_by_form
from automerge.searching.objective import Measure, Objective
from automerge.spec import RefineSpec
from automerge.tasks.run import check_tokens, run_on
from automerge.tasks.task import TaskData

Rows = Mapping[str, Sequence[int]]

CHECK_EVERY = 5
"""Steps between two looks at the held-back data."""

SHARPNESS = 0.05
"""For the worst task: how far below the worst a task's cost may be and still count for 1 / e of it."""


@dataclass(frozen=True)
class Split:
    """The validation data in two parts, by task.

    Attributes:
        fit: rows that the gradient sees.
        held_back: rows that only the early stopping sees.
        objective: the objective with the specialists' figures on the rows held back.
    """

    fit: Rows
    held_back: Rows
    objective: Objective


@dataclass(frozen=True)
class Refined:
    """How one start ended.

    Attributes:
        blocks: the recipe's blocks with the best scalars on the rows held back; the start's own where none was better.
        scalars: how many numbers were tuned.
        steps: steps taken.
        best_step: the step of ``blocks``; 0 is the start.
        samples: forward passes of single samples; a backward pass counts as two.
        before, after: the objective on the rows held back.
    """

    blocks: list[RecipeBlock]
    scalars: int
    steps: int
    best_step: int
    samples: int
    before: float
    after: float


@dataclass
class _State:
    """All that a checkpoint holds."""

    values: list[float]
    first: list[float]
    second: list[float]
    step: int = 0
    samples: int = 0
    best_step: int = 0
    best_values: list[float] = field(default_factory=list)
    before: float = -math.inf
    after: float = -math.inf
    checks_without_gain: int = 0
    done: bool = False


def refine(
    evaluator: RecipeEvaluator,
    start: Sequence[RecipeBlock],
    groups_of: Callable[[RecipeBlock], list[tuple[str, list[str]]]],
    objective: Objective,
    split: Split,
    spec: RefineSpec,
    *,
    free: Callable[[RecipeBlock], RecipeBlock | None] | None = None,
    seed: int,
    checkpoint: Path,
    batch_statistics: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Refined:
    """Move the scalars of a recipe along the gradient of the objective.

    Args:
        evaluator: merges, and runs the merged model.
        start: the blocks to start from.
        groups_of: how a block's parameters are grouped, each group with scalars of its own: names and parameters.
        objective: what the gradient is of.
        split: the validation data in two parts.
        spec: steps, learning rate and so on.
        free: a block in the form in which its scalars move, or None where it stays as it is; by default every block
            whose technique has a derivative moves (`automerge.merging.derivative.refinable`).
        seed: of the batches.
        checkpoint: a file of the state after each look at the held-back data; if there is one, it goes on from there.
        batch_statistics: entered around passes with a gradient; for BatchNorm to normalise by its batch.

    Raises:
        SearchError: the model cannot be differentiated, no block has a derivative, or the objective is undefined on the
            rows held back.
        AutoMergeError: the start itself cannot be merged or measured.
    """
    has_base = evaluator.recipe.base is not None
    pieces = _pieces(start, free or partial(refinable, has_base=has_base), groups_of)
    origin = [value for piece in pieces if piece.free for value in scalar_values(piece.block)]
    if not origin:
        raise SearchError(
            "no block can be refined by a gradient: its technique has none, or a constraint holds it",
            "set search.refine to null, or allow other techniques",
        )
    split.objective.check()
    anchor = torch.tensor(origin, dtype=torch.float64)

    def blocks_at(values: Sequence[float]) -> list[RecipeBlock]:
        return _blocks_at(pieces, values)

    def held_back(blocks: Sequence[RecipeBlock]) -> tuple[float, int]:
        evaluator.merge(blocks)
        outcome = evaluator.measure(split.held_back)
        measures = {name: Measure.of(scores) for name, scores in outcome.scores.items()}
        return split.objective.value(split.objective.preservation(measures)), outcome.samples

    state = _read(checkpoint, len(origin))
    if state is None:
        before, samples = held_back(blocks_at(origin))
        state = _State(
            values=list(origin),
            first=[0.0] * len(origin),
            second=[0.0] * len(origin),
            samples=samples,
            best_values=list(origin),
            before=before,
            after=before,
        )
        _write(checkpoint, state)
    gradients = WeightGradients(evaluator, objective, batch_statistics)
    values = torch.tensor(state.values, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([values], lr=spec.learning_rate)
    if state.step:
        optimiser.state[values] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": torch.tensor(state.first, dtype=torch.float64),
            "exp_avg_sq": torch.tensor(state.second, dtype=torch.float64),
        }
    while not state.done and state.step < spec.steps:
        state.step += 1
        batch = _batch(evaluator.tasks, split.fit, spec.batch_size, seed, state.step)
        state.samples += 3 * sum(len(rows) for rows in batch.values())
        try:
            found = gradients(blocks_at(values.tolist()), batch)
        except AutoMergeError:
            if state.step == 1:
                raise
            found = {}
        except Exception as error:
            raise SearchError(
                f"the model cannot be differentiated: {short_reason(error)}", "set search.refine to null"
            ) from error
        flat = torch.tensor(
            [value for piece in pieces if piece.free for value in found.get(piece.block.name, [math.nan])],
            dtype=torch.float64,
        )
        if not bool(flat.isfinite().all()):
            state.done = True  # the steps led to where no model is: what was found before stands
            _write(checkpoint, state)
            break
        values.grad = flat + spec.pull * 2 * (values.detach() - anchor) / len(origin)
        optimiser.step()
        if state.step % CHECK_EVERY and state.step < spec.steps:
            continue
        _check(state, values, optimiser, held_back, blocks_at, spec)
        _write(checkpoint, state)
    return Refined(
        blocks=blocks_at(state.best_values) if state.best_step else list(start),
        scalars=len(origin),
        steps=state.step,
        best_step=state.best_step,
        samples=state.samples,
        before=state.before,
        after=state.after,
    )


def _check(
    state: _State,
    values: Tensor,
    optimiser: torch.optim.Adam,
    held_back: Callable[[Sequence[RecipeBlock]], tuple[float, int]],
    blocks_at: Callable[[Sequence[float]], list[RecipeBlock]],
    spec: RefineSpec,
) -> None:
    """Look at the held-back data, and keep what a checkpoint needs."""
    state.values = values.tolist()
    moments = optimiser.state[values]
    state.first, state.second = moments["exp_avg"].tolist(), moments["exp_avg_sq"].tolist()
    try:
        score, samples = held_back(blocks_at(state.values))
    except AutoMergeError:
        score, samples = -math.inf, 0  # the step led to where no model is: it counts as no gain
    state.samples += samples
    if score > state.after:
        state.after, state.best_step, state.best_values = score, state.step, list(state.values)
        state.checks_without_gain = 0
    else:
        state.checks_without_gain += 1
        state.done = state.checks_without_gain >= spec.patience


class WeightGradients:
    """Callable: blocks and a batch -> the gradient of the cost in the scalars of each block, by its name.

    Args:
        evaluator: merges, and runs the merged model.
        objective: what the cost is of.
        batch_statistics: entered around each pass.
    """

    def __init__(
        self,
        evaluator: RecipeEvaluator,
        objective: Objective,
        batch_statistics: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._evaluator = evaluator
        self._objective = objective
        self._batch_statistics = batch_statistics

    def __call__(self, blocks: Sequence[RecipeBlock], batch: Rows) -> dict[str, list[float]]:
        """One merge, one forward and one backward pass.

        Args:
            blocks: the recipe's blocks.
            batch: rows by task.

        Returns:
            by the name of each block whose technique is differentiable, one value for each of its scalars.

        Raises:
            TaskError: the model fails on the inputs.
        """
        evaluator = self._evaluator
        recipe = evaluator.recipe.model_copy(update={"blocks": list(blocks)})
        evaluator.merger.apply(recipe, evaluator.heads.live)
        for name, task in evaluator.tasks.items():
            check_tokens(evaluator.heads.module(task.reference), task.task, task.data.subset(batch[name]))
        free = [block for block in blocks if refinable(block, has_base=recipe.base is not None) is not None]
        sums = {block.name: [0.0] * len(scalars_of(block)) for block in free}
        owner = {name: block for block in free for name in block.parameters}
        modules = {task.reference: evaluator.heads.module(task.reference) for task in evaluator.tasks.values()}
        with self._watched(list({id(each): each for each in modules.values()}.values()), owner, recipe, sums):
            with torch.enable_grad(), self._batch_statistics(), self._autocast():
                cost = self._cost(batch)
            torch.autograd.backward(cost)
        return sums

    def _cost(self, batch: Rows) -> Tensor:
        """The cost of a batch: the aggregate over the tasks of the objective's differentiable loss; scalar."""
        costs: list[Tensor] = []
        for module, members in tasks_by_form(self._evaluator.heads.module, self._evaluator.tasks):
            parts = [
                self._evaluator.tasks[name].data.subset(batch[name]).to(self._evaluator.device) for name in members
            ]
            joined = _joined(parts)
            first = self._evaluator.tasks[members[0]]
            logits = run_on(self._evaluator.architecture, module, first.task, joined)
            for name, part, own in zip(members, parts, torch.split(logits, [len(each) for each in parts]), strict=True):
                task = self._evaluator.tasks[name].task
                count = task.loss_weights(part.targets).sum()
                loss = task.loss(own, part.targets).sum() / count
                soft = (
                    task.soft_metric(own, part.targets).sum() / count
                    if self._objective.name in ("metric", "soft_metric")
                    else torch.zeros(())
                )
                costs.append(self._objective.loss(name, loss, soft))
        stacked = torch.stack(costs)
        if self._objective.aggregate == "worst":
            return SHARPNESS * torch.logsumexp(stacked / SHARPNESS, dim=0)
        return stacked.mean()

    def _autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products on a GPU, where the weights are wider."""
        if self._evaluator.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    def _watched(
        self,
        modules: Sequence[nn.Module],
        owner: Mapping[str, RecipeBlock],
        recipe: Recipe,
        sums: dict[str, list[float]],
    ) -> AbstractContextManager[None]:
        return _Watched(self._evaluator, modules, owner, recipe, sums)


def tensor_gradients(
    evaluator: RecipeEvaluator,
    blocks: Sequence[RecipeBlock],
    objective: Objective,
    batch_statistics: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, dict[str, float]]:
    """The gradient of the cost in each tensor's own source weights, at a recipe, over all validation data.

    Args:
        evaluator, objective, batch_statistics: as of `refine`.
        blocks: the recipe's blocks.

    Returns:
        by tensor and source; tensors whose technique has no derivative are left out.

    Raises:
        SearchError: the model cannot be differentiated.
    """
    form = partial(refinable, has_base=evaluator.recipe.base is not None)
    pieces = _pieces(blocks, form, lambda block: [(name, [name]) for name in block.parameters])
    at = _blocks_at(pieces, [value for piece in pieces if piece.free for value in scalar_values(piece.block)])
    gradients = WeightGradients(evaluator, objective, batch_statistics)
    rows = {name: list(range(len(task.data))) for name, task in evaluator.tasks.items()}
    steps = max(-(-len(rows[name]) // task.batch_size) for name, task in evaluator.tasks.items())
    found: dict[str, dict[str, float]] = {}
    for step in range(steps):
        # Every task has its share in each batch, so that the mean over the batches is that over the data; one with
        # fewer samples than there are batches has each in several.
        batch = {}
        for name, each in rows.items():
            first = step * len(each) // steps
            batch[name] = each[first : max(first + 1, (step + 1) * len(each) // steps)]
        try:
            by_block = gradients(at, batch)
        except AutoMergeError:
            raise
        except Exception as error:
            raise SearchError(
                f"the model cannot be differentiated: {short_reason(error)}",
                "set search.split.importance to 'surrogate', and search.refine to null",
            ) from error
        for block in at:
            if block.name in by_block and block.parameters:
                values = dict(zip(block.weights, by_block[block.name], strict=False))
                tensor = found.setdefault(block.parameters[0], dict.fromkeys(values, 0.0))
                for source, value in values.items():
                    tensor[source] += value / steps
    return found


class _Watched(AbstractContextManager[None]):
    """While it is entered, the merged parameters want gradients, and each is contracted and freed as it comes."""

    def __init__(
        self,
        evaluator: RecipeEvaluator,
        modules: Sequence[nn.Module],
        owner: Mapping[str, RecipeBlock],
        recipe: Recipe,
        sums: dict[str, list[float]],
    ) -> None:
        self._handles: list[Any] = []
        self._parameters: list[nn.Parameter] = []

        def hook(name: str) -> Callable[[Tensor], None]:
            block = owner[name]

            def contract(parameter: Tensor) -> None:
                gradient, parameter.grad = parameter.grad, None
                if gradient is None:
                    return
                inputs = evaluator.merger.technique_inputs(recipe, name)
                found = scalar_gradient(load_technique(block.technique), block, inputs, gradient)
                sums[block.name] = [total + value for total, value in zip(sums[block.name], found, strict=True)]

            return contract

        for module in modules:
            tied = state_names(module).tied
            for name, parameter in module.state_dict(keep_vars=True).items():
                if name in owner and name not in tied and isinstance(parameter, nn.Parameter):
                    if not parameter.is_floating_point():
                        continue
                    parameter.requires_grad_(True)
                    self._parameters.append(parameter)
                    handle = parameter.register_post_accumulate_grad_hook(hook(name))  # type: ignore[no-untyped-call]
                    self._handles.append(handle)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Piece:
    """A block of the refined recipe; ``free``: its scalars move."""

    block: RecipeBlock
    free: bool


def _pieces(
    start: Sequence[RecipeBlock],
    free: Callable[[RecipeBlock], RecipeBlock | None],
    groups_of: Callable[[RecipeBlock], list[tuple[str, list[str]]]],
) -> list[_Piece]:
    """The start's blocks cut into groups with scalars of their own; buffers keep the weights of their block."""
    pieces = []
    for block in start:
        form = free(block) if block.parameters else None
        if form is None:
            pieces.append(_Piece(block, free=False))
            continue
        groups = groups_of(block)
        if len(groups) == 1:
            pieces.append(_Piece(form, free=True))
            continue
        for name, parameters in groups:
            cut = {"name": f"{block.name}/{name}", "parameters": parameters, "buffers": []}
            pieces.append(_Piece(form.model_copy(update=cut), free=True))
        if block.buffers:
            rest = {"name": f"{block.name}/buffers", "parameters": []}
            pieces.append(_Piece(block.model_copy(update=rest), free=False))
    return pieces


def _blocks_at(pieces: Sequence[_Piece], values: Sequence[float]) -> list[RecipeBlock]:
    blocks = []
    at = 0
    for piece in pieces:
        if not piece.free:
            blocks.append(piece.block)
            continue
        count = len(scalars_of(piece.block))
        blocks.append(with_scalars(piece.block, [float(value) for value in values[at : at + count]]))
        at += count
    return blocks


def _batch(tasks: Mapping[str, MeasuredTask], fit: Rows, batch_size: int, seed: int, step: int) -> dict[str, list[int]]:
    """The rows of one step, by task: an epoch is a permutation of its own, in batches as even as they can be."""
    batch = {}
    for index, (name, rows) in enumerate(fit.items()):
        size = min(len(rows), batch_size, tasks[name].batch_size)
        per_epoch = -(-len(rows) // size)
        epoch, place = divmod(step - 1, per_epoch)
        order = np.random.default_rng((seed, index, epoch)).permutation(len(rows))
        chosen = order[place * len(rows) // per_epoch : (place + 1) * len(rows) // per_epoch]
        batch[name] = [rows[at] for at in chosen.tolist()]
    return batch


def _joined(parts: Sequence[TaskData]) -> TaskData:
    """The inputs of several batches as one; without targets."""
    return TaskData({name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}, {})


def _read(path: Path, scalars: int) -> _State | None:
    if not path.exists():
        return None
    try:
        state = _State(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        state = None
    if state is None or len(state.values) != scalars:
        raise SearchError(f"{path}: damaged, or of another refinement", "remove it; the refinement then begins anew")
    return state


def _write(path: Path, state: _State) -> None:
    write_atomically(path, json.dumps(vars(state)).encode())

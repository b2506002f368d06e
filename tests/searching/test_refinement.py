"""Refinement: the gradient is that of finite differences, and a run leaves nothing behind, gains or stays, and resumes.

The gradients are compared in float64, with a cost that is computed here: merged by the technique's own function, run by
a model that was built afresh.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from automerge.errors import MergeError, SearchError, TaskError
from automerge.merging.derivative import scalar_values, scalars_of, with_scalars
from automerge.merging.recipe import InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.technique import TensorInputs, load_technique
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.models.state import state_names
from automerge.searching import refinement
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator
from automerge.searching.objective import Aggregate, Measure, Name, Objective, TaskReference
from automerge.searching.recalibration import batch_statistics
from automerge.searching.refinement import CHECK_EVERY, Refined, Split, WeightGradients, refine, tensor_gradients
from automerge.spec import ModelSpec, RefineSpec, TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.task import TaskData
from tests.e2e.tiny import TinyNet, TinyPair

CPU = torch.device("cpu")
SEED = 3
SOURCES = ("a", "b")
Tensors = dict[str, Tensor]
Rows = Mapping[str, Sequence[int]]


class Exact(Classification):
    """Its loss and its soft metric have the logits' own precision, so that finite differences show something."""

    def loss(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits, targets["labels"], reduction="none")

    def soft_metric(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return logits.softmax(1).gather(1, targets["labels"].unsqueeze(1)).squeeze(1)


class Plain(Architecture):
    def build(self, reference: str, arguments: Mapping[str, Any]) -> nn.Module:
        raise NotImplementedError


ARCHITECTURE = Plain(ModelSpec(kind="factory", target="nowhere:build"), {})


class Body(nn.Module):
    """Vectors [n, 5] in, logits [n, 3] out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, vectors: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.first(vectors)))
        return logits


class Tied(Body):
    """The same weight in two layers, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 4, bias=False)
        self.third = nn.Linear(4, 4, bias=False)
        self.third.weight = self.second.weight

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(vectors))
        logits: Tensor = self.head(torch.tanh(self.third(torch.tanh(self.second(hidden)))))
        return logits


class Normed(Body):
    """With BatchNorm between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, vectors: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.norm(self.first(vectors))))
        return logits


@dataclass(frozen=True)
class Setting:
    """An evaluator, and what it was made of."""

    build: Callable[[], nn.Module]
    base: Tensors
    sources: dict[str, Tensors]
    own: dict[str, Tensors]
    evaluator: RecipeEvaluator

    @property
    def parameters(self) -> list[str]:
        """The names of those that are merged, each of tied ones once."""
        names = state_names(self.build()).parameters
        return [name for name in names if name not in next(iter(self.own.values()))]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.evaluator.heads.module(name) for name in SOURCES]

    def blocks(self, technique: str, **values: bool | float | str) -> list[RecipeBlock]:
        """A block for each tensor, each with weights of its own, and the buffers in a block of theirs."""
        found = []
        for index, name in enumerate(self.parameters):
            weights = {"a": 0.3 + 0.1 * index, "b": 0.75 - 0.05 * index}
            found.append(block_of(technique, weights, [name], **values))
        if buffers := state_names(self.build()).buffers:
            found.append(block_of("task_arithmetic", {"a": 0.5, "b": 0.5}, [], name="buffers", buffers=buffers))
        return found

    def merged(self, blocks: Sequence[RecipeBlock]) -> Tensors:
        """Every parameter by its technique's own function."""
        found = {}
        for block in blocks:
            for name in block.parameters:
                states = [state[name] for state in self.sources.values()]
                inputs = TensorInputs(name, list(self.sources), self.base[name], states, seed=SEED)
                found[name] = load_technique(block.technique).merge(inputs, block.settings)
        return found

    def model(self, blocks: Sequence[RecipeBlock], reference: str) -> nn.Module:
        """A model of its own with what the blocks make, under one reference's head; buffers as they are live."""
        module = self.build()
        live = {name: self.evaluator.heads.live[name] for name in state_names(module).buffers}
        tensors = {**self.merged(blocks), **live, **self.own[reference]}
        tensors |= {alias: tensors[name] for alias, name in state_names(module).tied.items()}
        module.load_state_dict(tensors)
        return module.eval()


def block_of(
    technique: str,
    weights: dict[str, float],
    parameters: list[str],
    *,
    name: str = "",
    buffers: Sequence[str] = (),
    **values: bool | float | str,
) -> RecipeBlock:
    defaults = load_technique(technique).declaration.defaults()
    if "density" in defaults:
        defaults["density"] = 0.6
    return RecipeBlock(
        name=name or "+".join(parameters),
        technique=technique,
        weights=weights,
        hyperparameters={**defaults, **values},
        parameters=parameters,
        buffers=list(buffers),
    )


def task_of(name: str, count: int, seed: int, kind: type[Classification] = Exact, batch_size: int = 64) -> MeasuredTask:
    generator = torch.Generator().manual_seed(seed)
    data = TaskData(
        {"inputs": torch.randn(count, 5, generator=generator, dtype=torch.float64)},
        {"labels": torch.randint(0, 3, (count,), generator=generator)},
    )
    spec = TaskSpec(name=name, kind="classification", specialist=name, validation="v", test="t")
    return MeasuredTask(kind(spec), name, data, batch_size)


def setting_of(model: str, tasks: Mapping[str, MeasuredTask] | None = None) -> Setting:
    """A base, two sources near it, and a task for each; of the model 'heads' each source has a head of its own."""
    classes = {"plain": Body, "tied": Tied, "norm": Normed, "heads": Body}

    def build() -> nn.Module:
        return classes[model]().double().eval().requires_grad_(False)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
        names = state_names(module)
        state = {name: tensor for name, tensor in module.state_dict().items() if name not in names.tied}
        moved = {
            source: {
                name: tensor + 0.4 * torch.rand_like(tensor) if tensor.is_floating_point() else tensor
                for name, tensor in state.items()
            }
            for source in SOURCES
        }
    private = [name for name in state if model == "heads" and name.startswith("head.")]
    own = {source: {name: each[name] for name in private} for source, each in moved.items()}
    shared = {name: tensor for name, tensor in state.items() if name not in private}
    heads = Heads(lambda _: build(), own, shared, CPU)
    tasks = tasks or {"a": task_of("a", 12, 1), "b": task_of("b", 18, 2)}
    return Setting(build, state, moved, own, evaluator_of(state, moved, heads, names.tied, tasks, private))


def evaluator_of(
    base: Tensors,
    sources: Mapping[str, Tensors],
    heads: Heads,
    tied: dict[str, str],
    tasks: Mapping[str, MeasuredTask],
    private: Sequence[str] = (),
) -> RecipeEvaluator:
    recipe = Recipe(
        base=InputDigest(name="base"),
        sources=[InputDigest(name=name) for name in sources],
        seed=SEED,
        blocks=[],
        tied=tied,
        private={owner: list(private) for owner in ("base", *sources)} if private else {},
    )
    merger = ResidentMerger(base, sources, CPU)
    return RecipeEvaluator(recipe, merger, heads, ARCHITECTURE, tasks, CPU, soft=True)


def objective_of(name: Name = "soft_metric", aggregate: Aggregate = "harmonic") -> Objective:
    tasks = {
        task: TaskReference(
            specialist=Measure(loss=loss, soft=soft),
            nothing=1.1,
            higher_is_better={"top1": True},
            stand_ins={"top1": "soft"},
        )
        for task, loss, soft in (("a", 0.2, 0.8), ("b", 0.3, 0.7))
    }
    return Objective(name=name, aggregate=aggregate, epsilon=0.1, tasks=tasks)


def cost_of(
    setting: Setting, blocks: Sequence[RecipeBlock], rows: Rows, objective: Objective, *, by_batch: bool = False
) -> float:
    """The cost of a batch, written down once more.

    BatchNorm by the batch: of the tasks together where they run on one model, as they then share a forward pass.
    """
    tasks = setting.evaluator.tasks
    parts = {name: task.data.subset(rows[name]) for name, task in tasks.items()}
    logits: dict[str, Tensor] = {}
    if next(iter(setting.own.values())):
        logits = {name: setting.model(blocks, name)(part.inputs["inputs"]) for name, part in parts.items()}
    else:
        module = setting.model(blocks, "a").train(by_batch)
        joined = module(torch.cat([part.inputs["inputs"] for part in parts.values()]))
        logits = dict(zip(parts, joined.split([len(part) for part in parts.values()]), strict=True))
    terms = []
    for name, reference in objective.tasks.items():
        labels = parts[name].targets["labels"]
        loss = F.cross_entropy(logits[name], labels)
        soft = logits[name].softmax(1)[torch.arange(len(labels)), labels].mean()
        specialist = reference.specialist
        if objective.name == "loss_ratio":
            terms.append((loss + 0.1) / (specialist.loss + 0.1))
        elif objective.name == "gap":
            terms.append(1 + (loss - specialist.loss) / (1.1 - specialist.loss))
        else:
            assert specialist.soft is not None
            terms.append(2 - soft / specialist.soft)
    stacked = torch.stack(terms)
    if objective.aggregate == "worst":
        return float(0.05 * torch.logsumexp(stacked / 0.05, 0))
    return float(stacked.mean())


def by_differences(cost: Callable[[Sequence[RecipeBlock]], float], blocks: Sequence[RecipeBlock]) -> dict[str, Any]:
    """The gradient by block, by central differences."""
    step = 1e-5
    found: dict[str, Any] = {}
    for at, block in enumerate(blocks):
        if not block.parameters:
            continue
        slopes = []
        for index in range(len(scalars_of(block))):
            costs = []
            for sign in (1, -1):
                values = scalar_values(block)
                values[index] += sign * step
                costs.append(cost([*blocks[:at], with_scalars(block, values), *blocks[at + 1 :]]))
            slopes.append((costs[0] - costs[1]) / (2 * step))
        found[block.name] = pytest.approx(slopes, rel=1e-5, abs=1e-8)
    return found


ROWS: Rows = {"a": [0, 3, 4, 7, 11], "b": [2, 1, 17]}
TECHNIQUES = [
    ("task_arithmetic", {"lambda": 0.9}),
    ("ties", {"normalize": False}),
    ("ties", {"normalize": True, "lambda": 0.8}),
    ("dare_ties", {}),
]


def contexts(setting: Setting) -> Callable[[], Any]:
    return lambda: batch_statistics(setting.evaluator.heads, setting.evaluator.tasks)


@pytest.mark.parametrize("model", ["plain", "tied", "heads", "norm"])
@pytest.mark.parametrize(("technique", "values"), TECHNIQUES, ids=["arithmetic", "ties", "normalised ties", "dare"])
def test_the_gradient_is_that_of_finite_differences(model: str, technique: str, values: dict[str, Any]) -> None:
    setting, objective = setting_of(model), objective_of()
    blocks = setting.blocks(technique, **values)
    found = WeightGradients(setting.evaluator, objective, contexts(setting))(blocks, ROWS)
    expected = by_differences(lambda each: cost_of(setting, each, ROWS, objective, by_batch=True), blocks)
    assert {name: slopes for name, slopes in found.items() if name != "buffers"} == expected
    flat = {"buffers", *(["first.bias"] if model == "norm" else [])}  # normalising takes the bias before it out
    assert all(any(abs(slope) > 1e-4 for slope in slopes) for name, slopes in found.items() if name not in flat)


def test_by_running_statistics_it_is_another_gradient() -> None:
    """BatchNorm normalises by its batch only where that is asked for."""
    setting, objective = setting_of("norm"), objective_of()
    blocks = setting.blocks("task_arithmetic")
    found = WeightGradients(setting.evaluator, objective, nullcontext)(blocks, ROWS)
    expected = by_differences(lambda each: cost_of(setting, each, ROWS, objective), blocks)
    assert {name: found[name] for name in expected} == expected
    by_batch = WeightGradients(setting.evaluator, objective, contexts(setting))(blocks, ROWS)
    assert {name: by_batch[name] for name in expected} != expected


def test_a_block_of_several_tensors_has_the_sum_of_their_gradients() -> None:
    setting, objective = setting_of("tied"), objective_of()
    names = setting.parameters
    weights = {"a": 0.4, "b": 0.6}
    blocks = [block_of("ties", weights, names[:3]), block_of("task_arithmetic", weights, names[3:])]
    found = WeightGradients(setting.evaluator, objective)(blocks, ROWS)
    assert found == by_differences(lambda each: cost_of(setting, each, ROWS, objective), blocks)


@pytest.mark.parametrize("aggregate", ["harmonic", "worst", "pareto"])
@pytest.mark.parametrize("name", ["loss_ratio", "gap", "soft_metric", "metric"])
def test_the_gradient_is_of_the_objective_that_is_asked_for(name: Name, aggregate: Aggregate) -> None:
    setting, objective = setting_of("heads"), objective_of(name, aggregate)
    blocks = setting.blocks("task_arithmetic")
    found = WeightGradients(setting.evaluator, objective)(blocks, ROWS)
    assert found == by_differences(lambda each: cost_of(setting, each, ROWS, objective), blocks)


@pytest.mark.parametrize("batch_size", [64, 4])
def test_tensors_have_gradients_of_their_own_over_all_data(batch_size: int) -> None:
    """In batches it is the same where every batch has its share of each task."""
    tasks = {"a": task_of("a", 12, 1, batch_size=batch_size), "b": task_of("b", 24, 2, batch_size=batch_size)}
    setting, objective = setting_of("tied", tasks), objective_of("gap")
    names = setting.parameters
    blocks = [block_of("task_arithmetic", {"a": 0.4, "b": 0.7}, names)]
    found = tensor_gradients(setting.evaluator, blocks, objective)
    pieces = setting.blocks("task_arithmetic")
    pieces = [piece.model_copy(update={"weights": {"a": 0.4, "b": 0.7}}) for piece in pieces]
    rows = {name: range(len(task.data)) for name, task in tasks.items()}
    expected = by_differences(lambda each: cost_of(setting, each, rows, objective), pieces)
    assert {name: list(slopes.values()) for name, slopes in found.items()} == expected
    assert all(list(slopes) == ["a", "b"] for slopes in found.values())


def test_a_small_task_counts_as_much_as_a_large_one() -> None:
    """It has fewer samples than the large one has batches; still all samples of both count."""
    tasks = {"a": task_of("a", 3, 1), "b": task_of("b", 24, 2, batch_size=4)}
    setting, objective = setting_of("plain", tasks), objective_of("gap")
    pieces = setting.blocks("task_arithmetic")
    found = tensor_gradients(setting.evaluator, pieces, objective)
    rows = {name: range(len(task.data)) for name, task in tasks.items()}
    expected = by_differences(lambda each: cost_of(setting, each, rows, objective), pieces)
    assert {name: list(slopes.values()) for name, slopes in found.items()} == expected


# What a pass leaves behind


def untouched(setting: Setting, merged: Tensors) -> bool:
    """Whether the live model has the merged values and is as it was: no gradient, none wanted, no hook."""
    tensors = [tensor for module in setting.modules for tensor in module.parameters()]
    assert tensors
    live = setting.evaluator.heads.live
    return (
        all(tensor.grad is None and not tensor.requires_grad for tensor in tensors)
        and not any(getattr(tensor, "_post_accumulate_grad_hooks", None) for tensor in tensors)
        and all(torch.equal(live[name], tensor) for name, tensor in merged.items())
    )


@pytest.mark.parametrize("model", ["plain", "tied", "heads", "norm"])
def test_a_pass_leaves_the_model_as_it_merged_it(model: str) -> None:
    setting = setting_of(model)
    blocks = setting.blocks("task_arithmetic")
    setting.evaluator.merge(blocks)
    before = {name: tensor.clone() for name, tensor in setting.evaluator.heads.live.items()}
    own = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in setting.modules]
    state = torch.get_rng_state()
    WeightGradients(setting.evaluator, objective_of(), contexts(setting))(blocks, ROWS)
    assert untouched(setting, before)
    for module, known in zip(setting.modules, own, strict=True):
        assert all(torch.equal(tensor, known[name]) for name, tensor in module.state_dict().items())
        assert not module.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_pass_that_fails_leaves_the_model_as_it_was(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of("heads")
    blocks = setting.blocks("task_arithmetic")
    setting.evaluator.merge(blocks)
    before = {name: tensor.clone() for name, tensor in setting.evaluator.heads.live.items()}
    calls = 0

    def fails(*_: object) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*_)

    if at == "forward":
        original: Any = ARCHITECTURE.call
        monkeypatch.setattr(ARCHITECTURE, "call", fails)
    else:
        original = refinement.scalar_gradient
        monkeypatch.setattr(refinement, "scalar_gradient", fails)
    gradients = WeightGradients(setting.evaluator, objective_of(), contexts(setting))
    with pytest.raises(KeyboardInterrupt):
        gradients(blocks, ROWS)
    assert calls == 2
    assert untouched(setting, before)
    expected = by_differences(lambda each: cost_of(setting, each, ROWS, objective_of()), blocks)
    assert gradients(blocks, ROWS) == expected, "the next pass is not hurt"


def test_a_gradient_is_freed_before_the_next_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of("tied")
    blocks = setting.blocks("ties")
    original = refinement.scalar_gradient
    seen: list[weakref.ref[Tensor]] = []

    def watching(technique: Any, block: RecipeBlock, inputs: TensorInputs, gradient: Tensor) -> list[float]:
        assert all(each() is None for each in seen), "the gradients before are freed"
        assert all(each.grad is None for module in setting.modules for each in module.parameters())
        seen.append(weakref.ref(gradient))
        return original(technique, block, inputs, gradient)

    monkeypatch.setattr(refinement, "scalar_gradient", watching)
    WeightGradients(setting.evaluator, objective_of())(blocks, ROWS)
    assert len(seen) == len(setting.parameters), "once for each tensor, tied ones included"


# Whole refinements, of the tiny pair


@dataclass(frozen=True)
class Job:
    """The tiny pair, loaded, with its validation data in two parts."""

    evaluator: RecipeEvaluator
    objective: Objective
    split: Split

    def refine(self, folder: Path, start: Sequence[RecipeBlock], **changes: Any) -> Refined:
        options = {"steps": 40, "learning_rate": 0.05, "pull": 0.0, "batch_size": 20, "patience": 5, **changes}
        seed, each = options.pop("seed", 0), options.pop("each", "tensor")
        folder.mkdir(parents=True, exist_ok=True)
        return refine(
            self.evaluator,
            start,
            lambda block: (
                [(name, [name]) for name in block.parameters] if each == "tensor" else [("all", block.parameters)]
            ),
            self.objective,
            self.split,
            RefineSpec(**options),
            seed=seed,
            checkpoint=folder / "checkpoint.json",
        )

    def batch(self, step: int) -> Rows:
        """What a step is taken on."""
        return refinement._batch(self.evaluator.tasks, self.split.fit, 20, 0, step)

    def held_back(self, blocks: Sequence[RecipeBlock]) -> float:
        """The objective on the rows held back."""
        self.evaluator.merge(blocks)
        found = self.evaluator.measure(self.split.held_back).scores
        objective = self.split.objective
        return objective.value(objective.preservation({name: Measure.of(each) for name, each in found.items()}))


CONV, HEAD = ["conv.weight", "conv.bias"], ["head.weight", "head.bias"]


def start_of(technique: str = "task_arithmetic", **values: Any) -> list[RecipeBlock]:
    """Where there is much to gain: too much of one source."""
    weights = {"left": 0.9, "right": 0.1}
    return [
        block_of(technique, weights, CONV, name="conv", **values),
        block_of(technique, weights, HEAD, name="head", **values),
    ]


def job_of(pair: TinyPair, build: Callable[[], nn.Module] = TinyNet) -> Job:
    states = {name: load_file(pair.folder / f"{name}.safetensors") for name in ("base", "left", "right")}
    tasks = {}
    for name in ("left", "right"):
        data = load_file(pair.folder / f"{name}-validation.safetensors")
        spec = TaskSpec(name=name, kind="classification", specialist=name, validation="v", test="t")
        content = TaskData({"inputs": data["inputs"]}, {"labels": data["labels"]})
        tasks[name] = MeasuredTask(Classification(spec), name, content, 64)

    def heads_of(state: Tensors, build: Callable[[], nn.Module] = TinyNet) -> Heads:
        return Heads(lambda _: build().eval(), {"left": {}, "right": {}}, state, CPU)

    sources = {name: states[name] for name in ("left", "right")}
    evaluator = evaluator_of(states["base"], sources, heads_of(states["base"], build), {}, tasks)
    fit, held_back = {name: range(50) for name in tasks}, {name: range(50, 100) for name in tasks}

    def objective_on(rows: Rows | None) -> Objective:
        references = {}
        for name, task in tasks.items():
            specialist = evaluator_of(states["base"], sources, heads_of(states[name]), {}, tasks)
            scores = specialist.measure(rows).scores[name]
            data = task.data if rows is None else task.data.subset(rows[name])
            references[name] = TaskReference.of(task.task, data, scores, None)
        return Objective(name="soft_metric", tasks=references)

    objective = objective_on(None)
    objective.check()
    return Job(evaluator, objective, Split(fit, held_back, objective_on(held_back)))


@pytest.fixture
def job(pair: TinyPair) -> Job:
    return job_of(pair)


def test_it_gains_and_says_what_it_did(job: Job, tmp_path: Path) -> None:
    found = job.refine(tmp_path, start_of())
    assert found.before == pytest.approx(job.held_back(start_of()), rel=1e-12)
    assert found.after == pytest.approx(job.held_back(found.blocks), rel=1e-12)
    assert found.after > found.before + 0.05
    assert 0 < found.best_step <= found.steps <= 40
    assert found.scalars == 4 * 2, "four tensors, two sources"
    assert [block.name for block in found.blocks] == [
        "conv/conv.weight", "conv/conv.bias", "head/head.weight", "head/head.bias"
    ]  # fmt: skip
    assert len({block.weights["left"] for block in found.blocks}) == 4
    # A look is at all that is held back; a step passes over a batch of each task, of 50 samples in three, and back.
    looks = 1 + -(-found.steps // CHECK_EVERY)
    batches = [sum(len(rows) for rows in job.batch(step).values()) for step in range(1, found.steps + 1)]
    assert sum(batches[:3]) == 100
    assert found.samples == looks * 100 + 3 * sum(batches)


@pytest.mark.parametrize(
    ("technique", "values", "each", "scalars"),
    [
        ("task_arithmetic", {}, "block", 2 * 2),
        ("ties", {"normalize": True}, "block", 2 * 3),
        ("ties", {"normalize": True}, "tensor", 4 * 3),
        ("ties", {"normalize": False}, "tensor", 4 * 2),
        ("dare_linear", {}, "tensor", 4 * 2),
        ("linear", {}, "tensor", 4 * 2),
    ],
)
def test_the_scalars_are_counted(
    job: Job, tmp_path: Path, technique: str, values: dict[str, Any], each: str, scalars: int
) -> None:
    """A source's weight for each group; where the weights are normalised lambda is one more."""
    found = job.refine(tmp_path, start_of(technique, **values), each=each, steps=1)
    assert found.scalars == scalars
    assert len(found.blocks) in (2, 4)
    names = sorted(name for block in found.blocks for name in block.parameters)
    assert names == sorted([*CONV, *HEAD])


def test_where_nothing_is_gained_it_stays_at_the_start(job: Job, tmp_path: Path) -> None:
    start = start_of()
    found = job.refine(tmp_path, start, learning_rate=80.0, patience=2)
    assert found.best_step == 0
    assert found.blocks == start, "as they were given, in their own form"
    assert found.after == found.before == pytest.approx(job.held_back(start), rel=1e-12)
    assert found.steps == 2 * CHECK_EVERY, "patience is counted in checks"


@pytest.mark.parametrize("seed", range(4))
def test_it_never_ends_below_its_start(job: Job, tmp_path: Path, seed: int) -> None:
    """By large steps, from the average, where there is little to gain: what is returned is as good as it says."""
    start = [block.model_copy(update={"weights": {"left": 0.5, "right": 0.5}}) for block in start_of("ties")]
    found = job.refine(tmp_path, start, learning_rate=0.2, steps=20, seed=seed)
    assert found.after >= found.before
    assert job.held_back(found.blocks) == pytest.approx(found.after, rel=1e-12)


def test_it_is_drawn_back_to_its_start(job: Job, tmp_path: Path) -> None:
    moved = {}
    for pull in (0.0, 1000.0):
        blocks = job.refine(tmp_path / str(pull), start_of(), pull=pull, steps=20).blocks
        moved[pull] = max(abs(block.weights["left"] - 0.9) for block in blocks)
    assert moved[0.0] > 0.1
    assert moved[1000.0] < 0.06, "one step of Adam's may lead away, and is taken back"


def test_blocks_without_a_derivative_stay(job: Job, tmp_path: Path) -> None:
    start = start_of()
    slerp = block_of("slerp", {"left": 0.5, "right": 0.5}, CONV, name="conv")
    found = job.refine(tmp_path, [slerp, start[1]])
    assert found.scalars == 4
    assert found.blocks[0] == slerp
    assert found.best_step > 0
    assert [block.name for block in found.blocks[1:]] == ["head/head.weight", "head/head.bias"]
    with pytest.raises(SearchError, match=r"no block can be refined by a gradient: .*; set search\.refine to null"):
        job.refine(tmp_path / "none", [slerp, block_of("slerp", {"left": 1, "right": 1}, HEAD)])
    assert not (tmp_path / "none" / "checkpoint.json").exists()


def test_it_repeats_exactly_and_its_seed_counts(job: Job, pair: TinyPair, tmp_path: Path) -> None:
    one = job.refine(tmp_path / "one", start_of())
    other = job_of(pair).refine(tmp_path / "other", start_of())
    assert one == other
    assert (tmp_path / "one" / "checkpoint.json").read_bytes() == (tmp_path / "other" / "checkpoint.json").read_bytes()
    assert job.refine(tmp_path / "seed", start_of(), seed=1).blocks != one.blocks


class Stopped(BaseException):
    """Stands for the end of the process: nothing catches it."""


@contextmanager
def ended(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, *, after: bool = False) -> Iterator[None]:
    """Let the process end at a call of a function: before it, or after."""
    original, calls = getattr(owner, name), 0

    def ending(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise Stopped
        result = original(*arguments, **options)
        if calls == at:
            raise Stopped
        return result

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(owner, name, ending)
        yield


@pytest.mark.parametrize("technique", ["task_arithmetic", "ties"])
def test_interrupted_anywhere_it_ends_the_same(
    job: Job, tmp_path: Path, technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = start_of(technique)
    whole = job.refine(tmp_path / "whole", start, steps=23, patience=50)
    content = (tmp_path / "whole" / "checkpoint.json").read_bytes()
    assert whole.steps == 23 and whole.best_step > 0
    looks = 1 + 23 // CHECK_EVERY + 1
    places: list[tuple[Any, str, int, bool]] = [(RecipeEvaluator, "measure", at, False) for at in range(1, looks + 1)]
    places += [(refinement, "_write", at, True) for at in range(1, looks + 1)]
    places += [(WeightGradients, "__call__", at, False) for at in (1, 7, 10, 11, 23)]
    for number, (owner, name, at, after) in enumerate(places):
        folder = tmp_path / str(number)
        with ended(monkeypatch, owner, name, at, after=after):
            job.refine(folder, start, steps=23, patience=50)
        assert job.refine(folder, start, steps=23, patience=50) == whole, (name, at)
        assert (folder / "checkpoint.json").read_bytes() == content, (name, at)


def test_an_objective_that_is_undefined_on_what_is_held_back_is_refused(job: Job, tmp_path: Path) -> None:
    """Such as where the rows held back are all of one class, and the specialist is no better than a guess."""
    reference = job.split.objective.tasks["left"].model_copy(update={"higher_is_better": {}, "stand_ins": {}})
    objective = job.split.objective.model_copy(update={"tasks": {**job.split.objective.tasks, "left": reference}})
    broken = replace(job, split=replace(job.split, objective=objective))
    with pytest.raises(SearchError, match=r"task 'left': the specialist is no better than a guess .* is undefined"):
        broken.refine(tmp_path, start_of())


def test_a_finished_one_is_read_and_not_repeated(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job.refine(tmp_path, start_of())

    def never(*_: object) -> None:
        raise AssertionError("it is paid for")

    monkeypatch.setattr(RecipeEvaluator, "measure", never)
    monkeypatch.setattr(WeightGradients, "__call__", never)
    assert job.refine(tmp_path, start_of()) == whole


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"values": [1.0]}'])
def test_a_damaged_checkpoint_is_named(job: Job, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.json").write_bytes(content)
    with pytest.raises(SearchError, match=r"checkpoint\.json: damaged, or of another refinement; remove it"):
        job.refine(tmp_path, start_of())


class Brittle(TinyNet):
    """Its logits, and so their gradients, are no numbers where its convolution is stronger than ``limit``."""

    limit = math.inf

    def forward(self, images: Tensor) -> Tensor:
        factor = torch.where(self.conv.weight.norm() > self.limit, float("nan"), 1.0)
        return super().forward(images) * factor


def test_a_step_to_where_no_model_is_counts_as_no_gain(pair: TinyPair, tmp_path: Path) -> None:
    """The gradient there is NaN, and so would be all that follows it: what was found before is kept."""
    base, left, right = (load_file(pair.folder / f"{name}.safetensors")["conv.weight"] for name in ("base", *SIDES))
    start = start_of()
    norms = [float((base + w * (left - base) + (1 - w) * (right - base)).norm()) for w in (0.9, 0.5)]

    class Here(Brittle):
        limit = max(norms) * 1.02

    job = job_of(pair, Here)
    found = job.refine(tmp_path, start, learning_rate=0.1, steps=60, patience=4)
    assert found.after >= found.before
    assert job.held_back(found.blocks) == pytest.approx(found.after, rel=1e-12)
    wild = job.refine(tmp_path / "wild", start, learning_rate=30.0, steps=30, patience=30)
    assert wild.best_step == 0 and wild.blocks == start
    assert wild.steps == 2, "the first leads there, and the second has no gradient"
    with pytest.raises(TaskError):
        job.held_back([block.model_copy(update={"weights": {"left": 30.0, "right": 30.0}}) for block in start])
    again = job.refine(tmp_path / "wild", start, learning_rate=30.0, steps=30, patience=30)
    assert again == wild, "its checkpoint can be read"


SIDES = ("left", "right")


def test_a_start_that_cannot_be_measured_fails(pair: TinyPair, tmp_path: Path) -> None:
    class Nowhere(Brittle):
        limit = 0.0

    with pytest.raises(TaskError, match="is not finite"):
        job_of(pair, Nowhere).evaluator(start_of())
    broken = [block.model_copy(update={"weights": {"left": 1e38, "right": 1e38}}) for block in start_of()]
    with pytest.raises((MergeError, TaskError)):
        job_of(pair).refine(tmp_path, broken)


class Detached(TinyNet):
    """Not differentiable."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


def test_a_model_that_has_no_gradient_is_named(pair: TinyPair, tmp_path: Path) -> None:
    job = job_of(pair, Detached)
    with pytest.raises(SearchError, match=r"^the model cannot be differentiated: .*; set search\.refine to null$"):
        job.refine(tmp_path, start_of())
    with pytest.raises(SearchError, match=r"cannot be differentiated: .*; set search\.split\.importance to 'surr"):
        tensor_gradients(job.evaluator, start_of(), job.objective)


class Remembering(TinyNet):
    """Keeps a tensor from one call to the next, as models keep masks and positions."""

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = torch.ones(4)
        return super().forward(images) * self.kept


def test_a_model_that_keeps_tensors_between_calls_can_be_refined(pair: TinyPair, tmp_path: Path) -> None:
    """It is measured first, and what it keeps then must do for a pass with a gradient."""
    plain = job_of(pair).refine(tmp_path / "plain", start_of(), steps=10)
    assert job_of(pair, Remembering).refine(tmp_path / "kept", start_of(), steps=10) == plain


# Batches


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (9, 4), (8, 4), (3, 4), (257, 256), (1, 1)])
def test_an_epoch_has_every_row_once_in_even_batches(rows: int, size: int) -> None:
    """Of one sample BatchNorm has no variance: the last batch of an epoch is no smaller than the others."""
    tasks = {"a": task_of("a", 300, 1, batch_size=size)}
    fit = {"a": [3 + row for row in range(rows)]}
    steps = -(-rows // size)
    epochs = [
        [refinement._batch(tasks, fit, 300, 5, epoch * steps + step + 1)["a"] for step in range(steps)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == fit["a"]
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1
        assert max(map(len, epoch)) <= size
    if rows > 3:
        assert epochs[0] != epochs[1]


def test_one_sample_too_many_does_not_fail_a_model_with_batch_norm(tmp_path: Path) -> None:
    """With heads of their own the tasks are normalised apart, and a batch of one would fail."""
    tasks = {name: task_of(name, 18, seed, batch_size=8) for name, seed in (("a", 1), ("b", 2))}
    setting = setting_of("norm", tasks)
    evaluator = setting.evaluator
    head = [name for name in setting.base if name.startswith("head.")]
    own = {source: {name: setting.sources[source][name] for name in head} for source in SOURCES}
    shared = {name: tensor for name, tensor in setting.base.items() if name not in head}
    heads = Heads(lambda _: setting.build(), own, shared, CPU)
    evaluator = evaluator_of(setting.base, setting.sources, heads, {}, tasks, head)
    blocks = [block for block in setting.blocks("task_arithmetic") if block.name not in head]
    rows = {name: list(range(9)) for name in tasks}
    held_back = {name: list(range(9, 18)) for name in tasks}
    split = Split(rows, held_back, objective_of())
    found = refine(
        evaluator,
        blocks,
        lambda block: [(block.name, block.parameters)],
        objective_of(),
        split,
        RefineSpec(steps=6),
        seed=0,
        checkpoint=tmp_path / "checkpoint.json",
        batch_statistics=lambda: batch_statistics(heads, tasks),
    )
    assert found.steps == 6

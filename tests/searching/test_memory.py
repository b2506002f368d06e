"""The account of a step's memory, from shapes alone, against what torch's allocator counts when the step runs."""

import copy
import gc
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from automerge.errors import SearchError
from automerge.merging.device import HELD_BYTES
from automerge.merging.recipe import BASE, InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.technique import load_technique
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.models.state import state_names
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator
from automerge.searching.memory import account_refinement, account_trial, merge_workspace, recomputed
from automerge.searching.objective import Measure, Objective, TaskReference
from automerge.searching.refinement import WeightGradients
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.language_modelling import LanguageModelling
from automerge.tasks.task import TaskData

CPU = torch.device("cpu")
VOCABULARY, WIDTH, LENGTH, DEPTH = 3000, 64, 48, 3


class Plain(Architecture):
    def build(self, reference, arguments):
        raise NotImplementedError


ARCHITECTURE = Plain(ModelSpec(kind="factory", target="nowhere:build"), {})


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden):
        parts = self.attention(self.norm(hidden)).view(*hidden.shape[:2], 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + mixed.transpose(1, 2).reshape(hidden.shape)
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Language(nn.Module):
    """A small transformer whose output weights are its embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("positions", torch.randn(LENGTH, WIDTH), persistent=False)
        if tied:
            self.output.weight = self.embedding.weight

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        hidden = self.embedding(input_ids) + self.positions[: input_ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.output(hidden)


class Images(nn.Module):
    """Convolutions with BatchNorm and pooling, and a head."""

    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def language_task(name, samples=4):
    spec = TaskSpec(name=name, kind="language_modelling", specialist=name, validation="v", test="t")
    ids = torch.randint(VOCABULARY, (2 * samples, LENGTH), generator=torch.Generator().manual_seed(0))
    return MeasuredTask(LanguageModelling(spec), name, TaskData({"input_ids": ids}, {"labels": ids}), samples)


def image_task(name, samples=32):
    spec = TaskSpec(name=name, kind="classification", specialist=name, validation="v", test="t")
    generator = torch.Generator().manual_seed(0)
    data = TaskData(
        {"inputs": torch.randn(samples, 3, 32, 32, generator=generator)},
        {"labels": torch.randint(10, (samples,), generator=generator)},
    )
    return MeasuredTask(Classification(spec), name, data, samples)


def recipe_of(module, technique="task_arithmetic", private=None):
    names = state_names(module)
    own = {name for each in (private or {}).values() for name in each}
    return Recipe(
        base=InputDigest(name=BASE),
        sources=[InputDigest(name="a"), InputDigest(name="b")],
        blocks=[
            RecipeBlock(
                name="all",
                technique=technique,
                weights={"a": 0.3, "b": 0.4},
                hyperparameters=load_technique(technique).declaration.defaults(),
                parameters=[name for name in names.parameters if name not in own],
                buffers=[name for name in names.buffers if name not in own],
            )
        ],
        tied=names.tied,
        private=private or {},
    )


def allocated_by(run):
    """The most that torch's allocator had given out at one moment of a run, beside what was there before; bytes."""
    run()  # what is made once and kept
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def evaluator_of(module, recipe, tasks):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items() if name not in recipe.tied}
    inputs = [
        {name: each + 0.01 * at if each.is_floating_point() else each for name, each in state.items()}
        for at in range(3)
    ]
    heads = Heads(lambda _: copy.deepcopy(module), {name: {} for name in tasks}, state, CPU)
    merger = ResidentMerger(inputs[0], {"a": inputs[1], "b": inputs[2]}, CPU)
    return RecipeEvaluator(recipe, merger, heads, ARCHITECTURE, tasks, CPU)


def gradients_of(evaluator, objective="soft_metric"):
    figures = Measure(loss=1, soft=0.5)
    references = {
        name: TaskReference(
            specialist=figures, nothing=2, stand_ins={each.name: each.stand_in for each in task.task.metrics}
        )
        for name, task in evaluator.tasks.items()
    }
    step = WeightGradients(evaluator, Objective(name=objective, tasks=references))
    rows = {name: range(task.batch_size) for name, task in evaluator.tasks.items()}
    return partial(step, evaluator.recipe.blocks, rows)


MODELS = {
    "language": (Language, language_task),
    "images": (Images, image_task),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_trial_takes_what_its_account_says(kind):
    build, task = MODELS[kind]
    module = build().eval()
    tasks = {"a": task("a"), "b": task("b")}
    recipe = recipe_of(module)
    said = account_trial(recipe, ARCHITECTURE, {"a": module, "b": module}, tasks)
    evaluator = evaluator_of(module, recipe, tasks)
    assert said.allocated == pytest.approx(allocated_by(lambda: evaluator(recipe.blocks)), rel=0.02)
    assert said.gradients == 0


@pytest.mark.parametrize("technique", ["task_arithmetic", "ties", "dare_ties"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_refinement_step_takes_what_its_account_says(kind, technique):
    build, task = MODELS[kind]
    module = build().eval()
    tasks = {"a": task("a"), "b": task("b")}
    recipe = recipe_of(module, technique)
    said = account_refinement(recipe, ARCHITECTURE, {"a": module, "b": module}, tasks, "soft_metric")
    assert said.allocated == pytest.approx(allocated_by(gradients_of(evaluator_of(module, recipe, tasks))), rel=0.05)


def test_recomputed_layers_take_what_their_account_says_and_less():
    module = Language().eval()
    tasks = {"a": language_task("a", samples=16)}
    recipe = recipe_of(module)
    plain = account_refinement(recipe, ARCHITECTURE, {"a": module}, tasks, "gap")
    said = account_refinement(recipe, ARCHITECTURE, {"a": module}, tasks, "gap", recompute=True)
    evaluator = evaluator_of(module, recipe, tasks)
    with recomputed(evaluator.heads.module("a")):
        found = allocated_by(gradients_of(evaluator, "gap"))
    assert said.allocated == pytest.approx(found, rel=0.02)
    assert said.allocated < plain.allocated
    assert not any("forward" in vars(layer) for layer in evaluator.heads.module("a").layers)


def test_recomputed_layers_have_the_same_gradients():
    module = Language().eval()
    tasks = {"a": language_task("a")}
    evaluator = evaluator_of(module, recipe_of(module, "ties"), tasks)
    step = gradients_of(evaluator)
    plain = step()
    with recomputed(evaluator.heads.module("a")):
        assert step() == plain


def test_a_model_without_layers_cannot_be_recomputed():
    with pytest.raises(SearchError, match="Linear has no"), recomputed(nn.Linear(2, 2)):
        pass


def test_weights_are_counted_once():
    """Tied ones within a model, and what several heads share."""
    module = Language().eval()
    tasks = {"a": language_task("a"), "b": language_task("b")}
    elements = sum(each.numel() for each in module.parameters()) + module.positions.numel()
    same = account_trial(recipe_of(module), ARCHITECTURE, {"a": module, "b": module}, tasks)
    assert same.weights == 4 * elements

    state = {name: each for name, each in Images().state_dict().items() if not name.startswith("head.")}
    private = {name: [f"head.{leaf}" for leaf in ("weight", "bias")] for name in ("a", "b")}
    own = {name: {leaf: Images().state_dict()[leaf] for leaf in leaves} for name, leaves in private.items()}
    heads = Heads(lambda _: Images(), own, state, CPU)
    modules = {name: heads.module(name) for name in own}
    found = account_trial(
        recipe_of(modules["a"], private=private), ARCHITECTURE, modules, {"a": image_task("a"), "b": image_task("b")}
    )
    shared = sum(each.nbytes for each in state.values())
    assert found.weights == shared + 2 * 4 * (64 * 10 + 10)
    assert found.inputs == 3 * shared  # private tensors are not merged


def test_inputs_in_host_memory_take_none_of_the_device():
    """Then a tensor's base and sources come to the device in float32, beside its gradient and task vectors.

    Of these there are two: one is made while the one before is still in its variable.
    """
    with torch.device("meta"):
        module = Language(tied=False)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    task = MeasuredTask(language_task("a").task, "a", TaskData({"input_ids": ids}, {"labels": ids}), 1)
    arguments = (recipe_of(module), ARCHITECTURE, {"a": module}, {"a": task}, "gap")
    there = account_refinement(*arguments, dtype=torch.bfloat16)
    away = account_refinement(*arguments, dtype=torch.bfloat16, inputs_on_device=False)
    largest = VOCABULARY * WIDTH
    elements = sum(each.numel() for each in module.parameters())
    assert there.weights == away.weights == 2 * elements + 4 * module.positions.numel()
    assert there.inputs == 3 * 2 * elements
    assert away.inputs == 0
    assert away.workspace == (3 + 1 + 2) * 4 * largest
    assert away.gradients >= 2 * largest


def test_on_a_cuda_device_a_merge_goes_through_tiles():
    module = Images().eval()
    arguments = (recipe_of(module), ARCHITECTURE, {"a": module}, {"a": image_task("a", samples=2)})
    found = account_trial(*arguments, device="cuda")
    assert (found.workspace, found.kept) == (merge_workspace(3), 0)
    away = account_trial(*arguments, device="cuda", inputs_on_device=False)
    staged = 3 * max(each.nbytes for each in module.parameters())
    assert away.workspace == merge_workspace(3) + staged
    assert merge_workspace(3, [staged, 2 * HELD_BYTES]) == away.workspace
    assert account_trial(*arguments).workspace == 0


def test_on_the_cpu_the_heap_keeps_what_was_freed():
    """Nothing here is so large that it is given back at once: what the forward pass freed is there in the backward."""
    module = Language().eval()
    found = account_refinement(
        recipe_of(module), ARCHITECTURE, {"a": module}, {"a": language_task("a", samples=32)}, "gap"
    )
    assert found.passing == found.allocated
    larger = account_refinement(
        recipe_of(module), ARCHITECTURE, {"a": module}, {"a": language_task("a", samples=256)}, "gap"
    )
    assert larger.passing > larger.allocated


class Awkward(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)
        self.what = what

    def forward(self, images):
        hidden = self.head(images.flatten(1))
        if self.what == "branches" and hidden.sum() > 0:
            return hidden
        while self.what == "waits" and not hidden.isfinite().all():
            hidden = hidden + 1
        if self.what == "selects":
            return hidden[hidden[:, 0] > 0]
        return hidden


def test_values_that_only_decide_on_a_branch_are_made_up():
    module = Awkward("branches").eval()
    found = account_trial(recipe_of(module), ARCHITECTURE, {"a": module}, {"a": image_task("a")})
    assert found.activations > 0


@pytest.mark.parametrize(
    ("what", "why"),
    [
        pytest.param("waits", "a loop waits for a value", marks=pytest.mark.slow),
        ("selects", "DynamicOutputShape"),
    ],
)
def test_what_hangs_on_values_has_no_account(what, why):
    module = Awkward(what).eval()
    with pytest.raises(SearchError, match=f"the memory of a trial cannot be told from shapes: .*{why}"):
        account_trial(recipe_of(module), ARCHITECTURE, {"a": module}, {"a": image_task("a")})


def test_the_shortage_is_one_sentence():
    module = Images().eval()
    found = account_trial(recipe_of(module), ARCHITECTURE, {"a": module}, {"a": image_task("a")})
    assert found.shortage("a trial", found.peak) is None
    sentence = found.shortage("a trial", found.peak - 1)
    assert sentence is not None
    assert sentence.startswith(f"a trial takes {found.peak / 1e9:.1f} GB of memory (weights 0.0, inputs 0.0")


@pytest.mark.slow
def test_seven_billion_parameters_take_no_memory_to_account_for():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=32000, use_cache=False, dtype="bfloat16")
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.zeros(1, 64, dtype=torch.int64)
    task = MeasuredTask(language_task("a").task, "a", TaskData({"input_ids": ids}, {"labels": ids}), 1)
    page = os.sysconf("SC_PAGE_SIZE")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = resident()
    found = account_trial(
        recipe_of(module), ARCHITECTURE, {"a": module}, {"a": task}, device="cuda", inputs_on_device=False
    )
    assert resident() - before < 1e9
    assert found.weights == pytest.approx(2 * 6_738_415_616, rel=1e-5)
    assert found.peak < 16e9

"""Few-shot fine-tuning on tiny models: it learns, within its budget, deterministically, from the given data alone."""

import pytest
import torch
from torch import nn

from automerge.errors import TaskError
from automerge.models.architecture import Architecture
from automerge.models.heads import Heads
from automerge.searching.evaluator import MeasuredTask, mean_losses
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.task import TaskData, load_task
from studies.fine_tuning import BACKWARD_COST, Setting, _Run, _schedule, fine_tune, held_back_rows

CPU = torch.device("cpu")

RATES = (3e-3, 3e-2)
"""For models that have learned nothing yet: higher than those for models that have."""


class Plain(Architecture):
    """Counts samples as the budget does: a backward pass, seen by its hook on the logits, as two forward passes."""

    def __init__(self):
        super().__init__(ModelSpec(kind="factory", target="nowhere:build"), {})
        self.samples = 0
        self.inputs = []

    def build(self, reference, arguments):
        raise NotImplementedError

    def call(self, module, inputs):
        logits = super().call(module, inputs)
        count = len(logits)
        self.samples += count
        self.inputs.append((logits.requires_grad, next(iter(inputs.values())).clone()))
        if logits.requires_grad:
            logits.register_hook(lambda _: self._backward(count))
        return logits

    def _backward(self, count):
        self.samples += BACKWARD_COST * count


class Perceptron(nn.Module):
    def __init__(self, classes=4, dropout=0.0):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, classes)

    def forward(self, inputs):
        return self.head(self.dropout(torch.tanh(self.body(inputs))))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, inputs):
        return self.head(torch.relu(self.norm(self.body(inputs))))


class Tokens(nn.Module):
    """Predicts the next token from the present one; the head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        return self.head(torch.tanh(self.mix(self.embedding(input_ids))))


def built(kind, *arguments, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(*arguments).eval()


def heads_of(module, private=None, dtype=None):
    """The module's state under one head, or under those of two references; ``private``: a prefix."""
    state = {name: tensor.to(dtype) if dtype else tensor for name, tensor in module.state_dict().items()}
    own = {
        reference: {name: tensor + at for name, tensor in state.items() if private and name.startswith(private)}
        for at, reference in enumerate(("a", "b"))
    }
    shared = {name: tensor for name, tensor in state.items() if not (private and name.startswith(private))}
    kind = type(module)
    return Heads(lambda _: built(kind), own, shared, CPU)


def task(name, count=48, seed=1, offset=0.0, kind="classification", data=None, batch_size=16):
    """Four classes in six dimensions, each around a corner of its own; the same for every seed but the noise."""
    if data is None:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 4
        corners = torch.eye(6)[:4] * 2
        data = TaskData(
            {"inputs": corners[labels] + torch.randn(count, 6, generator=generator) * 0.5 + offset}, {"labels": labels}
        )
    spec = TaskSpec(name=name, kind=kind, specialist=name, validation="v", test="t")
    return MeasuredTask(load_task(spec, None), name, data, batch_size)


def two_tasks(**others):
    return {"a": task("a", 48, seed=1, **others), "b": task("b", 36, seed=2, offset=0.5, **others)}


def new_tasks():
    """Samples that the training has not seen."""
    return {"a": task("a", 400, seed=11), "b": task("b", 400, seed=12, offset=0.5)}


def tokens(count=40, seed=0):
    """The next token is the present one plus three, of twelve; lengths vary by padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(0, 12, (count, 1), generator=generator) + 3 * torch.arange(7)) % 12
    labels = torch.cat([ids[:, 1:], torch.full((count, 1), -100)], dim=1)
    return TaskData({"input_ids": ids}, {"labels": labels})


def loss_of(heads, tasks):
    found = mean_losses(tasks, heads.module, Plain(), CPU)
    return sum(found.values()) / len(found)


def snapshot(heads):
    return {name: tensor.detach().clone() for name, tensor in heads.live.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("criterion", ["loss", "soft_metric", "metric"])
def test_it_learns_what_new_samples_have_too(criterion):
    heads = heads_of(built(Perceptron))
    before = loss_of(heads, new_tasks())
    tuned = fine_tune(
        heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000, criterion=criterion, learning_rates=RATES
    )
    assert loss_of(heads, new_tasks()) < before / 4
    assert equal(tuned.state, snapshot(heads))
    assert tuned.private == {}
    assert tuned.chosen.steps > 0
    best = max(score for attempt in tuned.attempts for score in attempt.scores)
    assert tuned.chosen.score == best > tuned.attempts[0].scores[0]
    assert best in next(each for each in tuned.attempts if each.setting == tuned.chosen.setting).scores
    # The model is as fit to be measured as before.
    assert not heads.module("a").training
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in heads.module("a").parameters()
    )


@pytest.mark.parametrize("kind", [Perceptron, Normalised])
def test_the_same_seed_gives_the_same_bits_and_leaves_random_numbers_alone(kind):
    module = built(kind, *((4, 0.3) if kind is Perceptron else ()))

    def tuned(seed, draws):
        torch.manual_seed(draws)
        state = torch.get_rng_state()
        heads = Heads(
            lambda _: built(kind, *((4, 0.3) if kind is Perceptron else ())),
            {"a": {}, "b": {}},
            module.state_dict(),
            CPU,
        )
        found = fine_tune(heads, two_tasks(), Plain(), CPU, seed=seed, budget_samples=9_000)
        assert torch.equal(state, torch.get_rng_state())
        return found

    one, other = tuned(3, 0), tuned(3, 1)
    assert equal(one.state, other.state)
    assert (one.chosen, one.attempts, one.samples) == (other.chosen, other.attempts, other.samples)
    assert not equal(one.state, tuned(4, 0).state)


@pytest.mark.parametrize("budget", [2_500, 4_000, 7_777])
@pytest.mark.parametrize("kind", [Perceptron, Normalised])
def test_the_budget_holds_and_counts_what_was_computed(kind, budget):
    architecture = Plain()
    rates = (1e-3, 1e-2) if kind is Normalised else (1e-3, 3e-3, 1e-2)
    tuned = fine_tune(
        heads_of(built(kind)), two_tasks(), architecture, CPU, seed=0, budget_samples=budget, learning_rates=rates
    )
    assert tuned.samples == architecture.samples <= budget
    assert len(tuned.attempts) == len(rates) * (2 if kind is Normalised else 1)


def test_a_larger_budget_is_a_longer_training():
    steps = [
        fine_tune(
            heads_of(built(Perceptron)), two_tasks(), Plain(), CPU, seed=0, budget_samples=budget, max_epochs=most
        ).chosen.scheduled_steps
        for budget, most in ((3_000, 100), (6_000, 100), (6_000, 2))
    ]
    # Of 63 samples that are not held back: two batches an epoch.
    assert steps == [2 * 2, 2 * 5, 2 * 2]


def test_a_budget_without_an_epoch_is_refused():
    heads = heads_of(built(Perceptron))
    before = snapshot(heads)
    with pytest.raises(TaskError, match="the budget is 500; raise the budget"):
        fine_tune(heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=500)
    assert equal(before, snapshot(heads))


def test_what_is_held_back_is_not_learned_from_until_all_is():
    architecture, tasks = Plain(), two_tasks()
    tuned = fine_tune(
        heads_of(built(Perceptron)), tasks, architecture, CPU, seed=5, budget_samples=3_000, learning_rates=(1e-2,)
    )
    held = {name: set(held_back_rows(each.data, 4, 5, name)) for name, each in tasks.items()}
    hidden = {tuple(tasks[name].data.inputs["inputs"][row].tolist()) for name, rows in held.items() for row in rows}
    learned = [inputs for grad, inputs in architecture.inputs if grad]
    looked_at = [inputs for grad, inputs in architecture.inputs if not grad]
    assert {tuple(row.tolist()) for inputs in looked_at for row in inputs} == hidden
    attempted, last = learned[: -tuned.chosen.steps], learned[-tuned.chosen.steps :]
    seen = {tuple(row.tolist()) for inputs in attempted for row in inputs}
    assert len(seen) == 84 - len(hidden)
    assert not seen & hidden
    assert {tuple(row.tolist()) for inputs in last for row in inputs} == seen | hidden


def test_the_part_held_back_has_its_share_of_each_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 8 + [3])
    data = TaskData({"inputs": torch.randn(69, 2)}, {"labels": labels})
    rows = held_back_rows(data, 4, 0, "a")
    assert rows == sorted(set(rows))
    counts = torch.bincount(labels[rows], minlength=4).tolist()
    assert all(abs(got - wanted) < 1 for got, wanted in zip(counts, (10, 5, 2, 0.25), strict=True))
    assert rows == held_back_rows(data, 4, 0, "a") != held_back_rows(data, 4, 1, "a")
    assert len(held_back_rows(data, 2, 0, "a")) in (34, 35)
    # One number for each token is no class.
    assert len(held_back_rows(tokens(40), 4, 0, "a")) == 10
    assert len(held_back_rows(data.subset([3, 60]), 4, 0, "a")) == 1
    for rows, every in ([5], 4), (range(9), 1):
        with pytest.raises(TaskError, match="task 'a'"):
            held_back_rows(data.subset(rows), every, 0, "a")


def test_tasks_count_alike_whatever_their_size():
    """The gradients of an epoch's batches add up to that of the mean of the tasks' mean losses."""
    heads = heads_of(built(Perceptron), private="head.")
    tasks = {"a": task("a", 61, seed=1), "b": task("b", 9, seed=2)}
    run = _Run(heads, tasks, Plain(), CPU, 0, 8, "loss")
    rows = {name: list(range(len(each.data))) for name, each in tasks.items()}
    steps = run.steps_of(rows)
    assert steps == 4  # "b" has a head of its own and no batch of one
    batches = [
        {name: list(range(step * len(own) // steps, (step + 1) * len(own) // steps)) for name, own in rows.items()}
        for step in range(steps)
    ]
    trained = {key: tensor for key, tensor in run._tensors.items() if isinstance(tensor, nn.Parameter)}
    with run.training():
        found = [run._gradients(batch, {"a": 61.0, "b": 9.0}, steps, trained) for batch in batches]
        modules = {name: heads.module(name) for name in tasks}
        total = sum(
            nn.functional.cross_entropy(modules[name](each.data.inputs["inputs"]), each.data.targets["labels"]) / 2
            for name, each in tasks.items()
        )
        total.backward()
    shared = sum(each[(None, "body.weight")] for each in found) / steps
    expected = modules["a"].body.weight.grad + modules["b"].body.weight.grad
    torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-6)
    own = sum(each[("b", "head.weight")] for each in found) / steps
    torch.testing.assert_close(own, modules["b"].head.weight.grad, rtol=1e-4, atol=1e-6)


def test_shared_and_private_parameters_are_trained_and_stay_shared():
    heads = heads_of(built(Perceptron), private="head.")
    before = {name: heads.module(name).state_dict()["head.weight"].clone() for name in ("a", "b")}
    body = heads.live["body.weight"].detach().clone()
    start = loss_of(heads, new_tasks())
    tuned = fine_tune(heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000, learning_rates=RATES)
    assert loss_of(heads, new_tasks()) < start / 4
    assert set(tuned.state) == {"body.weight", "body.bias"}
    assert not torch.equal(tuned.state["body.weight"], body)
    for name in ("a", "b"):
        module = heads.module(name)
        assert torch.equal(module.body.weight, heads.live["body.weight"])
        assert module.body.weight.data_ptr() == heads.live["body.weight"].data_ptr()
        assert set(tuned.private[name]) == {"head.weight", "head.bias"}
        assert torch.equal(tuned.private[name]["head.weight"], module.head.weight)
        assert not torch.equal(module.head.weight, before[name])


def test_a_model_that_cannot_be_bettered_stays_as_it_is():
    """Its classes are certain already: each attempt's first epoch can at most be as good."""
    module = Perceptron()
    with torch.no_grad():
        module.body.weight.zero_()
        module.body.bias.fill_(1.0)
        module.head.weight.zero_()
        module.head.bias.copy_(torch.tensor([200.0, 0.0, 0.0, 0.0]))
    data = TaskData({"inputs": torch.randn(20, 6)}, {"labels": torch.zeros(20, dtype=torch.int64)})
    heads = heads_of(module)
    before = snapshot(heads)
    tuned = fine_tune(heads, {"a": task("a", data=data)}, Plain(), CPU, seed=0, budget_samples=3_000)
    assert (tuned.chosen.setting, tuned.chosen.steps, tuned.chosen.score) == (None, 0, 1.0)
    assert equal(before, snapshot(heads))
    assert equal(before, tuned.state)


def test_an_attempt_that_diverges_is_recorded_and_another_chosen():
    heads = heads_of(built(Perceptron))
    tuned = fine_tune(heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000, learning_rates=(1e38, 1e-2))
    assert [attempt.diverged for attempt in tuned.attempts] == [True, False]
    assert len(tuned.attempts[0].scores) < len(tuned.attempts[1].scores)
    assert tuned.chosen.setting == Setting(1e-2, None)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tuned.state.values())
    before = snapshot(heads)
    alone = fine_tune(heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000, learning_rates=(1e38,))
    assert alone.chosen.setting is None
    assert equal(before, snapshot(heads))


def test_a_model_that_is_broken_is_refused_and_left_alone():
    module = built(Perceptron)
    with torch.no_grad():
        module.head.bias[0] = torch.nan
    heads = heads_of(module)
    with pytest.raises(TaskError, match="starts from has a loss that is not finite"):
        fine_tune(heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000)
    assert torch.equal(heads.live["body.weight"], module.body.weight)
    assert not any(parameter.requires_grad for parameter in heads.module("a").parameters())


@pytest.mark.parametrize("treatment", ["batch", "kept"])
def test_batch_norm_moves_its_statistics_or_keeps_them(treatment):
    heads = heads_of(built(Normalised))
    before, start = snapshot(heads), loss_of(heads, new_tasks())
    tuned = fine_tune(
        heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000, statistics=(treatment,), learning_rates=RATES
    )
    assert {attempt.setting.statistics for attempt in tuned.attempts} == {treatment}
    assert loss_of(heads, new_tasks()) < start / 2
    assert not torch.equal(tuned.state["norm.weight"], before["norm.weight"])
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(tuned.state[name], before[name]) == (treatment == "kept")
    if treatment == "batch":
        # From the start, not from where the attempts had left them.
        assert tuned.state["norm.num_batches_tracked"] == tuned.chosen.steps


def test_batch_norm_sees_all_tasks_of_a_module_in_one_batch():
    architecture = Plain()
    fine_tune(
        heads_of(built(Normalised)),
        two_tasks(),
        architecture,
        CPU,
        seed=0,
        budget_samples=3_000,
        learning_rates=(1e-3,),
        statistics=("batch",),
    )
    # 63 samples in two batches, later 84 in three.
    assert {len(inputs) for grad, inputs in architecture.inputs if grad} <= {31, 32, 28}


def test_token_models_learn_and_stay_tied():
    tasks = {
        "a": task("a", kind="language_modelling", data=tokens(40, 0)),
        "b": task("b", kind="language_modelling", data=tokens(24, 1)),
    }
    heads = heads_of(built(Tokens))
    before = loss_of(heads, tasks)
    tuned = fine_tune(
        heads, tasks, Plain(), CPU, seed=0, budget_samples=15_000, learning_rates=(1e-2, 3e-2), criterion="metric"
    )
    assert loss_of(heads, tasks) < before / 2
    assert tuned.attempts[0].scores[0] < 0.3 < 0.8 < tuned.chosen.score <= 1
    assert heads.module("a").head.weight is heads.module("a").embedding.weight
    assert set(tuned.state) == {"embedding.weight", "mix.weight", "mix.bias"}


def test_narrow_weights_are_trained_in_float32():
    """Most steps of 5e-4 are lost on weights in bfloat16, unless they add up elsewhere."""
    progress = {}
    for dtype in (torch.float32, torch.bfloat16):
        heads = heads_of(built(Perceptron), dtype=dtype)
        before = loss_of(heads, new_tasks())
        tuned = fine_tune(heads, two_tasks(), Plain(), CPU, seed=0, budget_samples=9_000, learning_rates=(5e-4,))
        progress[dtype] = before - loss_of(heads, new_tasks())
        assert {tensor.dtype for tensor in tuned.state.values()} == {dtype}
    assert progress[torch.float32] > 0.05
    assert progress[torch.bfloat16] == pytest.approx(progress[torch.float32], rel=0.1)


def test_a_criterion_that_falls_is_not_maximised():
    spec = TaskSpec(
        name="a", kind="language_modelling", specialist="a", validation="v", test="t", metrics=["perplexity"]
    )
    tasks = {"a": MeasuredTask(load_task(spec, None), "a", tokens(), 16)}
    with pytest.raises(TaskError, match="its first metric is 'perplexity', of which less is better"):
        fine_tune(heads_of(built(Tokens)), tasks, Plain(), CPU, seed=0, budget_samples=9_000, criterion="metric")


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    class Failing(Plain):
        def call(self, module, inputs):
            if self.samples > 1_000:
                raise KeyboardInterrupt
            return super().call(module, inputs)

    heads = heads_of(built(Normalised))
    before = snapshot(heads)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(heads, two_tasks(), Failing(), CPU, seed=0, budget_samples=9_000)
    assert equal(before, snapshot(heads))
    assert not heads.module("a").training


def test_the_learning_rate_rises_and_falls_to_zero():
    factors = [_schedule(40)(step) for step in range(41)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[22] == pytest.approx(0.5)
    assert factors[40] == 0.0
    run = _Run(heads_of(built(Perceptron)), two_tasks(), Plain(), CPU, 0, 32, "loss")
    rows = {name: list(range(len(each.data))) for name, each in run._tasks.items()}
    moves = []
    with run.training():
        last = snapshot(run._heads)
        for _ in run.train(rows, Setting(1e-2, None), 40, 40):
            now = snapshot(run._heads)
            moves.append(float((now["head.bias"] - last["head.bias"]).abs().mean()))
            last = now
    # Adam's first step has the size of the learning rate.
    assert moves[0] == pytest.approx(1e-2 / 4, rel=1e-3)
    assert len(moves) == 40
    assert moves[-1] < 0.02 * max(moves)

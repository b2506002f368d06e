"""Fisher information and Gram matrices against their definitions, on models small enough to write them out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge.errors import SearchError
from automerge.models.architecture import Architecture
from automerge.searching.evaluator import MeasuredTask
from automerge.searching.gathering import (
    FISHER_SAMPLES,
    fisher_diagonals,
    gather,
    gram_matrices,
    linear_layers,
    refuse_sources_without_tasks,
)
from automerge.spec import ModelSpec
from automerge.tasks.task import TaskData

CPU = torch.device("cpu")


class Plain(Architecture):
    def build(self, reference, arguments):
        raise NotImplementedError


ARCHITECTURE = Plain(ModelSpec(kind="factory", target="nowhere:build"), {})


def task(inputs, reference="a", labels=None, batch_size=7):
    inputs = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    count = len(next(iter(inputs.values())))
    data = TaskData(inputs, {"labels": torch.zeros(count, dtype=torch.int64) if labels is None else labels})
    return MeasuredTask(task=None, reference=reference, data=data, batch_size=batch_size)  # type: ignore[arg-type]


def seeded(factory, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory().eval().requires_grad_(False)


def names_of(module):
    return [name for name, _ in module.named_parameters()]


def fisher(module, tasks, seed=0, source="a", names=None):
    return fisher_diagonals(module, tasks, names or names_of(module), ARCHITECTURE, CPU, source, seed)


def grams(module, tasks):
    return gram_matrices(module, tasks, names_of(module), ARCHITECTURE, CPU)


def test_fisher_of_a_softmax_regression_has_its_closed_form():
    """E_y[(dlog p(y|x) / dW_cj)^2] = p_c (1 - p_c) x_j^2 and p_c (1 - p_c) for the bias."""
    model = seeded(lambda: nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(FISHER_SAMPLES, 4, generator=generator)
    found = fisher(model, {"t": task(inputs)})
    p = torch.softmax(model(inputs).double(), -1)
    exact = {
        "weight": torch.einsum("nc,nj->cj", p * (1 - p), inputs.double() ** 2) / len(inputs),
        "bias": (p * (1 - p)).mean(0),
    }
    norm = torch.sqrt(sum(each.square().sum() for each in exact.values()))
    for name, value in exact.items():
        # One draw a sample: a standard error of some percent.
        torch.testing.assert_close(found[name].double(), value / norm, rtol=0.2, atol=0.03)
        assert found[name].dtype == torch.float32
    assert sum(each.double().square().sum() for each in found.values()) == pytest.approx(1, abs=1e-5)


def test_fisher_uses_gradients_of_single_samples():
    """Two samples whose gradients cancel: their mean has no square, each of them has."""
    model = nn.Linear(1, 2, bias=False).eval().requires_grad_(False)
    model.weight.zero_()
    found = fisher(model, {"t": task(torch.tensor([[1.0], [-1.0]]).repeat(50, 1))})
    torch.testing.assert_close(found["weight"], torch.full((2, 1), 0.5**0.5))


def test_labels_are_drawn_from_the_model_and_not_from_the_data():
    model = seeded(lambda: nn.Linear(2, 3))
    inputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    one, other = (fisher(model, {"t": task(inputs, labels=torch.full((50,), label))}) for label in (0, 2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_fisher_depends_on_seed_source_and_nothing_global():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)))
    tasks = {"t": task(torch.randn(40, 5, generator=torch.Generator().manual_seed(3)))}
    state = torch.get_rng_state()
    first = fisher(model, tasks)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(torch.equal(value, first[name]) for name, value in fisher(model, tasks).items())
    assert not torch.equal(fisher(model, tasks, seed=1)["0.weight"], first["0.weight"])
    assert not torch.equal(fisher(model, tasks, source="b")["0.weight"], first["0.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Tokens(nn.Module):
    """Tokens [n, T] in, logits [n, T, 5] out; the output weights are the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask=None):
        return self.out(torch.tanh(self.mix(self.embedding(input_ids))))


def test_positions_without_a_target_do_not_count():
    model = seeded(Tokens)
    ids = torch.randint(0, 5, (30, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 3:] = -100
    ids_changed = ids.clone()
    ids_changed[:, 3:] = 0
    one = fisher(model, {"t": task({"input_ids": ids}, labels=labels)})
    other = fisher(model, {"t": task({"input_ids": ids_changed}, labels=labels)})
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    every = fisher(model, {"t": task({"input_ids": ids}, labels=ids)})
    assert not torch.equal(every["mix.weight"], one["mix.weight"])


class Shifted(nn.Module):
    """Autograd gives both shifts one and the same gradient, and the scale an expanded one."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1, 3))
        self.other = nn.Parameter(torch.ones(1, 3))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, inputs):
        return (inputs + self.one + self.other) * self.scale.sum()


def test_gradients_that_share_their_memory():
    inputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    found = fisher(seeded(Shifted), {"t": task(inputs)})
    assert found["one"].count_nonzero() == 3
    assert torch.equal(found["one"], found["other"])
    assert found["scale"].count_nonzero() == 2
    assert found["scale"][0] == found["scale"][1]


def test_a_model_that_nothing_changes_is_refused():
    with pytest.raises(SearchError, match="source 'a': its Fisher information is zero"):
        fisher(seeded(lambda: nn.Linear(3, 1)), {"t": task(torch.ones(4, 3))})


def test_a_model_that_cannot_be_differentiated_is_one_sentence():
    class Detached(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).detach()

    with pytest.raises(
        SearchError, match=r"source 'a': its Fisher information on task 't' cannot be gathered: Runtime"
    ):
        fisher(seeded(lambda: Detached(3, 2)), {"t": task(torch.ones(4, 3))})


def test_gram_matrices_are_the_mean_over_all_rows_of_all_tasks():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)))
    data = [torch.randn(count, 9, 5, generator=torch.Generator().manual_seed(count)) for count in (30, 11)]
    found = grams(model, {"one": task(data[0]), "two": task(data[1])})
    assert sorted(found) == ["0.weight", "2.weight"]
    rows = torch.cat([each.reshape(-1, 5) for each in data]).double()
    torch.testing.assert_close(found["0.weight"].double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    hidden = torch.relu(model[0](rows.float())).double()
    torch.testing.assert_close(found["2.weight"].double(), hidden.T @ hidden / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": (2, 1)},
        {"padding": "valid", "bias": False},
    ],
    ids=str,
)
def test_a_convolution_is_linear_in_its_patches(options):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 2), **options), nn.Flatten(1)))
    images = torch.randn(10, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    gram = grams(model, {"t": task(images)})["0.weight"].double()
    # |W X|^2 of any weight of that shape, from the outputs of the convolution itself.
    probe = torch.randn(4, 3, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {key: value for key, value in options.items() if key != "bias"}
    outputs = F.conv2d(images.double(), probe, **options).transpose(0, 1).reshape(4, -1)
    flat = probe.reshape(4, -1)
    torch.testing.assert_close(flat @ gram @ flat.T, outputs @ outputs.T / outputs.shape[1], rtol=1e-5, atol=1e-5)


def test_layers_without_a_gram_matrix():
    model = seeded(
        lambda: nn.ModuleDict(
            {
                "grouped": nn.Conv2d(4, 4, 3, groups=2),
                "reflecting": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                "same": nn.Conv2d(4, 4, 3, padding="same"),
                "norm": nn.LayerNorm(4),
                "linear": nn.Linear(4, 4),
            }
        )
    )
    assert list(linear_layers(model, names_of(model))) == ["linear.weight"]
    # An embedding is no product with an input, so a weight that is also one has none.
    tied = seeded(Tokens)
    assert list(linear_layers(tied, names_of(tied))) == ["mix.weight"]


def test_masked_tokens_are_left_out():
    model = seeded(Tokens)
    ids = torch.randint(0, 5, (12, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    masked = grams(model, {"t": task({"input_ids": ids, "attention_mask": mask})})
    cut = grams(model, {"t": task({"input_ids": ids[:, :4]})})
    assert torch.equal(masked["mix.weight"], cut["mix.weight"])


class Sometimes(nn.Module):
    """``second`` is used only where an input is above 0."""

    def __init__(self):
        super().__init__()
        self.main = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.main(inputs) + (self.second(inputs) if bool((inputs > 0).any()) else 0)


def test_a_statistic_that_one_source_lacks_no_source_has():
    tasks = {"t": task(torch.ones(5, 3)), "u": task(-torch.ones(5, 3), reference="b")}
    models = {"a": seeded(Sometimes), "b": seeded(Sometimes, seed=1)}
    found = gather(["gram"], ["a", "b"], tasks, models.__getitem__, names_of(models["a"]), ARCHITECTURE, CPU, 0)
    assert sorted(found) == ["gram/a/main.weight", "gram/b/main.weight"]
    both = gather(
        ["fisher", "gram"], ["a", "b"], tasks, models.__getitem__, names_of(models["a"]), ARCHITECTURE, CPU, 0
    )
    assert len(both) == 2 + 2 * 4
    assert torch.equal(both["fisher/b/second.weight"], torch.zeros(2, 3))


def test_private_parameters_have_none():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)))
    tasks = {"t": task(torch.ones(4, 5))}
    found = gather(["fisher", "gram"], ["a"], tasks, lambda _: model, ["0.weight", "0.bias"], ARCHITECTURE, CPU, 0)
    assert sorted(found) == ["fisher/a/0.bias", "fisher/a/0.weight", "gram/a/0.weight"]


def test_a_model_without_linear_layers_has_no_gram_matrices():
    model = seeded(lambda: nn.LayerNorm(3))
    with pytest.raises(SearchError, match="needs 'gram' statistics, and no merged parameter has any; leave it out"):
        gather(["gram"], ["a"], {"t": task(torch.ones(4, 3))}, lambda _: model, names_of(model), ARCHITECTURE, CPU, 0)


def test_a_source_without_a_task_is_refused():
    with pytest.raises(SearchError, match=r"source 'b' is the specialist of no task, .* \(fisher\)"):
        refuse_sources_without_tasks(["fisher"], ["a", "b"], ["a", "base"])
    refuse_sources_without_tasks([], ["a", "b"], ["a"])
    refuse_sources_without_tasks(["fisher"], ["a"], ["a", "base"])

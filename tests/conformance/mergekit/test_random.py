"""The random techniques: one distribution, and with the same bits one mask. (Same bits, same tensors: test_tensors.)

A state dict of many tensors with the same values gives many draws in one merge: ours draws by the tensors' names,
mergekit by its generator.
"""

import math

import pytest
import torch

from tests.conformance.mergekit.cases import CASES, FIXTURES, SHAPES
from tests.conformance.mergekit.comparison import BASE, Merge, as_job, merge_ours
from tests.conformance.mergekit.reference import keep_probability

pytestmark = pytest.mark.mergekit

DRAWS = 200
SIGMAS = 5
"""How far a statistic may be from its expectation, in its standard deviations; the seeds are fixed."""


def repeated(models, fixture, merge, mergekit, seed=1):
    """(ours, theirs): the merged tensor of every draw, stacked."""
    many = {model: {f"w{draw:03d}": tensor for draw in range(DRAWS)} for model, tensor in models.items()}
    mergekit.save(fixture, many)
    job = as_job(merge, f"{fixture}-{merge.technique}", fixture, seed=seed)
    theirs = mergekit.merge(job)
    ours = merge_ours(merge, many)
    return [torch.stack([merged[name] for name in sorted(merged)]).double() for merged in (ours, theirs)]


def chi_square(counts, expected, total):
    """How unlikely counts of binomials are, in standard deviations of the chi-square distribution."""
    terms = (counts - expected * total).square() / (expected * (1 - expected) * total)
    return float((terms.sum() - terms.numel()) / math.sqrt(2 * terms.numel()))


@pytest.mark.parametrize("technique", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["l1", "inverse_density"])
def test_dare_drops_alike(mergekit, technique, rescale):
    """Each of the four fates of an element with two sources: a kept or not, b kept or not, independently."""
    size, density = 500, 0.3
    ones = torch.ones(size)
    models = {BASE: torch.zeros(size), "a": ones, "b": 16 * ones}
    merge = Merge(technique, {"a": 1.0, "b": 1.0}, {"density": density, "lambda": 1.0, "rescale": rescale})
    drawn = repeated(models, f"dare-{rescale}", merge, mergekit)
    for merged in drawn:
        # What is kept is about 1 / density of a, and 16 times as much of b; under l1 each draw has a scale of its own.
        second = merged > 8 / density
        alone = torch.where(second, merged, torch.inf).amin(1, keepdim=True)
        first = torch.where(second, merged > alone * 1.01, merged > 0)
        shares = {(True, True): density**2, (False, False): (1 - density) ** 2}
        for fate in ((True, True), (True, False), (False, True), (False, False)):
            expected = torch.tensor(shares.get(fate, density * (1 - density)), dtype=torch.float64)
            happened = (first == fate[0]) & (second == fate[1])
            assert abs(float(happened.sum()) - expected * happened.numel()) <= SIGMAS * math.sqrt(
                expected * (1 - expected) * happened.numel()
            )
            # Every element, and every draw, has its share; a pattern along either would show.
            assert abs(chi_square(happened.sum(0), expected, DRAWS)) < SIGMAS
            assert abs(chi_square(happened.sum(1), expected, size)) < SIGMAS


@pytest.mark.parametrize("technique", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_the_merged_values_have_one_distribution(mergekit, technique):
    """Mean and mean square of every element over the draws: two sources whose signs differ in half of the elements."""
    generator = torch.Generator().manual_seed(5)
    models = {BASE: torch.randn(20, 50, generator=generator)}
    models |= {source: models[BASE] + torch.randn(20, 50, generator=generator) for source in "ab"}
    settings = {"density": 0.6, "lambda": 1.0, "rescale": "l1"}
    if technique.startswith("della"):
        settings |= {"epsilon": 0.3} | ({"normalize": True} if technique == "della" else {})
    merge = Merge(technique, {"a": 0.6, "b": 0.8}, settings)
    ours, theirs = (merged - models[BASE].double() for merged in repeated(models, "values", merge, mergekit))
    for power in (1, 2):
        one, other = ours**power, theirs**power
        error = ((one.var(0) + other.var(0)) / DRAWS).sqrt()
        scores = ((one.mean(0) - other.mean(0)) / error)[error > 0]
        assert len(scores) == 1000
        # A sum of squares of standard normal numbers, and the largest of a thousand of them.
        assert abs(float(scores.square().sum()) - 1000) / math.sqrt(2 * 1000) < SIGMAS
        assert scores.abs().max() < SIGMAS
    assert not torch.equal(ours, theirs)


def test_della_drops_alike(mergekit):
    """The share kept at each rank of a row, against density - epsilon to density + epsilon."""
    density, epsilon, length = 0.5, 0.3, 64
    generator = torch.Generator().manual_seed(6)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(30)])
    models = {BASE: torch.zeros(30, length), "a": order + 1.0}
    settings = {"density": density, "epsilon": epsilon, "lambda": 1.0, "rescale": "l1"}
    drawn = repeated(models, "della", Merge("della_linear", {"a": 1.0}, settings), mergekit)
    expected = density - epsilon + 2 * epsilon * torch.arange(length, dtype=torch.float64) / (length - 1)
    for merged in drawn:
        kept = (merged != 0).double()
        by_rank = torch.zeros(length, dtype=torch.float64).index_add_(0, order.reshape(-1), kept.sum(0).reshape(-1))
        assert abs(chi_square(by_rank, expected, 30 * DRAWS)) < SIGMAS
        assert abs(chi_square(kept.sum(0).reshape(-1), expected[order.reshape(-1)], DRAWS)) < SIGMAS


@pytest.mark.parametrize("name", [name for name, (_, merge) in CASES.items() if merge.technique.startswith("della")])
def test_mergekit_computes_the_probabilities_that_ours_computes(theirs, name):
    """To float32's rounding, a hundredth of the 65536ths that bits resolve; equal magnitudes of a row may swap."""
    fixture, merge = CASES[name]
    models = FIXTURES[fixture]
    density, epsilon = merge.hyperparameters["density"], merge.hyperparameters["epsilon"]
    for source in merge.weights:
        for tensor in SHAPES:
            delta = models[source][tensor] - models[BASE][tensor]
            expected = keep_probability(delta.double(), density, epsilon)
            found = theirs[name][f"probabilities/{source}/{tensor}"].view(delta.shape)
            apart = (found.double() - expected).abs() > 0.01 / 65536
            rows = (delta if delta.dim() > 1 else delta.view(1, -1)).abs().transpose(1, -1)
            rising, order = rows.sort(dim=-1)
            equal = torch.zeros_like(rising, dtype=torch.bool)
            equal[..., 1:] = rising[..., 1:] == rising[..., :-1]
            equal[..., :-1] |= equal[..., 1:].clone()
            tied = torch.zeros_like(equal).scatter_(-1, order, equal).transpose(1, -1).view(delta.shape)
            assert not (apart & ~tied).any()
            assert apart.sum() < 1e-3 * apart.numel() + 3

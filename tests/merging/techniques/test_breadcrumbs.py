"""Model Breadcrumbs against a sort of (magnitude, index) pairs.

Values are multiples of 1/64 and weights multiples of 1/8: sums are exact, so that cuts and elections are decided alike.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging.sparsify import largest, trim, trim_outliers
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique

NAMES = ["breadcrumbs", "breadcrumbs_ties"]
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
shares = st.floats(0, 1)
densities = st.floats(2**-16, 1)


def make_inputs(count, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few magnitudes: nearly every cut lies between equal ones.
    base, *deltas = (torch.randint(-6, 7, shape, generator=generator) / 64 for _ in range(count + 1))
    return TensorInputs("w", [f"s{i}" for i in range(count)], base, [base + delta for delta in deltas])


def reference_trim(delta, density, gamma):
    count = len(delta)
    keep = max(1, int(density * count))
    drop_at_the_top = min(int(gamma * count), max(0, count - keep))
    ranked = sorted(range(count), key=lambda index: (-abs(delta[index]), index))
    kept = set(ranked[drop_at_the_top : drop_at_the_top + keep])
    return [value if index in kept else 0.0 for index, value in enumerate(delta)]


def reference(name, inputs, weights, density, gamma, lambda_):
    base = inputs.base.reshape(-1).tolist()
    deltas = [reference_trim(delta.reshape(-1).tolist(), density, gamma) for delta in inputs.deltas]
    merged = []
    for index, below in enumerate(base):
        terms = [weight * delta[index] for weight, delta in zip(weights, deltas, strict=True)]
        if name == "breadcrumbs_ties":
            sign = 1 if sum(terms) >= 0 else -1
            terms = [term for term in terms if term * sign > 0]
        merged.append(below + lambda_ * sum(terms))
    return torch.tensor(merged).reshape(inputs.base.shape)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name):
    check_technique(load_technique(name))


@pytest.mark.parametrize("name", NAMES)
@given(
    shapes,
    st.integers(0, 99),
    densities,
    shares,
    st.lists(st.integers(-4, 8), min_size=1, max_size=4),
    st.floats(-2, 2),
)
@settings(deadline=None, max_examples=60)
def test_closed_form(name, shape, seed, density, gamma, eighths, scale):
    inputs, weights = make_inputs(len(eighths), shape, seed), [each / 8 for each in eighths]
    merged = load_technique(name)(inputs, weights, density=density, gamma=gamma, lambda_=scale)
    expected = reference(name, inputs, weights, density, gamma, scale)
    torch.testing.assert_close(merged, expected, rtol=2e-6, atol=1e-6)


def test_both_ends_by_hand():
    delta = torch.tensor([5.0, -1, 4, 2, -3, 0, 7, -6, 8, 9])
    assert trim_outliers(delta, 0.5, 0.2).tolist() == [5, 0, 4, 0, -3, 0, 7, -6, 0, 0]
    # The density comes first: of the outliers only one can go.
    assert trim_outliers(delta, 0.9, 0.5).tolist() == [5, -1, 4, 2, -3, 0, 7, -6, 8, 0]


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 0)])
def test_something_is_left_of_the_smallest(shape):
    delta = torch.ones(shape)
    assert int(trim_outliers(delta, 0.3, 0.4).count_nonzero()) == min(1, delta.numel())


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), densities, shares)
@settings(deadline=None)
def test_exactly_the_density_is_kept(values, density, gamma):
    delta = torch.tensor(values, dtype=torch.float32) + 0.25  # no zeros
    kept = trim_outliers(delta, density, gamma)
    assert int(kept.count_nonzero()) == max(1, int(density * len(values)))
    assert torch.equal(kept[kept != 0], delta[kept != 0])
    assert torch.equal(trim_outliers(delta, density, 0.0), trim(delta, density))


@given(st.lists(st.integers(-3, 3), max_size=30), st.data())
@settings(deadline=None)
def test_largest_is_a_stable_sort(values, data):
    keep = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[torch.argsort(tensor, descending=True, stable=True)[:keep]] = True
    assert torch.equal(largest(tensor, keep), expected)


@pytest.mark.parametrize(
    ("name", "values", "other", "kept"),
    [
        ("breadcrumbs", {"density": 1.0, "gamma": 0.3}, "task_arithmetic", {}),
        ("breadcrumbs_ties", {"density": 1.0, "gamma": 0.3}, "ties", {"density": 1.0, "normalize": False}),
        ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.0}, "ties", {"density": 0.4, "normalize": False}),
    ],
)
def test_identities_are_exact(name, values, other, kept):
    weights = {"s0": 0.5, "s1": 0.25}
    given_settings = Settings(name, weights, {**values, "lambda": 1.0})
    same = canonical_settings(given_settings)
    assert same == Settings(other, weights, {**kept, "lambda": 1.0})
    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(31, 17, generator=generator) for _ in range(3))
    inputs = TensorInputs("w", ["s0", "s1"], base, [one, two])
    merged = load_technique(name).merge(inputs, given_settings)
    assert torch.equal(merged, load_technique(other).merge(inputs, same))


def test_lambda_is_folded():
    values = {"density": 0.5, "gamma": 0.1, "lambda": 2.0}
    for name in NAMES:
        folded = canonical_settings(Settings(name, {"a": 0.25, "b": -0.5}, values))
        assert folded == Settings(name, {"a": 0.5, "b": -1.0}, {**values, "lambda": 1.0})

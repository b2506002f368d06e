"""SCE against its definition, element by element in Python's floats.

Values are multiples of 1/64 and weights multiples of 1/8, so that variances and elections are decided alike.
"""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.errors import MergeError
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique, validate_settings
from automerge.testing.techniques import check_technique

sce = load_technique("sce")
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def make_inputs(count, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    base, *deltas = (torch.randint(-5, 6, shape, generator=generator) / 64 for _ in range(count + 1))
    return TensorInputs("w", [f"s{i}" for i in range(count)], base, [base + delta for delta in deltas])


def of_deltas(*deltas):
    deltas = [torch.tensor(delta) for delta in deltas]
    return TensorInputs("w", [f"s{i}" for i in range(len(deltas))], torch.zeros_like(deltas[0]), deltas)


def reference(inputs, weights, select_topk):
    deltas = [delta.reshape(-1).tolist() for delta in inputs.deltas]
    columns = list(zip(*deltas, strict=True))
    if select_topk < 1:
        # In units of 1/64 the values are whole numbers, and pvariance is exact.
        spread = [statistics.pvariance([round(64 * value) for value in column]) for column in columns]
        varying = sum(each > 0 for each in spread)
        keep = max(1, int(select_topk * varying)) if varying else 0
        kept = set(sorted(range(len(columns)), key=lambda index: (-spread[index], index))[:keep])
        columns = [column if i in kept else (0.0,) * len(weights) for i, column in enumerate(columns)]
    energies = [sum(column[source] ** 2 for column in columns) for source in range(len(weights))]
    own = [energy / (sum(energies) or 1.0) for energy in energies]
    merged = []
    for below, column in zip(inputs.base.reshape(-1).tolist(), columns, strict=True):
        votes = [weight * value for weight, value in zip(weights, column, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [i for i, vote in enumerate(votes) if vote * sign > 0]
        over = sum(weights[i] * own[i] for i in agree)
        merged.append(below + sum(weights[i] * own[i] * column[i] for i in agree) / (over or 1.0))
    return torch.tensor(merged).reshape(inputs.base.shape)


def test_it_keeps_the_contract():
    check_technique(sce)


@given(shapes, st.integers(0, 99), st.floats(0.001, 1), st.lists(st.integers(0, 8), min_size=2, max_size=5))
@settings(deadline=None, max_examples=150)
def test_closed_form(shape, seed, select_topk, eighths):
    inputs, weights = make_inputs(len(eighths), shape, seed), [each / 8 for each in eighths]
    merged = sce(inputs, weights, select_topk=select_topk)
    torch.testing.assert_close(merged, reference(inputs, weights, select_topk), rtol=3e-6, atol=3e-6)


def test_by_hand():
    """Squares sum to 9 and 3: shares 3/4 and 1/4. The second element is the first source's alone."""
    inputs = of_deltas([2.0, 2.0, 1.0], [1.0, -1.0, 1.0])
    assert sce(inputs, [0.5, 0.5], select_topk=1.0).tolist() == [1.75, 2.0, 1.0]


def test_what_all_changed_alike_is_not_selected():
    inputs = of_deltas([2.0, 2.0, 1.0], [1.0, -1.0, 1.0])
    # Two elements vary; half of them is one, that of the larger variance.
    assert sce(inputs, [0.5, 0.5], select_topk=0.5).tolist() == [0.0, 2.0, 0.0]
    alike = of_deltas([3.0, -1.0], [3.0, -1.0])
    assert sce(alike, [0.5, 0.5], select_topk=0.9).tolist() == [0.0, 0.0]
    assert sce(alike, [0.5, 0.5], select_topk=1.0).tolist() == [3.0, -1.0]


def test_our_weights_multiply_its_own_and_vote():
    inputs = of_deltas([2.0, 2.0, 1.0], [1.0, -1.0, 1.0])
    # 1/4 * 3/4 and 3/4 * 1/4 are equal; and -1 * 3/4 outvotes 2 * 1/4.
    assert sce(inputs, [0.25, 0.75], select_topk=1.0).tolist() == [1.5, -1.0, 1.0]
    assert sce(inputs, [0.0, 1.0], select_topk=1.0).tolist() == [1.0, -1.0, 1.0]


@given(shapes, st.integers(0, 99), st.floats(0.001, 1), st.integers(-40, 10))
@settings(deadline=None, max_examples=60)
def test_its_own_weights_are_shares_at_any_scale(shape, seed, select_topk, power):
    deltas = make_inputs(3, shape, seed).deltas
    merged, scaled = (
        sce(
            TensorInputs("w", ["a", "b", "c"], torch.zeros(shape), [delta * scale for delta in deltas]),
            [0.5, 0.25, 0.25],
            select_topk=select_topk,
        )
        for scale in (1.0, 2.0**power)
    )
    assert torch.equal(merged * 2.0**power, scaled)


@given(shapes, st.integers(0, 99), st.floats(0.001, 1), st.permutations(range(4)))
@settings(deadline=None, max_examples=60)
def test_the_order_of_the_sources_has_no_effect(shape, seed, select_topk, order):
    inputs, weights = make_inputs(4, shape, seed), [0.125, 0.5, 1.0, 0.25]
    shuffled = TensorInputs("w", [f"s{i}" for i in order], inputs.base, [inputs.sources[i] for i in order])
    merged = sce(inputs, weights, select_topk=select_topk)
    again = sce(shuffled, [weights[i] for i in order], select_topk=select_topk)
    torch.testing.assert_close(merged, again, rtol=1e-6, atol=1e-6)


@given(shapes, st.integers(0, 99), st.floats(0.001, 1), st.lists(st.integers(1, 8), min_size=2, max_size=4))
@settings(deadline=None, max_examples=60)
def test_it_stays_between_what_it_averages(shape, seed, select_topk, eighths):
    inputs = make_inputs(len(eighths), shape, seed)
    merged = sce(inputs, [each / 8 for each in eighths], select_topk=select_topk)
    everything = torch.stack([*inputs.sources, inputs.base])
    assert (merged <= everything.amax(0) + 1e-6).all()
    assert (merged >= everything.amin(0) - 1e-6).all()


def test_two_sources_at_least():
    with pytest.raises(MergeError, match="at least 2 sources"):
        validate_settings(
            Settings("sce", {"a": 1.0}, {"select_topk": 0.5}), sources=["a"], has_base=True, where="block"
        )


def test_a_shared_factor_cancels():
    values = {"select_topk": 0.5}
    assert canonical_settings(Settings("sce", {"a": 3.0, "b": 1.0}, values)) == Settings(
        "sce", {"a": 0.75, "b": 0.25}, values
    )

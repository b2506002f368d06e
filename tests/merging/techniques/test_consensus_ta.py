"""Consensus Task Arithmetic against its definition, element by element in exact arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique

consensus_ta = load_technique("consensus_ta")


def make_inputs(count, shape, seed=0):
    """Multiples of 1/64: with weights and mask_lambda in eighths every comparison is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(-64, 65, shape, generator=generator) / 64  # noqa: E731
    base = draw()
    return TensorInputs("w", [f"s{i}" for i in range(count)], base, [base + draw() for _ in range(count)])


def reference(inputs, weights, mask_lambda, agreement, lambda_):
    merged = []
    used = sum(weight != 0 for weight in weights)
    columns = zip(*[source.reshape(-1).tolist() for source in inputs.sources], strict=True)
    for below, column in zip(inputs.base.reshape(-1).tolist(), columns, strict=True):
        own = [Fraction(w) * (Fraction(t) - Fraction(below)) for w, t in zip(weights, column, strict=True)]
        users = 0
        for index, change in enumerate(own):
            others = sum(other for position, other in enumerate(own) if position != index)
            users += weights[index] != 0 and abs(change) >= Fraction(mask_lambda) * abs(others)
        total = sum(own) if users >= min(agreement, used) else 0
        merged.append(float(Fraction(below) + Fraction(lambda_) * total))
    return merged


def test_it_keeps_the_contract():
    check_technique(consensus_ta)


def test_by_hand():
    """Two sources use the first element; the second and the third are used by one alone."""
    base = torch.zeros(3)
    sources = [torch.tensor([2.0, 4, 1]), torch.tensor([3.0, 0, -1]), torch.tensor([-1.0, 0, 8])]
    inputs = TensorInputs("w", ["a", "b", "c"], base, sources)
    merged = consensus_ta(inputs, [1, 1, 1], mask_lambda=0.5, agreement=2, lambda_=1.0)
    assert merged.tolist() == [4.0, 0.0, 0.0]
    merged = consensus_ta(inputs, [1, 1, 1], mask_lambda=0.5, agreement=1, lambda_=1.0)
    assert merged.tolist() == [4.0, 4.0, 8.0]


@given(
    st.lists(st.integers(-4, 8), min_size=2, max_size=5),
    st.integers(0, 8),
    st.integers(1, 6),
    st.sampled_from([1.0, 0.5, -2.0]),
    st.integers(0, 999),
)
@settings(deadline=None, max_examples=100)
def test_closed_form(eighths, mask_eighths, agreement, scale, seed):
    inputs = make_inputs(len(eighths), (3, 5), seed)
    weights = [each / 8 for each in eighths]
    options = {"mask_lambda": mask_eighths / 8, "agreement": agreement, "lambda_": scale}
    merged = consensus_ta(inputs, weights, **options)
    assert merged.reshape(-1).tolist() == reference(inputs, weights, **options)


@given(st.permutations(range(4)), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_order_of_the_sources_has_no_effect(order, seed):
    inputs = make_inputs(4, (6, 7), seed)
    weights = [0.25, 0.5, 0.125, 1.0]
    options = {"mask_lambda": 0.375, "agreement": 2, "lambda_": 1.0}
    shuffled = TensorInputs(
        "w", [inputs.source_names[i] for i in order], inputs.base, [inputs.sources[i] for i in order]
    )
    again = consensus_ta(shuffled, [weights[i] for i in order], **options)
    assert torch.equal(consensus_ta(inputs, weights, **options), again)


def test_identical_sources_are_kept_whole():
    inputs = make_inputs(1, (9, 4))
    twins = TensorInputs("w", ["a", "b"], inputs.base, inputs.sources * 2)
    merged = consensus_ta(twins, [0.5, 0.5], mask_lambda=1.0, agreement=2, lambda_=1.0)
    assert torch.equal(merged, inputs.sources[0])


def test_a_common_factor_of_the_weights_leaves_the_masks():
    inputs = make_inputs(3, (50,))
    options = {"mask_lambda": 0.5, "agreement": 2, "lambda_": 1.0}
    one = consensus_ta(inputs, [0.25, 0.5, 0.5], **options) - inputs.base
    four = consensus_ta(inputs, [1.0, 2.0, 2.0], **options) - inputs.base
    assert torch.equal(4 * one, four)


@pytest.mark.parametrize(
    ("weights", "values", "expected"),
    [
        # Nothing masked, or one source used: task arithmetic, and then its own identities.
        ((0.5, 0.25), {"mask_lambda": 0.0}, ("task_arithmetic", (0.5, 0.25), {"lambda": 1.0})),
        ((0.5, 0.0), {}, ("task_arithmetic", (0.5, 0.0), {"lambda": 1.0})),
        ((1.0, 0.0), {}, ("linear", (1.0, 0.0), {})),
        # No more than all can agree; lambda is a factor of the weights.
        (
            (0.5, 0.25),
            {"agreement": 7, "lambda": 2.0},
            ("consensus_ta", (1.0, 0.5), {"mask_lambda": 0.4, "agreement": 2, "lambda": 1.0}),
        ),
    ],
)
def test_canonical_form(weights, values, expected):
    names = ["a", "b"]
    technique, scaled, options = expected
    settings = Settings(
        "consensus_ta", dict(zip(names, weights, strict=True)), consensus_ta.declaration.defaults() | values
    )
    simple = canonical_settings(settings)
    assert simple == Settings(technique, dict(zip(names, scaled, strict=True)), options)
    inputs = make_inputs(2, (8, 9))
    inputs = TensorInputs("w", names, inputs.base, inputs.sources)
    merged = load_technique(technique).merge(inputs, simple)
    torch.testing.assert_close(consensus_ta.merge(inputs, settings), merged, rtol=1e-6, atol=1e-6)

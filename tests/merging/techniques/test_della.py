"""DELLA against a reference that ranks and draws element by element.

Values are multiples of 1/64, so that many magnitudes are equal and ranked by index.
"""

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging import sparsify
from automerge.merging.sparsify import drop, drop_by_rank
from automerge.merging.technique import Settings, TensorInputs, canonical_settings, load_technique
from automerge.testing.techniques import check_technique

NAMES = ["della", "della_linear"]
WORD = 2**64
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def bits_of(seed, source, tensor, index):
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{source}\0{tensor}".encode()).digest()[:8], "little")
    word = (key + (index // 4 + 1) * 0x9E3779B97F4A7C15) % WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return ((word ^ (word >> 31)) >> (16 * (index % 4))) & 0xFFFF


def reference_drop(delta, density, epsilon, rescale, seed, source, tensor):
    """Every row in turn: the elements that differ in the second index only."""
    epsilon = min(epsilon, density, 1 - density)
    if epsilon <= 0:
        return drop(delta, density, rescale, seed=seed, source=source, tensor=tensor)
    rows = delta if delta.dim() > 1 else delta.reshape(1, -1)
    kept, flat_index = torch.zeros(rows.shape), torch.arange(rows.numel()).reshape(rows.shape)
    for first, *rest in itertools.product(*map(range, (rows.shape[0], *rows.shape[2:]))):
        places = [(first, column, *rest) for column in range(rows.shape[1])]
        ranked = sorted(places, key=lambda place: (abs(rows[place].item()), place))
        for rank, place in enumerate(ranked):
            share = rank / (len(ranked) - 1) if len(ranked) > 1 else 0.5
            threshold = math.floor((share * (2 * epsilon) + (density - epsilon)) * 65536 + 0.5)
            if bits_of(seed, source, tensor, int(flat_index[place])) < threshold:
                kept[place] = rows[place].item() / (threshold / 65536 if rescale == "inverse_density" else 1)
    kept = kept.reshape(delta.shape)
    if rescale == "l1" and kept.any():
        kept *= delta.abs().sum() / kept.abs().sum()
    return kept


def reference(name, inputs, weights, density, epsilon, lambda_, rescale, normalize):
    deltas = [
        reference_drop(delta, density, epsilon, rescale, inputs.seed, source, inputs.tensor).reshape(-1).tolist()
        for source, delta in zip(inputs.source_names, inputs.deltas, strict=True)
    ]
    merged = []
    for index, below in enumerate(inputs.base.reshape(-1).tolist()):
        terms = [(weight, weight * delta[index]) for weight, delta in zip(weights, deltas, strict=True)]
        if name == "della":
            sign = 1 if sum(term for _, term in terms) >= 0 else -1
            terms = [(weight, term) for weight, term in terms if term * sign > 0]
        total = sum(term for _, term in terms)
        if normalize:
            total /= sum(weight for weight, _ in terms) or 1.0
        merged.append(below + lambda_ * total)
    return torch.tensor(merged).reshape(inputs.base.shape)


def make_inputs(count, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    base, *deltas = (torch.randint(-32, 33, shape, generator=generator) / 64 for _ in range(count + 1))
    return TensorInputs("block.weight", [f"s{i}" for i in range(count)], base, [base + each for each in deltas], seed)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name):
    check_technique(load_technique(name))


@pytest.mark.parametrize("rescale", ["inverse_density", "l1"])
@given(shapes, st.integers(0, 99), st.floats(2**-16, 1), st.floats(0, 0.5))
@settings(deadline=None, max_examples=60)
def test_drop_by_rank(rescale, shape, seed, density, epsilon):
    delta = make_inputs(1, shape, seed).deltas[0]
    dropped = drop_by_rank(delta, density, epsilon, rescale, seed=seed, source="a", tensor="t")
    expected = reference_drop(delta, density, epsilon, rescale, seed, "a", "t")
    torch.testing.assert_close(dropped, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("name", "normalize"), [("della", True), ("della", False), ("della_linear", False)])
@pytest.mark.parametrize("rescale", ["inverse_density", "l1"])
@pytest.mark.parametrize("weights", [[0.375], [0.25, 0.75], [1.0, 0.0], [1.0, -0.5, 0.25]], ids=str)
def test_closed_form(name, normalize, rescale, weights):
    for shape in [(), (1,), (11,), (5, 7), (3, 5, 2, 2)]:
        for density, epsilon in [(0.5, 0.15), (0.7, 0.5), (0.4, 0.0), (1.0, 0.2)]:
            inputs = make_inputs(len(weights), shape, seed=len(weights))
            merged = load_technique(name)(
                inputs,
                weights,
                density=density,
                epsilon=epsilon,
                lambda_=0.5,
                rescale=rescale,
                **({"normalize": normalize} if name == "della" else {}),
            )
            expected = reference(name, inputs, weights, density, epsilon, 0.5, rescale, normalize)
            torch.testing.assert_close(merged, expected, rtol=3e-6, atol=3e-6)


def test_large_elements_are_kept_more_often():
    delta = torch.arange(1.0, 11).repeat(20_000, 1)
    kept = drop_by_rank(delta, 0.5, 0.2, "l1", seed=1, source="a", tensor="t") != 0
    expected = torch.linspace(0.3, 0.7, 10)
    assert ((kept.float().mean(0) - expected).abs() < 4 * 0.5 / math.sqrt(20_000)).all()


def test_it_is_unbiased():
    """In expectation over the seed every element comes back, the rarely kept ones too."""
    delta = torch.arange(1.0, 6).repeat(50_000, 1)
    mean = drop_by_rank(delta, 0.4, 0.3, "inverse_density", seed=2, source="a", tensor="t").mean(0)
    probability = torch.linspace(0.1, 0.7, 5)
    error = delta[0] * ((1 - probability) / probability / 50_000).sqrt()
    assert ((mean - delta[0]).abs() < 4 * error).all()


def test_l1_keeps_the_norm():
    delta = make_inputs(1, (40, 50), 3).deltas[0]
    dropped = drop_by_rank(delta, 0.3, 0.1, "l1", seed=2, source="a", tensor="t")
    torch.testing.assert_close(dropped.abs().sum(), delta.abs().sum())


def test_blocks_of_rows_and_strides_have_no_effect(monkeypatch):
    delta = torch.randn(9, 6, 2, generator=torch.Generator().manual_seed(0))
    arguments = {"seed": 2, "source": "a", "tensor": "t"}
    whole = drop_by_rank(delta, 0.5, 0.3, "l1", **arguments)
    strided = delta.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert torch.equal(drop_by_rank(strided, 0.5, 0.3, "l1", **arguments), whole)
    monkeypatch.setattr(sparsify, "CHUNK", 30)
    assert torch.equal(drop_by_rank(delta, 0.5, 0.3, "l1", **arguments), whole)


@pytest.mark.parametrize(
    ("name", "values", "other", "kept"),
    [
        ("della", {"density": 1.0, "normalize": True}, "ties", {"density": 1.0, "normalize": True}),
        ("della", {"density": 1.0, "normalize": False}, "ties", {"density": 1.0, "normalize": False}),
        ("della", {"density": 0.5, "epsilon": 0.0, "normalize": False}, "dare_ties", {"density": 0.5}),
        ("della_linear", {"density": 0.5, "epsilon": 0.0}, "dare_linear", {"density": 0.5}),
        ("della_linear", {"density": 1.0}, "task_arithmetic", {}),
        ("della_linear", {"density": 0.75, "epsilon": 0.5}, "della_linear", {"density": 0.75, "epsilon": 0.25}),
    ],
    ids=str,
)
def test_identities_are_exact(name, values, other, kept):
    weights = {"s0": 0.5, "s1": 0.25} if values.get("normalize") is not True else {"s0": 0.75, "s1": 0.25}
    for rescale in ("inverse_density", "l1"):
        given_settings = Settings(name, weights, {"epsilon": 0.15, "lambda": 1.0, "rescale": rescale} | values)
        same = canonical_settings(given_settings)
        if other in ("dare_ties", "dare_linear", "della_linear"):
            kept = kept | {"rescale": rescale}
        if other == "task_arithmetic":
            assert sum(weights.values()) != 1  # else it were linear
        assert same == Settings(other, weights, kept | {"lambda": 1.0})
        generator = torch.Generator().manual_seed(0)
        base, one, two = (torch.randn(31, 17, generator=generator) for _ in range(3))
        inputs = TensorInputs("w", ["s0", "s1"], base, [one, two], seed=4)
        merged = load_technique(name).merge(inputs, given_settings)
        assert torch.equal(merged, load_technique(other).merge(inputs, same))


def test_factors_are_folded():
    values = {"density": 0.5, "epsilon": 0.1, "lambda": 2.0, "rescale": "l1"}
    folded = canonical_settings(Settings("della_linear", {"a": 0.25, "b": -0.5}, values))
    assert folded == Settings("della_linear", {"a": 0.5, "b": -1.0}, {**values, "lambda": 1.0})
    scaled = canonical_settings(Settings("della", {"a": 3.0, "b": 1.0}, {**values, "normalize": True}))
    assert scaled == Settings("della", {"a": 0.75, "b": 0.25}, {**values, "normalize": True})

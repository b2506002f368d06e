"""The five built-in techniques against a slow reference that is written from their definitions, element by element.

Values are multiples of 1/64 and weights multiples of 1/8: every sum is exact in float32, so that elections of signs
and cuts between equal magnitudes are decided alike, and only divisions round.
"""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.merging.random import keep_threshold
from automerge.merging.technique import TensorInputs, load_technique

WORD = 2**64


def splitmix64(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def reference_kept(seed, source, tensor, index, density):
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{source}\0{tensor}".encode()).digest()[:8], "little")
    word = splitmix64((key + (index // 4 + 1) * 0x9E3779B97F4A7C15) % WORD)
    return (word >> (16 * (index % 4))) & 0xFFFF < math.floor(density * 65536 + 0.5)


def reference_trim(delta, density):
    keep = max(1, int(density * len(delta)))
    by_magnitude = sorted(range(len(delta)), key=lambda index: (-abs(delta[index]), index))
    return [value if index in by_magnitude[:keep] else 0.0 for index, value in enumerate(delta)]


def reference_drop(delta, density, rescale, inputs, source):
    if density == 1:
        return delta
    kept = [
        value if reference_kept(inputs.seed, source, inputs.tensor, index, density) else 0.0
        for index, value in enumerate(delta)
    ]
    norm = sum(map(abs, kept))
    factor = 1 / density if rescale == "inverse_density" else (sum(map(abs, delta)) / norm if norm else 1.0)
    return [value * factor for value in kept]


def reference_elected(column, weights, normalize):
    weighted = [weight * value for weight, value in zip(weights, column, strict=True)]
    sign = 1 if sum(weighted) >= 0 else -1
    kept = [(weight, value) for weight, value in zip(weights, weighted, strict=True) if value * sign > 0]
    total = sum(value for _, value in kept)
    return total / (sum(weight for weight, _ in kept) or 1.0) if normalize else total


def reference(name, inputs, weights, options):
    sources = [source.reshape(-1).tolist() for source in inputs.sources]
    if name == "linear":
        columns = zip(*sources, strict=True)
        return [sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights) for column in columns]
    base = inputs.base.reshape(-1).tolist()
    deltas = [[value - below for value, below in zip(source, base, strict=True)] for source in sources]
    if name == "ties":
        deltas = [reference_trim(delta, options["density"]) for delta in deltas]
    if name.startswith("dare"):
        deltas = [
            reference_drop(delta, options["density"], options["rescale"], inputs, source)
            for source, delta in zip(inputs.source_names, deltas, strict=True)
        ]
    merged = []
    for below, *column in zip(base, *deltas, strict=True):
        if name in ("ties", "dare_ties"):
            value = reference_elected(column, weights, options.get("normalize", False))
        else:
            value = sum(weight * each for weight, each in zip(weights, column, strict=True))
        merged.append(below + options["lambda_"] * value)
    return merged


def make_inputs(count, shape, seed=0, base=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(-64, 65, shape, generator=generator) / 64  # noqa: E731
    below = draw()
    sources = [below + draw() for _ in range(count)]
    return TensorInputs("block.weight", [f"s{index}" for index in range(count)], below if base else None, sources, seed)


OPTIONS = {
    "linear": [{}],
    "task_arithmetic": [{"lambda_": 1.0}, {"lambda_": 0.5}, {"lambda_": -2.0}],
    "ties": [
        {"density": density, "lambda_": scale, "normalize": normalize}
        for density in (0.001, 0.3, 0.65, 1.0)
        for scale in (1.0, 0.5)
        for normalize in (True, False)
    ],
    "dare_linear": [
        {"density": density, "lambda_": scale, "rescale": rescale}
        for density in (0.01, 0.5, 1.0)
        for scale in (1.0, 0.5)
        for rescale in ("inverse_density", "l1")
    ],
}
OPTIONS["dare_ties"] = OPTIONS["dare_linear"]
CASES = [(name, options) for name, many in OPTIONS.items() for options in many]
WEIGHTS = {
    1: [[1.0], [0.375]],
    2: [[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [1.5, -0.25]],
    3: [[0.5, 0.25, 0.25], [0.125, 1.0, 0.5], [1.0, -0.5, 0.25]],
    4: [[0.25, 0.25, 0.25, 0.25], [0.125, 0.5, 1.0, 0.25]],
}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_closed_form(name, options, count):
    for shape in [(), (1,), (7, 9), (2, 3, 5)]:
        inputs = make_inputs(count, shape, seed=count)
        for weights in WEIGHTS[count]:
            merged = load_technique(name)(inputs, weights, **options)
            expected = torch.tensor(reference(name, inputs, weights, options)).reshape(shape)
            assert merged.shape == shape
            torch.testing.assert_close(merged, expected, rtol=2e-6, atol=2e-6)


def test_ties_by_hand():
    """Three elements: both agree, they conflict, one was trimmed."""
    base = torch.zeros(4)
    inputs = TensorInputs("t", ["a", "b"], base, [torch.tensor([4.0, 3, 1, 0]), torch.tensor([2.0, -5, 0, 4])])
    merged = load_technique("ties")(inputs, [0.5, 0.5], density=0.5, lambda_=1.0, normalize=True)
    # a keeps 4, 3; b keeps -5, 4. Second element: -5 outweighs 3; the last is b's alone.
    assert merged.tolist() == [4.0, -5.0, 0.0, 4.0]


def test_a_tie_in_the_election_is_positive():
    inputs = TensorInputs("t", ["a", "b"], torch.zeros(1), [torch.tensor([2.0]), torch.tensor([-2.0])])
    merged = load_technique("ties")(inputs, [0.5, 0.5], density=1.0, lambda_=1.0, normalize=True)
    assert merged.tolist() == [2.0]


def test_dare_is_unbiased():
    base, source = torch.zeros(400_000), torch.ones(400_000)
    inputs = TensorInputs("t", ["a"], base, [source], seed=5)
    merged = load_technique("dare_linear")(inputs, [1.0], density=0.3, lambda_=1.0, rescale="inverse_density")
    assert merged.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(0.7 / 0.3 / 400_000))


def test_dare_l1_keeps_the_norm():
    inputs = make_inputs(1, (3000,), seed=2)
    merged = load_technique("dare_linear")(inputs, [1.0], density=0.3, lambda_=1.0, rescale="l1")
    torch.testing.assert_close((merged - inputs.base).abs().sum(), inputs.deltas[0].abs().sum(), rtol=1e-4, atol=0)


techniques = st.sampled_from(CASES)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@given(techniques, shapes, st.integers(1, 4), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=80)
def test_the_order_of_the_sources_has_no_effect(case, shape, count, random):
    name, options = case
    inputs = make_inputs(count, shape, seed=1)
    weights = [random.randrange(1, 9) / 8 for _ in range(count)]
    order = random.sample(range(count), count)
    shuffled = TensorInputs(
        inputs.tensor,
        [inputs.source_names[i] for i in order],
        inputs.base,
        [inputs.sources[i] for i in order],
        inputs.seed,
    )
    technique = load_technique(name)
    merged = technique(inputs, weights, **options)
    again = technique(shuffled, [weights[i] for i in order], **options)
    torch.testing.assert_close(merged, again, rtol=1e-6, atol=1e-6)


@given(shapes, st.lists(st.floats(0.01, 5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_linear_of_identical_sources_is_the_source(shape, weights):
    source = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs = TensorInputs("t", [str(i) for i in range(len(weights))], None, [source] * len(weights))
    torch.testing.assert_close(load_technique("linear")(inputs, weights), source, rtol=1e-6, atol=0)


@given(st.sampled_from(["linear", "ties"]), shapes, st.lists(st.integers(1, 8), min_size=2, max_size=4))
@settings(deadline=None, max_examples=50)
def test_normalised_techniques_stay_between_what_they_average(name, shape, eighths):
    inputs = make_inputs(len(eighths), shape, seed=3)
    options = {"density": 0.5, "lambda_": 1.0, "normalize": True} if name == "ties" else {}
    merged = load_technique(name)(inputs, [each / 8 for each in eighths], **options)
    everything = torch.stack([*inputs.sources, inputs.base])
    assert (merged <= everything.amax(0) + 1e-6).all()
    assert (merged >= everything.amin(0) - 1e-6).all()


@given(shapes, st.lists(st.integers(1, 8), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_ties_without_trim_or_conflict_is_linear(shape, eighths):
    inputs = make_inputs(len(eighths), shape, seed=4)
    upwards = [inputs.base + (source - inputs.base).abs() + 1 / 64 for source in inputs.sources]
    inputs = TensorInputs("t", inputs.source_names, inputs.base, upwards)
    weights = [each / 8 for each in eighths]
    merged = load_technique("ties")(inputs, weights, density=1.0, lambda_=1.0, normalize=True)
    torch.testing.assert_close(merged, load_technique("linear")(inputs, weights), rtol=1e-6, atol=1e-6)


def test_the_resolution_of_the_density():
    assert keep_threshold(1.0) == 65536
    assert keep_threshold(0.65) == 42598
    assert keep_threshold(2**-16) == 1

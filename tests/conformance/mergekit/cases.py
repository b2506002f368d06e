"""The fixtures, and the merges of them that are compared."""

from collections.abc import Iterator

import torch

from tests.conformance.mergekit.comparison import BASE, Merge, Model

SHAPES = {"matrix": (257, 129), "embedding": (300, 300), "conv": (24, 16, 3, 3), "bias": (1000,)}

WEIGHTS = {
    2: {"a": 0.3, "b": 0.7},
    3: {"a": 0.3, "b": 0.5, "c": 0.4},
    5: {"a": 0.3, "b": -0.2, "c": 0.45, "d": 0.0, "e": 0.6},
}


def near(sources: int) -> dict[str, Model]:
    """Fine-tuned models as they are: task vectors of a tenth of the base's size."""
    generator = torch.Generator().manual_seed(sources)
    base = _draw(generator, 0.05)
    models = {BASE: base}
    for source in WEIGHTS[sources]:
        change = _draw(generator, 0.005)
        models[source] = {name: base[name] + change[name] for name in SHAPES}
    return models


def far(sources: int) -> dict[str, Model]:
    """Models that have nothing in common, of magnitudes from 1e-7 to 1e5."""
    generator = torch.Generator().manual_seed(100 + sources)
    models = {}
    for model in (BASE, *WEIGHTS[sources]):
        sizes = _draw(generator, 2.0)
        models[model] = {name: value * sizes[name].exp() for name, value in _draw(generator, 1.0).items()}
    return models


def _draw(generator: torch.Generator, scale: float) -> Model:
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


FIXTURES = {"near2": near(2), "near3": near(3), "far2": far(2), "far5": far(5)}
"""float32; no two elements of a task vector have one magnitude at any cut of the merges below (asserted)."""


def merges(sources: int) -> Iterator[Merge]:
    """For every technique that both have, its settings; the weights are not all positive, nor sum to 1, for all."""
    weights = WEIGHTS[sources]
    yield Merge("linear", weights)
    for scale in (1.0, 0.8):
        yield Merge("task_arithmetic", weights, {"lambda": scale})
    for density, scale, normalize in ((0.1, 1.0, True), (0.5, 0.8, True), (0.5, 0.8, False), (1.0, 1.0, True)):
        yield Merge("ties", weights, {"density": density, "lambda": scale, "normalize": normalize})
    for technique in ("dare_linear", "dare_ties"):
        for density, scale in ((0.25, 1.0), (0.7, 1.2), (1.0, 1.0)):
            for rescale in ("l1", "inverse_density"):
                yield Merge(technique, weights, {"density": density, "lambda": scale, "rescale": rescale})
    for technique in ("breadcrumbs", "breadcrumbs_ties"):
        for density, gamma in ((0.5, 0.01), (0.9, 0.05), (0.98, 0.05)):
            yield Merge(technique, weights, {"density": density, "gamma": gamma, "lambda": 0.8})
    for density, epsilon in ((0.5, 0.15), (0.7, 0.25)):
        settings = {"density": density, "epsilon": epsilon, "lambda": 0.8, "rescale": "l1"}
        yield Merge("della_linear", weights, settings)
        for normalize in (True, False):
            yield Merge("della", weights, {**settings, "normalize": normalize})
    if sources == 2:
        yield Merge("slerp", weights)
    for share in (1.0, 0.5, 0.1):
        yield Merge("sce", dict.fromkeys(weights, 1.0), {"select_topk": share})


CASES = {
    "-".join([fixture, merge.technique, *(f"{key}={value}" for key, value in merge.hyperparameters.items())]): (
        fixture,
        merge,
    )
    for fixture in FIXTURES
    for merge in merges(len(FIXTURES[fixture]) - 1)
}

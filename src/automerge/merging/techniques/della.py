"""DELLA: drop elements of the task vectors at random, small ones more likely, and rescale; then as DARE."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from automerge.merging.consensus import sum_of_agreeing, weighted_sum
from automerge.merging.sparsify import DENSITY, Rescale, drop_by_rank
from automerge.merging.technique import (
    Hyperparameter,
    Settings,
    TensorInputs,
    Value,
    fold_lambda,
    scaled_to_sum_one,
    technique,
)
from automerge.merging.techniques.dare import RESCALE
from automerge.merging.techniques.task_arithmetic import LAMBDA, scaled_weights
from automerge.merging.techniques.ties import NORMALIZE, normalised_shares

EPSILON = Hyperparameter(
    "epsilon",
    "float",
    default=0.15,
    low=0.0,
    high=0.5,
    doc="the probability to be kept runs from density - epsilon (smallest of a row) to density + epsilon (largest); "
    "cut to min(density, 1 - density)",
)

_RESCALE = replace(
    RESCALE,
    doc="inverse_density: divide each kept element by its own probability (the paper); l1: restore the L1 norm "
    "(mergekit)",
)

_SOURCE = "Deep et al., 'DELLA-Merging', https://arxiv.org/abs/2406.11617; rows and parameters as in mergekit"


def _cut(settings: Settings) -> dict[str, Value]:
    """The hyperparameters with the epsilon that takes effect."""
    density, epsilon = (float(settings.hyperparameters[name]) for name in ("density", "epsilon"))
    return {**settings.hyperparameters, "epsilon": min(epsilon, density, 1 - density)}


def _canonical(settings: Settings) -> Settings:
    values = _cut(settings)
    if values["density"] == 1:
        kept = {name: values[name] for name in ("density", "lambda", "normalize")}
        return Settings("ties", settings.weights, kept)
    if values["normalize"]:
        return Settings("della", scaled_to_sum_one(settings.weights), values)
    if values["epsilon"] == 0:
        kept = {name: values[name] for name in ("density", "lambda", "rescale")}
        return Settings("dare_ties", settings.weights, kept)
    return fold_lambda(Settings("della", settings.weights, values))


def _canonical_linear(settings: Settings) -> Settings:
    values = _cut(settings)
    if values["epsilon"] == 0:  # at density 1 too
        kept = {name: values[name] for name in ("density", "lambda", "rescale")}
        return Settings("dare_linear", settings.weights, kept)
    return fold_lambda(Settings("della_linear", settings.weights, values))


def _dropped(inputs: TensorInputs, density: float, epsilon: float, rescale: Rescale) -> list[torch.Tensor]:
    return [
        drop_by_rank(delta, density, epsilon, rescale, seed=inputs.seed, source=source, tensor=inputs.tensor)
        for source, delta in zip(inputs.source_names, inputs.deltas, strict=True)
    ]


@technique(
    name="della",
    requires_base=True,
    hyperparameters=(DENSITY, EPSILON, LAMBDA, NORMALIZE, _RESCALE),
    normalised=True,
    randomised=True,
    effective_weights=normalised_shares,
    effective_note="where all sources were kept and agree, before the rescaling of what was kept; an element that was "
    "dropped or lost the election has weight 0, and under 'normalize' the others of that element share the whole",
    canonical=_canonical,
    differentiable=True,
    source=f"{_SOURCE}; sign election of https://arxiv.org/abs/2306.01708",
)
def della(
    inputs: TensorInputs,
    weights: Sequence[float],
    *,
    density: float,
    epsilon: float,
    lambda_: float,
    normalize: bool,
    rescale: Rescale,
) -> torch.Tensor:
    """b + lambda * the sum of the w_i * dropped(d_i) that agree with the elected sign, normalised by their weights."""
    merged = sum_of_agreeing(_dropped(inputs, density, epsilon, rescale), weights, normalize=normalize)
    return inputs.base_plus(merged * lambda_)


@technique(
    name="della_linear",
    requires_base=True,
    hyperparameters=(DENSITY, EPSILON, LAMBDA, _RESCALE),
    randomised=True,
    effective_weights=scaled_weights,
    effective_note="in expectation over the random mask",
    canonical=_canonical_linear,
    differentiable=True,
    source=_SOURCE,
)
def della_linear(
    inputs: TensorInputs,
    weights: Sequence[float],
    *,
    density: float,
    epsilon: float,
    lambda_: float,
    rescale: Rescale,
) -> torch.Tensor:
    """b + lambda * sum(w_i * dropped(d_i)), not normalised."""
    merged = weighted_sum(_dropped(inputs, density, epsilon, rescale), weights)
    return inputs.base_plus(merged * lambda_)

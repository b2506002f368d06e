"""A space of 20 hyperparameters, 5 of them conditional, and two synthetic landscapes on it.

The space has the shape of a real one: five blocks, each with a technique, a weight for either of two sources, and a
density that exists only under three of the five techniques. A landscape is drawn from a seed, so that ten seeds are ten
problems; its costs are like those of a search, 1 where nothing is lost and larger elsewhere.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace, Float, InCondition

BLOCKS = 5
TECHNIQUES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
SPARSE = ("ties", "dare_linear", "dare_ties")
WEIGHTS = (-0.5, 1.5)
DENSITIES = (0.2, 1.0)

Landscape = Callable[[Mapping[str, Any]], float]


def make_space(seed: int) -> ConfigurationSpace:
    """The space: 5 categoricals, 10 floats, 5 floats under a condition."""
    space = ConfigurationSpace(seed=seed)
    for block in range(BLOCKS):
        technique = CategoricalHyperparameter(f"b{block}/technique", list(TECHNIQUES))
        density = Float(f"b{block}/density", DENSITIES)
        space.add(technique, Float(f"b{block}/weight/a", WEIGHTS), Float(f"b{block}/weight/b", WEIGHTS), density)
        space.add(InCondition(density, technique, list(SPARSE)))
    return space


def separable(seed: int) -> Landscape:
    """Each block has a best technique, weights and density of its own, and the blocks' losses add up."""
    rng = np.random.default_rng([seed, 1])
    targets = rng.uniform(0.1, 0.9, (BLOCKS, 2))
    best_densities = rng.uniform(*DENSITIES, BLOCKS)
    penalties = rng.permuted(np.tile(np.linspace(0.0, 0.4, len(TECHNIQUES)), (BLOCKS, 1)), axis=1)
    shares = rng.dirichlet(np.full(BLOCKS, 2.0))  # some blocks matter more

    def cost(config: Mapping[str, Any]) -> float:
        total = 1.0
        for block, share in enumerate(shares):
            weights = _weights(config, block)
            loss = np.sum((weights - targets[block]) ** 2)
            loss += penalties[block, TECHNIQUES.index(config[f"b{block}/technique"])]
            loss += 0.3 * (config.get(f"b{block}/density", 1.0) - best_densities[block]) ** 2
            total += share * loss
        return float(total)

    return cost


def interacting(seed: int) -> Landscape:
    """Neighbouring blocks have to agree: in their weights, and in what their techniques leave of the source's scale.

    Besides, the two sources' weights trade off within a block, and one of two basins is the deeper.
    """
    rng = np.random.default_rng([seed, 2])
    centres = rng.uniform(0.2, 0.8, (2, BLOCKS, 2))
    scales = rng.uniform(0.5, 1.5, len(TECHNIQUES))
    fits = rng.uniform(0.0, 0.3, (len(TECHNIQUES), len(TECHNIQUES)))

    def cost(config: Mapping[str, Any]) -> float:
        techniques = [TECHNIQUES.index(config[f"b{block}/technique"]) for block in range(BLOCKS)]
        densities = np.array([config.get(f"b{block}/density", 1.0) for block in range(BLOCKS)])
        weights = np.stack([_weights(config, block) for block in range(BLOCKS)])
        effective = weights * (scales[techniques] * np.sqrt(densities))[:, None]
        basins = np.mean(np.sum((effective - centres) ** 2, axis=2), axis=1) + np.array([0.0, 0.15])
        balance = np.mean((effective.sum(axis=1) - 1.0) ** 2)
        jumps = np.mean(np.sum(np.diff(effective, axis=0) ** 2, axis=1))
        pairs = np.mean([fits[one, other] for one, other in pairwise(techniques)])
        return float(1.0 + basins.min() + 0.5 * balance + 0.5 * jumps + pairs)

    return cost


LANDSCAPES: dict[str, Callable[[int], Landscape]] = {"separable": separable, "interacting": interacting}


def _weights(config: Mapping[str, Any], block: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([config[f"b{block}/weight/a"], config[f"b{block}/weight/b"]])

"""The search space: for each block a technique, the sources' weights, and the technique's own hyperparameters.

A hyperparameter of a technique (its density, say) is conditional: it exists in the space only where a technique that
has it is chosen. Blocks share nothing. Two modes of weights:

``simplex``
    the weights are not negative and sum to 1. For two sources the space holds the first one's weight w (the second's is
    1 - w), as published. For N sources it holds N - 1 stick-breaking fractions that are uniform on the simplex.
``independent``
    one weight for each source within the range, and normalising techniques do not normalise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace, EqualsCondition, Float, InCondition, Integer

from automerge.errors import SearchError
from automerge.merging.recipe import RecipeBlock
from automerge.merging.technique import Declaration, Hyperparameter
from automerge.segmenting.segmentation import Block
from automerge.spec import SearchSpec


@dataclass(frozen=True)
class SearchSpace:
    """The space over a list of blocks, and the way from a point in it to the blocks of a recipe.

    Attributes:
        blocks: the blocks to be merged, in order.
        sources: the sources' names, in the spec's order.
        techniques: declarations by name, in the spec's order.
        spec: the search part of the spec.
    """

    blocks: Sequence[Block]
    sources: Sequence[str]
    techniques: Mapping[str, Declaration]
    spec: SearchSpec

    def configuration_space(self, seed: int) -> ConfigurationSpace:
        """The space as ConfigSpace understands it; the same arguments give the same space."""
        space = ConfigurationSpace(seed=seed)
        for block in self.blocks:
            if not block.parameters:
                continue  # only buffers: the policy for buffers has no hyperparameters
            choice = None
            if len(self.techniques) > 1:
                choice = CategoricalHyperparameter(f"{block.name}/technique", list(self.techniques))
                space.add(choice)
            for key in self._weight_keys(block):
                low, high = (
                    self.spec.weight_range if self.spec.weights == "independent" or len(self.sources) == 2 else (0, 1)
                )
                space.add(Float(key, (low, high)))
            for name, users in self._searched().items():
                hyperparameter = self._dimension(f"{block.name}/{name}", next(iter(users.values())))
                space.add(hyperparameter)
                owners = list(users)
                if choice is not None and len(owners) < len(self.techniques):
                    space.add(
                        EqualsCondition(hyperparameter, choice, owners[0])
                        if len(owners) == 1
                        else InCondition(hyperparameter, choice, owners)
                    )
        return space

    def recipe_blocks(self, config: Mapping[str, Any]) -> list[RecipeBlock]:
        """The blocks of the recipe that a point stands for."""
        return [self._recipe_block(block, config) for block in self.blocks]

    def warm_starts(self) -> list[tuple[str, dict[str, Any]]]:
        """Points worth trying first: the uniform average and each unmerged source, as far as the ranges allow them."""
        count = len(self.sources)
        wanted = [("average", [1.0 / count] * count)]
        wanted += [
            (f"source:{name}", [float(index == other) for other in range(count)])
            for index, name in enumerate(self.sources)
        ]
        low, high = self.spec.weight_range
        plain = next((name for name in ("linear", "task_arithmetic") if name in self.techniques), None)
        if plain is None:  # no technique gives a source unmerged
            wanted, plain = wanted[:1], next(iter(self.techniques))
        return [
            (origin, self._point(plain, weights))
            for origin, weights in wanted
            if all(low <= weight <= high for weight in weights)
        ]

    def average(self) -> dict[str, Any]:
        """The point that gives every source the same weight, by the first technique at its defaults."""
        weights = [1.0 / len(self.sources)] * len(self.sources)
        return self._point(next(iter(self.techniques)), weights)

    def _point(self, technique: str, weights: list[float]) -> dict[str, Any]:
        """The point at which every block has one technique at its defaults and the same weights."""
        values = weights if self.spec.weights == "independent" else _fractions(weights)
        config: dict[str, Any] = {}
        for block in self.blocks:
            if not block.parameters:
                continue
            if len(self.techniques) > 1:
                config[f"{block.name}/technique"] = technique
            config.update(zip(self._weight_keys(block), values, strict=True))
            for name, users in self._searched().items():
                if technique in users:
                    config[f"{block.name}/{name}"] = self._within(users[technique])
        return config

    def _within(self, hyperparameter: Hyperparameter) -> Any:
        """The default, or what of the spec's range is nearest to it."""
        if hyperparameter.name != "density":
            return hyperparameter.default
        low, high = self.spec.density_range
        return min(max(float(hyperparameter.default), low), high)

    def _recipe_block(self, block: Block, config: Mapping[str, Any]) -> RecipeBlock:
        technique = config.get(f"{block.name}/technique", next(iter(self.techniques)))
        declaration = self.techniques[technique]
        if block.parameters:
            values = [float(config[key]) for key in self._weight_keys(block)]
            weights = values if self.spec.weights == "independent" else _simplex(values)
        else:
            weights = [1.0 / len(self.sources)] * len(self.sources)
        hyperparameters: dict[str, Any] = {}
        spellings = {users[technique].name: name for name, users in self._searched().items() if technique in users}
        for hyperparameter in declaration.hyperparameters:
            name = spellings.get(hyperparameter.name, hyperparameter.name)
            value = config.get(f"{block.name}/{name}", hyperparameter.default)
            if hyperparameter.name == "normalize" and self.spec.weights == "independent":
                value = False
            hyperparameters[hyperparameter.name] = value if isinstance(value, str | bool | int) else float(value)
        return RecipeBlock(
            name=block.name,
            technique=technique,
            weights=dict(zip(self.sources, weights, strict=True)),
            hyperparameters=hyperparameters,
            parameters=block.parameters,
            buffers=block.buffers,
        )

    def _weight_keys(self, block: Block) -> list[str]:
        names = self.sources if self.spec.weights == "independent" else self.sources[:-1]
        return [f"{block.name}/weight/{name}" for name in names]

    def _searched(self) -> dict[str, dict[str, Hyperparameter]]:
        """Searched hyperparameters by their name in the space, as each technique that has it declares it.

        Techniques share what they declare alike. Where they mean different things by one name, each has one of its own,
        with the technique's name before it.
        """
        by_name: dict[str, dict[str, Hyperparameter]] = {}
        for technique, declaration in self.techniques.items():
            for hyperparameter in declaration.hyperparameters:
                if hyperparameter.searched:
                    by_name.setdefault(hyperparameter.name, {})[technique] = hyperparameter
        found: dict[str, dict[str, Hyperparameter]] = {}
        for name, users in by_name.items():
            first, *others = (replace(user, doc="") for user in users.values())
            if all(other == first for other in others):
                found[name] = users
            else:
                found |= {f"{technique}.{name}": {technique: user} for technique, user in users.items()}
        return found

    def _dimension(self, key: str, hyperparameter: Hyperparameter) -> Any:
        if hyperparameter.kind == "choice":
            return CategoricalHyperparameter(key, list(hyperparameter.choices))
        if hyperparameter.kind == "bool":
            return CategoricalHyperparameter(key, [False, True])
        low, high = (
            self.spec.density_range if hyperparameter.name == "density" else (hyperparameter.low, hyperparameter.high)
        )
        if low is None or high is None:
            raise SearchError(
                f"hyperparameter {hyperparameter.name!r} is searched but declares no range", "declare one"
            )
        if hyperparameter.kind == "int":
            return Integer(key, (int(low), int(high)))
        return Float(key, (float(low), float(high)))


def _simplex(fractions: Sequence[float]) -> list[float]:
    """Weights that sum to 1 from N - 1 stick-breaking fractions in [0, 1].

    A piece with k pieces to come takes 1 - (1 - v)^(1/k) of what is left, which makes uniform fractions uniform on the
    simplex (the Dirichlet distribution with all concentrations 1). For two sources the first weight is v itself.
    """
    if len(fractions) == 1:
        return [fractions[0], 1.0 - fractions[0]]
    weights, left = [], 1.0
    for index, fraction in enumerate(fractions):
        piece = left * (1.0 - (1.0 - fraction) ** (1.0 / (len(fractions) - index)))
        weights.append(piece)
        left -= piece
    return [*weights, max(0.0, left)]


def _fractions(weights: Sequence[float]) -> list[float]:
    """The inverse of :func:`_simplex`."""
    if len(weights) == 2:
        return [weights[0]]
    fractions, left = [], 1.0
    for index, weight in enumerate(weights[:-1]):
        share = weight / left if left > 0 else 0.0
        fractions.append(min(1.0, max(0.0, 1.0 - (1.0 - share) ** (len(weights) - 1 - index))))
        left -= weight
    return fractions

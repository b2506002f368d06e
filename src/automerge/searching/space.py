"""The search space: for each block a technique, the sources' weights, and the technique's own hyperparameters.

A hyperparameter of a technique (its density, say) is conditional: it exists in the space only where a technique that
has it is chosen. Blocks share nothing, unless a constraint says so; what a constraint fixes is no dimension of the
space. Two modes of weights:

``simplex``
    the weights are not negative and sum to 1. For two sources the space holds the first one's weight w (the second's is
    1 - w), as published. For N sources it holds N - 1 stick-breaking fractions that are uniform on the simplex.
``independent``
    one weight for each source within the range, and normalising techniques do not normalise. It needs a base.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace, EqualsCondition, Float, InCondition, Integer

from automerge.errors import MergeError, PluginError, SearchError
from automerge.merging.recipe import RecipeBlock, canonical
from automerge.merging.technique import Declaration, Hyperparameter, Settings, Value
from automerge.plugins import nearest
from automerge.searching.constraints import Choice, WeightMode, choices_of
from automerge.segmenting.segmentation import Block
from automerge.spec import SearchSpec


@dataclass(frozen=True)
class SearchSpace:
    """The space over a list of blocks, and the way between a point in it and the blocks of a recipe.

    Attributes:
        blocks: the blocks to be merged, in order.
        sources: the sources' names, in the spec's order.
        techniques: declarations by name, in the spec's order.
        spec: the search part of the spec.
        has_base: whether there is a base; without one all weights are on the simplex, anywhere on it.
        start_points: points of this space to be tried at the start besides `warm_starts`, with their origins.
        choices: what there is to choose, by the spec's constraints: one choice for each block, or for those that share
            it.

    Raises:
        SearchError: a constraint cannot be followed.
    """

    blocks: Sequence[Block]
    sources: Sequence[str]
    techniques: Mapping[str, Declaration]
    spec: SearchSpec
    has_base: bool = True
    start_points: Sequence[tuple[str, Mapping[str, Any]]] = ()
    choices: Sequence[Choice] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = choices_of(self.blocks, self.sources, self.techniques, self.spec, self.mode)
        object.__setattr__(self, "choices", choices)

    @property
    def mode(self) -> WeightMode:
        """How weights are spread over the sources: as the spec says, without a base always ``simplex``."""
        return self.spec.weights if self.has_base else "simplex"

    @property
    def weight_range(self) -> tuple[float, float]:
        """The lowest and highest weight; of simplex weights the first of two sources' weight."""
        if self.mode != self.spec.weights:
            return 0.0, 1.0  # the spec's range is for independent weights
        low, high = self.spec.weight_range
        return low, high

    def configuration_space(self, seed: int) -> ConfigurationSpace:
        """The space as ConfigSpace understands it; the same arguments give the same space.

        Raises:
            SearchError: nothing is left to choose, or a technique has a searched hyperparameter without a range.
        """
        found: list[Any] = []
        for choice in self._searchable:
            technique = None
            if len(choice.techniques) > 1:
                technique = CategoricalHyperparameter(f"{choice.name}/technique", list(choice.techniques))
                found.append(technique)
            for key in self._weight_keys(choice).values():
                bounds = self.weight_range if self.mode == "independent" or len(self.sources) == 2 else (0, 1)
                found.append(Float(key, bounds))
            for name, users in self._searched(choice).items():
                hyperparameter = self._dimension(f"{choice.name}/{name}", next(iter(users.values())))
                found.append(hyperparameter)
                owners = list(users)
                if technique is not None and len(owners) < len(choice.techniques):
                    found.append(
                        EqualsCondition(hyperparameter, technique, owners[0])
                        if len(owners) == 1
                        else InCondition(hyperparameter, technique, owners)
                    )
        space = ConfigurationSpace(seed=seed)
        space.add(found)  # at once: each addition sorts all again
        if not len(space):
            raise SearchError(
                "the search space is empty: no block has anything left to choose",
                "leave something free in search.constraints, or write a recipe and run `automerge merge`",
            )
        return space

    def recipe_blocks(self, config: Mapping[str, Any]) -> list[RecipeBlock]:
        """The blocks of the recipe that a point stands for."""
        settings = {block.name: made for choice, made in self._settings_at(config) for block in choice.blocks}
        return [
            RecipeBlock(
                name=block.name,
                technique=settings[block.name].technique,
                weights=dict(settings[block.name].weights),
                hyperparameters=dict(settings[block.name].hyperparameters),
                parameters=block.parameters,
                buffers=block.buffers,
            )
            for block in self.blocks
        ]

    def from_recipe(self, blocks: Sequence[RecipeBlock]) -> dict[str, Any]:
        """The point of this space that stands for a recipe, or is nearest to it.

        The inverse of `recipe_blocks`: a recipe that this space made leads back to its point (but where a source has
        the whole weight, N - 1 fractions say it in many ways), and so does its like over the blocks from which these
        were cut. Of another recipe,

        - a block takes the settings of the recipe's block that holds most of its parameters, the first of equals;
        - settings that the space has in another form are brought to it (a linear block to task arithmetic, lambda
          into the weights);
        - a value outside its range is moved to the range's end, simplex weights are scaled to sum to 1, and what is
          fixed here stays as it is.

        Raises:
            SearchError: the recipe merges a block by a technique that it cannot have here, has none of its
                parameters, uses a source that is not merged here, or is not valid.
        """
        holder = {name: index for index, block in enumerate(blocks) for name in block.parameters}
        config: dict[str, Any] = {}
        for choice in self.choices:
            if not choice.has_parameters:
                continue
            held = Counter(holder[name] for block in choice.blocks for name in block.parameters if name in holder)
            if not held:
                raise SearchError(
                    f"block {choice.name!r}: the recipe has none of its parameters", "give a recipe of the same model"
                )
            most = max(held.values())
            config |= self._nearest(choice, blocks[min(index for index, count in held.items() if count == most)])
        return config

    def warm_starts(self) -> list[tuple[str, dict[str, Any]]]:
        """Points worth trying first, as far as the ranges allow them.

        They are the uniform average, each unmerged source, and with independent weights the base. A block that
        constraints keep from being an unmerged source (or the base) is as near to it as they let it; the point is left
        out where that holds of every block.
        """
        count = len(self.sources)
        wanted = [("average", [1.0 / count] * count)]
        wanted += [
            (f"source:{name}", [float(index == other) for other in range(count)])
            for index, name in enumerate(self.sources)
        ]
        if self.mode == "independent":
            wanted.append(("base", [0.0] * count))
        # Those that give a source unmerged; `linear` has no form with independent weights.
        plain = ["linear", "task_arithmetic"] if self.mode == "simplex" else ["task_arithmetic"]
        if not any(self._weight_keys(choice) and {*plain} & {*choice.techniques} for choice in self._searchable):
            wanted = wanted[:1]
        low, high = self.weight_range
        return [
            (origin, self._point(weights, plain))
            for origin, weights in wanted
            if all(low <= weight <= high for weight in weights)
        ]

    def average(self) -> dict[str, Any]:
        """The point that gives every source the same weight, by the first technique at its defaults."""
        return self._point([1.0 / len(self.sources)] * len(self.sources))

    def separable(self) -> list[Block]:
        """The blocks whose parts could be merged differently from each other, if they were blocks: those that have
        something to choose, and are not held together by a constraint.
        """
        return [
            block
            for choice in self._searchable
            if not choice.shared and (len(choice.techniques) > 1 or self._weight_keys(choice) or self._searched(choice))
            for block in choice.blocks
        ]

    @property
    def _searchable(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.has_parameters]

    # From settings to a point

    def _point(self, weights: Sequence[float], preferred: Sequence[str] = ()) -> dict[str, Any]:
        """The point at which every block has the same weights, and the first technique that is preferred, if it can
        have one of them, else its own first, at its defaults.
        """
        config: dict[str, Any] = {}
        for choice in self._searchable:
            technique = next((name for name in preferred if name in choice.techniques), choice.techniques[0])
            config |= self._at(choice, Settings(technique, dict(zip(self.sources, weights, strict=True))))
        return config

    def _at(self, choice: Choice, settings: Settings) -> dict[str, Any]:
        """The dimensions of one choice at some settings; a hyperparameter that these leave out is at its default."""
        config: dict[str, Any] = {}
        if len(choice.techniques) > 1:
            config[f"{choice.name}/technique"] = settings.technique
        keys = self._weight_keys(choice)
        if self.mode == "independent":
            config |= {key: settings.weights[source] for source, key in keys.items()}
        elif keys:
            fractions = _fractions([settings.weights[source] for source in self.sources])
            config |= dict(zip(keys.values(), fractions, strict=True))
        for name, users in self._searched(choice).items():
            if settings.technique in users:
                hyperparameter = users[settings.technique]
                value = settings.hyperparameters.get(hyperparameter.name, hyperparameter.default)
                config[f"{choice.name}/{name}"] = self._within(hyperparameter, value)
        return config

    def _nearest(self, choice: Choice, block: RecipeBlock) -> dict[str, Any]:
        """The dimensions of one choice that are nearest to how a recipe merges a block."""
        literal = self._read(choice, block)
        if literal is not None and self._holds(choice, literal):
            return self._at(choice, literal)
        try:
            others = [canonical(block)]
        except PluginError:  # of a technique that is not installed only its own form is known
            others = []
        except MergeError as error:
            raise SearchError(f"block {choice.name!r}: {error.problem}", error.remedy) from None
        if others and others[0].technique == "linear" and self.has_base and "task_arithmetic" in choice.techniques:
            total = math.fsum(others[0].weights.values())
            shares = {source: weight / total for source, weight in others[0].weights.items()}
            update = {"technique": "task_arithmetic", "weights": shares, "hyperparameters": {}}
            others.append(block.model_copy(update=update))
        forms = [form for form in (literal, *(self._read(choice, other) for other in others)) if form is not None]
        if not forms:
            raise SearchError(
                f"block {choice.name!r}: the recipe merges it by {block.technique!r}, which it cannot have here",
                f"its techniques are: {', '.join(choice.techniques)}",
            )
        exact = next((form for form in forms if self._holds(choice, form)), None)
        return self._at(choice, exact if exact is not None else self._allowed(choice, forms[0]))

    def _read(self, choice: Choice, block: RecipeBlock) -> Settings | None:
        """A recipe's settings over this space's sources, whole and typed; None if the choice has not the technique."""
        strange = [source for source, weight in block.weights.items() if weight and source not in self.sources]
        if strange:
            raise SearchError(
                f"block {choice.name!r}: the recipe merges the source {strange[0]!r}",
                f"the sources are: {', '.join(self.sources)}",
            )
        if block.technique not in choice.techniques:
            return None
        given = self.techniques[block.technique].defaults()
        unknown = [name for name in block.hyperparameters if name not in given]
        if unknown:
            raise SearchError(
                f"block {choice.name!r}: technique {block.technique!r} has no hyperparameter {unknown[0]!r}",
                nearest(unknown[0], list(given)) if given else "leave it out",
            )
        given |= block.hyperparameters
        try:
            values = {
                each.name: each.validate(given[each.name], f"block {choice.name!r}")
                for each in self.techniques[block.technique].hyperparameters
            }
        except MergeError as error:
            raise SearchError(error.problem, error.remedy) from None
        weights = {source: float(block.weights.get(source, 0.0)) for source in self.sources}
        return Settings(block.technique, weights, values)

    def _holds(self, choice: Choice, settings: Settings) -> bool:
        """Whether the space has a point with these very settings."""
        if not self._in_range(settings.weights, choice):
            return False
        made = self._settings(choice, self._at(choice, settings))
        return made.hyperparameters == settings.hyperparameters and all(
            math.isclose(made.weights[source], weight, rel_tol=0.0, abs_tol=1e-9)
            for source, weight in settings.weights.items()
        )

    def _in_range(self, weights: Mapping[str, float], choice: Choice) -> bool:
        low, high = self.weight_range
        if self.mode == "independent":
            return all(low <= weights[source] <= high for source in self._weight_keys(choice))
        published = self.sources[0] in self._weight_keys(choice) and len(self.sources) == 2
        return all(weight >= 0 for weight in weights.values()) and (
            not published or low <= weights[self.sources[0]] <= high
        )

    def _allowed(self, choice: Choice, settings: Settings) -> Settings:
        """Settings whose weights the space can have, and which merge most nearly as these."""
        low, high = self.weight_range
        weights = dict(settings.weights)
        if self.mode == "simplex":
            weights = {source: max(0.0, weight) for source, weight in weights.items()}
            total = math.fsum(weights.values())
            weights = {source: weight / total if total else 1 / len(weights) for source, weight in weights.items()}
            if len(weights) == 2:
                first = min(max(weights[self.sources[0]], low), high)
                weights = dict(zip(self.sources, (first, 1.0 - first), strict=True))
            return replace(settings, weights=weights)
        # What a normalisation or a lambda does to the factors of the sources goes into the weights.
        rule = self.techniques[settings.technique].effective_weights
        ones = replace(settings, weights=dict.fromkeys(self.sources, 1.0))
        own = self._settings(choice, self._at(choice, ones)).hyperparameters
        factors = rule(replace(ones, hyperparameters=own))
        effective = rule(settings)
        for source, factor in factors.items():
            weight = effective[source] / factor if factor else weights[source]
            weights[source] = min(max(weight, low), high)
        return replace(settings, weights=weights)

    def _within(self, hyperparameter: Hyperparameter, value: Value) -> Any:
        """The value, or what of the hyperparameter's range in the space is nearest to it."""
        if isinstance(value, bool | str):
            return value
        low, high = self._range(hyperparameter)
        value = value if low is None else max(value, low)
        value = value if high is None else min(value, high)
        return int(value) if hyperparameter.kind == "int" else float(value)

    # From a point to settings

    def _settings_at(self, config: Mapping[str, Any]) -> list[tuple[Choice, Settings]]:
        return [(choice, self._settings(choice, config)) for choice in self.choices]

    def _settings(self, choice: Choice, config: Mapping[str, Any]) -> Settings:
        technique = config.get(f"{choice.name}/technique", choice.techniques[0])
        keys = self._weight_keys(choice)
        weights = dict.fromkeys(self.sources, 1.0 / len(self.sources))  # of a block with only buffers
        if choice.has_parameters and self.mode == "independent":
            weights |= {source: float(config[key]) for source, key in keys.items()}
        elif choice.has_parameters and keys:
            weights = dict(zip(self.sources, _simplex([float(config[key]) for key in keys.values()]), strict=True))
        weights |= choice.weights
        hyperparameters: dict[str, Value] = {}
        spellings = {
            users[technique].name: name for name, users in self._searched(choice).items() if technique in users
        }
        for hyperparameter in self.techniques[technique].hyperparameters:
            name = spellings.get(hyperparameter.name, hyperparameter.name)
            value = config.get(f"{choice.name}/{name}", hyperparameter.default)
            if hyperparameter.name == "normalize" and self.mode == "independent":
                value = False
            value = choice.hyperparameters[technique].get(hyperparameter.name, value)
            hyperparameters[hyperparameter.name] = value if isinstance(value, str | bool | int) else float(value)
        return Settings(technique, weights, hyperparameters)

    # The dimensions

    def _weight_keys(self, choice: Choice) -> dict[str, str]:
        """The names of the dimensions of the weights that are not fixed, by source."""
        names = self.sources if self.mode == "independent" else self.sources[:-1]
        return {name: f"{choice.name}/weight/{name}" for name in names if name not in choice.weights}

    def _searched(self, choice: Choice) -> dict[str, dict[str, Hyperparameter]]:
        """What `_spelled` has of the techniques of one choice, without what is fixed."""
        found = {}
        for name, users in self._spelled.items():
            left = {
                technique: user
                for technique, user in users.items()
                if technique in choice.techniques and user.name not in choice.hyperparameters[technique]
            }
            if left:
                found[name] = left
        return found

    @cached_property
    def _spelled(self) -> dict[str, dict[str, Hyperparameter]]:
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
        low, high = self._range(hyperparameter)
        if low is None or high is None:
            raise SearchError(
                f"hyperparameter {hyperparameter.name!r} is searched but declares no range", "declare one"
            )
        if hyperparameter.kind == "int":
            return Integer(key, (int(low), int(high)))
        return Float(key, (float(low), float(high)))

    def _range(self, hyperparameter: Hyperparameter) -> tuple[float | None, float | None]:
        """A number's lowest and highest value: the declared ones, of a density the spec's."""
        if hyperparameter.name == "density":
            low, high = self.spec.density_range
            return low, high
        return hyperparameter.low, hyperparameter.high


def _simplex(fractions: Sequence[float]) -> list[float]:
    """Weights that sum to 1 from N - 1 stick-breaking fractions in [0, 1].

    A piece with k pieces to come takes 1 - (1 - v)^(1/k) of what is left, which makes uniform fractions uniform on the
    simplex (the Dirichlet distribution with all concentrations 1). For two sources the first weight is v itself.
    """
    if len(fractions) == 1:
        return [fractions[0], 1.0 - fractions[0]]
    weights, left = [], 1.0
    for index, fraction in enumerate(fractions):
        piece = _piece(left, fraction, len(fractions) - index)
        weights.append(piece)
        left -= piece
    return [*weights, max(0.0, left)]


def _piece(left: float, fraction: float, to_come: int) -> float:
    """What a piece with so many to come takes of what is left."""
    return left * (1.0 - math.pow(1.0 - fraction, 1.0 / to_come))


def _fractions(weights: Sequence[float]) -> list[float]:
    """Fractions of which :func:`_simplex` makes these weights: to the last bit, if it has made them before."""
    if len(weights) == 2:
        return [weights[0]]
    fractions, left = [], 1.0
    for index, weight in enumerate(weights[:-1]):
        to_come = len(weights) - 1 - index
        share = weight / left if left > 0 else 0.0
        fraction = min(1.0, max(0.0, 1.0 - (1.0 - share) ** to_come))
        if _piece(left, fraction, to_come) != weight:
            # The power has rounded something off, which bisection finds again.
            low, high = 0.0, 1.0
            for _ in range(80):
                middle = (low + high) / 2
                low, high = (middle, high) if _piece(left, middle, to_come) < weight else (low, middle)
            fraction = high if _piece(left, high, to_come) == weight else fraction
        fractions.append(fraction)
        left -= weight
    return fractions

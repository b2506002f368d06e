"""Coarse to fine: which blocks matter most, and cutting them into their layers.

A search over few blocks finds its way in few trials, and one over many can say more. So the blocks are cut late, only
those that matter, and each part starts from the settings of the block that it was a part of
(`automerge.searching.space.SearchSpace.from_recipe`): the cut itself changes no merge.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from automerge.errors import SearchError
from automerge.segmenting.segmentation import Block, Segmentation

if TYPE_CHECKING:
    from automerge.searching.space import SearchSpace

Array = npt.NDArray[np.float64]

TREES = 64
"""Trees of the forest: its mean is what is analysed, so more of them mean less noise."""

LEAF = 3
"""Least trials in a leaf: one bad trial is no region of the space."""

AGREEMENT = 1e-12
"""Layers whose gradients differ by so small a part agree: it is what sums in floating point leave."""

DRAWS = 512
"""Points at which a block's marginal is taken: its standard error is a few percent of it."""


def split_blocks(blocks: Sequence[Block], chosen: Collection[str], layers: Segmentation) -> list[Block]:
    """The blocks with each chosen one replaced by its layers.

    A part is called after its block and layer (``1-sequence/encoder.layers.0``). What no layer holds is a last part,
    ``<block>/(remainder)``. Buffers of a layer without parameters go with the part before it (or the first one): alone
    they would no longer be averaged with the weights that their block has. A block with parameters in one layer only
    stays as it is.

    Args:
        blocks: the blocks of a search, in order.
        chosen: the names of those to be cut.
        layers: the same model at granularity ``layer``. Parameters are counted as it counts them, as the parameters of
            blocks are: with those that are private.

    Raises:
        SearchError: a chosen block is not there, or a layer lies in several blocks.
    """
    names = [block.name for block in blocks]
    for name in chosen:
        if name not in names:
            raise SearchError(f"there is no block {name!r} to cut", f"the blocks are: {', '.join(names)}")
    layer_of = _layer_of(layers)
    found = []
    block_of = {tensor: block.name for block in blocks for tensor in block.tensors()}
    for block in blocks:
        parts = _parts(block, layers, layer_of) if block.name in chosen else {}
        if len(parts) < 2:
            found.append(block)
            continue
        for layer in [layers.blocks[index] for index in parts if index is not None]:
            others = sorted({block_of[tensor] for tensor in layer.tensors() if tensor in block_of} - {block.name})
            if others:
                raise SearchError(
                    f"layer {layer.name!r} lies in the blocks {block.name!r} and {others[0]!r}",
                    "take the layers of the segmentation that the blocks are of",
                )
        found += [_part(block, index, held, layers, parts) for index, held in parts.items()]
    return found


def most_important(
    importance: Mapping[str, float], blocks: Sequence[Block], layers: Segmentation, count: int
) -> list[str]:
    """The names of the blocks to cut: of those with several layers the most important, the first of equals before.

    Args:
        importance: by block; a block that is not there has none.
        blocks: the blocks that may be cut (`automerge.searching.space.SearchSpace.separable`), in order.
        layers: the same model at granularity ``layer``.
        count: how many at most.
    """
    layer_of = _layer_of(layers)
    can_be_cut = [block.name for block in blocks if len(_parts(block, layers, layer_of)) > 1]
    return sorted(can_be_cut, key=lambda name: -importance.get(name, 0.0))[:count]


def surrogate_importance(
    points: Sequence[Mapping[str, Any]], costs: Sequence[float], space: "SearchSpace"
) -> dict[str, float]:
    """How much of the variance of the logarithm of the cost each block explains.

    A random forest (Breiman, 'Random Forests', 2001) is fitted to the trials, and its mean prediction analysed by
    functional ANOVA (Hutter, Hoos and Leyton-Brown, 'An Efficient Approach for Assessing Hyperparameter Importance',
    ICML 2014): the variance of the marginal of all hyperparameters of a block together, over the whole space, with the
    other blocks averaged out. Interactions of blocks count for none of them. We differ in that a block's points are
    drawn from the space, so that a hyperparameter that is not active needs no value; the marginals over the trees'
    leaves are exact for these.

    Args:
        points: the trials' points of ``space``.
        costs: their costs, above 0.
        space: the space.

    Returns:
        for every block its part of what the blocks explain, in order: the parts sum to 1, or all are 0 where the costs
        do not differ as the forest sees it. Blocks that share one choice have equal parts of it. The same arguments
        give the same numbers.

    Raises:
        SearchError: a cost is not a positive number.
    """
    from sklearn.ensemble import RandomForestRegressor  # the extra `search` brings it

    for cost in costs:
        if not (math.isfinite(cost) and cost > 0):
            raise SearchError(f"a trial's cost is {cost}", "leave trials without a positive cost out")
    found = dict.fromkeys([block.name for block in space.blocks], 0.0)
    if len(points) < 2 * LEAF:
        return found
    configuration_space = space.configuration_space(space.spec.seed)
    drawn = [dict(config) for config in configuration_space.sample_configuration(DRAWS)]
    columns = _columns(space, dict(configuration_space))
    every = [column for own in columns.values() for column in own]
    slices: dict[str, slice] = {}
    for name, own in columns.items():
        start = max((each.stop for each in slices.values()), default=0)
        slices[name] = slice(start, start + len(own))
    forest = RandomForestRegressor(
        n_estimators=TREES, min_samples_leaf=LEAF, max_features=1.0, random_state=space.spec.seed, n_jobs=1
    ).fit(_encoded(points, every), np.log(np.asarray(costs, dtype=np.float64)))
    encoded = _encoded(drawn, every)
    marginals = {name: np.zeros(DRAWS) for name in columns}
    for estimator in forest.estimators_:
        low, high, means = _leaves(estimator.tree_, len(every))
        inside = {name: _inside(encoded[:, own], low[:, own], high[:, own]) for name, own in slices.items()}
        for name, own_inside in inside.items():
            elsewhere = [each.mean(axis=0) for other, each in inside.items() if other != name]
            marginals[name] += own_inside @ (means * np.prod([np.ones(len(means)), *elsewhere], axis=0)) / TREES
    variances = {name: float(marginal.var()) for name, marginal in marginals.items()}
    total = math.fsum(variances.values())
    # What floating-point sums leave of a constant is no variance.
    if total <= 1e-20 * max(1.0, float(np.square(np.log(costs)).max())):
        return found
    for choice in space.choices:
        members = [block.name for block in choice.blocks if block.parameters]
        for member in members:
            found[member] = variances.get(choice.name, 0.0) / total / len(members)
    return found


def gradient_importance(
    gradients: Mapping[str, Mapping[str, float]],
    blocks: Sequence[Block],
    layers: Segmentation,
    *,
    simplex: bool = False,
) -> dict[str, float]:
    """How much the layers of each block disagree on its weights: what weights of their own would gain at first.

    Let g be the gradient of the cost with respect to the weights [layer, source] of a block's L layers. A small step of
    length r along -g lowers the cost by r |g|. The block's common weights can only step along the mean of g over the
    layers, which lowers it by r |mean g| sqrt(L), the length of g's projection on the steps that are common. The
    difference of the two is the block's importance. (Our own derivation, by Cauchy and Schwarz.)

    Args:
        gradients: by tensor and source, the derivative of the cost with respect to the weight that this source has in
            this tensor, at the best recipe. A tensor that is left out has none.
        blocks: the blocks of the search.
        layers: the same model at granularity ``layer``.
        simplex: whether the weights sum to 1: then only steps that leave the sum as it is count.

    Returns:
        for every block its part of the importance of all, in order: the parts sum to 1, or all are 0.

    Raises:
        SearchError: a derivative is not finite.
    """
    for tensor, by_source in gradients.items():
        for source, value in by_source.items():
            if not math.isfinite(value):
                raise SearchError(
                    f"tensor {tensor!r}: the gradient of source {source!r} is {value}",
                    "measure the importance by the surrogate: search.split.importance",
                )
    sources = list(dict.fromkeys(source for by_source in gradients.values() for source in by_source))
    layer_of = _layer_of(layers)
    found = {}
    for block in blocks:
        slopes = np.array(
            [
                [math.fsum(gradients.get(name, {}).get(source, 0.0) for name in held) for source in sources]
                for held in _parts(block, layers, layer_of).values()
            ]
        )
        if simplex and slopes.size:
            slopes = slopes - slopes.mean(axis=1, keepdims=True)
        found[block.name] = _gain(slopes)
    total = math.fsum(found.values())
    return {name: gain / total if total > 0 else 0.0 for name, gain in found.items()}


def _gain(slopes: Array) -> float:
    """|g| - |projection of g on the steps that all layers have in common|, of g [layers, sources]."""
    largest = float(np.abs(slopes).max(initial=0.0))
    if len(slopes) < 2 or largest == 0:
        return 0.0
    slopes = slopes / largest  # so that no square underflows
    mean = slopes.mean(axis=0)
    whole = float(np.linalg.norm(slopes))
    common = float(np.linalg.norm(mean)) * math.sqrt(len(slopes))
    # The difference of the squares is the sum of the squared deviations: computed so, nothing cancels.
    deviations = float(np.square(slopes - mean).sum())
    if deviations <= (AGREEMENT * whole) ** 2:
        return 0.0
    return largest * deviations / (whole + common)


def _layer_of(layers: Segmentation) -> dict[str, int]:
    return {name: index for index, layer in enumerate(layers.blocks) for name in layer.tensors()}


def _parts(block: Block, layers: Segmentation, layer_of: Mapping[str, int]) -> dict[int | None, list[str]]:
    """A block's tensors by the index of their layer, in the layers' order; None, the last, is the remainder."""
    held: dict[int | None, list[str]] = {}
    for name in block.tensors():
        held.setdefault(layer_of.get(name), []).append(name)
    order = sorted(index for index in held if index is not None)
    parameters = set(block.parameters)
    parts: dict[int | None, list[str]] = {}
    homeless: list[str] = []
    for index in [*order, *([None] if None in held else [])]:
        if not parameters.isdisjoint(held[index]):
            parts[index] = [*homeless, *held[index]]
            homeless = []
        elif parts:
            parts[next(reversed(parts))] += held[index]
        else:
            homeless += held[index]
    return parts


def _part(
    block: Block,
    index: int | None,
    held: Collection[str],
    layers: Segmentation,
    parts: Mapping[int | None, Sequence[str]],
) -> Block:
    """One part of a block."""
    own = set(held)
    tensors = {
        "parameters": [name for name in block.parameters if name in own],
        "buffers": [name for name in block.buffers if name in own],
    }
    if index is not None:
        layer = layers.blocks[index]
        prefix = f"{block.name}/"
        name = layer.name if layer.name.startswith(prefix) else f"{prefix}{layer.name}"
        return layer.model_copy(update={"name": name, **tensors})
    others = [layers.blocks[other] for other in parts if other is not None]
    return block.model_copy(
        update={
            "name": f"{block.name}/(remainder)",
            "parameter_count": max(0, block.parameter_count - sum(layer.parameter_count for layer in others)),
            "share": max(0.0, block.share - math.fsum(layer.share for layer in others)),
            **tensors,
        }
    )


@dataclass(frozen=True)
class _Column:
    """What the forest sees of one hyperparameter: a number, or whether a choice is taken.

    Attributes:
        key: the hyperparameter's name in the space.
        choice: the choice; None for a number.
        inactive: what stands for a number that is not active: one below its range, so that one cut tells them apart.
    """

    key: str
    choice: Any = None
    inactive: float = 0.0

    def value(self, point: Mapping[str, Any]) -> float:
        """The column's value at one point."""
        value = point.get(self.key)
        if self.choice is not None:
            return float(value == self.choice)
        return self.inactive if value is None else float(value)


def _columns(space: "SearchSpace", hyperparameters: Mapping[str, Any]) -> dict[str, list[_Column]]:
    """The columns by the name of the choice that they belong to."""
    names = [choice.name for choice in space.choices if choice.has_parameters]
    found: dict[str, list[_Column]] = {name: [] for name in names}
    for key, hyperparameter in hyperparameters.items():
        # The longest, since a part of a block has the block's name before its own.
        owner = max((name for name in names if key.startswith(f"{name}/")), key=len)
        if hasattr(hyperparameter, "choices"):
            found[owner] += [_Column(key, choice=choice) for choice in hyperparameter.choices]
        else:
            low, high = float(hyperparameter.lower), float(hyperparameter.upper)
            found[owner].append(_Column(key, inactive=2 * low - high))
    return found


def _encoded(points: Sequence[Mapping[str, Any]], columns: Sequence[_Column]) -> Array:
    """[points, columns], rounded to float32, in which the trees compare."""
    values = [[column.value(point) for column in columns] for point in points]
    return np.array(values, dtype=np.float32).reshape(len(points), len(columns)).astype(np.float64)


def _leaves(tree: Any, columns: int) -> tuple[Array, Array, Array]:
    """The leaves of a tree of scikit-learn: the box low < x <= high of each ([leaves, columns]), and its mean."""
    boxes = []
    waiting = [(0, np.full(columns, -np.inf), np.full(columns, np.inf))]
    while waiting:
        node, low, high = waiting.pop()
        left, right = int(tree.children_left[node]), int(tree.children_right[node])
        if left == right:
            boxes.append((low, high, float(tree.value[node].item())))
            continue
        column, threshold = int(tree.feature[node]), float(tree.threshold[node])
        below, above = high.copy(), low.copy()
        below[column], above[column] = min(high[column], threshold), max(low[column], threshold)
        waiting += [(left, low, below), (right, above, high)]
    lows, highs, means = zip(*boxes, strict=True)
    return np.stack(lows), np.stack(highs), np.array(means)


def _inside(points: Array, low: Array, high: Array) -> Array:
    """1 where a point ([points, columns]) lies in a box ([leaves, columns]), else 0: [points, leaves]."""
    inside = (points[:, None, :] > low[None]) & (points[:, None, :] <= high[None])
    return np.asarray(inside.all(axis=2), dtype=np.float64)

"""What the spec's constraints leave to choose in each block.

A constraint's pattern is matched against the name of a block, and against the name of a block that it is a part of: the
parts of ``1-sequence`` are called ``1-sequence/...``, whether the segmentation or the search has cut it, so what is
said of a block also holds for its parts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from automerge.errors import MergeError, SearchError
from automerge.merging.technique import Declaration, Value
from automerge.plugins import nearest
from automerge.segmenting.segmentation import Block
from automerge.spec import ConstraintSpec, SearchSpec

WeightMode = Literal["simplex", "independent"]


@dataclass(frozen=True)
class Choice:
    """One choice of technique, weights and hyperparameters: a block's own, or that of the blocks that share it.

    Attributes:
        name: what its dimensions in the space are named after: the first block (the first with parameters).
        blocks: the blocks, in order.
        techniques: the names of those that may be chosen, in the spec's order.
        weights: what is fixed, by source; with simplex weights all sources or none.
        hyperparameters: what is fixed, by technique and name.
        shared: whether a constraint holds its blocks, and their parts, together.
    """

    name: str
    blocks: Sequence[Block]
    techniques: Sequence[str]
    weights: Mapping[str, float]
    hyperparameters: Mapping[str, Mapping[str, Value]]
    shared: bool = False

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to choose: the policy for buffers has no hyperparameters."""
        return any(block.parameters for block in self.blocks)


def choices_of(
    blocks: Sequence[Block],
    sources: Sequence[str],
    techniques: Mapping[str, Declaration],
    spec: SearchSpec,
    mode: WeightMode,
) -> list[Choice]:
    """The choices that ``spec.constraints`` leave, in the order of their first blocks; every block is in one.

    Args:
        blocks: the blocks to be merged, in order.
        sources: the sources' names.
        techniques: the techniques of the space, by name.
        spec: the search part of the spec.
        mode: how weights are spread over the sources.

    Raises:
        SearchError: a constraint matches no block, names something unknown, fixes what is not allowed, contradicts
            another, or leaves a block without a technique.
    """
    matched = []
    for index, constraint in enumerate(spec.constraints):
        _check_names(index, constraint, sources, techniques, spec, mode)
        names = {block.name for block in blocks if _matches(constraint.blocks, block.name)}
        if not names:
            raise SearchError(
                f"search.constraints.{index}.blocks: the pattern {constraint.blocks!r} matches no block",
                f"the blocks are: {', '.join(block.name for block in blocks)}",
            )
        matched.append(names)
    shared = [names for names, constraint in zip(matched, spec.constraints, strict=True) if constraint.share]
    found = []
    for group in _groups(blocks, shared):
        members = {block.name for block in group}
        own = {index: spec.constraints[index] for index, names in enumerate(matched) if names & members}
        first = next((block for block in group if block.parameters), group[0])
        allowed = _techniques(own, first.name, techniques)
        found.append(
            Choice(
                name=first.name,
                blocks=group,
                techniques=allowed,
                weights=_weights(own, first.name, sources, mode),
                hyperparameters=_hyperparameters(own, first.name, [techniques[name] for name in allowed]),
                shared=any(names & members for names in shared),
            )
        )
    return found


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a block, or one that it is a part of."""
    parts = name.split("/")
    return any(fnmatchcase("/".join(parts[:count]), pattern) for count in range(len(parts), 0, -1))


def _groups(blocks: Sequence[Block], shared: Sequence[set[str]]) -> list[list[Block]]:
    """The blocks by what they share; sets that overlap are one."""
    leader = {block.name: block.name for block in blocks}
    for names in shared:
        joined = {leader[name] for name in names}
        first = next(name for name in leader if leader[name] in joined)
        leader = {name: first if led in joined else led for name, led in leader.items()}
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        groups.setdefault(leader[block.name], []).append(block)
    return list(groups.values())


def _check_names(
    index: int,
    constraint: ConstraintSpec,
    sources: Sequence[str],
    techniques: Mapping[str, Declaration],
    spec: SearchSpec,
    mode: WeightMode,
) -> None:
    """Raise where one constraint says something that no block could follow."""
    where = f"search.constraints.{index}"
    # One that does not fit the inputs is left out of the space with a notice; naming it here is no mistake.
    valid = list(dict.fromkeys([*techniques, *spec.techniques]))
    for key, names in (("techniques", constraint.techniques or []), ("forbid", constraint.forbid)):
        for position, name in enumerate(names):
            if name not in valid:
                raise SearchError(
                    f"{where}.{key}.{position}: the technique {name!r} is not among search.techniques",
                    nearest(name, valid),
                )
    for source, weight in (constraint.weights or {}).items():
        if source not in sources:
            raise SearchError(f"{where}.weights: no source is called {source!r}", nearest(source, list(sources)))
        if not math.isfinite(weight):
            raise SearchError(f"{where}.weights.{source}: the weight is {weight}", "give a finite number")
        if mode == "simplex" and not 0 <= weight <= 1:
            raise SearchError(
                f"{where}.weights.{source}: simplex weights lie between 0 and 1, got {weight:g}",
                "change it, or set search.weights to 'independent', which needs a base",
            )
    declared = dict.fromkeys(each.name for name in techniques.values() for each in name.hyperparameters)
    for name, value in constraint.hyperparameters.items():
        if name not in declared:
            raise SearchError(
                f"{where}.hyperparameters: no technique of the space has the hyperparameter {name!r}",
                nearest(name, list(declared)) if declared else "leave it out",
            )
        if name == "normalize" and value is True and mode == "independent":
            raise SearchError(
                f"{where}.hyperparameters.normalize: independent weights are never normalised",
                "leave it out, or set search.weights to 'simplex'",
            )


def _techniques(
    constraints: Mapping[int, ConstraintSpec], block: str, techniques: Mapping[str, Declaration]
) -> list[str]:
    """What all constraints of a block allow, in the spec's order."""
    left = list(techniques)
    for index, constraint in constraints.items():
        wanted = techniques if constraint.techniques is None else constraint.techniques
        before, left = left, [name for name in left if name in wanted and name not in constraint.forbid]
        if not left:
            raise SearchError(
                f"search.constraints.{index}: leaves no technique for block {block!r}",
                f"allow one of: {', '.join(before)}",
            )
    return left


def _weights(
    constraints: Mapping[int, ConstraintSpec], block: str, sources: Sequence[str], mode: WeightMode
) -> dict[str, float]:
    """What the constraints of a block fix, by source; with simplex weights completed to all sources."""
    fixed: dict[str, float] = {}
    fixers: dict[str, int] = {}
    for index, constraint in constraints.items():
        for source, weight in (constraint.weights or {}).items():
            _agree(f"weights.{source}", block, fixers.get(source), index, fixed.get(source), weight)
            fixed[source], fixers[source] = weight + 0.0, fixers.get(source, index)
    if mode == "independent" or not fixed:
        return {source: fixed[source] for source in sources if source in fixed}
    where = f"search.constraints.{max(fixers.values())}.weights"
    free = [source for source in sources if source not in fixed]
    total = math.fsum(fixed.values())
    if len(free) > 1:
        raise SearchError(
            f"{where}: in block {block!r} the weights of {', '.join(map(repr, free))} are free, and simplex weights "
            "are fixed all or not at all",
            "fix all of them; the last one may be left out",
        )
    if total > 1 + 1e-9 or (not free and total < 1 - 1e-9):
        raise SearchError(f"{where}: simplex weights sum to 1, and those of block {block!r} to {total:g}", "scale them")
    fixed |= {source: max(0.0, 1.0 - total) for source in free}
    return {source: fixed[source] for source in sources}


def _hyperparameters(
    constraints: Mapping[int, ConstraintSpec], block: str, techniques: Sequence[Declaration]
) -> dict[str, dict[str, Value]]:
    """What the constraints of a block fix, by technique and name, as the technique types it."""
    fixed: dict[str, Value] = {}
    fixers: dict[str, int] = {}
    for index, constraint in constraints.items():
        for name, value in constraint.hyperparameters.items():
            _agree(f"hyperparameters.{name}", block, fixers.get(name), index, fixed.get(name), value)
            fixed[name], fixers[name] = value, fixers.get(name, index)
    found: dict[str, dict[str, Value]] = {}
    for declaration in techniques:
        found[declaration.name] = {}
        for each in declaration.hyperparameters:
            if each.name in fixed:
                where = f"search.constraints.{fixers[each.name]}.hyperparameters: technique {declaration.name!r}"
                try:
                    found[declaration.name][each.name] = each.validate(fixed[each.name], where)
                except MergeError as error:
                    raise SearchError(error.problem, error.remedy) from None
    return found


def _agree(path: str, block: str, earlier: int | None, index: int, value: Value | None, other: Value) -> None:
    """Raise where two constraints fix one thing to different values."""
    if earlier is not None and value != other:
        raise SearchError(
            f"search.constraints.{index}.{path}: fixes {other!r} in block {block!r}, "
            f"and search.constraints.{earlier} fixes {value!r}",
            "make them agree, or narrow a pattern",
        )

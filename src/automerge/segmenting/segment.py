"""Segmentation: cut a model's parameters into blocks where the layout of its data changes.

The rule for transitions is in ``layout``; the finer granularities divide each transition block further:

``layer``: within the modules that have tensors in this block, from the root downwards, children of one module whose
tensors in this block have the same shapes in the same structure (names do not matter) are repetitions, and each is a
layer; nothing below a layer is divided. In a container (a module that does nothing but hold or call its children) that
has a repetition, all children are layers, so that a first layer with an extra tensor is one too. What is in no layer
is grouped by the module that owns it.

``tensor``: each parameter; buffers go with the first parameter of the operation that uses them, or of their module.

``whole``: everything is one block.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from automerge.errors import ModelError
from automerge.segmenting.layout import Layout, blocks_of
from automerge.segmenting.segmentation import Block, Granularity, Kind, Segmentation
from automerge.segmenting.trace import Operation, Trace, trace

REMAINDER = "remainder"


def segment(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    granularity: Granularity = "transition",
) -> Segmentation:
    """Cut the parameters and persistent buffers of a module into blocks by one inference on fake tensors.

    Args:
        module: on any device; on ``meta``, a model of any size takes next to no memory. It is not changed.
        args: example inputs of one inference (batch of any size; values do not matter).
        kwargs: the same, by keyword.
        granularity: ``transition`` (a block a change of layout), ``layer``, ``tensor`` or ``whole``.

    Raises:
        ModelError: the module cannot be called on the example inputs, its control flow depends on values, or none of
            its parameters meets the inputs.

    Source:
        The cut where the data's shape changes is AutoMerge's (arXiv 2601.22748).
    """
    traced = trace(module, args, kwargs)
    if traced.tensors and not traced.operations:
        raise ModelError(
            f"the trace of {type(module).__name__} met no operation that combines its parameters with the inputs",
            "pass the example inputs of one inference",
        )
    pieces = _transition_pieces(traced)
    if granularity == "whole":
        pieces = _whole(traced, pieces)
    elif granularity == "layer":
        pieces = [part for piece in pieces for part in _layers(traced, piece)]
    elif granularity == "tensor":
        pieces = [part for piece in pieces for part in _single_tensors(traced, piece)]
    return Segmentation(granularity=granularity, blocks=_documents(traced, pieces), tied=traced.tied)


@dataclass
class _Piece:
    """A block in the making."""

    name: str
    kind: Kind
    transition: str
    operations: list[Operation]
    tensors: list[str] = field(default_factory=list)


def _transition_pieces(traced: Trace) -> list[_Piece]:
    blocks = blocks_of(traced)
    block_of = {operation.index: number for number, (_, operations) in enumerate(blocks) for operation in operations}
    pieces = [
        _Piece(f"{number}-{layout}", layout, _transition(traced, layout, operations, block_of, blocks), operations)
        for number, (layout, operations) in enumerate(blocks)
    ]
    # A tensor belongs to the first operation that uses it; one that no operation uses, to its module's block.
    home: dict[str, int] = {}
    for operation in traced.operations:
        for name in operation.tensors:
            home.setdefault(name, block_of[operation.index])
    owners: dict[str, int] = {}
    for name, number in home.items():
        owners.setdefault(traced.tensors[name].owner, number)
    remainder = _Piece(REMAINDER, "remainder", "not touched by the inference", [])
    for name, tensor in traced.tensors.items():
        place = home.get(name)
        if place is None and not tensor.is_parameter:
            place = owners.get(tensor.owner)
        (remainder if place is None else pieces[place]).tensors.append(name)
    # All tensors of a block can have their home in an earlier one (shared weights).
    return [piece for piece in [*pieces, remainder] if piece.tensors]


def _transition(
    traced: Trace,
    layout: Layout,
    operations: list[Operation],
    block_of: dict[int, int],
    blocks: list[tuple[Layout, list[Operation]]],
) -> str:
    """``4-D convolutional -> 3-D sequence at encoder.0``, or ``input``."""
    first = operations[0]
    own = block_of[first.index]
    # Data that come back from a later block are no beginning.
    entries = [
        (operation, index) for operation in operations for index in sorted(operation.producers) if block_of[index] < own
    ]
    # A gate is no form that data arrive in, where there is another.
    entries = [entry for entry in entries if not traced.operations[entry[1]].enclosed] or entries
    if not entries:
        return "input"
    sources = dict.fromkeys(
        f"{len(traced.operations[index].shape_out)}-D {blocks[block_of[index]][0]}" for _, index in entries
    )
    entry = entries[0][0]
    return f"{' + '.join(sources)} -> {entry.rank}-D {layout} at {_place(traced, entry)}"


def _place(traced: Trace, operation: Operation) -> str:
    name = operation.tensors[0]
    return traced.tensors[name].owner or name


def _whole(traced: Trace, pieces: list[_Piece]) -> list[_Piece]:
    if not pieces:
        return []
    kinds: Counter[Kind] = Counter()
    for piece in pieces:
        kinds[piece.kind] += sum(traced.tensors[name].elements for name in piece.tensors)
    return [_Piece("whole", kinds.most_common(1)[0][0], "input", traced.operations, list(traced.tensors))]


def _layers(traced: Trace, piece: _Piece) -> list[_Piece]:
    if piece.kind == "remainder":
        return [piece]
    groups: dict[str, list[str]] = {}
    _descend(traced, "", piece.tensors, traced.working(), groups)
    return _divide(traced, piece, groups)


def _descend(traced: Trace, path: str, names: list[str], working: set[str], groups: dict[str, list[str]]) -> None:
    """Divide the tensors of one module (``path``) of one block into layers and owners."""
    own: list[str] = []
    children: dict[str, list[str]] = {}
    prefix = f"{path}." if path else ""
    for name in names:
        owner = traced.tensors[name].owner
        if owner == path:
            own.append(name)
        else:
            child = prefix + owner[len(prefix) :].split(".", 1)[0]
            children.setdefault(child, []).append(name)
    if own:
        groups[path] = own
    signatures = {child: _signature(traced, child, held) for child, held in children.items()}
    repeated = {signature for signature, count in Counter(signatures.values()).items() if count > 1}
    all_layers = bool(repeated) and not own and path not in working
    for child, held in children.items():
        if all_layers or signatures[child] in repeated:
            groups[child] = held
        else:
            _descend(traced, child, held, working, groups)


def _signature(traced: Trace, path: str, names: list[str]) -> tuple[Any, ...]:
    """Shapes of a module's tensors in their structure, without names."""
    prefix = f"{path}."
    own: list[tuple[int, ...]] = []
    children: dict[str, list[str]] = {}
    for name in names:
        tensor = traced.tensors[name]
        if tensor.owner == path:
            own.append(tensor.shape)
        else:
            child = prefix + tensor.owner[len(prefix) :].split(".", 1)[0]
            children.setdefault(child, []).append(name)
    return (tuple(own), tuple(_signature(traced, child, held) for child, held in children.items()))


def _single_tensors(traced: Trace, piece: _Piece) -> list[_Piece]:
    if piece.kind == "remainder":
        return [piece]
    held = set(piece.tensors)
    leader: dict[str, str] = {}
    leader_of_owner: dict[str, str] = {}
    for name in piece.tensors:
        if traced.tensors[name].is_parameter:
            leader[name] = name
            leader_of_owner.setdefault(traced.tensors[name].owner, name)
    for operation in piece.operations:
        first = next((name for name in operation.tensors if name in held and traced.tensors[name].is_parameter), None)
        for name in operation.tensors:
            if first is not None and name in held:
                leader.setdefault(name, first)
    groups: dict[str, list[str]] = {}
    for name in piece.tensors:
        owner = traced.tensors[name].owner
        # Statistics of a norm without parameters have none to go with: they keep together under their module.
        key = leader.get(name) or leader_of_owner.get(owner) or owner
        groups.setdefault(key, []).append(name)
    return _divide(traced, piece, groups)


def _divide(traced: Trace, piece: _Piece, groups: dict[str, list[str]]) -> list[_Piece]:
    """One piece a group, in the order in which the trace reaches them."""
    group_of = {name: key for key, names in groups.items() for name in names}
    operations: dict[str, list[Operation]] = {key: [] for key in groups}
    reached: dict[str, int] = {}
    for operation in piece.operations:
        for key in dict.fromkeys(group_of[name] for name in operation.tensors if name in group_of):
            operations[key].append(operation)
        for name in operation.tensors:
            if name in group_of:
                reached.setdefault(group_of[name], len(reached))
    parts: list[_Piece] = []
    for key in sorted(groups, key=lambda key: reached.get(key, len(groups))):
        transition = f"inside {piece.name} at {key}" if parts else piece.transition
        name = f"{piece.name}/{key}" if key else f"{piece.name}/(root)"
        parts.append(_Piece(name, piece.kind, transition, operations[key], groups[key]))
    return parts


def _documents(traced: Trace, pieces: list[_Piece]) -> list[Block]:
    total = sum(tensor.elements for tensor in traced.tensors.values() if tensor.is_parameter)
    blocks: list[Block] = []
    for piece in pieces:
        seen = [operation for operation in piece.operations if not operation.enclosed] or piece.operations
        parameters = [name for name in piece.tensors if traced.tensors[name].is_parameter]
        count = sum(traced.tensors[name].elements for name in parameters)
        blocks.append(
            Block(
                name=piece.name,
                kind=piece.kind,
                transition=piece.transition,
                shape_in=list(seen[0].shape_in) if seen else None,
                shape_out=list(seen[-1].shape_out) if seen else None,
                parameters=parameters,
                buffers=[name for name in piece.tensors if not traced.tensors[name].is_parameter],
                parameter_count=count,
                share=count / total if total else 0.0,
            )
        )
    return blocks

"""Layouts: what the data look like at each operation of a trace, and which operations form a block.

The layout is judged where weights meet data:

1. A convolution is ``convolutional`` in any number of dimensions, a recurrent kernel ``recurrent``. A product (linear,
   matmul, attention projections) is ``sequence`` on 3-D data and ``vector`` on less; a lookup (embedding) is judged by
   its result, since integers have no layout. Batch and sequence folded into one axis still are a sequence.
2. Reshapes that one module's forward makes and undoes do not count. Where such a forward convolves (a depth-wise
   convolution over tokens) or works on a pooled vector (a squeeze-and-excitation gate) in between, these operations
   take the layout of the data that it was given, as does a norm in between (over the channels of a map). The whole
   model is no such forward, however often it is wrapped.
3. Everything else takes a layout from its neighbours: norms, scales, positions and class tokens, and products on data
   of four or more dimensions (heads, windows, channel-last maps). Data in the form in which the latest producer left
   them keep its layout. Else, data in the form in which the next operation takes them have that operation's (the norm
   right after flattening). Else, laid out anew on both sides, an operation lies within a layout that is found on both
   (the linear layers between channel-last convolutions). Else, the rank decides.
4. Operations that hand data of one layout to each other, or share a parameter, are one block; a change is a transition.
5. A group of operations that one module's forward executes, and whose data come from and go to one and the same block,
   is enclosed by it and joins it (an attention over the positions of a map, flattened and restored around it). A whole
   transformer between convolutions is more than one forward and stays; so does recurrence, which is no reshape.
"""

from collections.abc import Iterable
from typing import Literal

from automerge.segmenting.trace import KEPT, Operation, Trace

Layout = Literal["convolutional", "sequence", "vector", "recurrent"]


def blocks_of(trace: Trace) -> list[tuple[Layout, list[Operation]]]:
    """The transition blocks of a trace: layout and operations of each, a block after those that it takes data from.

    Among blocks that could come next, and where blocks take data from each other, the first traced comes first.
    """
    layouts = judge(trace)
    groups = _Groups(len(trace.operations))
    _join(trace.operations, layouts, groups)
    while _absorb_enclosed(trace, layouts, groups):
        _join(trace.operations, layouts, groups)
    return [
        (layouts[members[0]], [trace.operations[index] for index in members])
        for members in _in_order(trace.operations, groups)
    ]


def judge(trace: Trace) -> list[Layout]:
    """The layout at each operation (rules 1 to 3)."""
    operations = trace.operations
    consumers: list[list[int]] = [[] for _ in operations]
    for operation in operations:
        for producer in sorted(operation.producers):
            consumers[producer].append(operation.index)
    found: list[Layout | None] = [_own_layout(operation) for operation in operations]
    entries = _there_and_back(trace, consumers, found)
    for index in entries:
        found[index] = None
        operations[index].enclosed = True
    while True:
        _inherit(operations, consumers, found)
        waiting = [operation.index for operation in operations if found[operation.index] is None]
        if not waiting:
            return [layout for layout in found if layout is not None]
        for index in waiting:
            found[index] = found[entries[index]] if index in entries else None
        if any(found[index] is not None for index in waiting):
            continue
        for index in waiting:
            before, after = _around(index, operations, consumers, found)
            common = [layout for layout in before if layout in after]
            if common:
                found[index] = common[0]
                break
        else:
            index = waiting[0]
            before, after = _around(index, operations, consumers, found)
            rank = operations[index].rank
            if rank <= 3:
                found[index] = _by_rank(rank)
            else:
                found[index] = next(iter([*before, *after]), "convolutional")


def _own_layout(operation: Operation) -> Layout | None:
    if operation.kind == "convolution":
        return "convolutional"
    if operation.kind == "recurrence":
        return "recurrent"
    if operation.kind != "other" and operation.rank <= 3:
        return _by_rank(operation.rank)
    return None


def _by_rank(rank: int) -> Layout:
    return "sequence" if rank == 3 else "vector"


def _inherit(operations: list[Operation], consumers: list[list[int]], found: list[Layout | None]) -> None:
    """Give layouts along paths on which the data keep their form, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for operation in operations:
            if found[operation.index] is None:
                kept = [index for index, passage in operation.producers.items() if passage == KEPT]
                if not kept or (layout := found[max(kept)]) is None:
                    continue
                if layout == "recurrent" and max(kept) != max(operation.producers):
                    continue  # a residual path around what comes after the recurrence does not make that recurrent
                found[operation.index] = layout
                changed = True
        for operation in reversed(operations):
            if found[operation.index] is None:
                first = consumers[operation.index][:1]
                for consumer in consumers[operation.index]:
                    layout = found[consumer]
                    if layout is None or operations[consumer].producers[operation.index] != KEPT:
                        continue
                    if layout == "recurrent" and [consumer] != first:
                        continue  # nor what comes before it
                    found[operation.index] = layout
                    changed = True
                    break


def _there_and_back(trace: Trace, consumers: list[list[int]], found: list[Layout | None]) -> dict[int, int]:
    """Rule 2: operation -> the latest producer of the data that its forward lays out anew and back again."""
    operations = trace.operations
    forwards = [trace.forward_of(operation.calls[-1]) if operation.calls else None for operation in operations]
    groups = _Groups(len(operations))
    for operation in operations:
        for producer in operation.producers:
            same = forwards[producer] == forwards[operation.index]
            if same and found[producer] == found[operation.index]:
                groups.join(producer, operation.index)
    entries: dict[int, int] = {}
    for members in groups.members():
        call, layout, inside = forwards[members[0]], found[members[0]], set(members)
        if call is None or layout in ("sequence", "recurrent"):
            continue
        if layout is not None and all(call in operation.calls for operation in operations):
            continue  # the whole model
        ranks: set[int] = set()
        sound = True
        for index in members:
            for producer, passage in operations[index].producers.items():
                if producer not in inside:
                    sound = sound and passage != KEPT and trace.forward_of(passage) == call
                    ranks.add(len(operations[producer].shape_out))
        for index in members:
            outside = [consumer for consumer in consumers[index] if consumer not in inside]
            leaves = bool(outside) or not consumers[index]
            sound = sound and all(operations[consumer].producers[index] != KEPT for consumer in outside)
            sound = sound and (not leaves or _rank_on_leaving(trace, index, call) in ranks)
        if sound and len(ranks) == 1:
            first = max(producer for index in members for producer in operations[index].producers.keys() - inside)
            entries.update(dict.fromkeys(members, first))
    return entries


def _rank_on_leaving(trace: Trace, index: int, call: int) -> int | None:
    """The rank of an operation's result after its forward has laid it out anew; none where that forward does not."""
    rank = None
    for exit_call, exit_rank in trace.operations[index].exits:
        if trace.forward_of(exit_call) != call:
            break
        rank = exit_rank
    return rank


def _around(
    index: int, operations: list[Operation], consumers: list[list[int]], found: list[Layout | None]
) -> tuple[list[Layout], list[Layout]]:
    """The nearest layouts before and after an operation, looked for through operations that have none yet."""

    def search(next_of: list[list[int]]) -> list[Layout]:
        seen, front, layouts = {index}, [index], []
        while front:
            ahead = []
            for at in front:
                for neighbour in next_of[at]:
                    if neighbour in seen:
                        continue
                    seen.add(neighbour)
                    layout = found[neighbour]
                    if layout is None:
                        ahead.append(neighbour)
                    elif layout not in layouts:
                        layouts.append(layout)
            front = ahead
        return layouts

    producers = [sorted(operation.producers, reverse=True) for operation in operations]
    return search(producers), search(consumers)


class _Groups:
    """Disjoint sets of operation indexes."""

    def __init__(self, size: int) -> None:
        self.parents = list(range(size))

    def root(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def join(self, one: int, other: int) -> None:
        """Unite two sets; the smaller index stands for both."""
        low, high = sorted((self.root(one), self.root(other)))
        self.parents[high] = low

    def members(self) -> list[list[int]]:
        """All sets, by their first members."""
        sets: dict[int, list[int]] = {}
        for index in range(len(self.parents)):
            sets.setdefault(self.root(index), []).append(index)
        return list(sets.values())


def _in_order(operations: list[Operation], groups: _Groups) -> list[list[int]]:
    waiting = {groups.root(members[0]): members for members in groups.members()}
    sources = {
        root: {groups.root(p) for index in members for p in operations[index].producers} - {root}
        for root, members in waiting.items()
    }
    ordered: list[list[int]] = []
    while waiting:
        ready = [root for root in waiting if not sources[root] & waiting.keys()]
        ordered.append(waiting.pop(ready[0] if ready else next(iter(waiting))))
    return ordered


def _join(operations: Iterable[Operation], layouts: list[Layout], groups: _Groups) -> None:
    """Rule 4."""
    users: dict[tuple[str, Layout], int] = {}
    for operation in operations:
        for producer in operation.producers:
            if layouts[producer] == layouts[operation.index]:
                groups.join(producer, operation.index)
        for tensor in operation.tensors:
            groups.join(users.setdefault((tensor, layouts[operation.index]), operation.index), operation.index)


def _absorb_enclosed(trace: Trace, layouts: list[Layout], groups: _Groups) -> bool:
    """Rule 5, for the first group that it holds for; tells whether there was one."""
    before: dict[int, set[int]] = {}
    after: dict[int, set[int]] = {}
    for operation in trace.operations:
        own = groups.root(operation.index)
        for producer in operation.producers:
            other = groups.root(producer)
            if other != own:
                before.setdefault(own, set()).add(other)
                after.setdefault(other, set()).add(own)
    for members in groups.members():
        own = groups.root(members[0])
        around = before.get(own, set()) | after.get(own, set())
        if layouts[own] == "recurrent" or len(around) != 1 or own not in before or own not in after:
            continue
        (outer,) = around
        calls = [trace.operations[index].calls for index in members]
        forward = {trace.forward_of(stack[-1]) if stack else None for stack in calls}
        if len(forward) != 1 or (call := forward.pop()) is None:
            continue
        # The module must lie within the outer block, not hold the whole of it: else it is the model, however wrapped.
        outer_members = [index for index in range(len(layouts)) if groups.root(index) == outer]
        if all(call in trace.operations[index].calls for index in outer_members):
            continue
        for index in members:
            layouts[index] = layouts[outer]
            trace.operations[index].enclosed = True
        groups.join(own, outer)
        return True
    return False

"""Layouts: what the data look like at each operation of a trace, and which operations form a block.

The layout is judged where weights meet data:

1. A convolution is ``convolutional`` in any number of dimensions, a recurrent kernel ``recurrent``. A product (linear,
   matmul, attention projections) is ``sequence`` on 3-D data and ``vector`` on less; a lookup (embedding) is judged by
   its result, since integers have no layout. Batch and sequence folded into one axis still are a sequence.
2. Everything else takes a layout from its neighbours: norms, scales, positions and class tokens, and products on data
   of four or more dimensions (heads, windows, channel-last maps). Data in the form in which the latest producer left
   them keep its layout. Else, data in the form in which the next operation takes them have that operation's (the norm
   right after flattening). Else, laid out anew on both sides, an operation lies within a layout that is found on both
   (the norms between channel-last convolutions). Else, the rank decides.
3. Operations that hand data of one layout to each other, or share a parameter, are one block; a change is a transition.
4. Reshapes inside one module's forward do not count: a group of operations that one module's forward executes, and
   whose data come from and go to one and the same block, joins that block (squeeze-and-excitation gates, depth-wise
   convolutions inside a transformer layer). Recurrence is no reshape and stays.
"""

from collections.abc import Iterable
from typing import Literal

from automerge.segmenting.trace import Operation, Trace

Layout = Literal["convolutional", "sequence", "vector", "recurrent"]


def blocks_of(trace: Trace) -> list[tuple[Layout, list[Operation]]]:
    """The transition blocks of a trace: layout and operations of each, in the order of their first operations."""
    layouts = judge(trace.operations)
    groups = _Groups(len(trace.operations))
    _join(trace.operations, layouts, groups)
    while _absorb_enclosed(trace, layouts, groups):
        _join(trace.operations, layouts, groups)
    return [(layouts[members[0]], [trace.operations[i] for i in members]) for members in groups.members()]


def judge(operations: list[Operation]) -> list[Layout]:
    """The layout at each operation (rules 1 and 2)."""
    consumers: list[list[int]] = [[] for _ in operations]
    for operation in operations:
        for producer in sorted(operation.producers):
            consumers[producer].append(operation.index)
    found: list[Layout | None] = [_own_layout(operation) for operation in operations]
    while True:
        _inherit(operations, consumers, found)
        waiting = [operation.index for operation in operations if found[operation.index] is None]
        if not waiting:
            return [layout for layout in found if layout is not None]
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
                kept = [index for index, anew in operation.producers.items() if not anew]
                if kept and (layout := found[max(kept)]) is not None:
                    found[operation.index] = layout
                    changed = True
        for operation in reversed(operations):
            if found[operation.index] is None:
                for consumer in consumers[operation.index]:
                    layout = found[consumer]
                    if layout is not None and not operations[consumer].producers[operation.index]:
                        found[operation.index] = layout
                        changed = True
                        break


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


def _join(operations: Iterable[Operation], layouts: list[Layout], groups: _Groups) -> None:
    """Rule 3."""
    users: dict[tuple[str, Layout], int] = {}
    for operation in operations:
        for producer in operation.producers:
            if layouts[producer] == layouts[operation.index]:
                groups.join(producer, operation.index)
        for tensor in operation.tensors:
            groups.join(users.setdefault((tensor, layouts[operation.index]), operation.index), operation.index)


def _absorb_enclosed(trace: Trace, layouts: list[Layout], groups: _Groups) -> bool:
    """Rule 4, for the first group that it holds for; tells whether there was one."""
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
        forward = {_forward(trace, trace.operations[index]) for index in members}
        if len(forward) != 1 or (call := forward.pop()) is None:
            continue
        # The module must lie within the outer block, not hold the whole of it: else it is the model, however wrapped.
        outer_members = [index for index in range(len(layouts)) if groups.root(index) == outer]
        if all(call in trace.operations[index].calls for index in outer_members):
            continue
        for index in members:
            layouts[index] = layouts[outer]
        groups.join(own, outer)
        return True
    return False


def _forward(trace: Trace, operation: Operation) -> int | None:
    """The module call whose forward executes an operation: leaves and mere containers count as the call around them."""
    if not operation.calls:
        return None
    call: int | None = operation.calls[-1]
    if call is not None and trace.calls[call].busy_children == 0:
        call = trace.calls[call].parent
    while call is not None and trace.calls[call].steps == 0:
        call = trace.calls[call].parent
    return call

"""The Pareto front of trials by what they keep of each task."""

from collections.abc import Mapping, Sequence

import numpy as np

from automerge.errors import SearchError


def pareto_front(cp: Sequence[Mapping[str, float]]) -> list[int]:
    """Which trials are on the Pareto front: those that no other beats on one task without losing on another.

    Args:
        cp: capability preservation by task, of each trial; bigger is better. All hold the same tasks.

    Returns:
        The indices of the trials on the front, the best of the first task first, and among equals in the first task
        the best of the second, and so on. Of trials that keep the same of every task, the earliest stands for all.

    Raises:
        SearchError: trials hold different tasks, or a value that is no number.
    """
    if not cp:
        return []
    tasks = list(cp[0])
    for index, each in enumerate(cp):
        if each.keys() != cp[0].keys():
            raise SearchError(
                f"trial {index} of the front has the tasks {sorted(each)}, the first {sorted(tasks)}",
                "take only trials that were measured on all tasks",
            )
    values = np.array([[each[task] for task in tasks] for each in cp], dtype=np.float64)
    if np.isnan(values).any():
        raise SearchError("the front is asked of a value that is no number", "leave failed trials out")
    # Best of the first task first; so a trial can only be beaten, or repeated, by one before it.
    order = np.lexsort((np.arange(len(values)), *(-values).T[::-1]))
    front: list[int] = []
    for index in order:
        if not front or not (values[front] >= values[index]).all(axis=1).any():
            front.append(int(index))
    return front

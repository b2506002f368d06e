"""The Pareto front of a search on disk: a folder for each point, and choosing one."""

import shutil
from pathlib import Path

from automerge.errors import SpecError
from automerge.stages.documents import FRONT, RECIPE, STATISTICS, Front

POINTS = "front"
"""The folder of the points, in that of the search."""


def point_folder(folder: Path, number: int) -> Path:
    """Where the recipe of a point is, and its statistics, if it needs some.

    Args:
        folder: of the search.
        number: of the point's trial.
    """
    return folder / POINTS / str(number)


def choose_point(folder: Path, number: int) -> Path:
    """Make a point of the front the recipe of the search, for the stages after it; returns the recipe's file.

    Args:
        folder: of the search.
        number: of the point's trial.

    Raises:
        SpecError: the search wrote no front, or this is none of its points.
    """
    path = folder / FRONT
    if not path.exists():
        raise SpecError(
            f"{path}: no such file: the search was not for a Pareto front", "set search.aggregate to 'pareto'"
        )
    front = Front.read(path)
    numbers = [point.number for point in front.points]
    if number not in numbers:
        raise SpecError(
            f"{path}: trial {number} is no point of the front", f"choose one of {', '.join(map(str, numbers))}"
        )
    place = point_folder(folder, number)
    # The statistics first: without its recipe a statistics file says nothing.
    for name in (STATISTICS, RECIPE):
        if (place / name).exists():
            temporary = folder / f".{name}.tmp"
            shutil.copyfile(place / name, temporary)
            temporary.replace(folder / name)
    return folder / RECIPE

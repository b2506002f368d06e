"""Repeating a study over seeds: its rows, on disk.

A study runs several *ways* of making one model (searches, single techniques, fine-tuning) on a *pair* of specialists,
again and again with other seeds, of which each splits the data and trains base and specialists anew. Every way gives a
row a seed. The rows of one seed of one pair are one file, so that seeds run in processes of their own, and a study that
was interrupted goes on where it was:

    results = open_results(folder, "digits", seed, settings)
    for way, run in ways.items():
        if way not in results.ways:
            results = add_row(folder, results, run())

`studies.comparison` says what may be said of them.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, FiniteFloat, JsonValue, NonNegativeFloat, NonNegativeInt, model_validator

from automerge.documents import Document, Model
from automerge.errors import SpecError, TaskError
from automerge.preservation import ModelResult

PAIR = r"[a-z0-9][a-z0-9_]*"


class Row(Model):
    """One way on one seed of one pair, on test data."""

    pair: str = Field(pattern=f"^{PAIR}$")
    seed: int
    way: str
    mean_pr: FiniteFloat = Field(description="Mean preservation rate over the tasks, percent.")
    worst_pr: FiniteFloat = Field(description="Least preservation rate, percent.")
    pd: FiniteFloat = Field(description="Preservation discrepancy, points.")
    rates: dict[str, FiniteFloat] = Field(default_factory=dict, description="Preservation rate by task, percent.")
    seconds: NonNegativeFloat | None = Field(default=None, description="Wall time that the way took.")
    samples: NonNegativeInt | None = Field(
        default=None, description="What the way computed, in forward passes of single samples; a backward pass is two."
    )
    figures: dict[str, FiniteFloat] = Field(default_factory=dict, description="What else was measured, by name.")

    def value(self, figure: str) -> float:
        """One figure by its name.

        Raises:
            SpecError: the row has none of this name.
        """
        value = getattr(self, figure) if figure in _COLUMNS else self.figures.get(figure)
        if value is None:
            raise SpecError(
                f"{self.pair}, seed {self.seed}, {self.way!r}: there is no figure {figure!r}",
                "measure it, or ask for another",
            )
        return float(value)


_COLUMNS = ("mean_pr", "worst_pr", "pd", "seconds", "samples")


class Results(Document):
    """The rows of one seed of one pair."""

    FORMAT: ClassVar[str] = "automerge.study.results"

    pair: str = Field(pattern=f"^{PAIR}$")
    seed: int
    settings: dict[str, JsonValue] = Field(description="All that decides the rows beside pair and seed.")
    rows: list[Row] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "Results":
        if any((row.pair, row.seed) != (self.pair, self.seed) for row in self.rows):
            raise ValueError("a row is of another pair or seed")
        if len(set(self.ways)) < len(self.rows):
            raise ValueError("a way has two rows")
        return self

    @property
    def ways(self) -> list[str]:
        """The ways that have a row, in the order in which they were added."""
        return [row.way for row in self.rows]


def row_of(
    model: ModelResult,
    *,
    pair: str,
    seed: int,
    way: str,
    seconds: float | None = None,
    samples: int | None = None,
    figures: Mapping[str, float] | None = None,
) -> Row:
    """A row of what `automerge.preservation.preservation` found of a model.

    Raises:
        TaskError: a figure is undefined: a specialist is no better than a guess, or the model was not measured.
    """
    undefined = [name for name, task in model.tasks.items() if task.pr is None]
    if model.mean_pr is None or model.worst_pr is None or model.pd is None or undefined:
        raise TaskError(
            f"{pair}, seed {seed}, {way!r}: the preservation rate is undefined"
            + (f" on {', '.join(map(repr, undefined))}" if undefined else ""),
            "measure the model on two tasks or more whose specialists are better than a guess",
        )
    return Row(
        pair=pair,
        seed=seed,
        way=way,
        mean_pr=model.mean_pr,
        worst_pr=model.worst_pr,
        pd=model.pd,
        rates={name: task.pr.value for name, task in model.tasks.items() if task.pr is not None},
        seconds=seconds,
        samples=samples,
        figures=dict(figures or {}),
    )


def results_path(folder: Path, pair: str, seed: int) -> Path:
    """Where the rows of one seed of one pair are."""
    return folder / f"{pair}-seed-{seed}.json"


def open_results(folder: Path, pair: str, seed: int, settings: Mapping[str, JsonValue]) -> Results:
    """The rows that are there; none yet where there is no file.

    Raises:
        SpecError: the file is damaged, or its rows were made with other settings.
    """
    path = results_path(folder, pair, seed)
    wanted = Results(pair=pair, seed=seed, settings=dict(settings))
    if not path.exists():
        return wanted
    found = Results.read(path)
    if (found.pair, found.seed, found.settings) != (pair, seed, wanted.settings):
        raise SpecError(
            f"{path}: was written with other settings than those of this run", "run in another folder, or remove it"
        )
    return found


def add_row(folder: Path, results: Results, row: Row) -> Results:
    """The results with one more row, written atomically. One process a seed and pair: there is no lock.

    Raises:
        SpecError: the row is of another pair or seed, or its way has one already.
    """
    if (row.pair, row.seed) != (results.pair, results.seed) or row.way in results.ways:
        raise SpecError(
            f"{results.pair}, seed {results.seed}: a row of {row.pair}, seed {row.seed}, {row.way!r} cannot be added",
            "add one row for each way, to the results of its own pair and seed",
        )
    added = results.model_copy(update={"rows": [*results.rows, row]})
    added.write(results_path(folder, results.pair, results.seed))
    return added


def read_rows(folder: Path) -> list[Row]:
    """The rows of all files of a folder, by pair and seed.

    Raises:
        SpecError: there are none, one is damaged, or the files of one pair were written with different settings.
    """
    found = [Results.read(path) for path in sorted(folder.glob("*-seed-*.json"))]
    if not found:
        raise SpecError(f"{folder}: there are no results", "run the study first")
    found.sort(key=lambda results: (results.pair, results.seed))
    for one, other in itertools.pairwise(found):
        if (one.pair, one.seed) == (other.pair, other.seed):
            raise SpecError(f"{folder}: two files are of {one.pair}, seed {one.seed}", "remove one of them")
        if one.pair == other.pair and one.settings != other.settings:
            raise SpecError(
                f"{folder}: seeds {one.seed} and {other.seed} of {one.pair} were run with different settings",
                "run them again with the same, in one folder",
            )
    return [row for results in found for row in results.rows]


def values_of(rows: Iterable[Row], pair: str, way: str, figure: str) -> dict[int, float]:
    """A figure by seed.

    Raises:
        SpecError: there is none, or a row lacks the figure.
    """
    found = {row.seed: row.value(figure) for row in rows if row.pair == pair and row.way == way}
    if not found:
        raise SpecError(f"{pair}: there is no row of {way!r}", "run this way first")
    return dict(sorted(found.items()))


def paired_values(rows: Sequence[Row], pair: str, first: str, second: str, figure: str) -> tuple[list[float], ...]:
    """A figure of two ways on the same seeds: two lists, by seed.

    Raises:
        SpecError: a seed has only one of them: a seed that is left out could be the one that decides.
    """
    one, other = (values_of(rows, pair, way, figure) for way in (first, second))
    if lonely := sorted({*one} ^ {*other}):
        raise SpecError(
            f"{pair}: of seed {lonely[0]} there is only one of {first!r} and {second!r}", "run the other on it too"
        )
    return list(one.values()), [other[seed] for seed in one]

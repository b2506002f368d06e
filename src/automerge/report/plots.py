"""The report's plots: SVG to be put into an HTML page, coloured by the page's CSS variables.

The same trials give the same bytes: matplotlib's random ids are salted with a constant and no date is written.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TrialLike(Protocol):
    """What the report needs of a trial; :class:`automerge.searching.trial.Trial` has it."""

    @property
    def number(self) -> int:
        """From 0."""
        ...

    @property
    def origin(self) -> str:
        """Where the point came from: 'sobol', 'surrogate', ..."""
        ...

    @property
    def status(self) -> str:
        """'ok', 'cached', 'stopped' (measured in part) or 'failed'."""
        ...

    @property
    def objective(self) -> float | None:
        """What the search maximises; None if the trial failed."""
        ...

    @property
    def cp(self) -> Mapping[str, float]:
        """Capability preservation by task."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """Preservation rate on validation data by task, percent."""
        ...

    @property
    def phase(self) -> str:
        """'search', 'split-1', ..., or 'refine'."""
        ...

    @property
    def samples(self) -> int:
        """Forward passes of single samples."""
        ...

    @property
    def tuned(self) -> int:
        """Scalars of the recipe that a refinement tuned."""
        ...

    @property
    def fidelity(self) -> float:
        """The share of the validation data that it was measured on."""
        ...

    @property
    def seconds(self) -> float:
        """Wall time of merging and evaluating."""
        ...

    @property
    def optimiser_seconds(self) -> float:
        """Wall time of proposing the point."""
        ...


# Colours that stand for the page's: matplotlib knows no CSS variable, so each is drawn in a colour of its own and
# exchanged afterwards. The series' colours tell apart in every common form of colour blindness (Okabe and Ito).
_INK, _MUTED, _LINE, _ACCENT, _BAND, _BAD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_SERIES = ("#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c")
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _LINE: "line",
    _ACCENT: "accent",
    _BAND: "band",
    _BAD: "bad",
    **{colour: f"series-{index}" for index, colour in enumerate(_SERIES)},
}
_DASHES = ("-", "--", "-.", ":")
_PROPOSED = ("surrogate", "random")  # origins that are not of the initial phase


def initial_count(trials: Sequence[TrialLike]) -> int:
    """How many trials came before the first that the optimiser proposed."""
    return next((index for index, trial in enumerate(trials) if trial.origin in _PROPOSED), len(trials))


def best_so_far(trials: Sequence[TrialLike]) -> list[TrialLike | None]:
    """For each trial, the best up to it; the first of equals; None until one is measured whole."""
    found: list[TrialLike | None] = []
    best: TrialLike | None = None
    for trial in trials:
        whole = trial.status in ("ok", "cached") and trial.objective is not None
        if whole and (best is None or (best.objective or 0.0) < (trial.objective or 0.0)):
            best = trial
        found.append(best)
    return found


def convergence_plot(trials: Sequence[TrialLike]) -> str:
    """Each trial's objective, and the best so far; the initial phase is shaded."""
    figure, axes = _figure()
    _initial_band(axes, trials)
    for status, face, mark in (("ok", _MUTED, "o"), ("cached", "none", "o"), ("stopped", "none", "v")):
        shown = [(trial.number, trial.objective) for trial in trials if trial.status == status]
        axes.scatter(
            [number for number, _ in shown],
            [objective for _, objective in shown if objective is not None],
            s=11,
            marker=mark,
            facecolors=face,
            edgecolors=_MUTED,
            linewidths=0.8,
            zorder=2,
        )
    best = [(trial.number, top.objective) for trial, top in zip(trials, best_so_far(trials), strict=True) if top]
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=_ACCENT, linewidth=2, zorder=3)
        _end_label(axes, best[-1][0], best[-1][1], f"best {best[-1][1]:.3f}", _ACCENT)
    failed = [trial.number for trial in trials if trial.status == "failed"]
    bottom = axes.get_ylim()[0]
    axes.scatter(failed, [bottom] * len(failed), marker="x", s=22, color=_BAD, zorder=4, clip_on=False)
    axes.set_ylabel("objective")
    return _svg(figure, "convergence")


def preservation_plot(trials: Sequence[TrialLike]) -> str:
    """CP of each task for the best recipe so far: whether one task paid for another."""
    figure, axes = _figure()
    _initial_band(axes, trials)
    steps = [(trial.number, top.cp) for trial, top in zip(trials, best_so_far(trials), strict=True) if top]
    tasks = list(steps[-1][1]) if steps else []
    ends = _apart([steps[-1][1][task] for task in tasks], axes, [cp[task] for _, cp in steps for task in tasks])
    for index, (task, end) in enumerate(zip(tasks, ends, strict=True)):
        colour = _SERIES[index % len(_SERIES)]
        numbers, values = zip(*((number, cp[task]) for number, cp in steps), strict=True)
        axes.step(
            numbers,
            values,
            where="post",
            color=colour,
            linewidth=1.8,
            linestyle=_DASHES[(index // len(_SERIES)) % len(_DASHES)],
            zorder=3,
        )
        _end_label(axes, numbers[-1], end, f"{task} {values[-1]:.3f}", colour)
    axes.set_ylabel("CP of the best so far")
    return _svg(figure, "preservation")


def _figure() -> tuple["Figure", "Axes"]:
    """An empty plot. Made without pyplot, so that no global state of matplotlib is touched."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.5, 3.0))
    axes = figure.add_axes((0.062, 0.15, 0.79, 0.82))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
    axes.tick_params(colors=_MUTED, length=0, labelsize=9, pad=5)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("trial", color=_MUTED, fontsize=9)
    axes.yaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_fontsize(9)
    return figure, axes


def _initial_band(axes: "Axes", trials: Sequence[TrialLike]) -> None:
    count = initial_count(trials)
    axes.set_xlim(-0.5, max(len(trials) - 0.5, 0.5))
    if count:
        axes.axvspan(-0.5, count - 0.5, color=_BAND, linewidth=0, zorder=0)
        axes.annotate(
            "initial",
            (-0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=_MUTED,
        )


def _end_label(axes: "Axes", x: float, y: float | None, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (x, y if y is not None else 0.0),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=colour,
        annotation_clip=False,
    )


def _apart(ends: list[float], axes: "Axes", values: list[float]) -> list[float]:
    """Where the end labels go so that they do not overlap: at least a line's height from one another."""
    if not ends:
        return []
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    gap = 0.09 * (high - low + 2 * margin)
    placed = list(ends)
    order = sorted(range(len(ends)), key=lambda index: ends[index])
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    shift = max(0.0, max(placed) - (high + margin))  # a pile that grew past the top is moved down as a whole
    return [place - shift for place in placed]


def _svg(figure: "Figure", name: str) -> str:
    """The figure as an ``<svg>`` element whose ids are unique on the page and whose colours are the page's."""
    import matplotlib

    settings: dict[str, Any] = {
        "svg.hashsalt": f"automerge-{name}",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):  # type: ignore[arg-type, unused-ignore]
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)  # the page's
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)

"""Writes ``report.html``: one self-contained file that is read by eye in ten seconds, and then in depth.

The file needs no network, no script and no other file, so it opens in the sandboxed frame of a pipeline's web page, in
a mail, and in ten years. Equal documents give equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from automerge.documents import write_atomically
from automerge.errors import MissingExtraError
from automerge.merging.recipe import Recipe, RecipeBlock, effective_note, effective_weights
from automerge.preservation import Evaluation, Interval, ModelResult, TaskInfo
from automerge.report.alignment import alignment
from automerge.report.plots import TrialLike, best_so_far, convergence_plot, initial_count, preservation_plot
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import Spec
from automerge.telemetry.logs import redact

NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"

IMPORTANCE = {
    "surrogate": "is a block's part of what all blocks explain of the differences between the trials' costs",
    "gradient": "is a block's part of what its layers would gain, at first, by weights of their own",
}
"""What a cut's measure measures."""

IMPORTANT = 8
"""Blocks whose importance is shown: the most important ones, and those that were cut."""


class FileLike(Protocol):
    """One file of an input."""

    @property
    def bytes(self) -> int:
        """Its size."""
        ...


class InputLike(Protocol):
    """What the report needs of an input; :class:`automerge.stages.documents.Input` has it."""

    @property
    def name(self) -> str:
        """The input's name."""
        ...

    @property
    def role(self) -> str:
        """'base', 'source', 'validation' or 'test'."""
        ...

    @property
    def uri(self) -> str:
        """Where it came from."""
        ...

    @property
    def digest(self) -> str:
        """sha256, hex."""
        ...

    @property
    def files(self) -> Sequence[FileLike]:
        """Its files."""
        ...


class ManifestLike(Protocol):
    """What the report needs of the manifest; :class:`automerge.stages.documents.Manifest` has it."""

    @property
    def inputs(self) -> Sequence[InputLike]:
        """All inputs."""
        ...


class CutLike(Protocol):
    """What the report needs of a cut of blocks; :class:`automerge.searching.store.Cut` has it."""

    @property
    def phase(self) -> str:
        """The phase that begins with it."""
        ...

    @property
    def blocks(self) -> Sequence[str]:
        """Those that were cut into their layers."""
        ...

    @property
    def importance(self) -> Mapping[str, float]:
        """Each block's part of the importance of all."""
        ...

    @property
    def measure(self) -> str | None:
        """'surrogate', 'gradient', or None where it is not known."""
        ...


def write_report(
    path: Path,
    *,
    spec: Spec,
    segmentation: Segmentation,
    recipe: Recipe,
    trials: Sequence[TrialLike],
    cuts: Sequence[CutLike],
    evaluation: Evaluation,
    manifest: ManifestLike,
) -> Path:
    """Write the report of one merge, atomically; returns ``path``.

    Args:
        path: the HTML file.
        spec: what was asked for.
        segmentation: the blocks.
        recipe: the merge that was chosen.
        trials: the search's trials in their order; none if the recipe was given.
        cuts: the blocks that the search cut, in the order of the phases; none if it cut none.
        evaluation: what the merged model and its rivals score on test data.
        manifest: the inputs and their digests.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtraError("the report", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("automerge.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "points_2": lambda value: _signed(value, ".2f"),
        "value": number,
        "metric": metric,
        "interval": interval,
        "metric_interval": metric_interval,
    }
    html = environment.get_template("report.html.j2").render(
        spec=spec,
        evaluation=evaluation,
        merged=evaluation.merged,
        worst_task=_worst_task(evaluation),
        groups=_groups(evaluation),
        metric_columns=sum(len(task.metrics) + 1 for task in evaluation.tasks),
        gate=_gate(spec, evaluation),
        rates=_rates(spec, evaluation),
        rival=_rival(evaluation),
        search=_search(trials),
        cuts=[_cut(cut) for cut in cuts],
        importance=IMPORTANCE,
        blocks=_blocks(segmentation, recipe),
        notes=_notes(recipe),
        private={name: list(tensors) for name, tensors in recipe.private.items() if tensors},
        inputs=[_input(item) for item in manifest.inputs],
        recipe=recipe,
        recipe_digest=recipe.digest(),
        spec_digest=spec.digest(),
        confidence=f"{100 * evaluation.confidence:g}{NBSP}%",
    )
    write_atomically(path, html.encode())
    return path


@dataclass(frozen=True)
class _Rate:
    """One task's preservation rate, with its place on the scale, in percent of the scale's width."""

    task: TaskInfo
    pr: Interval | None
    why_undefined: str
    at: float = 0.0
    band_from: float = 0.0
    band_width: float = 0.0


@dataclass(frozen=True)
class _Scale:
    rates: list[_Rate]
    low: float
    high: float
    reference: float
    limit: float | None


@dataclass(frozen=True)
class _Weight:
    source: str
    value: float
    width: float
    spread: str = ""


@dataclass(frozen=True)
class _BlockRow:
    name: str
    about: str
    share: float | None
    parameters: int | None
    technique: str
    hyperparameters: str
    weights: list[_Weight]


def _worst_task(evaluation: Evaluation) -> str:
    """The task with the lowest rate; empty where there is nothing to choose from."""
    rates = {name: result.pr.value for name, result in evaluation.merged.tasks.items() if result.pr is not None}
    return min(rates, key=lambda task: rates[task]) if len(rates) > 1 else ""


def _groups(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The table's rows by what they are; the merged model first."""
    titles = {
        ("merged",): "",
        ("base", "source"): "Unmerged",
        ("technique",): "One technique for the whole model, at its defaults",
    }
    groups = [
        {"title": title, "models": [model for model in evaluation.models if model.role in roles]}
        for roles, title in titles.items()
    ]
    return [group for group in groups if group["models"]]


def _gate(spec: Spec, evaluation: Evaluation) -> dict[str, Any]:
    has_limits = spec.gate.min_worst_pr is not None or spec.gate.max_pd is not None
    if evaluation.gate.verdict == "fail":
        return {"state": "fail", "text": "Quality gate failed", "reasons": evaluation.gate.reasons}
    if not has_limits:
        return {"state": "none", "text": "No quality gate was set", "reasons": []}
    return {"state": "pass", "text": "Quality gate passed", "reasons": evaluation.gate.reasons}


def _rates(spec: Spec, evaluation: Evaluation) -> _Scale:
    """The merged model's rates on one scale that shows every interval, the specialist's 100 % and the gate's limit."""
    results = evaluation.merged.tasks
    known = [pr for task in evaluation.tasks if (pr := results[task.name].pr) is not None]
    limit = spec.gate.min_worst_pr
    lowest = min([100.0, *(pr.low for pr in known), *([limit] if limit is not None else [])])
    highest = max([100.0, *(pr.high for pr in known)])
    low = max(0.0, 10.0 * ((lowest - 2.0) // 10.0))
    high = 5.0 * -((-highest - 1.0) // 5.0)

    def place(value: float) -> float:
        return round(100.0 * (value - low) / (high - low), 3)

    rates = []
    for task in evaluation.tasks:
        pr = results[task.name].pr
        why = "; ".join(sorted({metric.undefined for metric in task.metrics if metric.undefined}))
        if pr is None:
            rates.append(_Rate(task, None, why or "no metric has a defined rate"))
        else:
            width = round(place(pr.high) - place(pr.low), 3)
            rates.append(_Rate(task, pr, why, at=place(pr.value), band_from=place(pr.low), band_width=width))
    return _Scale(rates, low, high, place(100.0), place(limit) if limit is not None else None)


def _rival(evaluation: Evaluation) -> dict[str, Any] | None:
    """The single technique with the best mean rate on the same test data, and how far the merged model is from it."""
    techniques = [model for model in evaluation.models if model.role == "technique" and model.mean_pr is not None]
    if not techniques or evaluation.merged.mean_pr is None:
        return None
    best: ModelResult = max(techniques, key=lambda model: model.mean_pr or 0.0)
    difference = round(evaluation.merged.mean_pr - (best.mean_pr or 0.0), 1)
    return {"model": best, "difference": abs(difference), "word": "above" if difference >= 0 else "below"}


def _search(trials: Sequence[TrialLike]) -> dict[str, Any] | None:
    """The search in numbers and pictures; None where the recipe was given."""
    if not trials:
        return None
    best = best_so_far(trials)[-1]
    statuses = [trial.status for trial in trials]
    return {
        "count": len(trials),
        "initial": initial_count(trials),
        "cached": statuses.count("cached"),
        "failed": statuses.count("failed"),
        "stopped": statuses.count("stopped"),
        "samples": f"{sum(trial.samples for trial in trials):,}",
        "saved": _saved(trials),
        "phases": _phases(trials),
        "refined": sum(trial.phase == "refine" for trial in trials),
        "tuned": max(trial.tuned for trial in trials),
        "alignment": alignment(trials),
        "seconds": duration(sum(trial.seconds + trial.optimiser_seconds for trial in trials)),
        "optimiser_seconds": duration(sum(trial.optimiser_seconds for trial in trials)),
        "best": best,
        "convergence": convergence_plot(trials),
        "preservation": preservation_plot(trials) if best is not None and len(best.cp) > 1 else "",
    }


def _cut(cut: CutLike) -> dict[str, Any]:
    """The blocks by importance, the largest first, and how many are not shown."""
    ranked = sorted(cut.importance.items(), key=lambda item: -item[1])
    shown = [
        {"name": name, "share": 100.0 * value, "is_cut": name in cut.blocks}
        for index, (name, value) in enumerate(ranked)
        if index < IMPORTANT or name in cut.blocks
    ]
    return {"phase": cut.phase, "measure": cut.measure, "blocks": shown, "hidden": len(ranked) - len(shown)}


def _phases(trials: Sequence[TrialLike]) -> str:
    """How many trials each phase had, where there was more than one."""
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.phase] = counts.get(trial.phase, 0) + 1
    return ", ".join(f"{phase} {count}" for phase, count in counts.items()) if len(counts) > 1 else ""


def _saved(trials: Sequence[TrialLike]) -> str:
    """What multi-fidelity saved: samples that stopped trials did not need, as a share of all without it."""
    stopped = [trial for trial in trials if trial.status == "stopped" and trial.samples]
    if not stopped:
        return ""
    spent = sum(trial.samples for trial in trials)
    spared = sum(trial.samples / trial.fidelity - trial.samples for trial in stopped)
    return percent(100 * spared / (spent + spared))


def _blocks(segmentation: Segmentation, recipe: Recipe) -> list[_BlockRow]:
    """A row for each block of the recipe; where a block was cut in many, one for each technique in it."""
    cut_from = {name: block for block in segmentation.blocks for name in block.tensors()}
    members: dict[str, list[RecipeBlock]] = {}
    for block in recipe.blocks:
        first = next(iter([*block.parameters, *block.buffers]), "")
        origin = cut_from.get(first)
        members.setdefault(origin.name if origin is not None else block.name, []).append(block)
    by_name = {block.name: block for block in segmentation.blocks}
    largest = max((abs(v) for block in recipe.blocks for v in effective_weights(block).values()), default=0.0) or 1.0
    rows = []
    for name, blocks in members.items():
        segment = by_name.get(name)
        merged = [block for block in blocks if block.parameters] or blocks
        for technique in dict.fromkeys(block.technique for block in merged):
            same = [block for block in merged if block.technique == technique]
            rows.append(
                _BlockRow(
                    name=name,
                    about=segment.transition.replace("->", "\u2192") if segment else "",
                    share=segment.share if segment else None,
                    parameters=segment.parameter_count if segment else None,
                    technique=technique,
                    hyperparameters=_hyperparameters(same[0]) if len(same) == 1 else f"{len(same)} groups of tensors",
                    weights=_weights(same, largest),
                )
            )
    return rows


def _weights(blocks: Sequence[RecipeBlock], largest: float) -> list[_Weight]:
    """Each source's effective weight; of several blocks the mean, with the range."""
    found: dict[str, list[float]] = {}
    for block in blocks:
        for source, value in effective_weights(block).items():
            found.setdefault(source, []).append(value)
    weights = []
    for source, values in found.items():
        mean = sum(values) / len(values)
        spread = f"{metric(min(values))} to {metric(max(values))}" if len(values) > 1 else ""
        weights.append(_Weight(source, mean, round(100 * abs(mean) / largest, 2), spread))
    return weights


def _hyperparameters(block: RecipeBlock) -> str:
    def show(value: bool | int | float | str) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return number(value) if isinstance(value, int | float) else value

    return ", ".join(f"{name}{NBSP}{show(value)}" for name, value in block.hyperparameters.items())


def _notes(recipe: Recipe) -> Mapping[str, str]:
    """What must be known about the effective weights, by technique."""
    notes = {block.technique: effective_note(block) for block in recipe.blocks}
    return {technique: note for technique, note in sorted(notes.items()) if note}


def _input(item: InputLike) -> dict[str, str]:
    return {
        "name": item.name,
        "role": item.role,
        "uri": redact(item.uri),
        "digest": item.digest,
        "size": size(sum(file.bytes for file in item.files)),
    }


def percent(value: float | None) -> str:
    """One decimal and a percent sign; a dash for None."""
    return DASH if value is None else f"{_signed(value, '.1f')}{NBSP}%"


def points(value: float | None) -> str:
    """One decimal; a dash for None."""
    return DASH if value is None else _signed(value, ".1f")


def number(value: float | None) -> str:
    """Four significant digits; a dash for None."""
    return DASH if value is None else _signed(value, ".4g")


def metric(value: float) -> str:
    """A fixed number of decimals for each magnitude, so that a column lines up."""
    size = abs(value)
    return _signed(value, ".3f" if size < 10 else ".2f" if size < 1000 else ",.0f" if size < 1e7 else ".3g")


def interval(value: Interval) -> str:
    """``94.9 to 97.8``."""
    return f"{points(value.low)} to {points(value.high)}"


def metric_interval(value: Interval) -> str:
    """``0.949 to 0.978``."""
    return f"{metric(value.low)} to {metric(value.high)}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g}{NBSP}{unit}"
        value /= 1000
    return f"{value:.3g}{NBSP}TB"


def duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min"


def _signed(value: float, digits: str) -> str:
    return format(value, digits).replace("-", MINUS)

"""Tables for a terminal: the segmentation, and the evaluation."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from automerge.preservation import Evaluation, Interval
from automerge.segmenting.segmentation import Segmentation

WIDE = 160
"""Columns of a table that is not printed on a terminal."""

NARROW = 80
"""Columns from which the metrics are shown beside the preservation rates, and some more for each."""


def print_segmentation(segmentation: Segmentation) -> None:
    """Print the blocks: kind, the transition that began each, shapes, parameter count and share."""
    count = len(segmentation.blocks)
    title = f"{count} block{'' if count == 1 else 's'}, granularity {segmentation.granularity}"
    table = Table(title=title, title_justify="left")
    for heading in ("block", "kind", "begins", "in", "out"):
        table.add_column(heading, overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for block in segmentation.blocks:
        shapes = ["x".join(map(str, shape)) if shape else "-" for shape in (block.shape_in, block.shape_out)]
        table.add_row(
            block.name, block.kind, block.transition, *shapes, f"{block.parameter_count:,}", f"{block.share:.1%}"
        )
    _console().print(table)


def print_evaluation(evaluation: Evaluation, report: Path) -> None:
    """Print every model on every task, the warnings, the gate's verdict and where the report is."""
    console = _console()
    confidence = f"{evaluation.confidence:.0%}"
    table = Table(
        title=f"Preservation on test data: PR in % [{confidence} interval], PD in points", title_justify="left"
    )
    table.add_column("model", no_wrap=True)
    with_metrics = console.width >= NARROW + 12 * sum(len(task.metrics) for task in evaluation.tasks)
    for task in evaluation.tasks:
        for metric in task.metrics if with_metrics else []:
            table.add_column(f"{task.name}\n{metric.name}", justify="right", no_wrap=True)
        table.add_column(f"{task.name}\nPR", justify="right", no_wrap=True)
    for heading in ("mean\nPR", "worst\nPR", "PD"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(evaluation.models, [*evaluation.models[1:], None], strict=True):
        cells = []
        for task in evaluation.tasks:
            result = row.tasks[task.name]
            cells += [f"{result.metrics[metric.name].value:.4g}" for metric in task.metrics if with_metrics]
            cells.append(_rate(result.pr))
        cells += ["-" if value is None else f"{value:.1f}" for value in (row.mean_pr, row.worst_pr, row.pd)]
        ends = following is not None and (
            row.role == "merged" or (row.role != "technique" and following.role == "technique")
        )
        table.add_row(row.name, *cells, style="bold" if row.role == "merged" else None, end_section=ends)
    console.print(table)
    for warning in evaluation.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    reasons = "; ".join(evaluation.gate.reasons)
    console.print(f"gate:   {evaluation.gate.verdict} ({reasons})", highlight=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _console() -> Console:
    """The terminal; a pipe or file, which has no width, gets lines long enough for a whole table."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _rate(pr: Interval | None) -> str:
    return "-" if pr is None else f"{pr.value:.1f} [{pr.low:.1f}, {pr.high:.1f}]"

"""Draws what the dashboard's queries return: ``python -m tests.observability.plot_dashboard docs/dashboard.png``.

Grafana is not run. Some runs of the tiny pair are watched: two that go well, one that fails, one that the gate refuses.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from automerge.errors import AutoMergeError
from automerge.spec import Spec
from automerge.stages.run import run
from automerge.stages.status import report_status
from helm.dashboard import ROWS, Panel
from tests.e2e.tiny import prepare
from tests.observability.expressions import CHOSEN
from tests.observability.servers import SCRAPE_SECONDS
from tests.observability.watched import Watched, watching
from tests.trigger.service import alias_event

COLUMNS = 6
MOST_LINES = 10


def happenings(watched: Watched) -> list[tuple[Spec, str]]:
    """The runs, each with what an engine says of it."""
    plain = watched.spec
    lost = plain.sources[0].model_copy(update={"uri": "/no/such/file"})
    return [
        (plain, "SUCCEEDED"),
        (plain.model_copy(update={"sources": [lost, plain.sources[1]]}), "FAILED"),
        (plain.model_copy(update={"gate": plain.gate.model_copy(update={"min_worst_pr": 150.0})}), "SUCCEEDED"),
        (plain.model_copy(update={"search": plain.search.model_copy(update={"seed": 1})}), "SUCCEEDED"),
    ]


def series(watched: Watched, expression: str, start: float, end: float) -> list[Any]:
    """A query over the time of the runs."""
    for variable, value in CHOSEN.items():
        expression = expression.replace(variable, value)
    step = f"{SCRAPE_SECONDS}s"
    found: list[Any] = watched.prometheus.ask(
        "query_range", query=expression, start=str(start), end=str(end), step=step
    )["result"]
    return found


def draw(axes: Any, panel: Panel, watched: Watched, start: float, end: float) -> None:
    """One panel as lines over seconds."""
    axes.set_title(panel.title + (f" [{panel.unit}]" if panel.unit != "short" else ""), fontsize=7)
    for expression, legend in panel.queries:
        found_all = series(watched, expression, start, end)
        for found in found_all:
            label = legend
            for name, value in found["metric"].items():
                label = label.replace(f"{{{{{name}}}}}", value)
            if len(found_all) > MOST_LINES and not any(float(value) for _, value in found["values"]):
                continue
            times = [float(at) - start for at, _ in found["values"]]
            axes.plot(times, [float(value) for _, value in found["values"]], label=label, linewidth=1)
    axes.tick_params(labelsize=6)
    axes.margins(y=0.1)
    if len(axes.lines) > 1:
        axes.legend(fontsize=5)


def main(path: Path) -> None:
    """Watch the runs and write the picture."""
    matplotlib.use("Agg")
    with tempfile.TemporaryDirectory() as name, watching(prepare(Path(name) / "pair"), Path(name)) as watched:
        start = time.time()
        for number, (spec, state) in enumerate(happenings(watched)):
            try:
                run(spec, Path(name) / f"run-{number}", resume=True)
            except AutoMergeError as error:
                print(f"run {number}: {error}")
            report_status(spec, state)
            for secret in ("another", "the-secret-of-the-webhook"):
                watched.service.deliver(alias_event("digits"), secret=secret)
            time.sleep(6 * SCRAPE_SECONDS)
        end = time.time()
        panels = [panel for _, row in ROWS for panel in row]
        rows = -(-len(panels) // COLUMNS)
        figure, grid = pyplot.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 2 * rows), layout="constrained")
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw(axes, panel, watched, start, end)
        figure.suptitle(
            "The dashboard's queries over four runs: merged, failed, refused by the gate, merged (x: seconds)"
        )
        figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

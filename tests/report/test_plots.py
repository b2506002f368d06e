"""Plots: what they show, and that they can stand on a page."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from automerge.report.plots import best_so_far, convergence_plot, initial_count, preservation_plot


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - our own


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parse(svg).iter() if element.tag.endswith("text")]


def test_best_so_far_is_the_first_of_equals_and_skips_failures(run) -> None:
    first, second, failed = (run.trials[0], run.trials[1], run.trials[31])
    equal = second.model_copy(update={"number": 99})
    assert best_so_far([failed, first, second, equal, first]) == [None, first, second, second, second]


def test_the_initial_phase_ends_where_the_optimiser_begins(run) -> None:
    assert initial_count(run.trials) == 20
    assert initial_count(run.trials[:5]) == 5
    assert initial_count([]) == 0


def test_convergence_names_the_best(run) -> None:
    best = max(trial.objective for trial in run.trials if trial.objective is not None)
    assert f"best {best:.3f}" in texts(convergence_plot(run.trials))
    assert "initial" in texts(convergence_plot(run.trials))


def test_preservation_names_every_task(run) -> None:
    best = best_so_far(run.trials)[-1]
    assert best is not None
    assert {f"{task} {value:.3f}" for task, value in best.cp.items()} <= set(texts(preservation_plot(run.trials)))


@pytest.mark.parametrize("kept", [slice(0, 1), slice(31, 32), slice(19, 21), slice(0, 60)])
def test_any_search_can_be_drawn(run, kept: slice) -> None:
    """One trial, only a failed one, a few, all."""
    for plot in (convergence_plot, preservation_plot):
        parse(plot(run.trials[kept]))


def test_many_tasks_with_equal_cp_get_labels_apart(run) -> None:
    tasks = [f"task{number}" for number in range(8)]
    trials = [trial.model_copy(update={"cp": dict.fromkeys(tasks, trial.objective or 0)}) for trial in run.trials]
    svg = preservation_plot([trial for trial in trials if trial.objective is not None])
    labels = [element for element in parse(svg).iter() if (element.text or "").startswith("task")]
    heights = [float(element.attrib["y"]) for element in labels]
    assert len(heights) == 8
    assert all(abs(a - b) > 8 for i, a in enumerate(heights) for b in heights[:i])


def test_two_plots_can_share_a_page_and_take_its_colours(run) -> None:
    plots = [convergence_plot(run.trials), preservation_plot(run.trials)]
    identifiers = [identifier for svg in plots for identifier in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(identifiers) == len(set(identifiers))
    for svg in plots:
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)) <= {
            pair for name in identifiers for pair in ((name, ""), ("", name))
        }
        assert not re.search(r"<style|#0[0-9a-f]0[0-9a-f]0[0-9a-f]|<metadata|<script", svg)
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000", "#ffffff"}
        assert "var(--accent)" in svg or "var(--series-0)" in svg


def test_equal_trials_give_equal_bytes(run) -> None:
    assert convergence_plot(run.trials) == convergence_plot(list(run.trials))

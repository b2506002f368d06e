"""Rows on disk: nothing that was paid for is lost, and nothing is mixed that does not belong together."""

import json
import math

import pytest
from pydantic import ValidationError

from automerge.errors import SpecError, TaskError
from automerge.preservation import Interval, ModelResult, TaskResult
from studies.results import (
    Results,
    Row,
    add_row,
    open_results,
    paired_values,
    read_rows,
    results_path,
    row_of,
    values_of,
)

SETTINGS = {"trials": 200, "spec": {"preset": "best"}}


def row(seed=0, way="best", pair="digits", mean_pr=95.0, **others):
    return Row(pair=pair, seed=seed, way=way, mean_pr=mean_pr, worst_pr=mean_pr - 1, pd=2.0, **others)


def model(rates, mean=95.0):
    tasks = {
        name: TaskResult(
            loss=0.1,
            metrics={},
            metric_pr={},
            pr=None if rate is None else Interval(value=rate, low=rate - 1, high=rate + 1),
        )
        for name, rate in rates.items()
    }
    return ModelResult(name="m", role="merged", tasks=tasks, mean_pr=mean, worst_pr=94.0, pd=2.0, pd_pairwise=2.0)


def test_a_study_goes_on_where_it_was(tmp_path):
    results = open_results(tmp_path, "digits", 3, SETTINGS)
    assert results.ways == []
    results = add_row(tmp_path, results, row(3, "best", seconds=1.5, samples=70, figures={"loss": 0.25}))
    add_row(tmp_path, results, row(3, "paper", mean_pr=94.5))
    again = open_results(tmp_path, "digits", 3, SETTINGS)
    assert again.ways == ["best", "paper"]
    assert again.rows[0] == row(3, "best", seconds=1.5, samples=70, figures={"loss": 0.25})
    assert [path.name for path in tmp_path.iterdir()] == ["digits-seed-3.json"]


def test_rows_of_other_settings_are_not_taken_for_these(tmp_path):
    add_row(tmp_path, open_results(tmp_path, "digits", 0, SETTINGS), row())
    with pytest.raises(SpecError, match="other settings"):
        open_results(tmp_path, "digits", 0, {**SETTINGS, "trials": 100})


@pytest.mark.parametrize("other", [row(1, "paper"), row(0, "paper", "emoji"), row(0, "best")])
def test_a_row_goes_where_it_belongs_and_once(tmp_path, other):
    results = add_row(tmp_path, open_results(tmp_path, "digits", 0, SETTINGS), row())
    before = results_path(tmp_path, "digits", 0).read_bytes()
    with pytest.raises(SpecError, match="cannot be added"):
        add_row(tmp_path, results, other)
    assert results_path(tmp_path, "digits", 0).read_bytes() == before


def test_a_file_with_a_foreign_row_is_refused(tmp_path):
    path = results_path(tmp_path, "digits", 0)
    add_row(tmp_path, open_results(tmp_path, "digits", 0, SETTINGS), row())
    value = json.loads(path.read_text())
    value["rows"][0]["seed"] = 1
    path.write_text(json.dumps(value))
    with pytest.raises(SpecError, match="another pair or seed"):
        open_results(tmp_path, "digits", 0, SETTINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_is_a_number(value):
    with pytest.raises(ValidationError):
        row(mean_pr=value)
    with pytest.raises(ValidationError):
        row(figures={"loss": value})


@pytest.mark.parametrize("pair", ["../digits", "Digits", "", "a b"])
def test_a_pair_is_named_so_that_its_file_is_in_the_folder(pair):
    with pytest.raises(ValidationError):
        Results(pair=pair, seed=0, settings={})


def test_rows_are_read_by_pair_and_by_seed_as_a_number(tmp_path):
    for seed in (10, 2):
        for pair in ("emoji", "digits"):
            add_row(tmp_path, open_results(tmp_path, pair, seed, SETTINGS), row(seed, pair=pair))
    assert [(each.pair, each.seed) for each in read_rows(tmp_path)] == [
        ("digits", 2),
        ("digits", 10),
        ("emoji", 2),
        ("emoji", 10),
    ]


def test_seeds_with_different_settings_are_not_summarised_together(tmp_path):
    add_row(tmp_path, open_results(tmp_path, "digits", 0, SETTINGS), row(0))
    add_row(tmp_path, open_results(tmp_path, "emoji", 1, {"trials": 1}), row(1, pair="emoji"))
    assert len(read_rows(tmp_path)) == 2
    add_row(tmp_path, open_results(tmp_path, "digits", 1, {"trials": 1}), row(1))
    with pytest.raises(SpecError, match="seeds 0 and 1 of digits were run with different settings"):
        read_rows(tmp_path)


def test_a_copied_file_does_not_count_twice(tmp_path):
    add_row(tmp_path, open_results(tmp_path, "digits", 0, SETTINGS), row())
    (tmp_path / "digits-seed-1.json").write_bytes(results_path(tmp_path, "digits", 0).read_bytes())
    with pytest.raises(SpecError, match="two files are of digits, seed 0"):
        read_rows(tmp_path)


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(SpecError, match="no results"):
        read_rows(tmp_path)


def test_figures_by_seed():
    rows = [
        row(2, mean_pr=90.0),
        row(0, mean_pr=91.5),
        row(0, "paper", mean_pr=80.0),
        row(0, pair="emoji", mean_pr=1.0),
    ]
    assert list(values_of(rows, "digits", "best", "mean_pr").items()) == [(0, 91.5), (2, 90.0)]
    assert values_of(rows, "digits", "paper", "worst_pr") == {0: 79.0}
    assert values_of([row(figures={"loss": 0.5})], "digits", "best", "loss") == {0: 0.5}
    with pytest.raises(SpecError, match="no row of 'fast'"):
        values_of(rows, "digits", "fast", "pd")
    for figure in ("seconds", "loss", "seed"):
        with pytest.raises(SpecError, match="no figure"):
            values_of(rows, "digits", "best", figure)


def test_pairs_are_of_the_same_seeds():
    rows = [row(1, mean_pr=90.0), row(0, mean_pr=91.0), row(0, "paper", mean_pr=80.0), row(1, "paper", mean_pr=81.0)]
    assert paired_values(rows, "digits", "best", "paper", "mean_pr") == ([91.0, 90.0], [80.0, 81.0])
    with pytest.raises(SpecError, match="of seed 7 there is only one"):
        paired_values([*rows, row(7)], "digits", "best", "paper", "mean_pr")


def test_a_row_of_what_was_measured():
    found = row_of(model({"low": 96.0, "high": 94.0}), pair="digits", seed=1, way="best", seconds=2.0, samples=5)
    assert found == Row(
        pair="digits",
        seed=1,
        way="best",
        mean_pr=95.0,
        worst_pr=94.0,
        pd=2.0,
        rates={"low": 96.0, "high": 94.0},
        seconds=2.0,
        samples=5,
    )


@pytest.mark.parametrize("measured", [model({"low": 96.0, "high": None}), model({"low": 96.0}, mean=None)])
def test_an_undefined_rate_is_no_row(measured):
    with pytest.raises(TaskError, match="preservation rate is undefined"):
        row_of(measured, pair="digits", seed=1, way="best")

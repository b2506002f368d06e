"""The report: what a reader finds in it, and that it needs nothing else."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from automerge.errors import MissingExtraError
from automerge.preservation import GateVerdict, OnnxResult
from automerge.report.report import duration, metric, number, percent, size, write_report
from automerge.searching.store import Cut
from automerge.spec import GateSpec

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses a page: checks that its tags nest, and collects its text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


@pytest.fixture
def render(run, tmp_path: Path):
    def render(**changes: Any) -> str:
        path = write_report(tmp_path / "report.html", **run.documents(**changes))
        assert path == tmp_path / "report.html"
        return path.read_text()

    return render


def test_the_verdict_comes_first(render) -> None:
    text = Page(render()).text
    parts = [
        "digits: 2 models merged into one",
        "Quality gate passed",
        "interval's lower end 91.9 % is at least 85.0 %",
        "Mean preservation rate 95.1 %",
        "Worst task 93.8 % high",
        "Preservation discrepancy 2.6 points",
        "low specialist: low 96.4 % 94.5 to 97.9",
        "Read the figures with care tasks 'low' and 'high' share 3 test samples",
        "The best single technique at its defaults is linear with a mean of 89.8 %.",
        "The merged model is 5.3 points above it.",
        "The recipe",
        "The search",
        "What was merged and measured",
        "Exported and checked",
        "How to reproduce",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_every_model_block_and_input_is_there(run, render) -> None:
    text = Page(render()).text
    for model in run.evaluation.models:
        assert model.name in text
    for block in run.recipe.blocks:
        assert f"{block.name} " in text
    for name in ("s3://models/digits/low", run.manifest.input("low").digest, run.recipe.digest(), run.spec.digest()):
        assert name in text
    assert "density 0.71, lambda 1, normalize yes" in text.replace("\xa0", " ")
    assert "low 0.470 high 0.530" in text
    assert "automerge merge spec.json --output again --recipe recipe.json" in text


def test_it_needs_no_network_script_or_other_file(render) -> None:
    html = render()
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    addresses = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")
    ]
    assert all(value is not None and value.startswith("#") for value in addresses)
    assert not re.search(r"@import|url\((?!#)", html)
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert "default-src 'none'" in html


def test_it_is_accessible(render) -> None:
    page = Page(render())
    tables = [attrs for tag, attrs in page.tags if tag == "table"]
    assert len(tables) == 5
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("aria-hidden") == "true" for tag, attrs in page.tags if tag == "svg")
    pictures = [attrs["aria-label"] for tag, attrs in page.tags if attrs.get("role") == "img"]
    assert len(pictures) == 2
    assert all(label and "0." in label for label in pictures)  # the numbers are told, too
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    assert dict(page.tags)["html"] == {"lang": "en"}


def test_equal_documents_give_equal_bytes(render) -> None:
    assert render() == render()


def test_names_from_outside_cannot_become_markup(run, render) -> None:
    evil = "<script>alert(1)</script>"
    inputs = [item.model_copy(update={"uri": f"s3://b/{evil}"}) for item in run.manifest.inputs]
    html = render(
        evaluation=run.evaluation.model_copy(update={"warnings": [evil]}),
        manifest=run.manifest.model_copy(update={"inputs": inputs}),
        trials=[trial.model_copy(update={"cp": {f"{evil}{i}": 0.5 for i in range(2)}}) for trial in run.trials[:2]],
    )
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_credentials_in_an_address_do_not_get_in(run, render) -> None:
    inputs = [item.model_copy(update={"uri": "https://me:hunter2@host/w"}) for item in run.manifest.inputs]
    assert "hunter2" not in render(manifest=run.manifest.model_copy(update={"inputs": inputs}))


def test_a_failed_gate_is_said(run, render) -> None:
    gate = GateVerdict(verdict="fail", reasons=["preservation discrepancy 9.0 points is above 8.0"])
    text = Page(render(evaluation=run.evaluation.model_copy(update={"gate": gate}))).text
    assert "Quality gate failed preservation discrepancy 9.0 points is above 8.0" in text


def test_no_gate_is_not_called_passed(run, render) -> None:
    text = Page(render(spec=run.spec.model_copy(update={"gate": GateSpec()}))).text
    assert "No quality gate was set" in text
    assert "passed" not in text


def test_an_undefined_rate_gives_its_reason(run, render) -> None:
    why = "the specialist is no better than a guess"
    tasks = [
        task.model_copy(update={"metrics": [m.model_copy(update={"undefined": why}) for m in task.metrics]})
        for task in run.evaluation.tasks
    ]
    models = [
        model.model_copy(
            update={
                "tasks": {name: result.model_copy(update={"pr": None}) for name, result in model.tasks.items()},
                **dict.fromkeys(("mean_pr", "worst_pr", "pd", "pd_pairwise")),
            }
        )
        for model in run.evaluation.models
    ]
    text = Page(render(evaluation=run.evaluation.model_copy(update={"tasks": tasks, "models": models}))).text
    assert f"low specialist: low undefined {why}" in text
    assert "Mean preservation rate \u2013" in text
    assert "best single technique" not in text


def test_a_merge_that_a_single_technique_beats_says_so(run, render) -> None:
    models = [
        model.model_copy(update={"mean_pr": 99.9}) if model.name == "ties" else model for model in run.evaluation.models
    ]
    text = Page(render(evaluation=run.evaluation.model_copy(update={"models": models}))).text
    assert "is ties with a mean of 99.9 %. The merged model is 4.8 points below it." in text


def test_without_trials_there_is_no_search(render) -> None:
    assert "The search" not in Page(render(trials=[])).text


@pytest.mark.parametrize(
    ("onnx", "sentence"),
    [
        (OnnxResult(status="failed", reason="no ONNX form of aten::foo"), "Not exported: no ONNX form of aten::foo."),
        (OnnxResult(status="off"), "Not asked for."),
    ],
)
def test_onnx_that_is_missing_is_explained(run, render, onnx: OnnxResult, sentence: str) -> None:
    assert sentence in Page(render(evaluation=run.evaluation.model_copy(update={"onnx": onnx}))).text


def test_private_parameters_and_negative_weights_are_shown(run, render) -> None:
    block = run.recipe.blocks[0].model_copy(
        update={
            "technique": "task_arithmetic",
            "weights": {"low": -0.3, "high": 1.2},
            "hyperparameters": {"lambda": 1.0},
        }
    )
    recipe = run.recipe.model_copy(
        update={"blocks": [block, *run.recipe.blocks[1:]], "private": {"low": [f"head.{i}" for i in range(9)]}}
    )
    html = render(recipe=recipe)
    text = Page(html).text
    assert "low \u22120.300 high 1.200" in text
    assert 'class="negative" style="width:25.0%"' in html
    assert "kept for each model: low: head.0 , head.1" in text
    assert "and 3 more" in text


def cut(run, technique: str = "task_arithmetic") -> Any:
    """The run's recipe with its first block cut in three, as a split or a refinement does; two are merged alike."""
    block = run.recipe.blocks[0]
    parts = [
        block.model_copy(
            update={
                "name": f"{block.name}/part.{index}",
                "technique": technique if index < 2 else "ties",
                "weights": {"low": weight, "high": 1.0},
                "hyperparameters": {"lambda": 1.0}
                if index < 2
                else {"density": 0.5, "lambda": 1.0, "normalize": False},
                "parameters": [f"{block.parameters[0]}.{index}"],
            }
        )
        for index, weight in enumerate((0.2, -0.4, 0.9))
    ]
    segment = run.segmentation.blocks[0].model_copy(update={"parameters": [part.parameters[0] for part in parts]})
    segmentation = run.segmentation.model_copy(update={"blocks": [segment, *run.segmentation.blocks[1:]]})
    recipe = run.recipe.model_copy(update={"blocks": [*parts, *run.recipe.blocks[1:]]})
    return {"recipe": recipe, "segmentation": segmentation}


def test_a_block_that_was_cut_has_a_row_for_each_technique_in_it(run, render) -> None:
    text = Page(render(**cut(run))).text.replace("\xa0", " ")
    name, rest = run.recipe.blocks[0].name, run.recipe.blocks[1].name
    first = text.find(f"{name} ")
    assert "part." not in text, "named after the block that people know"
    row = text[first : text.find(f"{rest} ")]
    assert "task_arithmetic 2 groups of tensors low \u22120.100 high 1.000" in row
    assert "low: mean of \u22120.400 to 0.200" in row and "high: mean of 1.000 to 1.000" in row
    assert "ties density 0.5, lambda 1, normalize no low 0.900 high 1.000" in row


def phases(run) -> list[Any]:
    """The run's trials in three phases; the last two are refined, three were stopped after a quarter of 400 samples."""
    found = []
    for trial in run.trials:
        changes: dict[str, Any] = {"samples": 0 if trial.status == "cached" else 400}
        if trial.number >= 50:
            changes["phase"] = "split-1" if trial.number < 58 else "refine"
            changes["tuned"] = 1234 if trial.number >= 58 else 0
        if trial.number in (21, 22, 23):
            changes |= {"status": "stopped", "samples": 100, "fidelity": 0.25}
        if trial.objective is not None:
            changes["rates"] = {"low": 100 * trial.objective, "high": 90 * trial.objective}
        found.append(trial.model_copy(update=changes))
    return found


def test_the_search_tells_its_phases_and_what_it_spent(run, render) -> None:
    text = Page(render(trials=phases(run))).text.replace("\xa0", " ")
    assert "By phase search 50, split-1 8, refine 2" in text
    # 55 trials at 400 and three at 100; without the race these would have taken 300 more each.
    assert "Samples 22,300 forward passes" in text
    assert "Stopped early 3, which saved 3.9 % of the samples" in text
    assert "Objective against what is kept rank correlation 1.00 with the mean, 1.00 with the worst" in text
    assert "The last 2 trials were found by moving the recipe's weights along the gradient of the objective." in text
    assert "Only these 1,234 scalars were tuned; no parameter of a model was trained" in text
    assert "Note: the objective ranked" not in text
    plain = Page(render()).text
    for word in ("By phase", "Stopped early", "Objective against", "gradient"):
        assert word not in plain


def test_the_blocks_importance_is_told_before_each_cut(run, render) -> None:
    """The largest first; of many, the most important ones and those that were cut."""
    few = {"0-convolutional": 0.125, "1-sequence": 0.75, "2-vector": 0.125}
    many = {f"1-sequence/{i}": 0.0 for i in range(30)} | {"0-convolutional": 0.9, "1-sequence/29": 0.004}
    cuts = [
        Cut(phase="split-1", blocks=["1-sequence"], importance=few, measure="surrogate"),
        Cut(phase="split-2", blocks=["0-convolutional", "1-sequence/20"], importance=many, measure="gradient"),
    ]
    text = Page(render(trials=phases(run), cuts=cuts)).text.replace("\xa0", " ")
    one, two = text.split("Which blocks mattered")[1].split("Importance is a block's part")[0].split("Before split-2")
    assert "Before split-1 1-sequence 75.0 % yes 0-convolutional 12.5 % no 2-vector 12.5 % no" in one
    assert two.split()[:7] == ["0-convolutional", "90.0", "%", "yes", "1-sequence/29", "0.4", "%"]
    assert "1-sequence/20 0.0 % yes 22 more less no" in two
    assert "of what all blocks explain of the differences between the trials' costs." in text
    assert "of what its layers would gain, at first, by weights of their own." in text
    assert "Which blocks mattered" not in Page(render(trials=phases(run))).text


def test_an_objective_that_misled_is_warned_of(run, render) -> None:
    trials = [
        trial.model_copy(update={"rates": {task: 100 - rate for task, rate in trial.rates.items()}})
        for trial in phases(run)
    ]
    text = Page(render(trials=trials)).text
    assert "rank correlation \u22121.00 with the mean" in text
    assert "Note: the objective ranked the 54 recipes of the search poorly by what they keep" in text


def test_a_failure_leaves_the_earlier_report(run, render, tmp_path: Path) -> None:
    before = render()
    with pytest.raises(AttributeError):
        write_report(tmp_path / "report.html", **run.documents(manifest=None))
    assert (tmp_path / "report.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_jinja2_the_extra_is_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"automerge-models\[report\]"):
        write_report(tmp_path / "report.html", **run.documents())


def test_numbers_are_written_for_readers() -> None:
    assert percent(None) == "\u2013"
    assert percent(-3.14) == "\u22123.1\u00a0%"
    assert [metric(value) for value in (0.62, 12.345, 1234.5, 1e9)] == ["0.620", "12.35", "1,234", "1e+09"]
    assert number(0.000012345) == "1.234e\u221205"
    assert [size(count) for count in (0, 999, 1000, 5_000_000_000)] == [
        "0\u00a0B",
        "999\u00a0B",
        "1\u00a0kB",
        "5\u00a0GB",
    ]
    assert [duration(value) for value in (0.04, 61, 3725)] == [
        "0.0\u00a0s",
        "1\u00a0min 1\u00a0s",
        "1\u00a0h 2\u00a0min",
    ]

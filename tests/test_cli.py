"""The command line: what each command prints, writes and returns."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge.cli import main
from automerge.documents import Document
from automerge.errors import MissingExtraError
from automerge.merging.recipe import Recipe
from automerge.spec import json_schema, load_spec
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.trigger.registry import copy_database

AUTOMERGE = Path(sys.executable).with_name("automerge")
HEAVY = (
    "torch",
    "kfp",
    "hera",
    "smac",
    "mlflow",
    "transformers",
    "numpy",
    "boto3",
    "matplotlib",
    "sklearn",
    "ConfigSpace",
)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Automerge = Callable[..., Ended]


@pytest.fixture
def automerge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, logs_as_before: None
) -> Automerge:
    """Runs the console script's function in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["automerge", *arguments])
        capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        seen = capsys.readouterr()
        return Ended(code or 0, seen.out, seen.err)

    return run


@pytest.fixture
def spec(pair: TinyPair, empty_database: Path, tmp_path: Path) -> Path:
    """A short job on the tiny pair, as a file."""
    path = tmp_path / "spec.json"
    spec = tiny_spec(
        str(pair.folder),
        f"sqlite:///{copy_database(empty_database, tmp_path)}",
        search={"trials": 3, "initial": 2, "split": None, "refine": None},
        evaluation={"resamples": 100, "onnx": False, "baselines": False},
    )
    path.write_text(spec.model_dump_json())
    return path


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what answers at once


@pytest.mark.parametrize("code", ["import automerge", "import automerge.cli", "import automerge.spec"])
def test_an_import_loads_nothing_heavy(code: str) -> None:
    check = f"{code}; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("run", "--help"), ("init", "fresh.yaml"), ("schema",)]
)
def test_the_console_script_answers_without_loading_anything_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", AUTOMERGE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert ended.stdout
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "automerge.cli" in loaded
    assert not loaded & set(HEAVY)


def test_help_names_every_command(automerge: Automerge) -> None:
    ended = automerge("--help")
    assert ended.code == 0
    commands = re.findall(r"^  ([a-z-]+)  ", ended.out.partition("Commands:")[2], flags=re.MULTILINE)
    stages = ["resolve", "fetch", "segment", "search", "merge", "evaluate", "register", "run"]
    cluster = ["compile", "deploy", "submit", "report-status", "serve"]
    assert commands == sorted(["init", "validate", "schema", "apply", *stages, *cluster])
    for command in commands:
        assert automerge(command, "-h").code == 0


def test_without_a_command_it_shows_its_help(automerge: Automerge) -> None:
    ended = automerge()
    assert ended.code == 2
    assert "Commands:" in ended.err


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = f"{AUTOMERGE} schema | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.stdout == "{\n"
    assert ended.stderr == ""


# --- init, validate, schema


def test_init_writes_a_spec_that_validates(automerge: Automerge, tmp_path: Path) -> None:
    ended = automerge("init")
    assert (ended.code, ended.out) == (0, "wrote automerge.yaml; edit it, then: automerge validate automerge.yaml\n")
    assert load_spec(tmp_path / "automerge.yaml").name == "my-merge"
    assert automerge("validate", "automerge.yaml").out == "automerge.yaml: valid (2 sources, 2 tasks)\n"
    assert len([line for line in (tmp_path / "automerge.yaml").read_text().splitlines() if "#" in line]) > 20


def test_init_never_overwrites(automerge: Automerge, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    ended = automerge("init", "mine.yaml")
    assert (ended.code, ended.err) == (2, "error: mine.yaml: exists already; name another file\n")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("arguments", [("init", "file/spec.yaml"), ("schema", "--all", "file/schemas")])
def test_a_place_that_cannot_be_written(automerge: Automerge, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    ended = automerge(*arguments)
    assert ended.code == 2
    assert re.fullmatch(r"error: file\S*: \w.*; check the path, its permissions and the free space\n", ended.err)


def test_validate_names_each_problem_on_a_line(automerge: Automerge, spec: Path) -> None:
    rewrite(spec, colour="red", search={"trials": 0})
    ended = automerge("validate", "spec.json")
    assert ended.code == 2
    first, second = ended.err.splitlines()
    assert first == "error: spec.json: search.trials: input should be greater than or equal to 1, got 0"
    assert second.startswith("error: spec.json: colour: unknown key; choose one of: name, model, base, sources, ")


def test_validate_gives_notice_of_techniques_that_leave(automerge: Automerge, spec: Path) -> None:
    rewrite(spec, base=None)
    ended = automerge("validate", "spec.json")
    assert ended.code == 0
    assert ended.err == (
        "notice: without a base these techniques are left out: task_arithmetic, ties, dare_linear, dare_ties\n"
    )
    assert ended.out == "spec.json: valid (2 sources, 2 tasks)\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"search": {"techniques": ["lineer"]}},
            "search.techniques.0: unknown technique 'lineer'; did you mean 'linear'?",
        ),
        ({"registry": {"kind": "mlflo"}}, "registry.kind: unknown registry kind 'mlflo'; did you mean 'mlflow'?"),
        (
            {"model": {"kind": "factry", "target": "a:b"}},
            "model.kind: unknown model kind 'factry'; did you mean 'factory'?",
        ),
    ],
)
def test_validate_knows_the_plug_ins(automerge: Automerge, spec: Path, changes: dict[str, Any], sentence: str) -> None:
    rewrite(spec, **changes)
    assert automerge("validate", "spec.json").err == f"error: {sentence}\n"


def test_schema_prints_the_specs_or_writes_all(automerge: Automerge, tmp_path: Path) -> None:
    assert json.loads(automerge("schema").out) == json_schema()
    written = automerge("schema", "--all", "schemas").out.split()
    assert sorted(written) == sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "schemas").iterdir())
    assert "schemas/recipe.schema.json" in written


# --- for a cluster


def test_compile_writes_what_the_format_says(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "schedules.yaml").write_text("schedules: [{name: nightly, cron: 0 3 * * *, spec: spec.json}]")
    (tmp_path / "settings.yaml").write_text("name: merge")
    arguments = ("--settings", "settings.yaml", "--schedules", "schedules.yaml", "--timezone", "Europe/Berlin")
    ended = automerge("compile", "--format", "argo", "--namespace", "models", *arguments)
    assert (ended.code, ended.out) == (0, "wrote merge.yaml\n")
    template, cron = yaml.safe_load_all((tmp_path / "merge.yaml").read_text())
    assert (template["kind"], template["metadata"]["name"]) == ("WorkflowTemplate", "merge")
    assert (cron["kind"], cron["metadata"]["name"]) == ("CronWorkflow", "nightly")
    assert cron["spec"]["timezone"] == "Europe/Berlin"
    assert cron["metadata"]["namespace"] == template["metadata"]["namespace"] == "models"
    refused = automerge("compile", *arguments)
    assert refused.code == 2
    assert refused.err.startswith("error: --schedules and --timezone need --format argo; `automerge deploy` makes ")


# --- the stages


def test_the_stages_one_by_one(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    fetched = automerge("fetch", "spec.json")
    assert fetched.code == 0, fetched.err
    names = [line.split()[0] for line in fetched.out.splitlines()]
    assert names == ["base", "left", "right", "left/validation", "left/test", "right/validation", "right/test"]

    segmented = automerge("segment", "spec.json")
    assert "2 blocks, granularity transition" in segmented.out
    for heading in ("block", "kind", "begins", "in", "out", "parameters", "share"):
        assert heading in segmented.out
    # 6 x 9 weights and 6 biases; 96 x 4 weights and 4 biases; of 448.
    rows = [line.replace("│", " ").split() for line in segmented.out.splitlines() if "%" in line]
    assert [(row[-2], row[-1]) for row in rows] == [("60", "13.4%"), ("388", "86.6%")]

    searched = automerge("search", "spec.json")
    assert re.fullmatch(
        r"best: trial \d of 3, objective 0\.\d{4}; recipe in runs/tiny/search/recipe\.json\n", searched.out
    )
    merged = automerge("merge", "spec.json")
    assert re.fullmatch(r"merged 448 parameters into runs/tiny/merge \(digest [0-9a-f]{16}\)\n", merged.out)

    evaluated = automerge("evaluate", "spec.json")
    assert evaluated.code == 0
    for word in (
        "merged",
        "base",
        "left",
        "right",
        "gate:   pass (no limits set)",
        "report: runs/tiny/evaluate/report.html",
    ):
        assert word in evaluated.out

    first = automerge("register", "spec.json")
    assert first.out.startswith("registered: tiny version 1 (")
    assert automerge("register", "spec.json").out.startswith("already registered: tiny version 1 (")
    assert sorted(path.name for path in (tmp_path / "runs" / "tiny").iterdir()) == [
        "evaluate", "fetch", "merge", "register", "search", "segment",
    ]  # fmt: skip


def test_another_granularity_is_only_printed(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    assert automerge("fetch", "spec.json", "-o", "out").code == 0
    printed = automerge("segment", "spec.json", "-o", "out", "--granularity", "whole")
    assert "1 block, granularity whole" in printed.out
    assert "only printed: the spec says 'transition'" in printed.err
    assert not (tmp_path / "out" / "segment").exists()
    assert automerge("segment", "spec.json", "-o", "out", "--granularity", "transition").code == 0
    assert (tmp_path / "out" / "segment" / "segmentation.json").is_file()
    refused = automerge("segment", "spec.json", "-o", "out", "--granularity", "blocks")
    assert refused.code == 2
    assert refused.err.startswith("error: invalid value for '--granularity': 'blocks' is not one of 'transition', ")


def test_run_is_all_of_them(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    ended = automerge("run", "spec.json", "--output", "out")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == "registered: tiny version 1"
    assert (tmp_path / "out" / "register" / "registration.json").is_file()
    again = automerge("run", "spec.json", "--output", "out")
    assert (again.code, again.err) == (
        2,
        "error: out: a run was begun here; pass --resume to go on, or another folder\n",
    )
    resumed = automerge("run", "spec.json", "--output", "out", "--resume")
    assert resumed.out.splitlines()[-1] == "already registered: tiny version 1"


def test_a_refused_model_ends_with_3(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    rewrite(spec, gate={"min_worst_pr": 1000})
    ended = automerge("run", "spec.json", "--output", "out")
    assert ended.code == 3
    assert "gate:   fail (task '" in ended.out
    assert "below the limit of 1000 %" in ended.out
    assert (tmp_path / "out" / "evaluate" / "report.html").is_file()
    assert not (tmp_path / "out" / "register").exists()
    assert automerge("evaluate", "spec.json", "--output", "out").code == 3
    register = automerge("register", "spec.json", "--output", "out")
    assert register.code == 2
    assert register.err.startswith("error: the quality gate refused this model: task '")
    assert register.err.endswith("; merge better sources, search longer, or lower the gate\n")


@pytest.mark.parametrize(("gate", "verdict"), [({}, "pass"), ({"min_worst_pr": 1000}, "fail")])
def test_a_verdict_in_a_file_is_no_failure(
    automerge: Automerge, spec: Path, tmp_path: Path, gate: dict[str, float], verdict: str
) -> None:
    rewrite(spec, gate=gate)
    for command in ("fetch", "segment", "search", "merge"):
        assert automerge(command, "spec.json").code == 0
    ended = automerge("evaluate", "spec.json", "--verdict", "made/verdict")
    assert ended.code == 0, ended.err
    assert f"gate:   {verdict} (" in ended.out
    assert (tmp_path / "made" / "verdict").read_text() == verdict


def test_the_inputs_one_by_one(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    resolved = automerge("resolve", "spec.json", "--names", "names.json")
    assert resolved.code == 0, resolved.err
    names = json.loads((tmp_path / "names.json").read_text())
    assert names == ["base", "left", "right", "left/validation", "left/test", "right/validation", "right/test"]
    assert [line.split()[0] for line in resolved.out.splitlines()] == names
    assert not (tmp_path / "runs").exists()
    for name in names:
        assert automerge("fetch", "spec.json", f"--input={name}").code == 0
    folder = tmp_path / "runs" / "tiny" / "fetch"
    assert not (folder / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(before) == len(names)
    assert automerge("fetch", "spec.json").code == 0
    assert (folder / "manifest.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before, "an input was fetched again"

    unknown = automerge("fetch", "spec.json", "--input=lefd")
    assert unknown.code == 2
    assert unknown.err.startswith("error: the spec has no input 'lefd'; did you mean 'left'?")


def test_a_point_of_the_front_is_merged(automerge: Automerge, spec: Path, tmp_path: Path) -> None:
    search = {**json.loads(spec.read_text())["search"], "trials": 8, "aggregate": "pareto"}
    rewrite(spec, search=search)
    for command in ("fetch", "segment", "search"):
        assert automerge(command, "spec.json").code == 0
    found = tmp_path / "runs" / "tiny" / "search"
    numbers = [point["number"] for point in json.loads((found / "front.json").read_text())["points"]]
    best = (found / "recipe.json").read_bytes()
    recipes = {number: (found / "front" / str(number) / "recipe.json").read_bytes() for number in numbers}
    other = next(number for number, content in recipes.items() if content != best)
    merged = automerge("merge", "spec.json", "--point", str(other))
    assert merged.code == 0, merged.err
    assert (found / "recipe.json").read_bytes() == recipes[other]
    written = json.loads((tmp_path / "runs" / "tiny" / "merge" / "merged.json").read_text())
    assert written["recipe"] == Recipe.read(found / "recipe.json").digest()
    assert automerge("evaluate", "spec.json").code == 0, "the stages after it take the point"

    stranger = next(number for number in range(8) if number not in numbers)
    refused = automerge("merge", "spec.json", "--point", str(stranger))
    points = ", ".join(map(str, numbers))
    assert (refused.code, refused.err.splitlines()[-1]) == (
        2,
        f"error: runs/tiny/search/front.json: trial {stranger} is no point of the front; choose one of {points}",
    )
    both = automerge("merge", "spec.json", "--point", str(other), "--recipe", "recipe.json")
    assert (both.code, both.err) == (
        2,
        "error: --recipe and --point exclude each other; see `automerge merge --help`\n",
    )


def test_without_a_front_there_is_no_point_to_merge(automerge: Automerge, spec: Path) -> None:
    refused = automerge("merge", "spec.json", "--point", "0")
    assert refused.code == 2
    assert refused.err == (
        "error: runs/tiny/search/front.json: no such file: the search was not for a Pareto front; set search.aggregate "
        "to 'pareto'\n"
    )


def test_ctrl_c_keeps_the_search(
    automerge: Automerge, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from automerge.searching.store import TrialStore

    append, events = TrialStore.append, []

    def interrupted(self: TrialStore, event: Any) -> None:
        append(self, event)
        events.append(event)
        if len(events) == 3:  # the second trial was asked for and is not told
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrialStore, "append", interrupted)
        ended = automerge("run", "spec.json", "--output", "out")
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "interrupted: nothing is lost; go on with --resume"
    assert automerge("run", "spec.json", "--output", "out", "--resume").code == 0
    lines = (tmp_path / "out" / "search" / "trials.jsonl").read_text().splitlines()
    told = [json.loads(line)["trial"]["number"] for line in lines if '"event":"tell"' in line]
    assert told == [0, 1, 2]


def test_json_logs_on_request(automerge: Automerge, spec: Path) -> None:
    ended = automerge("--log-format", "json", "fetch", "spec.json", "-o", "out")
    entries = [json.loads(line) for line in ended.err.splitlines()]
    assert entries[0]["message"].startswith("fetching base from ")


def test_a_defect_of_ours_keeps_its_traceback(
    automerge: Automerge, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Document, "write", broken)
    with pytest.raises(ZeroDivisionError):
        automerge("fetch", "spec.json", "-o", "out")


def test_a_missing_extra_is_an_instruction(automerge: Automerge, spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingExtraError("the search", "search")

    monkeypatch.setattr("automerge.stages.run.search", missing)
    ended = automerge("run", "spec.json", "-o", "out")
    assert (ended.code, ended.err.splitlines()[-1]) == (
        2,
        "error: the search needs an optional dependency; install this package with its extra [search]: "
        "automerge-models[search]",
    )


def test_yaml_specs_and_variables(
    automerge: Automerge, spec: Path, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = spec.read_text().replace(str(pair.folder), "${PAIR}")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(json.loads(text)))
    refused = automerge("validate", "spec.yaml")
    assert refused.code == 2
    assert refused.err.startswith("error: spec.yaml: base.uri: the environment variable PAIR is not set; ")
    monkeypatch.setenv("PAIR", str(pair.folder))
    assert automerge("fetch", "spec.yaml", "-o", "out").code == 0

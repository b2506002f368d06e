"""The spec: what it accepts, and the sentence for each thing that it does not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge.errors import SpecError
from automerge.spec import PAPER_TECHNIQUES, PRESETS, SearchSpec, Spec, json_schema, load_spec, parse_spec

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"kind": "factory", "target": "net:build"},
    "base": {"uri": "base.safetensors"},
    "sources": [{"name": "a", "uri": "a.safetensors"}, {"name": "b", "uri": "b.safetensors"}],
    "tasks": [
        {"name": "one", "kind": "classification", "specialist": "a", "validation": "v.npz", "test": "t.npz"},
        {"name": "two", "kind": "classification", "specialist": "b", "validation": "v2.npz", "test": "t2.npz"},
    ],
}
TEMPLATE = Path(__file__).parents[1] / "src" / "automerge" / "spec_template.yaml"


def with_value(path: str, value: Any) -> dict[str, Any]:
    """`SMALL` with another value at a dotted path; DELETE takes the key away."""
    spec = copy.deepcopy(SMALL)
    *parents, last = path.split(".")
    place: Any = spec
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    if value is DELETE:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return spec


DELETE = object()


def sentences(spec: dict[str, Any] | str, **environment: str) -> list[str]:
    """The sentences with which a spec is refused, without its name."""
    with pytest.raises(SpecError) as caught:
        parse_spec(spec if isinstance(spec, str) else json.dumps(spec), environment=environment)
    lines = str(caught.value).splitlines()
    assert all(line.startswith("spec: ") for line in lines)
    return [line.removeprefix("spec: ") for line in lines]


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SMALL))
    (tmp_path / "spec.json").write_text(json.dumps(SMALL))
    assert load_spec(tmp_path / "spec.yaml") == load_spec(tmp_path / "spec.json")
    assert load_spec(tmp_path / "spec.yaml").digest() == load_spec(tmp_path / "spec.json").digest()


def test_a_spec_survives_its_own_json() -> None:
    spec = parse_spec(json.dumps(SMALL))
    assert parse_spec(spec.model_dump_json()) == spec


def test_relative_paths_start_at_the_specs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    spec = {**SMALL, "model": {**SMALL["model"], "python_path": [".", "../lib", "/abs"]}}
    spec["sources"] = [{"name": "a", "uri": "s3://bucket/a/"}, {"name": "b", "uri": "file:///b"}]
    spec["registry"] = {"kind": "kubeflow", "uri": "http://registry", "artifacts": "merged"}
    (tmp_path / "project" / "spec.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.chdir(tmp_path)
    loaded = load_spec(Path("project/spec.yaml"))
    assert loaded.registry.artifacts == str(tmp_path / "project" / "merged")
    assert loaded.model.python_path == [str(tmp_path / "project"), str(tmp_path / "lib"), "/abs"]
    assert loaded.base is not None
    assert loaded.base.uri == str(tmp_path / "project" / "base.safetensors")
    assert [source.uri for source in loaded.sources] == ["s3://bucket/a/", "file:///b"]
    assert loaded.tasks[0].validation == str(tmp_path / "project" / "v.npz")


def test_without_a_folder_paths_stay() -> None:
    assert parse_spec(json.dumps(SMALL)).sources[0].uri == "a.safetensors"


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_gives_what_is_left_out(preset: str) -> None:
    search = parse_spec(json.dumps(with_value("search.preset", preset))).search
    assert SearchSpec.model_validate({"preset": preset, **PRESETS[preset]}) == search
    own = {"preset": preset, "epsilon": 0.5, "warm_start": not search.warm_start, "trials": 7}
    changed = parse_spec(json.dumps(with_value("search", own))).search
    assert changed == SearchSpec.model_validate({**search.model_dump(), **own})


def test_paper_is_the_published_protocol() -> None:
    search = SearchSpec.model_validate({"preset": "paper"})
    assert (search.trials, search.initial, search.objective, search.epsilon) == (200, 20, "loss_ratio", 0.0)
    assert (search.weights, search.weight_range, search.density_range) == ("simplex", [0.0, 1.0], [0.5, 1.0])
    assert (search.warm_start, search.fidelity, search.split, search.refine) == (False, None, None, None)
    assert tuple(search.techniques) == PAPER_TECHNIQUES


@pytest.mark.parametrize(("weights", "expected"), [("simplex", [0.0, 1.0]), ("independent", [-0.5, 1.5])])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_range_of_the_weights_goes_with_their_kind(preset: str, weights: str, expected: list[float]) -> None:
    assert SearchSpec.model_validate({"preset": preset, "weights": weights}).weight_range == expected


@pytest.mark.parametrize("slices", [[0.5], [0.5, 0.5, 1.0], [0.0, 1.0], [0.5, 0.25, 1.0]])
def test_slices_rise_to_the_whole(slices: list[float]) -> None:
    with pytest.raises(SpecError, match="the shares must rise from above 0 to 1"):
        parse_spec(json.dumps(with_value("search.fidelity", {"slices": slices})))


def test_the_registered_model_is_called_as_the_spec_unless_it_says_otherwise() -> None:
    assert parse_spec(json.dumps(SMALL)).registered_model == "small"
    assert parse_spec(json.dumps(with_value("registry.model", "other"))).registered_model == "other"


def test_a_guard_task_is_measured_against_the_base() -> None:
    guard = {"name": "kept", "kind": "classification", "guard": True, "validation": "v", "test": "t"}
    spec = parse_spec(json.dumps({**SMALL, "tasks": [*SMALL["tasks"], guard]}))
    assert [spec.reference_of(task) for task in spec.tasks] == ["a", "b", "base"]


# --- every sentence


NAME = "use up to 63 letters, digits, '_', '.' and '-', beginning with a letter or digit"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("name", DELETE, "name: this key is missing; add it"),
        ("sources.1.uri", DELETE, "sources.1.uri: this key is missing; add it"),
        ("sourcs", [], "sourcs: unknown key; did you mean 'sources'?"),
        ("tasks.0.specalist", "a", "tasks.0.specalist: unknown key; did you mean 'specialist'?"),
        ("search.early_stop", {"patience": 3, "improvement": 1}, "search.early_stop.improvement: unknown key; did you "
         "mean 'min_improvement'?"),
        ("model.example", {"x": {"shape": [1], "dtyp": "int64"}}, "model.example.x.dtyp: unknown key; did you mean "
         "'dtype'?"),
        ("compute.zzz", 1, "compute.zzz: unknown key; choose one of: device, threads, workers, scheduler"),
        ("search.preset", "papr", "search.preset: unknown value 'papr'; did you mean 'paper'?"),
        ("merge.dtype", "int8", "merge.dtype: unknown value 'int8'; choose one of: same, float32, float16, bfloat16"),
        ("search.trials", "many", "search.trials: input should be a valid integer, unable to parse string as an "
         "integer, got 'many'"),
        ("search.trials", 0, "search.trials: input should be greater than or equal to 1, got 0"),
        ("search.seed", None, "search.seed: input should be a valid integer, got null"),
        ("name", True, "name: input should be a valid string, got true"),
        ("name", "a b", f"name: 'a b' is not valid; {NAME}"),
        ("sources.0.name", "../a", f"sources.0.name: '../a' is not valid; {NAME}"),
        ("compute.device", "gpu", "compute.device: 'gpu' is not valid; use auto, cpu, cuda or cuda:N"),
        ("model", "net:build", "model: expected a mapping, got 'net:build'; its keys are kind, target, arguments, "
         "python_path, trust_remote_code, example"),
        ("sources", {"a": "b"}, 'sources: input should be a valid list, got {"a": "b"}'),
        ("sources", SMALL["sources"][:1], "sources: expected at least 2 entries, got 1"),
        ("search.techniques", [], "search.techniques: expected at least 1 entry, got 0"),
        ("search.weight_range", [0, 1, 2], "search.weight_range: expected at most 2 entries, got 3"),
        ("search.weight_range", [1, 0], "search: weight_range: the lowest value must be below the highest, got 1.0 and "
         "0.0"),
        ("search", {"weights": "simplex", "weight_range": [-1, 1]}, "search: weight_range: simplex weights lie between "
         "0 and 1, got [-1.0, 1.0]"),
        ("search.density_range", [0, 1], "search: density_range: a density lies above 0 and at most at 1, got "
         "[0.0, 1.0]"),
        ("search.techniques", ["ties", "ties"], "search: techniques: a technique is named twice"),
        ("tasks.0.specialist", DELETE, "tasks.0: a task needs exactly one reference: set 'specialist: <source name>' "
         "or 'guard: true'"),
        ("tasks.0.guard", True, "tasks.0: a task needs exactly one reference: set 'specialist: <source name>' or "
         "'guard: true'"),
        ("sources.1.name", "a", "sources: the name 'a' is used twice; give each its own"),
        ("tasks.1.name", "one", "tasks: the name 'one' is used twice; give each its own"),
        ("sources.1.name", "merged", "sources: 'merged' means another model in every table; call the source something "
         "else"),
    ],
)  # fmt: skip
def test_each_mistake_has_one_sentence_with_its_path(path: str, value: Any, sentence: str) -> None:
    assert sentences(with_value(path, value)) == [sentence]


def test_a_specialist_that_is_no_source_gets_the_nearest() -> None:
    spec = json.loads(json.dumps(SMALL).replace('"name": "a"', '"name": "animals"'))
    spec["tasks"][0]["specialist"] = "animal"
    assert sentences(spec) == ["tasks.0.specialist: no source is called 'animal'; did you mean 'animals'?"]


def test_a_guard_task_needs_a_base() -> None:
    spec = with_value("base", DELETE)
    spec["tasks"][0] |= {"guard": True, "specialist": None}
    assert sentences(spec) == ["tasks.0.guard: a guard task's reference is the base, and the spec names none"]


def test_all_problems_are_named_at_once() -> None:
    spec = with_value("search.trials", -1)
    spec["colour"] = "red"
    del spec["tasks"][1]["kind"]
    assert len(sentences(spec)) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the spec is empty or not a mapping; start from `automerge init`"),
        ("- a\n- b", "the spec is empty or not a mapping; start from `automerge init`"),
        ("a: [1, 2", "not valid YAML or JSON: line 1, column 9: expected ',' or ']', but got '<stream end>'; mend it "
         "there"),
        ("a: 1\nb: 2\na: 3", "not valid YAML or JSON: line 3, column 1: the key 'a' is written twice; mend it there"),
        ("m:\n  k: 1\n  'k': 3", "not valid YAML or JSON: line 3, column 3: the key 'k' is written twice; mend it "
         "there"),
        ("? [1, 2]\n: 3", "not valid YAML or JSON: line 1, column 3: a key is not a word; mend it there"),
        ('{"a": {"b": 1, "b": 2}}', "not valid YAML or JSON: the key 'b' is written twice; mend it there"),
        ('{"a": x}', "not valid YAML or JSON: line 1, column 7: expecting value; mend it there"),
        ("[" * 50_000, "not valid YAML or JSON: it is nested too deeply; mend it there"),
        ('{"a":' * 50_000, "not valid YAML or JSON: it is nested too deeply; mend it there"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_or_json(text: str, sentence: str) -> None:
    assert sentences(text) == [sentence]


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    text = f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']"
    assert "could not determine a constructor" in sentences(text)[0]
    assert not (tmp_path / "ran").exists()


def test_yamls_merge_keys_work() -> None:
    tasks = (
        "tasks:\n- &t {name: one, kind: classification, specialist: a, validation: v, test: t}\n- <<: *t\n  name: two\n"
    )
    head = yaml.safe_dump({key: value for key, value in SMALL.items() if key != "tasks"})
    spec = parse_spec(head + tasks)
    assert [(task.name, task.kind) for task in spec.tasks] == [("one", "classification"), ("two", "classification")]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\xff\x00\x80")
    for path, reason in ((tmp_path / "no", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(SpecError) as caught:
            load_spec(path)
        assert str(caught.value) == (
            f"{path}: cannot be read ({reason}); pass the path of a spec; `automerge init` writes one"
        )
    with pytest.raises(SpecError, match=r"cannot be read \(not a text file\)"):
        load_spec(tmp_path / "weights")


# --- the environment


def test_variables_are_replaced_in_every_string() -> None:
    spec = with_value("sources.0.uri", "s3://${BUCKET}/${RUN}/a")
    spec["model"]["arguments"] = {"deep": [{"x": "${RUN}"}], "number": 3}
    loaded = parse_spec(json.dumps(spec), environment={"BUCKET": "models", "RUN": "7"})
    assert loaded.sources[0].uri == "s3://models/7/a"
    assert loaded.model.arguments == {"deep": [{"x": "7"}], "number": 3}


def test_a_missing_variable_is_named_with_its_place() -> None:
    spec = with_value("sources.0.uri", "s3://${BUKET}/a")
    assert sentences(spec, BUCKET="models") == [
        "sources.0.uri: the environment variable BUKET is not set; did you mean ${BUCKET}?"
    ]
    assert sentences(spec, HOME="/") == [
        "sources.0.uri: the environment variable BUKET is not set; set it, e.g. `export BUKET=...`"
    ]


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "db_password", "MY_API_KEY", "PRIVATE_KEY"])
def test_secrets_are_refused_and_not_shown(name: str) -> None:
    spec = with_value("registry.uri", f"http://user:${{{name}}}@host")
    found = sentences(spec, **{name: "hunter2-hunter2"})
    assert found == [
        f"registry.uri: ${{{name}}} looks like a secret, and a spec is logged and registered; leave it in the "
        "environment: storage and registries read their credentials there"
    ]


# --- template and schema


def test_the_template_is_valid_and_names_every_part() -> None:
    spec = load_spec(TEMPLATE)
    assert set(yaml.safe_load(TEMPLATE.read_text())) | {"private"} == set(Spec.model_fields)
    # What it writes out are the defaults: a user who deletes a line changes nothing.
    for part in ("segmentation", "search", "merge", "evaluation", "registry", "gate", "compute"):
        assert getattr(spec, part) == type(getattr(spec, part))(), part


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Spec.model_fields)
    assert schema["required"] == ["name", "model", "sources", "tasks"]
    for model in (schema, *schema["$defs"].values()):
        assert model["additionalProperties"] is False
    text = json.dumps(schema)
    for key in ("specialist", "guard", "python_path", "min_worst_pr", "early_stop"):
        assert f'"{key}"' in text


def test_the_schema_takes_what_the_spec_takes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for spec in (SMALL, yaml.safe_load(TEMPLATE.read_text())):
        assert list(validator.iter_errors(spec)) == []
    for path, value in (("sourcs", []), ("name", DELETE), ("search.trials", "many"), ("compute.device", "gpu")):
        assert list(validator.iter_errors(with_value(path, value))) != []


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("registry.uri", "postgresql://bob:hunter2@database/mlflow"),
        ("base.uri", "s3://KEY:hunter2@bucket/base.safetensors"),
        ("sources.0.uri", "https://bucket/low.safetensors?X-Amz-Signature=hunter2"),
        ("tasks.0.test", "s3://hunter2@bucket/test.safetensors"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_shown(path: str, uri: str) -> None:
    (sentence,) = sentences(with_value(path, uri))
    assert sentence.startswith(f"{path}: this URI carries credentials, and a spec is logged and registered; ")
    assert "hunter2" not in sentence


def test_a_key_with_an_at_sign_is_no_credential() -> None:
    spec = parse_spec(json.dumps(with_value("base.uri", "s3://bucket/team@home/base.safetensors")))
    assert spec.base is not None and spec.base.uri.endswith("team@home/base.safetensors")

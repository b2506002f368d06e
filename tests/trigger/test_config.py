"""trigger.yaml: what is refused, and in which words."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge.errors import SpecError
from automerge.trigger.config import KfpRunner, LocalRunner, load_config

Change = Callable[[dict[str, Any]], object]


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "trigger.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_relative_paths_start_at_the_file(tmp_path: Path, config: dict[str, Any]) -> None:
    loaded = load_config(written(tmp_path, config))
    assert loaded.state == tmp_path / "trigger.sqlite"
    assert isinstance(loaded.runner, LocalRunner)
    assert loaded.runner.folder == tmp_path / "runs"


def test_a_template_may_lie_in_a_file(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(config["rules"][0]["spec"]))
    direct = load_config(written(tmp_path, config))
    config["rules"][0]["spec"] = "spec.yaml"
    assert load_config(written(tmp_path, config)) == direct


def test_the_charts_json_is_read_too(tmp_path: Path, config: dict[str, Any]) -> None:
    config["runner"] = {"kind": "kfp", "endpoint": "http://ml-pipeline.kubeflow:8888", "namespace": None}
    path = tmp_path / "trigger.yaml"
    path.write_text(json.dumps(config, indent=2))
    runner = load_config(path).runner
    assert isinstance(runner, KfpRunner)
    assert (runner.pipeline, runner.experiment) == ("automerge-merge", "automerge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("rules"), "rules: this key is missing; add it"),
        (lambda c: c.update(rules=[]), "rules: expected at least 1 entry, got 0"),
        (lambda c: c.update(stat="x"), "stat: unknown key; "),
        (lambda c: c["rules"][0].update(registry="mlflw"), "names the registry 'mlflw'; there are: mlflow"),
        (lambda c: c["rules"].append(copy.deepcopy(c["rules"][0])), "two rules are called 'digits'"),
        (lambda c: c["registries"].append(c["registries"][0]), "two registries are called 'mlflow'"),
        (lambda c: c["rules"][0].update(minimum=1), "rules.0.minimum: "),
        (lambda c: c["rules"][0].update(minimum=3, maximum=2), "maximum is smaller than minimum"),
        (lambda c: c["rules"][0].update(select={}), "give either an alias or tags"),
        (lambda c: c["rules"][0].update(select={"alias": "a", "tag": {"k": "v"}}), "give either an alias or tags"),
        (lambda c: c["rules"][0].update(select={"tag": {"k": "it's"}}), "use text without quotes and backslashes"),
        (lambda c: c["rules"][0].update(name="Über"), "use up to 63 small letters, digits and '-'"),
        (lambda c: c["rules"][0].update(spec="no.yaml"), "no.yaml: cannot be read (No such file or directory)"),
        (lambda c: c["registries"][0].update(uri="http://me:pw@x:1"), "holds a user name or password"),
        (lambda c: c["registries"][0].update(uri="mlflow:5000"), "write http://HOST:PORT"),
        (lambda c: c["registries"][0].update(kind="kubeflow", name="mlflow"), "has no aliases; select by a tag"),
        (lambda c: c.update(runner={"kind": "cloud"}), "runner: "),
        (lambda c: c.update(max_body_bytes=10), "max_body_bytes: "),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, config: dict[str, Any], change: Change, message: str) -> None:
    change(config)
    with pytest.raises(SpecError) as refused:
        load_config(written(tmp_path, config))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_password_shows_in_the_refusal(tmp_path: Path, config: dict[str, Any]) -> None:
    config["registries"][0]["uri"] = "http://me:hunter22@x:1"
    with pytest.raises(SpecError) as refused:
        load_config(written(tmp_path, config))
    assert "hunter22" not in str(refused.value)

"""What every component has in common: its files, its imports, its image, its README."""

import ast
import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components

from automerge_components.generate import NAMES, ROOT, compiled, main, readme


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"automerge_components.{name}"), name)


def test_every_folder_is_listed() -> None:
    assert {path.parent.name for path in ROOT.glob("*/component.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_the_official_layout(name: str) -> None:
    for file in ("__init__.py", "component.py", "metadata.yaml", "README.md", "OWNERS", "tests"):
        assert (ROOT / name / file).exists(), file
    metadata = yaml.safe_load((ROOT / name / "metadata.yaml").read_text())
    assert metadata["name"] == name
    assert metadata["stability"] in ("experimental", "alpha", "beta", "stable")


@pytest.mark.parametrize("name", NAMES)
def test_only_the_standard_library_and_kfp_are_imported_at_the_top(name: str) -> None:
    tree = ast.parse((ROOT / name / "component.py").read_text())
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported <= {"kfp", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_of_this_release_and_nothing_is_installed_in_the_pod(name: str) -> None:
    container = component(name).component_spec.implementation.container
    assert container.image == f"automerge:{version('automerge-models')}"
    assert "pip install" not in " ".join(str(part) for part in container.command)


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_is_the_only_parameter_that_a_user_gives(name: str) -> None:
    inputs = component(name).component_spec.inputs
    assert inputs["spec"].type == "String"
    others = {key for key, item in inputs.items() if key != "spec" and "system." not in item.type}
    assert others <= {"workspace", "version", "versions", "status"}


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_is_up_to_date_and_loads(name: str) -> None:
    path = ROOT / name / "component.yaml"
    assert path.read_text() == compiled(name), "run: make pipeline"
    loaded = components.load_component_from_file(str(path)).component_spec
    made = component(name).component_spec
    assert (loaded.name, set(loaded.inputs or {}), set(loaded.outputs or {})) == (
        made.name,
        set(made.inputs or {}),
        set(made.outputs or {}),
    )


def test_all_are_importable_from_the_package() -> None:
    package = importlib.import_module("automerge_components")
    assert sorted(package.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(package, name) is component(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_is_up_to_date(name: str) -> None:
    assert (ROOT / name / "README.md").read_text() == readme(name), "run: make pipeline"


def test_a_stale_readme_is_found_and_what_was_written_by_hand_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("automerge_components.generate.ROOT", tmp_path)
    for name in NAMES:
        (tmp_path / name).mkdir()
        for file in ("metadata.yaml", "OWNERS"):
            (tmp_path / name / file).write_text((ROOT / name / file).read_text())
    by_hand = "<!-- custom -->\n## Notes\n\nBy hand.\n"
    (tmp_path / "fetch" / "README.md").write_text(f"old\n\n{by_hand}")
    assert main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert main([]) == 0
    assert (tmp_path / "fetch" / "README.md").read_text() == f"{(ROOT / 'fetch' / 'README.md').read_text()}\n{by_hand}"
    assert main(["--check"]) == 0

"""What every component has in common: its files, its imports, its image, its README."""

import ast
import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge_components.generate import NAMES, ROOT, main, readme


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
def test_the_spec_is_the_only_parameter(name: str) -> None:
    inputs = component(name).component_spec.inputs
    assert inputs["spec"].type == "String"
    assert all("system." in item.type for key, item in inputs.items() if key != "spec")


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_is_up_to_date(name: str) -> None:
    assert (ROOT / name / "README.md").read_text() == readme(name), "run: python -m automerge_components.generate"


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

"""The component ``fetch_input``: one input on the volume, where ``fetch`` takes it up."""

from pathlib import Path
from typing import Any

import pytest

from automerge.stages.documents import Manifest
from automerge_components.fetch import fetch
from automerge_components.fetch_input import fetch_input
from automerge_components.resolve import resolve


def test_fetch_finds_all_there_and_its_artifact_is_the_manifest_alone(spec: str, artifact: Any, tmp_path: Path) -> None:
    versions = resolve.python_func(spec=spec)
    for version in versions:
        fetch_input.python_func(spec=spec, version=version, workspace=str(tmp_path))
    brought = {path: path.stat().st_mtime_ns for path in (tmp_path / "inputs").rglob("*.safetensors")}
    assert len(brought) == len(versions)
    inputs = artifact()
    fetch.python_func(spec=spec, inputs=inputs, versions=versions, workspace=str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in brought} == brought, "nothing was fetched again"
    assert [path.name for path in Path(inputs.path).iterdir()] == ["manifest.json"]
    manifest = Manifest.read(tmp_path / "inputs" / "manifest.json")
    assert Manifest.read(Path(inputs.path) / "manifest.json") == manifest
    assert inputs.metadata == manifest.digests()


def test_an_unknown_input_is_one_sentence(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fetch_input.python_func(spec=spec, version="lefd@0", workspace=str(tmp_path))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: the spec has no input 'lefd'; did you mean 'left'?"
    assert list(tmp_path.iterdir()) == []

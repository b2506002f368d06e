"""The component ``fetch``: what it writes, and how a user's error ends it."""

import json
from pathlib import Path
from typing import Any

import pytest

from automerge.stages.documents import Manifest
from automerge_components.fetch import fetch


def test_writes_the_manifest_and_every_file(fetched: dict[str, Any], tiny_folder: Path) -> None:
    folder = Path(fetched["inputs"].path)
    manifest = Manifest.read(folder / "manifest.json")
    assert len(manifest.inputs) == len(list(tiny_folder.iterdir()))
    for item in manifest.inputs:
        for file in item.files:
            assert (folder / file.path).read_bytes() == (tiny_folder / Path(file.path).name).read_bytes()


def test_digests_are_the_artifacts_metadata(fetched: dict[str, Any]) -> None:
    manifest = Manifest.read(Path(fetched["inputs"].path) / "manifest.json")
    assert fetched["inputs"].metadata == manifest.digests()


def test_a_users_error_is_one_sentence_and_an_exit_code(
    spec: str, artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {**json.loads(spec), "base": {"uri": str(tmp_path / "nowhere.safetensors")}}
    inputs = artifact()
    with pytest.raises(SystemExit) as ended:
        fetch.python_func(spec=json.dumps(missing), inputs=inputs)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere.safetensors" in last
    assert not (Path(inputs.path) / "manifest.json").exists()

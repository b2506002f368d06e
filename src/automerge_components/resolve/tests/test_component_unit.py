"""The component ``resolve``: the inputs and their versions, which change when an input does."""

import json
from pathlib import Path

import pytest

from automerge_components.resolve import resolve


def test_every_input_has_a_version_that_stays(spec: str) -> None:
    found = resolve.python_func(spec=spec)
    names = [item.rpartition("@")[0] for item in found]
    assert names == ["base", "left", "right", "left/validation", "left/test", "right/validation", "right/test"]
    assert resolve.python_func(spec=spec) == found


def test_a_replaced_input_has_another_version(spec: str, tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = spec.replace(str(tiny_folder), str(tmp_path))
    before = dict(item.split("@") for item in resolve.python_func(spec=moved))
    data = (tmp_path / "left.safetensors").read_bytes()
    (tmp_path / "left.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    after = dict(item.split("@") for item in resolve.python_func(spec=moved))
    assert {name for name in before if before[name] != after[name]} == {"left"}


def test_a_users_error_is_one_sentence_and_an_exit_code(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {**json.loads(spec), "base": {"uri": str(tmp_path / "nowhere.safetensors")}}
    with pytest.raises(SystemExit) as ended:
        resolve.python_func(spec=json.dumps(missing))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere.safetensors" in last

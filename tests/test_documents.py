"""Documents are read strictly and written whole."""

import json
import os
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.documents import Document, Model, digest_of, write_atomically
from automerge.errors import SpecError


class Part(Model):
    name: str


class Recipe(Document):
    """Stands for any document."""

    FORMAT: ClassVar[str] = "automerge/recipe"

    weight: float = 0.5
    parts: list[Part] = []  # noqa: RUF012 - pydantic copies it


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    document = Recipe(weight=0.1 + 0.2, parts=[Part(name="ü")])
    path = document.write(tmp_path / "deep" / "recipe.json")
    assert json.loads(path.read_text())["format"] == "automerge/recipe"
    assert json.loads(path.read_text())["version"] == 1
    assert Recipe.read(path) == document
    assert Recipe.read(path).digest() == document.digest()


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        Recipe.read(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_each_refusal_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(SpecError, match=r"r\.json: no such file; `automerge search` writes it$"):
        Recipe.read(path)
    with pytest.raises(SpecError, match=r"cannot be read \(Is a directory\); `automerge search` writes it$"):
        Recipe.read(tmp_path)
    pass_it, again = "pass what `automerge search` wrote", "have it written again by `automerge search`"
    assert refusal(path, b"[]") == f"not of the format automerge/recipe; {pass_it}"
    assert refusal(path, b"{}") == f"not of the format automerge/recipe; {pass_it}"
    assert refusal(path, b'{"format": "automerge/manifest"}') == (
        f"not of the format automerge/recipe, its format is automerge/manifest; {pass_it}"
    )
    assert refusal(path, b'{"format": "automerge/recipe", "version": 2}') == (
        "automerge/recipe version 2 is not readable by this release, which reads version 1; "
        "use the release that wrote it"
    )
    head = b'{"format": "automerge/recipe", "version": 1, '
    assert refusal(path, head + b'"wieght": 1}') == f"wieght: unknown key; {again}"
    assert refusal(path, head + b'"parts": [{"name": "a"}, {}]}') == f"parts.1.name: this key is missing; {again}"
    assert refusal(path, head).startswith("not valid JSON (")
    assert refusal(path, b"\xff\xfe").endswith(again)
    assert refusal(path, b"[" * 100_000).startswith("not valid JSON (")


def test_a_document_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().weight = 1.0  # type: ignore[misc]


@given(JSON)
def test_the_digest_is_of_the_content_and_not_its_form(value: object) -> None:
    again = json.loads(json.dumps(value, indent=3, ensure_ascii=False))
    assert digest_of(value) == digest_of(again)
    if isinstance(value, dict):
        assert digest_of(dict(reversed(value.items()))) == digest_of(value)


def test_different_content_has_another_digest() -> None:
    assert Recipe(weight=0.5).digest() != Recipe(weight=0.5000001).digest()
    assert digest_of({"a": 1}) != digest_of({"a": "1"})


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    contents = [b"a" * 300_000, b"b" * 200_000]
    write_atomically(path, contents[0])
    writer = threading.Thread(target=lambda: [write_atomically(path, contents[turn % 2]) for turn in range(50)])
    writer.start()
    seen = {path.read_bytes() for _ in range(200)}
    writer.join()
    assert seen <= set(contents)
    assert path.stat().st_mode & 0o777 == 0o644

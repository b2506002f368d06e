"""Concepts, matching and caching of the emoji example, on small archives made here: nothing is downloaded."""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from automerge.errors import StorageError
from emoji import drawings as emoji_drawings
from emoji.drawings import (
    INDEX,
    PIXELS,
    VENDORS,
    VERSIONS,
    Concept,
    Index,
    fetch_packages,
    load_drawings,
    match,
    read_concepts,
    simplified,
    to_svg,
)

EMOJI = [
    {"label": "cat face", "hexcode": "1F431", "group": 3, "subgroup": 34},
    {"label": "piñata", "hexcode": "1FA85", "group": 6, "subgroup": 60},
    {"label": "umbrella", "hexcode": "2602", "group": 5, "subgroup": 59},
    {"label": "red heart", "hexcode": "2764", "group": 0, "subgroup": 14},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
GROUPS = {
    "groups": {"0": "smileys-emotion", "3": "animals-nature", "5": "travel-places", "6": "activities"},
    "subgroups": {"14": "heart", "34": "animal-mammal", "59": "sky-weather", "60": "event"},
}
NAMES = {"1F431": "CAT FACE", "2602-FE0F": "OPEN UMBRELLA", "2764": "HEAVY BLACK HEART"}
SQUARE = '<path fill="#f00" d="M0 0h8v8H0z"/>'


def archive(path: Path, files: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as package:
        for name, value in files.items():
            content = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            package.addfile(entry, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Archives in which every icon set draws one red cat of 8x8 in its middle, and one thing that is no concept."""
    for name, version in VERSIONS.items():
        path = tmp_path / "packages" / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
        icons = {"cat-face": {"body": SQUARE, "left": -4, "top": -4}, "blob": {"body": SQUARE}}
        files = {"icons.json": {"icons": icons, "width": 16, "height": 16}}
        if name == "emojibase-data":
            files = {"en/data.json": EMOJI, "meta/groups.json": GROUPS, "meta/unicode-names.json": NAMES}  # type: ignore[dict-item]
        archive(path, files)
    return tmp_path


def test_concepts_are_things_by_their_label_and_by_unicodes_name() -> None:
    umbrella = Concept("umbrella", "sky-weather")
    assert read_concepts(EMOJI, GROUPS, NAMES) == {
        "catface": Concept("cat face", "animal-mammal"),
        "pinata": Concept("piñata", "event"),
        "umbrella": umbrella,
        "openumbrella": umbrella,
    }


def test_a_label_goes_before_another_concepts_older_name() -> None:
    assert read_concepts(EMOJI, GROUPS, {"2602": "CAT FACE"})["catface"].name == "cat face"


@pytest.mark.parametrize("name", ["Cocktail-Glass", "cocktail glass", "cocktailglass", "cocktail\u2019glass"])
def test_icon_sets_spell_a_name_in_their_own_way(name: str) -> None:
    assert simplified(name) == "cocktailglass"


def test_a_concept_is_drawn_once_by_a_set() -> None:
    concepts = read_concepts(EMOJI, GROUPS, NAMES)
    found = match({"umbrella": {}, "heart": {}, "open-umbrella": {}}, concepts)
    assert found == {Concept("umbrella", "sky-weather"): "umbrella"}


def test_an_icons_own_size_goes_before_the_sets() -> None:
    icons = {"icons": {"a": {"body": SQUARE, "width": 20}}, "width": 10, "height": 12}
    assert 'viewBox="0 0 20 12" width="20" height="12"' in to_svg(icons, "a")
    assert 'viewBox="0 0 16 16"' in to_svg({"icons": {"a": {"body": SQUARE}}}, "a")


def test_all_vendors_sets_are_rendered_on_white(folder: Path) -> None:
    pytest.importorskip("resvg_py")
    found = load_drawings(folder)
    assert [(drawing.concept, drawing.subgroup) for drawing in found.drawings] == [("cat face", "animal-mammal")] * 8
    assert {(drawing.vendor, drawing.icon_set) for drawing in found.drawings} == {
        (vendor, icon_set) for vendor, icon_sets in VENDORS.items() for icon_set in icon_sets
    }
    expected = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    expected[1:, 8:24, 8:24] = 0
    assert found.pixels.dtype == torch.uint8
    assert all(torch.equal(image, expected) for image in found.pixels)


def test_a_drawing_that_is_not_square_stands_in_the_middle() -> None:
    pytest.importorskip("resvg_py")
    image = emoji_drawings.render(to_svg({"icons": {"a": {"body": SQUARE, "width": 8, "height": 4}}}, "a"))
    assert image.shape == (3, 32, 32)
    assert torch.equal((image[1] == 0).any(dim=1).nonzero().flatten(), torch.arange(8, 24))


@pytest.fixture
def rendered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder after one call of ``load_drawings``; what is fetched or rendered from here on fails the test."""
    pytest.importorskip("resvg_py")
    load_drawings(folder)
    for archived in (folder / "packages").iterdir():
        archived.unlink()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    return folder


def test_a_second_call_fetches_and_renders_nothing(rendered: Path) -> None:
    found = load_drawings(rendered)
    assert torch.equal(found.pixels, load_file(rendered / PIXELS)["pixels"])
    assert found.digest == Index.read(rendered / INDEX).digest()


@pytest.mark.parametrize("damage", ["pixels", "index", "no pixels", "other packages"])
def test_what_is_damaged_or_of_other_packages_is_made_anew(
    rendered: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    if damage == "pixels":
        content = (rendered / PIXELS).read_bytes()
        (rendered / PIXELS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "index":
        (rendered / INDEX).write_text("{")
    elif damage == "no pixels":
        (rendered / PIXELS).unlink()
    else:
        monkeypatch.setitem(VERSIONS, "emojibase-data", "1.0.0")
    with pytest.raises(pytest.fail.Exception, match="fetched again"):
        load_drawings(rendered)


def test_only_what_is_missing_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def npm(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        assert command[-1] == f"@iconify-json/noto@{VERSIONS['@iconify-json/noto']}"
        assert command[-2] != "--pack-destination"
        destination = Path(command[command.index("--pack-destination") + 1])
        (destination / f"iconify-json-noto-{VERSIONS['@iconify-json/noto']}.tgz").write_bytes(b"fetched")
        return subprocess.CompletedProcess(command, 0, "", "")

    missing = folder / "packages" / f"iconify-json-noto-{VERSIONS['@iconify-json/noto']}.tgz"
    missing.unlink()
    monkeypatch.setattr(subprocess, "run", npm)
    assert fetch_packages(folder / "packages")["@iconify-json/noto"] == missing
    assert missing.read_bytes() == b"fetched"
    assert len(list((folder / "packages").iterdir())) == len(VERSIONS)


def test_without_npm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match=r"there is no npm; install Node\.js"):
        load_drawings(tmp_path)


def test_npms_own_reason_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    with pytest.raises(StorageError, match=r"cannot fetch .*ENOTFOUND"):
        load_drawings(tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_damaged_archive_is_named(folder: Path) -> None:
    damaged = folder / "packages" / f"emojibase-data-{VERSIONS['emojibase-data']}.tgz"
    damaged.write_bytes(b"not an archive")
    with pytest.raises(StorageError, match=r"emojibase-data.*delete the archive"):
        load_drawings(folder)

"""Emoji of several vendors as 32x32 images, with the Unicode concept and subgroup of each.

The drawings are real and freely licensed vector graphics out of the packages ``@iconify-json/...`` of the npm registry;
``emojibase-data`` tells the Unicode name, group and subgroup of every concept. Both are fetched once, by ``npm pack``,
in the versions named here; nothing of them is part of this repository. ``resvg`` renders without the fonts of the
machine, so the pixels are the same everywhere.
"""

import hashlib
import importlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from automerge.documents import Document, Model, write_atomically
from automerge.errors import SpecError, StorageError
from emoji.resnet import SIDE

VENDORS = {
    "google": ("noto", "noto-v1"),  # Apache-2.0
    "mozilla": ("fxemoji",),  # Apache-2.0
    "microsoft": ("fluent-emoji-flat",),  # MIT
    "twitter": ("twemoji",),  # CC-BY-4.0
    "emojione": ("emojione", "emojione-v1"),  # CC-BY-4.0, CC-BY-SA-4.0
    "openmoji": ("openmoji",),  # CC-BY-SA-4.0
}
"""The icon sets of every vendor. Sets of one vendor are relatives: a later one often redraws an earlier one."""

VERSIONS = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/emojione-v1": "1.2.3",
    "@iconify-json/openmoji": "1.2.29",
    "emojibase-data": "17.0.0",
}

GROUPS = frozenset({"animals-nature", "food-drink", "travel-places", "activities", "objects"})
"""The Unicode groups that are read: things, not people, symbols or flags."""

INDEX = "drawings.json"
PIXELS = "pixels.safetensors"


class Drawing(Model):
    """One picture: the vendor who drew it, its icon set, and the Unicode name and subgroup of what it shows."""

    concept: str
    subgroup: str
    vendor: str
    icon_set: str


class Index(Document):
    """``drawings.json``: the drawings in the order of their pixels, and what they were made of.

    ``pixels`` is the sha256 of the file of pixels.
    """

    FORMAT: ClassVar[str] = "automerge.example.emoji.drawings"

    packages: dict[str, str]
    renderer: str
    side: int
    pixels: str
    drawings: list[Drawing]


@dataclass(frozen=True)
class Drawings:
    """All drawings.

    Attributes:
        pixels: uint8 [n, 3, 32, 32], red, green, blue, on white.
        drawings: what each row shows.
        digest: sha256 (hex) of pixels and descriptions.
    """

    pixels: Tensor
    drawings: list[Drawing]
    digest: str


@dataclass(frozen=True)
class Concept:
    """What Unicode says of one emoji: its name in English and its subgroup, such as ``animal-bird``."""

    name: str
    subgroup: str


def load_drawings(folder: Path) -> Drawings:
    """The drawings in ``folder``; where there are none of these packages yet, they are fetched and rendered.

    Processes may share the folder, even at the first call: every file is replaced as a whole, by equal content.

    Raises:
        StorageError: npm is missing or cannot fetch the packages.
        SpecError: the renderer is not installed.
    """
    found = _read(folder)
    if found is not None:
        return found
    sources = fetch_packages(folder / "packages")
    drawings, pixels = render_all(sources)
    content = save({"pixels": pixels})
    write_atomically(folder / PIXELS, content)
    index = Index(
        packages=VERSIONS,
        renderer=_renderer().__version__,
        side=SIDE,
        pixels=hashlib.sha256(content).hexdigest(),
        drawings=drawings,
    )
    index.write(folder / INDEX)
    return Drawings(pixels, drawings, index.digest())


def _read(folder: Path) -> Drawings | None:
    """What an earlier call left, or None where it is missing, damaged, or of other packages."""
    if not (folder / INDEX).is_file() or not (folder / PIXELS).is_file():
        return None
    try:
        index = Index.read(folder / INDEX)
        content = (folder / PIXELS).read_bytes()
        if index.packages != VERSIONS or index.side != SIDE or hashlib.sha256(content).hexdigest() != index.pixels:
            return None
        return Drawings(load_file(folder / PIXELS)["pixels"], index.drawings, index.digest())
    except (SpecError, SafetensorError):
        return None


def fetch_packages(folder: Path) -> dict[str, Path]:
    """The archive of every package in ``VERSIONS`` by its name, fetched by ``npm pack`` where it is not in ``folder``.

    Raises:
        StorageError: npm is missing or fails.
    """
    archives = {name: folder / f"{name.removeprefix('@').replace('/', '-')}-{VERSIONS[name]}.tgz" for name in VERSIONS}
    missing = [name for name, archive in archives.items() if not archive.is_file()]
    if not missing:
        return archives
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        wanted = [f"{name}@{VERSIONS[name]}" for name in missing]
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", fresh, *wanted]
        remedy = "install Node.js with npm and let it reach its registry, or copy the archives into that folder"
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise StorageError(f"{folder}: the drawings are npm packages and there is no npm", remedy) from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise StorageError(f"{folder}: npm cannot fetch {', '.join(wanted)} ({reason})", remedy)
        for name in missing:
            (Path(fresh) / archives[name].name).replace(archives[name])
    return archives


def render_all(archives: Mapping[str, Path]) -> tuple[list[Drawing], Tensor]:
    """Every drawing of a concept of ``GROUPS``, ordered by concept and icon set, and pixels uint8 [n, 3, 32, 32]."""
    data = archives["emojibase-data"]
    concepts = read_concepts(
        _member(data, "en/data.json"), _member(data, "meta/groups.json"), _member(data, "meta/unicode-names.json")
    )
    found: list[tuple[Drawing, str]] = []
    for vendor, icon_sets in VENDORS.items():
        for icon_set in icon_sets:
            icons = _member(archives[f"@iconify-json/{icon_set}"], "icons.json")
            for concept, icon in match(icons["icons"], concepts).items():
                drawing = Drawing(concept=concept.name, subgroup=concept.subgroup, vendor=vendor, icon_set=icon_set)
                found.append((drawing, to_svg(icons, icon)))
    found.sort(key=lambda pair: (pair[0].subgroup, pair[0].concept, pair[0].icon_set))
    return [drawing for drawing, _ in found], torch.stack([render(svg) for _, svg in found])


def _member(archive: Path, name: str) -> Any:
    """One JSON file of a package.

    Raises:
        StorageError: the archive is damaged or has no such file.
    """
    try:
        with tarfile.open(archive, "r:gz") as package:
            content = package.extractfile(f"package/{name}")
            return json.loads(content.read() if content else b"")
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise StorageError(
            f"{archive}: {name} cannot be read ({error})", "delete the archive and have it fetched again"
        ) from None


def read_concepts(
    emoji: list[dict[str, Any]], groups: dict[str, dict[str, Any]], names: Mapping[str, str]
) -> dict[str, Concept]:
    """The concepts of ``GROUPS`` by each of their names: emojibase's label and Unicode's own, as ``simplified``.

    Args:
        emoji: emojibase's ``data.json``: ``label``, ``hexcode``, ``group`` and ``subgroup`` (numbers) of every emoji.
        groups: emojibase's ``groups.json``: the names of groups and subgroups by number.
        names: Unicode's name by hexcode. They are the older ones, which older icon sets use.
    """
    concepts = {
        entry["hexcode"]: Concept(entry["label"], groups["subgroups"][str(entry["subgroup"])])
        for entry in emoji
        if groups["groups"].get(str(entry.get("group"))) in GROUPS
    }
    by_name: dict[str, Concept] = {}
    for concept in concepts.values():
        by_name.setdefault(simplified(concept.name), concept)
    for hexcode, concept in concepts.items():
        for code in (hexcode, f"{hexcode}-FE0F"):
            if code in names:
                by_name.setdefault(simplified(names[code]), concept)
    return by_name


def simplified(name: str) -> str:
    """Only a name's letters a-z and digits, without accents: icon sets differ in hyphens, marks and case."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub("[^a-z0-9]", "", plain)


def match(icons: Mapping[str, Any], concepts: Mapping[str, Concept]) -> dict[Concept, str]:
    """The name of the first icon that bears a name of each concept; concepts that were not drawn are left out."""
    found: dict[Concept, str] = {}
    for icon in icons:
        concept = concepts.get(simplified(icon))
        if concept is not None:
            found.setdefault(concept, icon)
    return found


def to_svg(icons: Mapping[str, Any], name: str) -> str:
    """An icon of an Iconify set as a whole SVG document; sizes are the icon's own, else the set's, else 16."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render(svg: str) -> Tensor:
    """An SVG document as uint8 [3, 32, 32] on white, as large as fits, in the middle.

    Raises:
        SpecError: the renderer is not installed.
    """
    from PIL import Image

    content = _renderer().svg_to_bytes(
        svg_string=svg, width=SIDE, height=SIDE, background="white", skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(content)).convert("RGB")
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _renderer() -> Any:
    try:
        return importlib.import_module("resvg_py")  # optional, so neither the types nor the tests ask for it
    except ImportError:
        raise SpecError("the emoji cannot be rendered without resvg", "pip install resvg-py pillow") from None

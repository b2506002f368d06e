"""The chart's README: its table of values comes from the comments in ``values.yaml``."""

import json
from pathlib import Path

import yaml

MARKER = "<!-- what follows is written by `make chart` from values.yaml -->"


def readme(chart: Path) -> str:
    """The README that the chart should have: what stands before the marker, and the values.

    Raises:
        ValueError: a value has no comment above it, or the README has no marker.
    """
    by_hand, marker, _ = (chart / "README.md").read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"{chart / 'README.md'}: the line {MARKER!r} is missing; add it")
    text = (chart / "values.yaml").read_text(encoding="utf-8")
    rows = _rows(yaml.compose(text), text.splitlines(), ())
    return "\n".join([by_hand + MARKER, "", "| Value | Default | |", "|---|---|---|", *rows, ""])


def _rows(mapping: yaml.Node | None, lines: list[str], path: tuple[str, ...]) -> list[str]:
    """A row for each value. A mapping with comments inside is described key by key, another one as a whole."""
    assert isinstance(mapping, yaml.MappingNode)  # noqa: S101 - narrows the type
    rows = []
    for key, value in mapping.value:
        here = (*path, key.value)
        comment = _comment(lines, key.start_mark.line)
        if not comment:
            raise ValueError(f"values.yaml: {'.'.join(here)} has no comment; write one above it")
        if isinstance(value, yaml.MappingNode) and _has_comments(value, lines, key.start_mark.line):
            rows.append(f"| **`{'.'.join(here)}`** | | {comment} |")
            rows += _rows(value, lines, here)
        else:
            default = json.dumps(yaml.safe_load(yaml.serialize(value))).replace("|", "\\|")
            rows.append(f"| `{'.'.join(here)}` | `{default}` | {comment.replace('|', chr(92) + '|')} |")
    return rows


def _has_comments(mapping: yaml.MappingNode, lines: list[str], above: int) -> bool:
    """Whether a key below the line has a comment of its own."""
    inside = [key.start_mark.line for key, _ in mapping.value]
    return any(line > above and _comment(lines, line) for line in inside)


def _comment(lines: list[str], line: int) -> str:
    """The comment that stands right above a line."""
    found: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().removeprefix("#").strip())
    return " ".join(found)

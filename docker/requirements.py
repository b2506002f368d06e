"""Prints what an image installs beside the package itself, one requirement a line, as pyproject.toml has it.

Runs in the image's build, with nothing but the standard library: ``python3 requirements.py automerge``.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = {"automerge": "all", "automerge-trigger": "trigger"}
RUNS_MODELS = {"torch", "safetensors", "numpy"}
"""Of the core's requirements, those that only merging and running models needs: the trigger goes without them."""


def requirements(image: str, project: dict[str, object]) -> list[str]:
    """The core's requirements and those of the image's extra, with the extras that it names in their place."""
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    core: list[str] = project["dependencies"]  # type: ignore[assignment]

    def expanded(extra: str) -> list[str]:
        lines: list[str] = []
        for line in extras[extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", line)
            lines += [part for name in own[1].split(",") for part in expanded(name)] if own else [line]
        return lines

    kept = [line for line in core if image == "automerge" or re.split(r"[^\w.-]", line)[0] not in RUNS_MODELS]
    return [*kept, *expanded(EXTRAS[image])]


if __name__ == "__main__":
    print(*requirements(sys.argv[1], tomllib.loads(Path("pyproject.toml").read_text())["project"]), sep="\n")

"""Writes each component's ``README.md`` from its docstring, its interface and its ``metadata.yaml``, and compiles it to
``component.yaml``.

What follows the line ``<!-- custom -->`` in a README is written by hand and kept.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from kfp import compiler

ROOT = Path(__file__).parent
NAMES = ("resolve", "fetch_input", "fetch", "segment", "search_merge", "evaluate", "register", "report_status")
CUSTOM = "<!-- custom -->"

_SINGLE_OUTPUT = "Output"
"""The name under which KFP files a plain return value."""


def readme(name: str) -> str:
    """The README that a component should have."""
    folder = ROOT / name
    component = getattr(importlib.import_module(f"automerge_components.{name}"), name)
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    owners = yaml.safe_load((folder / "OWNERS").read_text())
    docstring = docstring_parser.parse(component.python_func.__doc__)
    # KFP keeps the descriptions of inputs and named returns, but not those of output artifacts and of a plain return.
    descriptions = {item.arg_name: item.description for item in docstring.params}
    if docstring.returns is not None:
        descriptions[_SINGLE_OUTPUT] = docstring.returns.description
    interface = component.component_spec
    lines = [
        f"# {name}",
        "",
        str(docstring.short_description),
        "",
        *([str(docstring.long_description), ""] if docstring.long_description else []),
        *_table("Inputs", interface.inputs or {}, descriptions),
        *_table("Outputs", interface.outputs or {}, descriptions),
        "## Metadata",
        "",
        f"- Stability: {metadata['stability']}",
        *_dependencies(metadata["dependencies"]),
        f"- Tags: {', '.join(metadata['tags'])}",
        f"- Last verified: {metadata['lastVerified']:%Y-%m-%d}",
        f"- Approvers: {', '.join(owners['approvers'])}",
        f"- Reviewers: {', '.join(owners['reviewers'])}",
        "",
    ]
    return "\n".join(lines) + _custom(folder / "README.md")


def compiled(name: str) -> str:
    """The component as YAML, for pipelines that load it from a file."""
    component = getattr(importlib.import_module(f"automerge_components.{name}"), name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "component.yaml"
        compiler.Compiler().compile(component, str(path))
        return path.read_text(encoding="ascii")


def _table(title: str, items: dict[str, Any], descriptions: dict[str, str | None]) -> list[str]:
    rows = [f"## {title}", "", "| Name | Type | Description |", "|---|---|---|"]
    for item, spec in items.items():
        described = spec.description or descriptions.get(item)
        if not described:
            raise ValueError(f"{title.lower()}: {item} has no description in the docstring")
        rows.append(f"| `{item}` | `{_type(spec.type)}` | {' '.join(described.split())} |")
    return [*rows, ""]


def _type(name: str) -> str:
    """``system.Artifact@0.0.1`` is an ``Artifact``; parameters keep their names."""
    return name.removeprefix("system.").partition("@")[0]


def _dependencies(dependencies: dict[str, list[dict[str, str]]]) -> list[str]:
    kinds = {"kubeflow": "Kubeflow", "externalServices": "External services"}
    listed = {
        kind: ", ".join(f"{item['name']} {item['version']}" for item in items) for kind, items in dependencies.items()
    }
    return [f"- {kinds[kind]}: {text}" for kind, text in listed.items()]


def _custom(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    _, marker, custom = text.partition(CUSTOM)
    return f"\n{marker}{custom}" if marker else ""


def main(arguments: list[str] | None = None) -> int:
    """``python -m automerge_components.generate [--check]``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m automerge_components.generate",
        description="Write each component's README.md and component.yaml.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for name in NAMES:
        for path, wanted in (
            (ROOT / name / "README.md", readme(name)),
            (ROOT / name / "component.yaml", compiled(name)),
        ):
            if path.exists() and path.read_text() == wanted:
                continue
            stale += 1
            if check:
                print(f"{path}: out of date; run: python -m automerge_components.generate", file=sys.stderr)
            else:
                path.write_text(wanted)
                print(path)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())

"""JSON schemas of the spec and of every document, for those who read or write them without this package."""

import json
from pathlib import Path

from automerge.documents import write_atomically
from automerge.merging.recipe import Recipe
from automerge.preservation import Evaluation
from automerge.searching.store import Ask, Cut, Header, Tell
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import json_schema
from automerge.stages.documents import Front, Manifest, Merged, Registration


def all_schemas() -> dict[str, str]:
    """Text of each schema by file name."""
    schemas = {"spec.schema.json": json_schema()}
    for document in (Manifest, Segmentation, Recipe, Front, Merged, Evaluation, Registration):
        schemas[f"{document.FORMAT.removeprefix('automerge/')}.schema.json"] = document.model_json_schema()
    for line in (Header, Ask, Tell, Cut):
        schemas[f"trials.{line.__name__.lower()}.schema.json"] = line.model_json_schema()
    return {name: json.dumps(schema, indent=2) + "\n" for name, schema in schemas.items()}


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema into ``folder``; returns the files."""
    paths = []
    for name, text in all_schemas().items():
        write_atomically(folder / name, text.encode())
        paths.append(folder / name)
    return paths

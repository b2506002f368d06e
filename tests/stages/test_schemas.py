"""The committed JSON schemas are those of this code."""

from pathlib import Path

from automerge.stages.schemas import all_schemas

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"


def test_the_committed_schemas_are_up_to_date() -> None:
    committed = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert committed == all_schemas(), "run `automerge schema --all docs/schemas`"


def test_every_document_of_a_run_has_a_schema() -> None:
    documents = {"manifest", "segmentation", "recipe", "merged", "evaluation", "registration"}
    assert {f"{name}.schema.json" for name in documents} <= set(all_schemas())

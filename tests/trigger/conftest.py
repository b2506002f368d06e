"""What the tests of the trigger share."""

from pathlib import Path
from typing import Any

import pytest

from tests.trigger.registry import copy_database


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    """An MLflow database of the test's own, without models."""
    return copy_database(empty_database, tmp_path)


@pytest.fixture
def template() -> dict[str, Any]:
    """A spec template: one task for each candidate."""
    return {
        "name": "merged",
        "model": {"kind": "transformers", "target": "AutoModel"},
        "base": {"uri": "s3://models/$(group.base)"},
        "each": {
            "source": {"name": "$(candidate.name)", "uri": "$(candidate.uri)"},
            "tasks": [
                {
                    "name": "$(candidate.name)",
                    "kind": "classification",
                    "specialist": "$(candidate.name)",
                    "validation": "$(candidate.tags.validation)",
                    "test": "$(candidate.tags.test)",
                }
            ],
        },
    }


@pytest.fixture
def tags() -> dict[str, str]:
    """Of a candidate for that template."""
    return {"base": "base-1", "validation": "s3://data/validation", "test": "s3://data/test"}


@pytest.fixture
def config(database: Path, template: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose one rule is a dry run."""
    return {
        "state": "trigger.sqlite",
        "registries": [{"kind": "mlflow", "uri": f"sqlite:///{database}"}],
        "reconcile_seconds": 300,
        "runner": {"kind": "local", "folder": "runs"},
        "rules": [
            {
                "name": "digits",
                "registry": "mlflow",
                "models": ["digits-*"],
                "select": {"alias": "candidate"},
                "group_by": ["base"],
                "cooldown_seconds": 0,
                "dry_run": True,
                "spec": template,
            }
        ],
    }

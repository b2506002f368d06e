"""Registries to watch: MLflow on an SQLite file, with models whose versions are candidates."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_database(path: Path) -> Path:
    """An MLflow database with its tables, which takes seconds to make: copy it."""
    client(path).search_registered_models(max_results=1)
    return path


def client(path: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}")


def copy_database(template: Path, folder: Path) -> Path:
    return Path(shutil.copy(template, folder / "mlflow.db"))


def add_version(
    database: Path, model: str, tags: Mapping[str, str], *, alias: str | None = "candidate", source: str = "s3://m/x"
) -> str:
    """A version, and its model if it is the first; returns its number."""
    from mlflow.exceptions import MlflowException

    registry = client(database)
    try:
        registry.create_registered_model(model)
    except MlflowException as error:
        assert error.error_code == "RESOURCE_ALREADY_EXISTS"
    version = registry.create_model_version(model, source=source, tags=dict(tags))
    if alias is not None:
        registry.set_registered_model_alias(model, alias, version.version)
    return str(version.version)

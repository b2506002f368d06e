"""Every built-in registry keeps the contract."""

from pathlib import Path

import pytest

from automerge.registry.kubeflow import KubeflowRegistry
from automerge.registry.mlflow import MlflowRegistry
from automerge.spec import RegistrySpec
from automerge.testing.registries import check_registry
from tests.registry.kubeflow_server import running_model_registry
from tests.registry.mlflow_server import running_mlflow


def test_mlflow_on_sqlite(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    spec = RegistrySpec(uri=f"sqlite:///{tmp_path}/mlflow.db")
    check_registry(lambda: MlflowRegistry(spec), tmp_path / "files")


def test_kubeflow(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with running_model_registry() as server:
        spec = RegistrySpec(kind="kubeflow", uri=server.url, artifacts=str(tmp_path / "artifacts"))
        check_registry(lambda: KubeflowRegistry(spec), tmp_path / "files")


@pytest.mark.slow
def test_mlflow_on_a_server(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with running_mlflow(tmp_path) as url:
        check_registry(lambda: MlflowRegistry(RegistrySpec(uri=url)), tmp_path / "files")

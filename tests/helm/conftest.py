"""What the tests of the chart share."""

import pytest

from tests.helm.program import Helm, installed_helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm itself."""
    return installed_helm(tmp_path_factory.mktemp("helm"))

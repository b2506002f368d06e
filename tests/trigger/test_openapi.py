"""The service fuzzed from its own OpenAPI document: with the secrets, and without them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.trigger.registry import copy_database
from tests.trigger.service import ADMIN, SECRET, Service, running_service
from tests.trigger.test_service import TEMPLATE, configured

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
REFUSED = (400, 401, 404, 405, 413, 415, 422)
FUZZED = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def service(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzzed")
    with running_service(folder, configured(copy_database(empty_database, folder), TEMPLATE)) as running:
        yield running


@pytest.fixture(scope="module")
def document(service: Service) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def operation(document: Any, method: str, path: str) -> Any:
    found = [each.ok() for each in document.get_all_operations()]
    [operation] = [each for each in found if (each.method.upper(), each.path) == (method, path)]
    return operation


OPERATIONS = [
    ("POST", "/webhooks/mlflow"),
    ("POST", "/events"),
    ("GET", "/"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/runs/{name}/report"),
    ("POST", "/admin/reconcile"),
    ("POST", "/admin/runs/{name}/retry"),
]
KINDS = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


@pytest.mark.parametrize("kind", KINDS, ids=["valid", "invalid"])
@pytest.mark.parametrize(("method", "path"), [each for each in OPERATIONS if each[0] == "POST"])
def test_without_a_secret(document: Any, method: str, path: str, kind: GenerationMode) -> None:
    @FUZZED
    @given(operation(document, method, path).as_strategy(generation_mode=kind))
    def fuzz(case: Any) -> None:
        answer = case.call_and_validate(checks=CHECKS)
        assert answer.status_code in REFUSED, answer.text

    fuzz()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_with_the_secrets(document: Any, method: str, path: str) -> None:
    token = ADMIN if path.startswith("/admin/") else SECRET

    @FUZZED
    @given(operation(document, method, path).as_strategy(generation_mode=GenerationMode.POSITIVE))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {token}"})

    fuzz()


def test_it_is_all_there(document: Any, service: Service) -> None:
    found = [each.ok() for each in document.get_all_operations()]
    assert sorted((each.method.upper(), each.path) for each in found) == sorted(OPERATIONS)
    assert service.get("/healthz").status == 200

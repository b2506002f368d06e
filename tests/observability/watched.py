"""The trigger service, a Pushgateway and a Prometheus that watches both; runs push to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from automerge.spec import PromotionSpec, Spec
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.observability.expressions import RULES
from tests.observability.servers import Prometheus, running_gateway, running_prometheus
from tests.trigger.registry import make_database
from tests.trigger.service import Service, running_service


@dataclass(frozen=True)
class Watched:
    """What is watched, and the Prometheus that watches it."""

    prometheus: Prometheus
    service: Service
    spec: Spec
    folder: Path


@contextmanager
def watching(pair: TinyPair, folder: Path) -> Iterator[Watched]:
    """All of it, with the environment set so that runs of this process push there and are mirrored."""
    database = make_database(folder / "mlflow.db")
    plain = tiny_spec(str(pair.folder), f"sqlite:///{database}")
    registry = plain.registry.model_copy(update={"promote": PromotionSpec()})
    spec = plain.model_copy(update={"registry": registry})
    rule = {
        "name": "none",
        "registry": "mlflow",
        "models": ["none"],
        "select": {"alias": "candidate"},
        "spec": spec.model_dump(mode="json", exclude_defaults=True),
    }
    config = {
        "state": "trigger.sqlite",
        "registries": [{"kind": "mlflow", "uri": f"sqlite:///{database}"}],
        "reconcile_seconds": 1,
        "runner": {"kind": "local", "folder": "runs"},
        "rules": [rule],
    }
    with (
        running_gateway() as gateway,
        running_service(folder, config) as service,
        running_prometheus(
            folder, RULES, gateway=gateway, services={"trigger": service.url.removeprefix("http://")}
        ) as prometheus,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AUTOMERGE_PUSHGATEWAY", gateway)
        patch.setenv("AUTOMERGE_MIRROR", f"file://{folder / 'mirror'}")
        yield Watched(prometheus, service, spec, folder)

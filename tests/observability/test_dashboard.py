"""What dashboard and alerts see of a real run and the real trigger service, by a real Pushgateway and Prometheus.

Grafana itself is not run.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from automerge.errors import AutoMergeError
from automerge.stages.run import run
from automerge.stages.status import report_status
from tests.e2e.tiny import TinyPair
from tests.observability.expressions import queries
from tests.observability.watched import Watched, watching
from tests.trigger.service import alias_event

pytestmark = pytest.mark.system


def eventually(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run that went well."""
    with watching(pair, tmp_path_factory.mktemp("watched")) as found:
        outcome = run(found.spec, found.folder / "run")
        assert outcome.registration is not None
        assert report_status(found.spec, "SUCCEEDED")
        yield found


@pytest.mark.parametrize(("panel", "expression"), queries(), ids=[panel for panel, _ in queries()])
def test_every_query_of_the_dashboard_returns_data(watched: Watched, panel: str, expression: str) -> None:
    eventually(lambda: bool(watched.prometheus.values(expression)), f"{panel}: no data for {expression}")
    assert all(math.isfinite(value) for value in watched.prometheus.values(expression))


def test_what_it_shows_is_what_happened(watched: Watched) -> None:
    ask = watched.prometheus.values
    assert ask('automerge_run_last_success{pipeline="tiny", stage="run"}') == [1]
    assert ask("automerge_gate_passed") == [1]
    assert sum(ask("automerge_search_trials_total")) >= watched.spec.search.trials
    assert set(ask("automerge_stage_last_run_success")) == {1}
    assert ask("count(automerge_stage_last_run_success)") == [6]
    assert 0 < min(ask("automerge_preservation_rate_ratio")) < 2


def test_nothing_is_asked_that_is_not_there(watched: Watched) -> None:
    assert watched.prometheus.values("automerge_search_trials") == []


def test_alerts_begin_when_a_run_fails_and_end_with_the_next_success(watched: Watched, tmp_path: Path) -> None:
    """After the others: it changes what is watched."""
    assert watched.prometheus.firing() == set()
    missing = watched.spec.model_copy(
        update={
            "sources": [watched.spec.sources[0].model_copy(update={"uri": "/no/such/file"}), watched.spec.sources[1]]
        }
    )
    with pytest.raises(AutoMergeError):
        run(missing, tmp_path / "run")
    assert not report_status(missing, "FAILED")
    eventually(lambda: watched.prometheus.firing() == {"AutoMergeRunFailed"}, "the alert does not begin")
    assert watched.prometheus.values('automerge_stage_last_run_success{stage="fetch"}') == [0]
    report_status(watched.spec, "SUCCEEDED")
    eventually(lambda: watched.prometheus.firing() == set(), "the alert does not end")


def test_a_wrong_signature_is_seen(watched: Watched) -> None:
    answer = watched.service.deliver(alias_event("digits"), secret="another")
    assert answer.status == 401
    eventually(lambda: watched.prometheus.firing() == {"AutoMergeSignatureFailures"}, "the alert does not begin")

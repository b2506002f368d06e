"""The status page: one HTML document without scripts, forms or anything from elsewhere."""

import base64
import hashlib
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from automerge.errors import MissingExtraError
from automerge.telemetry.logs import redact
from automerge.trigger.config import KfpRunner, Secrets, TriggerConfig
from automerge.trigger.metrics import DOORS, TriggerMetrics
from automerge.trigger.registries import model_page
from automerge.trigger.runners import Runner
from automerge.trigger.state import State

_SHOWN = 50
_REFUSED = ("bad_signature", "stale", "malformed", "too_large")


class StatusPage:
    """The page, made anew for each look.

    Attributes:
        style: the digest of its style sheet, for the content security policy.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """

    def __init__(
        self, config: TriggerConfig, state: State, runner: Runner, metrics: TriggerMetrics, secrets: Secrets
    ) -> None:
        try:
            import jinja2
        except ModuleNotFoundError:
            raise MissingExtraError("the status page", "trigger") from None
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("automerge.trigger", "."),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"moment": _moment, "link": _link, "words": _words}
        environment.finalize = _shown
        self._template = environment.get_template("page.html.j2")
        self._config, self._state, self._runner = config, state, runner
        self._metrics, self._secrets = metrics, secrets
        self._css = files("automerge.trigger").joinpath("page.css").read_text()
        self.style = f"sha256-{base64.b64encode(hashlib.sha256(self._css.encode()).digest()).decode()}"

    def html(self) -> str:
        """The document."""
        reconciles = self._state.reconciles()
        return self._template.render(
            css=self._css,
            now=datetime.now(UTC).timestamp(),
            registries=[(each, reconciles.get(each.title)) for each in self._config.registries],
            rules=self._config.rules,
            runs=self._state.runs(_SHOWN),
            decisions=self._state.decisions(_SHOWN),
            deliveries=self._state.deliveries(_SHOWN),
            refused=self._refused(),
            doors_open=bool(self._secrets.webhook),
            has_admin=bool(self._secrets.admin),
            runner=self._config.runner,
            runner_place=self._config.runner.endpoint
            if isinstance(self._config.runner, KfpRunner)
            else self._config.runner.folder,
            page_of=self._page_of,
            has_report=lambda run: self._runner.report(run) is not None,
            shown=_SHOWN,
        )

    def _page_of(self, registry: str, model: str) -> str:
        found = next((each for each in self._config.registries if each.title == registry), None)
        return "" if found is None else model_page(found, model)

    def _refused(self) -> list[tuple[str, str, int]]:
        """Door, outcome and count of refused deliveries since the start of the service."""
        counts = [
            (
                door,
                outcome,
                int(
                    self._metrics.registry.get_sample_value(
                        "automerge_trigger_deliveries_total", {"door": door, "outcome": outcome}
                    )
                    or 0
                ),
            )
            for door in DOORS
            for outcome in _REFUSED
        ]
        return [each for each in counts if each[2]]


def _shown(value: Any) -> Any:
    """Whatever is written on the page is redacted first."""
    return redact(value) if type(value) is str else value


def _moment(value: float | None) -> str:
    return "never" if value is None else datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _words(value: str) -> str:
    return value.replace("_", " ")


def _link(value: str) -> str:
    """An address that may be a link; empty if it is none of the web."""
    return value if value.startswith(("http://", "https://")) else ""

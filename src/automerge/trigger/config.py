"""trigger.yaml: which registries are watched, which models become candidates, and what is run with them.

And the secrets, which are never in it but in the environment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from automerge.spec import Json
from automerge.written import WrittenModel, decode, read_text, validate

_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
_PLAIN = r"^[^'\"`\\]+$"
_PATTERNS = {
    _NAME: "up to 63 small letters, digits and '-', beginning and ending with a letter or digit",
    _PLAIN: "text without quotes and backslashes, which MLflow cannot search for",
}

ObjectName = Annotated[str, StringConstraints(pattern=_NAME)]
Plain = Annotated[str, StringConstraints(pattern=_PLAIN)]


def _server(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.username is not None:
        raise ValueError("the address holds a user name or password; leave them in the environment")
    if parts.scheme not in ("http", "https", "sqlite") or (parts.scheme != "sqlite" and not parts.hostname):
        raise ValueError("this is no address of a server; write http://HOST:PORT or https://HOST/PATH")
    return uri.rstrip("/")


ServerUri = Annotated[str, AfterValidator(_server)]


class WatchedRegistry(WrittenModel):
    """A registry whose versions are looked at."""

    kind: Literal["mlflow", "kubeflow"]
    uri: ServerUri = Field(description="Address, as the service reaches it.")
    name: ObjectName | None = Field(default=None, description="What rules call it; by default its kind.")
    ui: ServerUri | None = Field(default=None, description="Address for people, in links; by default the same.")

    @property
    def title(self) -> str:
        """What rules call it."""
        return self.name or self.kind


class KfpRunner(WrittenModel):
    """Runs are started on Kubeflow Pipelines."""

    kind: Literal["kfp"]
    endpoint: ServerUri
    namespace: str | None = None
    experiment: str = Field(default="automerge", min_length=1, description="Where the runs are grouped.")
    pipeline: str = Field(default="automerge-merge", min_length=1, description="Name of the deployed pipeline.")
    version: str | None = Field(default=None, description="Version of the pipeline; by default the newest.")
    parameters: dict[str, Json] = Field(default_factory=dict, description="Of the pipeline, e.g. memory: 32Gi.")
    service_account: str | None = Field(default=None, description="Of the pods; the server's default if left out.")


class LocalRunner(WrittenModel):
    """Runs are processes on this machine: `automerge run`."""

    kind: Literal["local"]
    folder: Path = Field(description="Each run has a folder of its own in it.")
    at_once: int = Field(default=1, ge=1, description="Most runs at the same time; the others wait.")


class Select(WrittenModel):
    """What makes a version a candidate: an alias, or a tag with this value."""

    alias: Plain | None = None
    tag: dict[Plain, Plain] | None = Field(default=None, min_length=1, description="All of these.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.alias is None) == (self.tag is None):
            raise ValueError("give either an alias or tags")
        return self


class Rule(WrittenModel):
    """When candidates become a run."""

    name: ObjectName
    registry: ObjectName = Field(description="Name of one of the registries.")
    models: list[str] = Field(min_length=1, description="Glob patterns of registered models.")
    select: Select
    versions: Literal["newest", "all"] = Field(
        default="newest", description="newest: of each registered model only its newest candidate; all: every one."
    )
    group_by: list[Plain] = Field(
        default_factory=list, description="Tags whose values candidates must share, e.g. base; of the version or model."
    )
    minimum: int = Field(default=2, ge=2, description="Candidates of a group that make a run.")
    maximum: int | None = Field(default=None, ge=2, description="Most candidates of a run: the newest.")
    spec: dict[str, Json] = Field(description="Spec template, or the path of one.")
    cooldown_seconds: float = Field(default=3600, ge=0, description="Between two runs of a group.")
    max_concurrent: int = Field(default=1, ge=1, description="Runs of this rule at the same time.")
    dry_run: bool = Field(default=False, description="Decide, and start nothing.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError("maximum is smaller than minimum")
        return self


class TriggerConfig(WrittenModel):
    """The whole file."""

    state: Path = Field(description="The SQLite file; on a disk of this machine, not on a network file system.")
    registries: list[WatchedRegistry] = Field(min_length=1)
    reconcile_seconds: float = Field(default=300, ge=1, description="Between two polls of a registry.")
    max_body_bytes: int = Field(default=1_000_000, ge=1_000, le=100_000_000, description="Largest delivery.")
    replay_seconds: float = Field(default=600, ge=1, description="How old a signed delivery may be.")
    runner: Annotated[KfpRunner | LocalRunner, Field(discriminator="kind")]
    rules: list[Rule] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, names in (
            ("registries", [registry.title for registry in self.registries]),
            ("rules", [rule.name for rule in self.rules]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two {what} are called {name!r}; give each a name of its own")
        for rule in self.rules:
            found = next((registry for registry in self.registries if registry.title == rule.registry), None)
            if found is None:
                there = ", ".join(registry.title for registry in self.registries)
                raise ValueError(f"rule {rule.name!r} names the registry {rule.registry!r}; there are: {there}")
            if found.kind == "kubeflow" and rule.select.alias is not None:
                raise ValueError(f"rule {rule.name!r}: Kubeflow Model Registry has no aliases; select by a tag")
        return self

    def rules_of(self, registry: WatchedRegistry) -> list[Rule]:
        """The rules that look at a registry."""
        return [rule for rule in self.rules if rule.registry == registry.title]


def load_config(path: Path) -> TriggerConfig:
    """Read trigger.yaml and the spec templates that it names; relative paths start at its folder.

    Raises:
        SpecError: a file cannot be read, is no YAML mapping, or breaks the schema; one sentence for each problem.
    """
    folder = path.resolve().parent
    value = decode(read_text(path, "pass the path of trigger.yaml"), str(path), "configuration", "see docs/trigger.md")
    rules = value.get("rules")
    if isinstance(rules, list):
        value["rules"] = [_with_template(rule, folder) for rule in rules]
    config = validate(value, TriggerConfig, str(path), _PATTERNS)
    return config.model_copy(
        update={
            "state": folder / config.state,
            "runner": config.runner.model_copy(update={"folder": folder / config.runner.folder})
            if isinstance(config.runner, LocalRunner)
            else config.runner,
        }
    )


def _with_template(rule: Any, folder: Path) -> Any:
    if not isinstance(rule, Mapping) or not isinstance(rule.get("spec"), str):
        return rule
    path = folder / rule["spec"]
    text = read_text(path, f"correct the spec of rule {rule.get('name')!r}")
    return {**rule, "spec": decode(text, str(path), "spec template", "see docs/trigger.md")}


@dataclass(frozen=True)
class Secrets:
    """What the environment holds.

    Attributes:
        webhook: any of them signs a delivery; none: the doors are closed.
        admin: the admin's token; empty: there is no admin.
    """

    webhook: Sequence[str]
    admin: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Secrets":
        """From ``AUTOMERGE_WEBHOOK_SECRET`` (several separated by commas) and ``AUTOMERGE_ADMIN_TOKEN``."""
        texts = environment.get("AUTOMERGE_WEBHOOK_SECRET", "").split(",")
        webhook = tuple(text.strip() for text in texts if text.strip())
        return cls(webhook, environment.get("AUTOMERGE_ADMIN_TOKEN", "").strip())

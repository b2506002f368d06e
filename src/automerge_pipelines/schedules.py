"""The schedules file: which specs are merged when, as recurring runs of the deployed pipeline."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from automerge.written import WrittenModel, decode, read_text, validate
from automerge_pipelines.cron import six_fields

_NAME = r"^[a-z0-9]([-a-z0-9]{0,48}[a-z0-9])?$"
_PATTERNS = {_NAME: "up to 50 small letters, digits and '-', beginning and ending with a letter or digit"}


class Schedule(WrittenModel):
    """A recurring run. Only one of its runs goes at a time, and what was missed is not caught up on."""

    name: Annotated[str, StringConstraints(pattern=_NAME)]
    cron: Annotated[str, AfterValidator(six_fields)] = Field(
        description="Five fields, or six with the second first; in the time zone of the server's scheduler, mostly UTC."
    )
    spec: Path = Field(description="The spec's file; a relative path starts at the schedules file.")
    parameters: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Of the pipeline, e.g. image, cpu, memory; the deployment settings by default.",
    )
    enabled: bool = True
    service_account: str | None = Field(default=None, description="Of the pods; the settings' if left out.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "spec" in self.parameters:
            raise ValueError("the parameter 'spec' is the content of the file that 'spec' names; leave it out")
        return self


class Schedules(WrittenModel):
    """The schedules file."""

    schedules: list[Schedule]

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [schedule.name for schedule in self.schedules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two schedules are called {name!r}; rename one")
        return self


def load_schedules(path: Path, service_account: str | None = None) -> list[Schedule]:
    """Read the schedules file; the paths of the specs become absolute.

    Args:
        path: the file.
        service_account: of the schedules that name none.

    Raises:
        SpecError: the file cannot be read, is no YAML mapping, or breaks the schema; one sentence for each problem.
    """
    text = read_text(path, "pass the path of the schedules file")
    value = decode(text, str(path), "file of schedules", "write schedules: [] for none")
    folder = path.resolve().parent
    found = validate(value, Schedules, str(path), _PATTERNS).schedules
    return [
        schedule.model_copy(
            update={
                "spec": folder / schedule.spec,
                "service_account": schedule.service_account or service_account,
            }
        )
        for schedule in found
    ]

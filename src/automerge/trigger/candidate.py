"""A candidate: a version in a registry that a rule may merge."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from automerge.documents import digest_of

OUR_TAG = "automerge.recipe"
"""On every version that we registered ourselves: what a merge made is no candidate for one."""


@dataclass(frozen=True)
class Candidate:
    """A version that a rule selects.

    Attributes:
        registry: name of the registry.
        model, version: as the registry calls them.
        uri: where its files are.
        created: when the registry made the version, in its own units; tells a version from a later one of its number.
        tags: those of the registered model, and over them those of the version.
    """

    registry: str
    model: str
    version: str
    uri: str
    created: int
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model} {self.version}"


def set_digest(candidates: Iterable[Candidate]) -> str:
    """sha256 (hex) of a set of versions, in whatever order they come."""
    return digest_of(sorted([each.registry, each.model, each.version, each.created] for each in candidates))

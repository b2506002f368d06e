"""What a door makes of a delivery: the facts in it, or a refusal."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["accepted", "duplicate", "ignored", "bad_signature", "stale", "malformed", "too_large"]
"""What becomes of a delivery; the values of the label ``outcome``."""


class Refusal(Exception):  # noqa: N818 - it is an answer, not an error of ours
    """A delivery that is not taken.

    Args:
        outcome: what it counts as.
        reason: one sentence for the sender, without anything of what was sent.
        status: the HTTP status, if not the outcome's own.
    """

    def __init__(self, outcome: Outcome, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.status = status or _STATUS[outcome]


_STATUS = {"bad_signature": 401, "stale": 401, "malformed": 400, "too_large": 413}


@dataclass(frozen=True)
class Facts:
    """What a delivery is about.

    Attributes:
        kind: what happened, in the sender's words.
        model, version: of the registry; empty where it does not say.
        ignored: why it needs no look at the registry; empty: it does.
    """

    kind: str
    model: str
    version: str
    ignored: str = ""

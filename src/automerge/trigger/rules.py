"""What a rule makes of the candidates: a pure function of the registry's content and of the runs there were."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from automerge.trigger.candidate import OUR_TAG, Candidate, set_digest
from automerge.trigger.config import Rule

Verb = Literal["start", "would_start", "too_few", "known", "cooling_down", "busy", "unlabelled", "invalid"]
"""What was decided; the values of the label ``decision``."""

Group = tuple[tuple[str, str], ...]
"""The tags that the candidates of a group share, with their values."""


@dataclass(frozen=True)
class PastRun:
    """What a decision must know of a run.

    Attributes:
        name: of the run.
        rule: the rule's name.
        group: what its candidates shared.
        digest: of its set of versions.
        created: unix seconds.
        active: it is about to start, or goes on.
    """

    name: str
    rule: str
    group: Group
    digest: str
    created: float
    active: bool


@dataclass(frozen=True)
class Decision:
    """What was decided for a group, and why.

    Attributes:
        rule: the rule's name.
        group: what the candidates share.
        candidates: by model and version.
        verb: what was decided.
        reason: one sentence for people.
        look_again: unix seconds at which time alone makes another decision; None: only an event does.
    """

    rule: str
    group: Group
    candidates: tuple[Candidate, ...]
    verb: Verb
    reason: str
    look_again: float | None = None

    @property
    def digest(self) -> str:
        """Of the set of versions."""
        return set_digest(self.candidates)

    @property
    def run(self) -> str:
        """The name of the run for this set of versions, the same whenever it is decided."""
        return f"{self.rule}-{self.digest[:12]}"


def decide(rule: Rule, candidates: Iterable[Candidate], runs: Sequence[PastRun], now: float) -> list[Decision]:
    """One decision for each group of candidates, in the order of the groups.

    Args:
        rule: the rule.
        candidates: what it selects in the registry.
        runs: all there were.
        now: unix seconds.
    """
    groups: dict[Group, list[Candidate]] = {}
    unlabelled: dict[Group, list[Candidate]] = {}
    for candidate in candidates:
        if OUR_TAG in candidate.tags:
            continue
        missing = tuple((key, "") for key in rule.group_by if not candidate.tags.get(key))
        if missing:
            unlabelled.setdefault(missing, []).append(candidate)
        else:
            groups.setdefault(tuple((key, candidate.tags[key]) for key in rule.group_by), []).append(candidate)
    decisions = [
        Decision(
            rule.name,
            missing,
            _ordered(found),
            "unlabelled",
            f"{_titles(_ordered(found))}: without the tag {' and '.join(repr(key) for key, _ in missing)}, by which "
            "the rule groups",
        )
        for missing, found in sorted(unlabelled.items())
    ]
    active = sum(run.active for run in runs if run.rule == rule.name)
    for group, found in sorted(groups.items()):
        decision = _decide_group(rule, group, _chosen(rule, found), runs, active, now)
        active += decision.verb == "start"
        decisions.append(decision)
    return decisions


def _decide_group(
    rule: Rule, group: Group, chosen: tuple[Candidate, ...], runs: Sequence[PastRun], active: int, now: float
) -> Decision:
    def decision(verb: Verb, reason: str, look_again: float | None = None) -> Decision:
        return Decision(rule.name, group, chosen, verb, reason, look_again)

    if len(chosen) < rule.minimum:
        return decision("too_few", f"{len(chosen)} of the {rule.minimum} candidates that the rule needs")
    digest = set_digest(chosen)
    known = next((run for run in runs if run.rule == rule.name and run.digest == digest), None)
    if known is not None:
        return decision("known", f"these versions have a run: {known.name}")
    if rule.dry_run:
        return decision("would_start", f"{_titles(chosen)}: the rule is a dry run")
    last = max((run.created for run in runs if run.rule == rule.name and run.group == group), default=None)
    if last is not None and now < last + rule.cooldown_seconds:
        return decision(
            "cooling_down",
            f"the last run of this group was started less than {rule.cooldown_seconds:g} seconds ago",
            last + rule.cooldown_seconds,
        )
    if active >= rule.max_concurrent:
        return decision("busy", f"{active} runs of the rule go on, and it allows {rule.max_concurrent}")
    return decision("start", f"{_titles(chosen)}: enough candidates, and no run of these versions yet")


def _chosen(rule: Rule, found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those of a group that are merged: of each model its newest, and no more than the maximum, the newest."""
    newest_first = sorted(found, key=lambda each: (each.created, each.model, each.version), reverse=True)
    if rule.versions == "newest":
        newest_first = list({each.model: each for each in reversed(newest_first)}.values())
        newest_first.sort(key=lambda each: (each.created, each.model, each.version), reverse=True)
    return _ordered(newest_first[: rule.maximum])


def _ordered(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda each: (each.model, each.created, each.version)))


def _titles(candidates: Iterable[Candidate]) -> str:
    return ", ".join(each.title for each in candidates)

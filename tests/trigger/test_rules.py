"""What a rule decides: a pure function."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automerge.trigger.candidate import Candidate, set_digest
from automerge.trigger.config import Rule
from automerge.trigger.rules import Decision, PastRun, decide

NOW = 1_000_000.0


def rule(**changes: Any) -> Rule:
    values = {"name": "r", "registry": "mlflow", "models": ["*"], "select": {"alias": "candidate"}, "spec": {}}
    return Rule.model_validate({**values, "group_by": ["base"], "cooldown_seconds": 100, **changes})


def candidate(model: str, version: str = "1", created: int = 1, **tags: str) -> Candidate:
    return Candidate("mlflow", model, version, f"s3://m/{model}/{version}", created, {"base": "b", **tags})


def past(decision: Decision, *, age: float = 1000, active: bool = False) -> PastRun:
    return PastRun(decision.run, decision.rule, decision.group, decision.digest, NOW - age, active)


PAIR = [candidate("x"), candidate("y")]


def test_two_candidates_make_a_run_with_a_name_of_their_own() -> None:
    [decision] = decide(rule(), PAIR, [], NOW)
    assert decision.verb == "start"
    assert decision.run == f"r-{set_digest(PAIR)[:12]}"
    assert decision.group == (("base", "b"),)


def test_one_is_too_few() -> None:
    [decision] = decide(rule(), PAIR[:1], [], NOW)
    assert (decision.verb, decision.reason) == ("too_few", "1 of the 2 candidates that the rule needs")


def test_candidates_are_grouped_by_their_tags() -> None:
    others = [candidate("v", base="c"), candidate("w", base="c")]
    decisions = decide(rule(max_concurrent=2), [*PAIR, *others], [], NOW)
    assert [[each.model for each in decision.candidates] for decision in decisions] == [["x", "y"], ["v", "w"]]
    assert {decision.verb for decision in decisions} == {"start"}


def test_one_without_the_tag_is_named() -> None:
    lost = replace(candidate("lost"), tags={})
    decisions = decide(rule(), [*PAIR, lost], [], NOW)
    assert [decision.verb for decision in decisions] == ["unlabelled", "start"]
    assert decisions[0].reason == "lost 1: without the tag 'base', by which the rule groups"


def test_a_set_has_one_run_however_it_ended() -> None:
    [decision] = decide(rule(), PAIR, [], NOW)
    [again] = decide(rule(), PAIR, [past(decision)], NOW)
    assert (again.verb, again.reason) == ("known", f"these versions have a run: {decision.run}")


def test_a_new_version_makes_a_new_set() -> None:
    [first] = decide(rule(), PAIR, [], NOW)
    [decision] = decide(rule(), [PAIR[0], candidate("y", "2", created=2)], [past(first)], NOW)
    assert decision.verb == "start"
    assert decision.run != first.run


def test_a_version_made_anew_under_an_old_number_is_another_one() -> None:
    assert set_digest(PAIR) != set_digest([PAIR[0], candidate("y", "1", created=7)])


def test_the_cool_down_ends_by_itself() -> None:
    [first] = decide(rule(), PAIR, [], NOW)
    newer = [PAIR[0], candidate("y", "2", created=2)]
    [waiting] = decide(rule(), newer, [past(first, age=30)], NOW)
    assert (waiting.verb, waiting.look_again) == ("cooling_down", NOW + 70)
    [after] = decide(rule(), newer, [past(first, age=100)], NOW)
    assert after.verb == "start"


def test_the_cool_down_is_of_the_group() -> None:
    [first] = decide(rule(), PAIR, [], NOW)
    [decision] = decide(rule(), [candidate("v", base="c"), candidate("w", base="c")], [past(first, age=1)], NOW)
    assert decision.verb == "start"


def test_runs_at_the_same_time_are_counted_over_all_groups() -> None:
    others = [candidate("v", base="c"), candidate("w", base="c")]
    decisions = decide(rule(), [*PAIR, *others], [], NOW)
    assert [decision.verb for decision in decisions] == ["start", "busy"]
    [first, _] = decisions
    [known, busy] = decide(rule(), [*PAIR, *others], [past(first, active=True)], NOW)
    assert (known.verb, busy.verb) == ("known", "busy")
    assert decide(rule(), [*PAIR, *others], [past(first)], NOW)[1].verb == "start"


def test_a_dry_run_starts_nothing() -> None:
    [decision] = decide(rule(dry_run=True), PAIR, [], NOW)
    assert decision.verb == "would_start"


def test_what_a_merge_made_is_no_candidate() -> None:
    ours = candidate("z", **{"automerge.recipe": "abc"})
    assert decide(rule(), [PAIR[0], ours], [], NOW)[0].verb == "too_few"


def test_of_a_model_the_newest_counts_unless_all_are_wanted() -> None:
    versions = [candidate("x", "1", 1), candidate("x", "2", 2), candidate("y", "1", 1)]
    [newest] = decide(rule(), versions, [], NOW)
    assert [each.title for each in newest.candidates] == ["x 2", "y 1"]
    [every] = decide(rule(versions="all"), versions, [], NOW)
    assert [each.title for each in every.candidates] == ["x 1", "x 2", "y 1"]


def test_no_more_than_the_maximum_the_newest() -> None:
    three = [candidate("x", created=1), candidate("y", created=3), candidate("z", created=2)]
    [decision] = decide(rule(maximum=2), three, [], NOW)
    assert [each.model for each in decision.candidates] == ["y", "z"]


models = st.sampled_from(["a", "b", "c", "d"])
candidates = st.lists(
    st.builds(candidate, models, st.sampled_from(["1", "2"]), st.integers(1, 3), base=st.sampled_from(["b", "c"])),
    max_size=8,
    unique_by=lambda each: (each.model, each.version),
)


@given(candidates, st.randoms())
def test_the_order_of_the_registry_decides_nothing(found: list[Candidate], random: Any) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert decide(rule(), found, [], NOW) == decide(rule(), shuffled, [], NOW)


@given(candidates)
def test_deciding_again_starts_nothing_twice(found: list[Candidate]) -> None:
    loose = rule(max_concurrent=9, cooldown_seconds=0)
    decisions = decide(loose, found, [], NOW)
    runs = [past(decision) for decision in decisions if decision.verb == "start"]
    assert len({run.name for run in runs}) == len(runs)
    assert "start" not in {decision.verb for decision in decide(loose, found, runs, NOW)}


@pytest.mark.parametrize("limit", [1, 2])
@given(found=candidates)
def test_never_more_than_allowed_at_once(limit: int, found: list[Candidate]) -> None:
    decisions = decide(rule(max_concurrent=limit), found, [], NOW)
    assert sum(decision.verb == "start" for decision in decisions) <= limit

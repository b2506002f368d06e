"""Which version has the alias: by what it reaches of the present champion on the same test data."""

import json
from dataclasses import dataclass, field

import pytest

from automerge.errors import RegistryError
from automerge.preservation import (
    Evaluation,
    GateVerdict,
    Interval,
    MetricInfo,
    ModelResult,
    OnnxResult,
    TaskInfo,
    TaskResult,
)
from automerge.registry.promotion import promote
from automerge.registry.registry import Promotion, RegisteredVersion
from automerge.spec import PromotionSpec

LOW, HIGH = {"low": 0.9, "high": 0.8}, {"low": 0.95, "high": 0.85}


def evaluation(accuracies: dict[str, float], **changes: object) -> Evaluation:
    """Tasks with one metric each; ``changes`` are of the tasks' info."""
    metric = MetricInfo(name="top1", higher_is_better=True, chance=0.1)
    infos = [
        TaskInfo.model_validate(
            {
                "name": name,
                "kind": "classification",
                "reference": name,
                "guard": False,
                "metrics": [metric],
                "validation_samples": 1,
                "test_samples": 1,
                "test_data": f"digest of {name}",
                **changes,
            }
        )
        for name in accuracies
    ]
    results = {
        name: TaskResult(
            loss=1.0,
            metrics={"top1": Interval(value=value, low=value, high=value)},
            metric_pr={"top1": 100.0},
            pr=Interval(value=100.0, low=100.0, high=100.0),
        )
        for name, value in accuracies.items()
    }
    merged = ModelResult(name="merged", role="merged", tasks=results, mean_pr=100, worst_pr=100, pd=0, pd_pairwise=0)
    return Evaluation(
        recipe="0" * 64,
        tasks=infos,
        models=[merged],
        warnings=[],
        gate=GateVerdict(verdict="pass", reasons=[]),
        onnx=OnnxResult(status="off"),
        confidence=0.95,
        resamples=100,
    )


@dataclass
class Registry:
    """A registry's part that promotion needs, in memory."""

    documents: dict[str, bytes | None] = field(default_factory=dict)
    alias: str | None = None

    def with_alias(self, model: str, alias: str) -> RegisteredVersion | None:
        return version(self.alias) if self.alias is not None else None

    def set_alias(self, model: str, alias: str, version: str) -> None:
        self.alias = version

    def read_document(self, model: str, version: str, name: str) -> bytes | None:
        assert name == "evaluation.json"
        return self.documents[version]


def version(number: str) -> RegisteredVersion:
    return RegisteredVersion(registry="r", model="m", version=number, uri="u", url="u", created=True)


def promoted(
    mine: Evaluation, champion: Evaluation | bytes | None, rule: PromotionSpec | None = None
) -> tuple[Promotion, Registry]:
    content = champion.model_dump_json().encode() if isinstance(champion, Evaluation) else champion
    registry = Registry({"1": content}, alias="1")
    found = promote(registry, version("2"), mine, rule or PromotionSpec(), document="evaluation.json")  # type: ignore[arg-type]
    assert registry.alias == ("2" if found.verdict == "promoted" else "1")
    return found, registry


def test_the_first_version_gets_the_alias_and_keeps_it() -> None:
    registry = Registry()
    for reason in ("no version had the alias", "version 2 has the alias already"):
        found = promote(registry, version("2"), evaluation(LOW), PromotionSpec(), document="evaluation.json")  # type: ignore[arg-type]
        assert (found.verdict, found.reason, registry.alias) == ("promoted", reason, "2")


def test_a_better_version_takes_it() -> None:
    found, _ = promoted(evaluation(HIGH), evaluation(LOW))
    assert found.previous == "1"
    assert found.rates == pytest.approx({"low": 100 * 0.95 / 0.9, "high": 100 * 0.85 / 0.8})
    assert found.reason == "105.90 % of version 1 on average, 105.56 % on its worst task 'low'"


@pytest.mark.parametrize("mine", [LOW, {"low": 0.8, "high": 0.8}])
def test_one_that_is_equal_or_worse_does_not(mine: dict[str, float]) -> None:
    found, _ = promoted(evaluation(mine), evaluation(LOW))
    assert found.verdict == "kept"
    assert found.reason.endswith("wanted: more than 100 % on average and 99 % on each task")


def test_a_task_may_lose_only_so_much() -> None:
    mine = evaluation({"low": 0.88, "high": 0.9})
    assert promoted(mine, evaluation(LOW))[0].verdict == "kept"
    assert promoted(mine, evaluation(LOW), PromotionSpec(max_loss=3))[0].verdict == "promoted"


def test_the_gain_may_have_to_be_larger() -> None:
    for gain, verdict in ((5.0, "promoted"), (6.0, "kept")):
        assert promoted(evaluation(HIGH), evaluation(LOW), PromotionSpec(min_gain=gain))[0].verdict == verdict


def test_a_metric_where_lower_is_better_is_inverted() -> None:
    metric = MetricInfo(name="top1", higher_is_better=False, chance=9.0)
    found, _ = promoted(evaluation(HIGH, metrics=[metric]), evaluation(LOW, metrics=[metric]))
    assert found.verdict == "kept"
    assert found.rates["low"] == pytest.approx(100 * 0.9 / 0.95)


def test_a_further_task_hinders_nothing() -> None:
    assert promoted(evaluation({**HIGH, "more": 0.5}), evaluation(LOW))[0].verdict == "promoted"


@pytest.mark.parametrize(
    ("mine", "champion", "reason"),
    [
        (evaluation(HIGH), evaluation({**LOW, "more": 0.1}), "it was measured on task 'more', this version was not"),
        (evaluation(HIGH), evaluation(LOW, test_data="x"), "its test data of task 'low' are other ones"),
        (
            evaluation(HIGH, test_data=None),
            evaluation(LOW, test_data=None),
            "its test data of task 'low' are other ones",
        ),
        (
            evaluation(HIGH, metrics=[MetricInfo(name="top1", higher_is_better=True, chance=0.1, undefined="chance")]),
            evaluation(LOW),
            "task 'low' has no metric that tells anything about both",
        ),
        (evaluation(HIGH), None, "it has no evaluation.json"),
        (evaluation(HIGH), b"{", "its evaluation.json is not valid JSON"),
        (evaluation(HIGH), json.dumps({"format": "other"}).encode(), "not of the format automerge/evaluation"),
    ],
)
def test_what_cannot_be_compared_keeps_its_alias(
    mine: Evaluation, champion: Evaluation | bytes | None, reason: str
) -> None:
    found, _ = promoted(mine, champion)
    assert found.verdict == "kept"
    assert found.reason.startswith("version 1 cannot be compared with: ")
    assert reason in found.reason


def test_a_registry_that_does_not_answer_is_an_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry({"1": None}, alias="1")

    def fail(*arguments: str) -> None:
        raise RegistryError("the server does not answer")

    monkeypatch.setattr(registry, "read_document", fail)
    with pytest.raises(RegistryError):
        promote(registry, version("2"), evaluation(HIGH), PromotionSpec(), document="evaluation.json")  # type: ignore[arg-type]
    assert registry.alias == "1"

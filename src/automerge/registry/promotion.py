"""Promotion: whether a registered version takes an alias ("champion") from the version that carries it.

Two versions are compared by their own evaluations, and only where these say the same thing: each task of the present
champion must be among the new version's, on the same test samples. The figures are those of the preservation rate, with
the champion in the specialist's place. A version measured on other data is neither better nor worse, and the alias
stays where it is.

No registry can compare and set an alias in one step. Of two versions promoted at the same moment the later one keeps
the alias, even if the earlier is better; the next registration compares with it again.
"""

import json
import math
from typing import Literal

from automerge.errors import SpecError
from automerge.preservation import Evaluation, preservation_rate
from automerge.registry.registry import Promotion, RegisteredVersion, Registry
from automerge.spec import PromotionSpec


def promote(
    registry: Registry, version: RegisteredVersion, evaluation: Evaluation, rule: PromotionSpec, *, document: str
) -> Promotion:
    """Give the rule's alias to a version that passed the gate, if it beats the version that carries it.

    May be repeated: a version that has the alias keeps it.

    Args:
        registry: where the version is.
        version: the version that was registered.
        evaluation: of that version.
        rule: when it is better.
        document: name of the evaluations among the versions' documents.

    Raises:
        RegistryError: the registry refuses or cannot be reached.
    """
    champion = registry.with_alias(version.model, rule.alias)

    def verdict(verdict: Literal["promoted", "kept"], reason: str, rates: dict[str, float] | None = None) -> Promotion:
        previous = champion.version if champion is not None else None
        return Promotion(alias=rule.alias, verdict=verdict, reason=reason, previous=previous, rates=rates or {})

    if champion is not None and champion.version == version.version:
        return verdict("promoted", f"version {version.version} has the alias already")
    if champion is None:
        registry.set_alias(version.model, rule.alias, version.version)
        return verdict("promoted", "no version had the alias")
    content = registry.read_document(champion.model, champion.version, document)
    rates, reason = _compared(evaluation, content, document)
    if reason is not None:
        return verdict("kept", f"version {champion.version} cannot be compared with: {reason}")
    mean = math.fsum(rates.values()) / len(rates)
    worst = min(rates, key=lambda name: rates[name])
    found = f"{mean:.2f} % of version {champion.version} on average, {rates[worst]:.2f} % on its worst task {worst!r}"
    if mean > 100 + rule.min_gain and rates[worst] >= 100 - rule.max_loss:
        registry.set_alias(version.model, rule.alias, version.version)
        return verdict("promoted", found, rates)
    wanted = f"more than {100 + rule.min_gain:g} % on average and {100 - rule.max_loss:g} % on each task"
    return verdict("kept", f"{found}; wanted: {wanted}", rates)


def _compared(evaluation: Evaluation, champion: bytes | None, document: str) -> tuple[dict[str, float], str | None]:
    """As :func:`compare`, with the champion's evaluation as it is in the registry."""
    if champion is None:
        return {}, f"it has no {document}"
    try:
        return compare(evaluation, Evaluation.parse(json.loads(champion), where=document))
    except ValueError:
        return {}, f"its {document} is not valid JSON"
    except SpecError as error:
        return {}, error.problem


def compare(evaluation: Evaluation, champion: Evaluation) -> tuple[dict[str, float], str | None]:
    """What a version reaches of another one, by the tasks of that one.

    Returns:
        By task, the mean over its metrics of the rate, percent; and why there is no comparison, or None.
    """
    mine = {task.name: task for task in evaluation.tasks}
    rates: dict[str, float] = {}
    for task in champion.tasks:
        own = mine.get(task.name)
        if own is None:
            return {}, f"it was measured on task {task.name!r}, this version was not"
        if task.test_data is None or own.test_data is None or task.test_data != own.test_data:
            return {}, f"its test data of task {task.name!r} are other ones"
        found, theirs = evaluation.merged.tasks[task.name].metrics, champion.merged.tasks[task.name].metrics
        # A metric by which even the specialist cannot be told from a guess tells nothing about these two either.
        by_metric = [
            preservation_rate(found[metric.name].value, theirs[metric.name].value, metric.higher_is_better)
            for metric in own.metrics
            if metric.undefined is None and metric.name in theirs
        ]
        by_metric = [rate for rate in by_metric if math.isfinite(rate)]
        if not by_metric:
            return {}, f"task {task.name!r} has no metric that tells anything about both"
        rates[task.name] = math.fsum(by_metric) / len(by_metric)
    return rates, None if rates else "it has no tasks"

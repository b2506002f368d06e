"""What is written beside a registered version: tags, params, metrics and description, from the documents of a run."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from automerge.merging.recipe import Recipe
from automerge.preservation import Evaluation, Interval
from automerge.registry.registry import RegistryEntry
from automerge.spec import Spec


def build_entry(
    spec: Spec,
    recipe: Recipe,
    evaluation: Evaluation,
    *,
    weights: Path,
    files: Sequence[str] = (),
    onnx: Sequence[Path] = (),
    documents: Sequence[Path] = (),
    run: str | None = None,
) -> RegistryEntry:
    """The entry for a merged model; everything in it is taken from the run's documents.

    Tags: ``spec``, ``spec.digest``, ``source.<name>.digest`` and ``.uri``, ``base.digest`` and ``.uri``, ``pr.<task>``,
    ``pr.mean``, ``pr.worst``, ``pd`` (percent and points), ``gate``, ``onnx``, ``run`` (the pipeline's, if it has a
    name), ``version`` (of this software).
    """
    merged = evaluation.merged
    rates = {name: result.pr for name, result in merged.tasks.items()}
    tags = {
        "spec": spec.name,
        "spec.digest": spec.digest(),
        **({"base.digest": recipe.base.digest} if recipe.base else {}),
        **({"base.uri": spec.base.uri} if spec.base else {}),
        **{f"source.{source.name}.digest": source.digest for source in recipe.sources},
        **{f"source.{source.name}.uri": source.uri for source in spec.sources},
        **{f"pr.{name}": _number(rate.value if rate else None) for name, rate in rates.items()},
        "pr.mean": _number(merged.mean_pr),
        "pr.worst": _number(merged.worst_pr),
        "pd": _number(merged.pd),
        "gate": evaluation.gate.verdict,
        "onnx": evaluation.onnx.status,
        **({"run": run} if run else {}),
        "version": _release(),
    }
    return RegistryEntry(
        model=spec.registered_model,
        recipe_digest=recipe.digest(),
        weights=weights,
        files=files,
        onnx=onnx,
        documents=documents,
        tags=tags,
        params=_params(recipe),
        metrics=_metrics(evaluation),
        description=_description(recipe, evaluation, rates),
    )


def _params(recipe: Recipe) -> dict[str, str]:
    params = {"dtype": recipe.dtype, "seed": str(recipe.seed), "blocks": str(len(recipe.blocks))}
    for block in recipe.blocks:
        params[f"{block.name}.technique"] = block.technique
        for source, weight in block.weights.items():
            params[f"{block.name}.weight.{source}"] = f"{weight:.6g}"
        for key, value in sorted(block.hyperparameters.items()):
            params[f"{block.name}.{key}"] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return params


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    merged = evaluation.merged
    found: dict[str, float | None] = {"pr_mean": merged.mean_pr, "pr_worst": merged.worst_pr, "pd": merged.pd}
    for name, result in merged.tasks.items():
        if result.pr is not None:
            found |= {f"pr/{name}": result.pr.value, f"pr_low/{name}": result.pr.low, f"pr_high/{name}": result.pr.high}
        found[f"loss/{name}"] = result.loss
        found |= {f"{metric}/{name}": interval.value for metric, interval in result.metrics.items()}
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _description(recipe: Recipe, evaluation: Evaluation, rates: Mapping[str, Interval | None]) -> str:
    names = ", ".join(source.name for source in recipe.sources)
    lines = [
        f"Merged from {names} by recipe `{recipe.digest()[:12]}`.",
        "",
        "| task | preservation rate |",
        "|---|---|",
    ]
    for name, rate in rates.items():
        text = "undefined" if rate is None else f"{rate.value:.1f} % ({rate.low:.1f} to {rate.high:.1f})"
        lines.append(f"| {name} | {text} |")
    pd = evaluation.merged.pd
    if pd is not None:
        lines += ["", f"Preservation discrepancy: {pd:.1f} points."]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _release() -> str:
    try:
        return version("automerge-models")
    except PackageNotFoundError:
        return "unknown"

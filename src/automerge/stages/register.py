"""register: file the merged model in the registry, with everything that proves it."""

import logging
import os
from pathlib import Path

from automerge.documents import write_atomically
from automerge.errors import RegistryError, SpecError
from automerge.merging.recipe import Recipe
from automerge.merging.statistics import Statistics
from automerge.preservation import Evaluation, check_gate
from automerge.registry.entry import build_entry
from automerge.registry.promotion import promote
from automerge.registry.registry import RegisteredVersion, load_registry
from automerge.spec import Spec
from automerge.stages.documents import (
    EVALUATION,
    MANIFEST,
    MERGED,
    RECIPE,
    REGISTRATION,
    REPORT,
    SEGMENTATION,
    STATISTICS,
    TRIALS,
    Merged,
    Registration,
)
from automerge.telemetry.metrics import observe_stage
from automerge.telemetry.traces import RUN_VARIABLE

log = logging.getLogger(__name__)


def register(
    spec: Spec, inputs: Path, segmentation: Path, search: Path, model: Path, evaluation: Path, folder: Path
) -> RegisteredVersion:
    """Register the merged model and write ``registration.json``; the same recipe is registered once.

    Where the spec says so, the version then takes an alias from the one that carries it, if it beats it.

    Args:
        spec: the spec.
        inputs, segmentation, search, model, evaluation: folders that the earlier stages wrote.
        folder: where the registration is written.

    Raises:
        RegistryError: the quality gate refused the model, or the registry refuses or cannot be reached.
        SpecError: a document is missing.
        MergeError: the recipe's statistics file is missing, or another one.
    """
    with observe_stage("register", pipeline=spec.name, family=spec.model.target, folder=folder) as metrics:
        measured = Evaluation.read(evaluation / EVALUATION)
        # The spec's gate may have been raised since the evaluation.
        gates = (measured.gate, check_gate(spec.gate, measured.merged, measured.tasks))
        gate = next((gate for gate in gates if gate.verdict != "pass"), None)
        if gate is not None:
            raise RegistryError(
                f"the quality gate refused this model: {'; '.join(gate.reasons)}",
                "merge better sources, search longer, or lower the gate",
            )
        recipe = Recipe.read(search / RECIPE)
        merged = Merged.read(model / MERGED)
        _check_belong_together(recipe.digest(), merged, measured)
        statistics = []
        if recipe.statistics is not None:  # without it the recipe could not be applied again
            Statistics.open(search / STATISTICS, recipe.statistics).close()
            statistics = [search / STATISTICS]
        spec_file = folder / "spec.json"
        # Where this machine keeps the factory's code means nothing to whoever reads the version.
        text = spec.model_dump_json(indent=2, exclude={"model": {"python_path"}})
        write_atomically(spec_file, (text + "\n").encode())
        entry = build_entry(
            spec,
            recipe,
            measured,
            weights=model,
            files=[*(record.path for record in merged.files), MERGED],
            onnx=[evaluation / name for name in measured.onnx.written],
            documents=[
                spec_file,
                inputs / MANIFEST,
                segmentation / SEGMENTATION,
                search / TRIALS,
                search / RECIPE,
                *statistics,
                evaluation / EVALUATION,
                evaluation / REPORT,
            ],
            run=os.environ.get(RUN_VARIABLE),
        )
        registry = load_registry(spec)
        version = registry.register(entry)
        metrics.set("automerge_register_new_version", float(version.created))
        promotion = None
        if spec.registry.promote is not None:
            promotion = promote(registry, version, measured, spec.registry.promote, document=EVALUATION)
            log.info("alias %r: %s, %s", promotion.alias, promotion.verdict, promotion.reason)
            metrics.set("automerge_register_promoted", float(promotion.verdict == "promoted"))
        Registration(recipe=recipe.digest(), registered=version, promotion=promotion).write(folder / REGISTRATION)
    return version


def _check_belong_together(recipe: str, merged: Merged, measured: Evaluation) -> None:
    """A version is filed under its recipe for ever: weights or figures of another one must never get there."""
    for made, stage, found in (
        ("the merged weights", "merge", merged.recipe),
        ("the figures", "evaluate", measured.recipe),
    ):
        if found != recipe:
            raise SpecError(
                f"{made} are of recipe {found[:12]}, and the search's is now {recipe[:12]}",
                f"run `automerge {stage}` again",
            )

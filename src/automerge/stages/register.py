"""register: file the merged model in the registry, with everything that proves it."""

from pathlib import Path

from automerge.documents import write_atomically
from automerge.errors import RegistryError
from automerge.merging.recipe import Recipe
from automerge.preservation import Evaluation
from automerge.registry.entry import build_entry
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
    TRIALS,
    Merged,
    Registration,
)
from automerge.telemetry.metrics import observe_stage


def register(
    spec: Spec, inputs: Path, segmentation: Path, search: Path, model: Path, evaluation: Path, folder: Path
) -> RegisteredVersion:
    """Register the merged model and write ``registration.json``; the same recipe is registered once.

    Args:
        spec: the spec.
        inputs, segmentation, search, model, evaluation: folders that the earlier stages wrote.
        folder: where the registration is written.

    Raises:
        RegistryError: the quality gate refused the model, or the registry refuses or cannot be reached.
        SpecError: a document is missing.
    """
    with observe_stage("register", pipeline=spec.name, family=spec.model.target, folder=folder) as metrics:
        measured = Evaluation.read(evaluation / EVALUATION)
        if measured.gate.verdict != "pass":
            raise RegistryError(
                f"the quality gate refused this model: {'; '.join(measured.gate.reasons)}",
                "merge better sources, search longer, or lower the gate",
            )
        recipe = Recipe.read(search / RECIPE)
        spec_file = folder / "spec.json"
        write_atomically(spec_file, (spec.model_dump_json(indent=2) + "\n").encode())
        entry = build_entry(
            spec,
            recipe,
            measured,
            weights=model,
            files=[*(record.path for record in Merged.read(model / MERGED).files), MERGED],
            onnx=[evaluation / name for name in sorted(set(measured.onnx.files.values()))],
            documents=[
                spec_file,
                inputs / MANIFEST,
                segmentation / SEGMENTATION,
                search / TRIALS,
                search / RECIPE,
                evaluation / EVALUATION,
                evaluation / REPORT,
            ],
        )
        version = load_registry(spec).register(entry)
        Registration(recipe=recipe.digest(), registered=version).write(folder / REGISTRATION)
        metrics.set("automerge_register_created", float(version.created))
    return version

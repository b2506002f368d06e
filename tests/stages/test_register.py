"""register: one version for a recipe, and none that the gate refused."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from automerge.errors import RegistryError, SpecError
from automerge.merging.recipe import Recipe
from automerge.preservation import Evaluation, GateVerdict
from automerge.spec import GateSpec, Spec
from automerge.stages.documents import Registration
from automerge.stages.register import register

STAGES = ("fetch", "segment", "search", "merge", "evaluate", "register")


def test_the_same_recipe_is_registered_once(spec: Spec, finished: Path, tmp_path: Path) -> None:
    folders = [finished / stage for stage in STAGES]
    first = register(spec, *folders)
    assert (first.model, first.version, first.created) == ("tiny", "1", True)
    second = register(spec, *folders[:-1], tmp_path / "again")
    assert second == first.model_copy(update={"created": False})
    assert Registration.read(tmp_path / "again" / "registration.json").registered == second
    client = MlflowClient(str(spec.registry.uri), str(spec.registry.uri))
    assert len(client.search_model_versions("name = 'tiny'")) == 1


def test_a_model_that_the_gate_refused_is_not_registered(spec: Spec, finished: Path, tmp_path: Path) -> None:
    measured = Evaluation.read(finished / "evaluate" / "evaluation.json")
    verdict = GateVerdict(verdict="fail", reasons=["task 'left': too low", "the preservation discrepancy is too large"])
    measured.model_copy(update={"gate": verdict}).write(finished / "evaluate" / "evaluation.json")
    with pytest.raises(RegistryError, match=r"^the quality gate refused this model: task 'left': too low; the pres"):
        register(spec, *[finished / stage for stage in STAGES[:-1]], tmp_path / "register")
    assert not (tmp_path / "register" / "registration.json").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_gate_that_was_raised_since_the_evaluation_holds(spec: Spec, finished: Path, tmp_path: Path) -> None:
    raised = spec.model_copy(update={"gate": GateSpec(min_worst_pr=1000)})
    with pytest.raises(RegistryError, match="the quality gate refused this model"):
        register(raised, *[finished / stage for stage in STAGES[:-1]], tmp_path / "register")


@pytest.mark.parametrize(
    ("document", "what"), [("merge/merged.json", "the merged weights"), ("evaluate/evaluation.json", "the figures")]
)
def test_weights_or_figures_of_another_recipe_are_refused(
    spec: Spec, finished: Path, tmp_path: Path, document: str, what: str
) -> None:
    """They would stand under this recipe's digest for ever."""
    path = finished / document
    path.write_text(path.read_text().replace(Recipe.read(finished / "search" / "recipe.json").digest(), "0" * 64))
    with pytest.raises(SpecError, match=f"{what} are of recipe 000000000000"):
        register(spec, *[finished / stage for stage in STAGES[:-1]], tmp_path / "register")
    assert not (tmp_path / "register" / "registration.json").exists()

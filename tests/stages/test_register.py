"""register: one version for a recipe, and none that the gate refused."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from automerge.errors import RegistryError, SpecError
from automerge.merging.recipe import Recipe
from automerge.preservation import Evaluation, GateVerdict
from automerge.spec import GateSpec, PromotionSpec, Spec
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


def test_a_model_that_the_gate_refused_is_not_registered(
    spec: Spec, finished: Path, empty_database: Path, tmp_path: Path
) -> None:
    measured = Evaluation.read(finished / "evaluate" / "evaluation.json")
    verdict = GateVerdict(verdict="fail", reasons=["task 'left': too low", "the preservation discrepancy is too large"])
    measured.model_copy(update={"gate": verdict}).write(finished / "evaluate" / "evaluation.json")
    with pytest.raises(RegistryError, match=r"^the quality gate refused this model: task 'left': too low; the pres"):
        register(spec, *[finished / stage for stage in STAGES[:-1]], tmp_path / "register")
    assert not (tmp_path / "register" / "registration.json").exists()
    assert (tmp_path / "mlflow.db").read_bytes() == empty_database.read_bytes()


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


def test_a_version_that_is_to_be_promoted_gets_its_alias(spec: Spec, finished: Path) -> None:
    registry = spec.registry.model_copy(update={"promote": PromotionSpec(alias="best")})
    promoting = spec.model_copy(update={"registry": registry})
    for reason in ("no version had the alias", "version 1 has the alias already"):
        register(promoting, *[finished / stage for stage in STAGES])
        promotion = Registration.read(finished / "register" / "registration.json").promotion
        assert promotion is not None
        assert (promotion.alias, promotion.verdict, promotion.reason) == ("best", "promoted", reason)
    client = MlflowClient(str(spec.registry.uri), str(spec.registry.uri))
    assert client.get_model_version_by_alias("tiny", "best").version == 1


def test_a_worse_version_leaves_the_alias_where_it_is(spec: Spec, finished: Path) -> None:
    """The champion's own evaluation, as it lies in the registry, is what counts."""
    registry = spec.registry.model_copy(update={"promote": PromotionSpec()})
    folders = [finished / stage for stage in STAGES]
    path = finished / "evaluate" / "evaluation.json"
    evaluation = Evaluation.read(path)
    perfect = dict.fromkeys(evaluation.merged.tasks, 1.0)
    _with_accuracies(evaluation, perfect).write(path)
    first = register(spec.model_copy(update={"registry": registry}), *folders)
    client = MlflowClient(str(spec.registry.uri), str(spec.registry.uri))
    # As another recipe's version: this one's own would not be registered again.
    client.set_model_version_tag("tiny", first.version, "automerge.recipe", "0" * 64)
    client.set_tag(client.get_model_version("tiny", first.version).run_id, "automerge.recipe", "0" * 64)
    _with_accuracies(evaluation, dict.fromkeys(perfect, 0.9)).write(path)
    second = register(spec.model_copy(update={"registry": registry}), *folders)
    promotion = Registration.read(finished / "register" / "registration.json").promotion
    assert promotion is not None
    assert (second.version, promotion.verdict, promotion.previous) == ("2", "kept", "1")
    assert promotion.rates == pytest.approx(dict.fromkeys(perfect, 90.0))
    assert client.get_model_version_by_alias("tiny", "champion").version == 1


def _with_accuracies(evaluation: Evaluation, values: dict[str, float]) -> Evaluation:
    """The evaluation with these values of every metric of the merged model."""
    merged = evaluation.merged
    tasks = {
        name: result.model_copy(
            update={
                "metrics": {
                    metric: interval.model_copy(update={"value": values[name]})
                    for metric, interval in result.metrics.items()
                }
            }
        )
        for name, result in merged.tasks.items()
    }
    models = [merged.model_copy(update={"tasks": tasks}), *evaluation.models[1:]]
    return evaluation.model_copy(update={"models": models})

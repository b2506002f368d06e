"""Statistics through the stages: gathered once, carried by digest, enough to merge again without any data."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from automerge.checkpoint.digest import sha256_file
from automerge.errors import MergeError, SearchError
from automerge.merging.recipe import Recipe
from automerge.merging.statistics import Statistics
from automerge.searching.evaluator import mean_losses
from automerge.searching.search import SearchResult
from automerge.spec import Spec
from automerge.stages.evaluate import evaluate
from automerge.stages.fetch import fetch
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded
from automerge.stages.merge import merge
from automerge.stages.register import register
from automerge.stages.search import search
from automerge.stages.segment import segment
from tests.stages.batchnorm import TASKS, NormNet, spec_of, write
from tests.stages.variants import TRIPLE
from tests.stages.variants import spec_of as variant_of
from tests.stages.variants import write as write_variant

SEARCH = {"trials": 6, "initial": 2, "weights": "simplex", "objective": "loss_ratio", "split": None, "refine": None}


@pytest.fixture(scope="session")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints and data of `batchnorm`; read only."""
    folder = tmp_path_factory.mktemp("norms")
    write(folder)
    return folder


@dataclass
class Run:
    """A spec with its folders; fetched and segmented."""

    spec: Spec
    folder: Path

    @property
    def inputs(self) -> Path:
        return self.folder / "fetch"

    @property
    def found(self) -> Path:
        return self.folder / "search"

    @property
    def statistics(self) -> Path:
        return self.found / "statistics.safetensors"

    @property
    def recipe(self) -> Recipe:
        return Recipe.read(self.found / "recipe.json")

    def search(self, spec: Spec | None = None, *, resume: bool = False) -> SearchResult:
        return search(spec or self.spec, self.inputs, self.folder / "segment", self.found, resume=resume)

    def merge(self, name: str = "merge") -> dict[str, torch.Tensor]:
        merge(self.spec, self.inputs, self.found / "recipe.json", self.folder / name)
        return load_file(self.folder / name / "model.safetensors")


def prepared(spec: Spec, folder: Path) -> Run:
    fetch(spec, folder / "fetch")
    segment(spec, folder / "fetch", folder / "segment")
    return Run(spec, folder)


@pytest.fixture
def start(norms: Path, tmp_path: Path):
    def begin(techniques: list[str], **changes: object) -> Run:
        options = {**SEARCH, "techniques": techniques, **changes.pop("search", {})}  # type: ignore[dict-item]
        return prepared(spec_of(norms, search=options, **changes), tmp_path / "run")

    return begin


def measured(run: Run, state: dict[str, torch.Tensor]) -> dict[str, float]:
    module = NormNet()
    module.load_state_dict(state)
    opened = Inputs.open(run.spec, run.inputs)
    loaded = Loaded.load(opened, torch.device("cpu"))
    return mean_losses(loaded.measured("validation"), lambda _: module.eval(), opened.architecture, torch.device("cpu"))


@pytest.mark.parametrize("fidelity", [None, {"slices": [0.5, 1.0]}], ids=["each trial", "once at the end"])
def test_recalibration_repairs_what_averaging_broke(start, fidelity) -> None:
    """Trials are measured recalibrated, so what is measured is what is written; but not where they are cut short."""
    run = start(["linear"], search={"fidelity": fidelity})
    best = run.search().best
    recipe, merged = run.recipe, run.merge()
    assert recipe.recalibrated == sorted(
        f"{layer}.{leaf}" for layer in ("features.1", "features.4", "norm") for leaf in ("running_mean", "running_var")
    )
    assert recipe.statistics == sha256_file(run.statistics)
    plain = recipe.model_copy(update={"statistics": None, "recalibrated": []})
    plain.write(run.folder / "plain" / "recipe.json")
    merge(run.spec, run.inputs, run.folder / "plain" / "recipe.json", run.folder / "averaged")
    averaged = load_file(run.folder / "averaged" / "model.safetensors")
    broken, repaired = measured(run, averaged), measured(run, merged)
    assert best.losses == (repaired if fidelity is None else broken)
    for task in TASKS:
        assert repaired[task] < 0.8 * broken[task]
    differ = {name for name, tensor in merged.items() if not torch.equal(tensor, averaged[name])}
    assert differ == set(recipe.recalibrated)
    with Statistics.open(run.statistics) as statistics:
        for name in recipe.recalibrated:
            assert torch.equal(merged[name], statistics.recalibrated(name, tuple(merged[name].shape)).float())


@pytest.mark.parametrize(
    "changes",
    [{"search": {"preset": "paper"}}, {"merge": {"recalibrate": False}}],
    ids=["preset paper", "switched off"],
)
def test_recalibration_is_off_in_preset_paper_and_where_it_is_switched_off(start, changes) -> None:
    run = start(["linear"], **changes)
    run.search()
    text = (run.found / "recipe.json").read_text()
    assert "statistics" not in text
    assert "recalibrated" not in text
    assert not run.statistics.exists()


def test_recalibration_is_on_where_the_spec_says_so(start) -> None:
    run = start(["linear"], search={"preset": "paper", "epsilon": 0.3, "warm_start": True}, merge={"recalibrate": True})
    run.search()
    assert run.recipe.recalibrated


def test_the_whole_flow_with_techniques_that_need_statistics(start) -> None:
    run = start(["fisher", "regmean"], merge={"recalibrate": False})
    run.search()
    recipe = run.recipe
    assert recipe.recalibrated == []
    assert recipe.statistics == sha256_file(run.statistics)
    kinds = {key.split("/")[0] for key in load_file(run.statistics)}
    assert kinds == {"fisher", "gram"}

    # Recipe, checkpoints and statistics: no data.
    merged = run.merge()
    shutil.move(run.inputs / "data", run.folder / "away")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in run.merge("again").items())
    shutil.move(run.folder / "away", run.inputs / "data")
    assert measured(run, merged) == run.search(resume=True).best.losses

    rows = evaluate(run.spec, run.inputs, run.folder / "segment", run.found, run.folder / "merge", run.folder / "eval")
    assert {"fisher", "regmean"} <= {row.name for row in rows.models}
    assert not [warning for warning in rows.warnings if "left out" in warning]

    arguments = (run.spec, run.inputs, run.folder / "segment", run.found, run.folder / "merge", run.folder / "eval")
    run.statistics.rename(run.folder / "hidden")
    with pytest.raises(
        MergeError, match=r"statistics\.safetensors: the recipe needs this statistics file, and it is not"
    ):
        register(*arguments, run.folder / "register")
    with pytest.raises(
        MergeError, match=r"statistics\.safetensors: the recipe needs this statistics file, and it is not"
    ):
        merge(run.spec, run.inputs, run.found / "recipe.json", run.folder / "third")
    assert not [item for item in (run.folder / "third").rglob("*") if item.suffix in (".safetensors", ".json")]
    (run.folder / "hidden").rename(run.statistics)
    version = register(*arguments, run.folder / "register")
    assert version.created

    damaged = load_file(run.statistics)
    save_file({key: tensor + 1 for key, tensor in damaged.items()}, run.statistics)
    with pytest.raises(MergeError, match="is not the statistics file of the recipe"):
        merge(run.spec, run.inputs, run.found / "recipe.json", run.folder / "third")


def test_the_statistics_are_registered_with_the_recipe(start) -> None:
    run = start(["fisher"])
    run.search()
    run.merge()
    arguments = (run.spec, run.inputs, run.folder / "segment", run.found, run.folder / "merge", run.folder / "eval")
    evaluate(*arguments)
    version = register(*arguments, run.folder / "register")
    client = MlflowClient(tracking_uri=run.spec.registry.uri, registry_uri=run.spec.registry.uri)
    origin = client.get_model_version(version.model, str(version.version)).run_id
    folders, names = [""], []
    while folders:
        for entry in client.list_artifacts(origin, folders.pop() or None):
            (folders if entry.is_dir else names).append(entry.path)
    assert {"recipe.json", "statistics.safetensors"} <= {Path(name).name for name in names}


def test_statistics_are_gathered_once_and_again_where_they_are_lost(start, caplog) -> None:
    run = start(["linear", "fisher"])
    with caplog.at_level("INFO", logger="automerge"):
        first = run.search()
        assert caplog.text.count("gathering the fisher statistics of 2 sources") == 1
        recipe, content = run.recipe, run.statistics.read_bytes()
        caplog.clear()
        longer = Spec.model_validate(
            {**run.spec.model_dump(), "search": {**run.spec.search.model_dump(), "trials": len(first.trials) + 1}}
        )
        run.search(longer, resume=True)
        assert "gathering" not in caplog.text
        run.statistics.unlink()
        again = run.search(longer, resume=True)
        assert "gathering the fisher statistics" in caplog.text
    assert len(again.trials) == len(first.trials) + 1
    if again.best.number == first.best.number:
        assert run.recipe == recipe
        assert run.statistics.read_bytes() == content


def test_a_search_notices_other_statistics(start) -> None:
    run = start(["linear", "fisher"])
    run.search()
    tensors = load_file(run.statistics)
    with Statistics.open(run.statistics) as statistics:
        metadata = statistics.metadata
    key = next(key for key in sorted(tensors) if key.startswith("fisher/"))
    save_file({**tensors, key: tensors[key] * 2}, run.statistics, metadata=metadata)
    with pytest.raises(SearchError, match="belongs to another search"):
        run.search(resume=True)


def test_a_search_that_may_not_begin_leaves_the_statistics(start) -> None:
    run = start(["fisher"])
    run.search()
    content = run.statistics.read_bytes()
    other = Spec.model_validate({**run.spec.model_dump(), "search": {**run.spec.search.model_dump(), "seed": 1}})
    with pytest.raises(SearchError, match="a search was begun here"):
        run.search(other)
    with pytest.raises(
        SearchError, match=r"statistics\.safetensors: belongs to another search, or is damaged; start in"
    ):
        run.search(other, resume=True)
    assert run.statistics.read_bytes() == content
    run.statistics.write_bytes(content[:-1])
    with pytest.raises(SearchError, match="or is damaged; start in another folder, or remove it"):
        run.search(resume=True)
    run.statistics.unlink()
    run.search(resume=True)
    assert run.statistics.read_bytes() == content


def test_a_source_without_a_task_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    write_variant(tmp_path, TRIPLE)
    spec = variant_of(tmp_path, TRIPLE, search={**SEARCH, "techniques": ["linear", "regmean"]})
    spec = spec.model_copy(update={"tasks": spec.tasks[:2]})
    with pytest.raises(SearchError, match=r"source 'blue' is the specialist of no task, .* statistics \(gram\)"):
        fetch(spec, tmp_path / "run")
    assert not [item for item in (tmp_path / "run").rglob("*") if item.suffix in (".json", ".safetensors")]


def test_heads_of_their_own_have_statistics_of_the_shared_part_alone(tmp_path: Path) -> None:
    write_variant(tmp_path, TRIPLE, own_heads=True)
    techniques = {**SEARCH, "techniques": ["fisher", "regmean"]}
    run = prepared(variant_of(tmp_path, TRIPLE, own_heads=True, search=techniques), tmp_path / "run")
    run.search()
    assert sorted(load_file(run.statistics)) == sorted(
        f"{key}/conv.{leaf}"
        for source in TRIPLE
        for key, leaf in ((f"fisher/{source}", "weight"), (f"fisher/{source}", "bias"), (f"gram/{source}", "weight"))
    )
    run.merge()

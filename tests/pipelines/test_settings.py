"""The deployment settings: what a file may say, and what each mistake is told."""

import re
from pathlib import Path

import pytest

from automerge.errors import SpecError
from automerge_pipelines.flow import FLOW, FlowTask
from automerge_pipelines.merge_pipeline import compile_pipeline
from automerge_pipelines.settings import Settings, load_settings

DOCS = Path(__file__).parents[2] / "docs" / "pipeline.md"
SEARCH = next(task for task in FLOW if task.name == "search-merge")
FETCH = next(task for task in FLOW if task.name == "fetch")


def read(text: str, folder: Path) -> Settings:
    path = folder / "deployment.yaml"
    path.write_text(text)
    return load_settings(path)


def test_without_a_file_all_is_default() -> None:
    assert load_settings(None) == Settings()


def test_the_documented_file_compiles(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    settings = read(text, tmp_path)
    assert settings.of(SEARCH).accelerator_count == 4
    assert settings.of(SEARCH).memory == "32Gi"
    assert settings.of(FETCH).memory == "4Gi"
    assert compile_pipeline(settings, tmp_path / "pipeline.yaml").stat().st_size > 10_000


def test_every_setting_is_documented() -> None:
    table = "\n".join(line for line in DOCS.read_text().splitlines() if line.startswith("| `"))
    for name in Settings.model_fields:
        assert f"`{name}" in table, name


def test_a_number_is_a_quantity(tmp_path: Path) -> None:
    assert read("defaults: {cpu: 16, memory: 1000000000}", tmp_path).defaults.memory == "1000000000"


class TestLayers:
    """One task's settings win over the defaults, which win over the table."""

    def test_the_table_gives_retries_and_cache(self) -> None:
        own = Settings().of(FETCH)
        assert (own.retries, own.cache, own.cpu, own.memory) == (3, True, "1", "4Gi")

    def test_defaults_win_over_the_table_and_a_task_over_the_defaults(self, tmp_path: Path) -> None:
        text = "defaults: {cpu: 2, retries: 0}\ntasks: {fetch: {cpu: 500m}}"
        settings = read(text, tmp_path)
        assert (settings.of(FETCH).cpu, settings.of(FETCH).retries) == ("500m", 0)
        assert settings.of(SEARCH).cpu == "2"

    def test_only_tasks_that_run_models_get_an_accelerator_by_default(self, tmp_path: Path) -> None:
        settings = read("defaults: {accelerator_count: 2}", tmp_path)
        assert settings.of(SEARCH).accelerator_count == 2
        assert settings.of(FETCH).accelerator_count == 0

    def test_false_and_zero_are_said_too(self, tmp_path: Path) -> None:
        settings = read("defaults: {cache: false, retries: 2}\ntasks: {segment: {retries: 0}}", tmp_path)
        segment = FlowTask("segment", (), (), ())
        assert (settings.of(segment).cache, settings.of(segment).retries) == (False, 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("imag: x", "imag: unknown key; did you mean 'image'?"),
        ("tasks: {fech: {}}", "tasks.fech.[key]: unknown value 'fech'; did you mean 'fetch'?"),
        ("defaults: {cpu: lots}", "defaults.cpu: 'lots' is not valid; use a quantity of Kubernetes"),
        ("defaults: {tolerations: [{}]}", "defaults.tolerations.0: a toleration without a key"),
        (
            "defaults: {tolerations: [{key: a, seconds: 3}]}",
            "defaults.tolerations.0: seconds belong to the effect NoExecute",
        ),
        ("workspace: {}", "workspace.size: this key is missing; add it"),
        ("labels: {team: 'a b'}", "labels.team: 'a b' is not valid; use up to 63 letters"),
        ("name: Merge", "name: 'Merge' is not valid; use the name of a Kubernetes object"),
        ("- a", "the file of settings is empty or not a mapping; leave the option out for the defaults"),
        ("a: [", "not valid YAML or JSON: line 1"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        read(text, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'deployment.yaml'}: {sentence}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read"):
        load_settings(tmp_path / "none.yaml")

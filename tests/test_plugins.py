"""Plug-ins are found by their entry points, and a name that is none gets the nearest one."""

import sys
from pathlib import Path

import pytest

from automerge.errors import PluginError
from automerge.plugins import load_plugin, nearest, plugin_names


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with one good and one broken technique, as pip would leave it."""
    metadata = tmp_path / "thirdparty-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[automerge.techniques]\nmine = thirdparty_merging:mine\nbroken = thirdparty_merging_not_there:broken\n"
    )
    (tmp_path / "thirdparty_merging.py").write_text("mine = 'my technique'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("thirdparty_merging", None)


def test_ours_are_entry_points_too() -> None:
    assert set(plugin_names("techniques")) >= {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"}
    assert set(plugin_names("tasks")) >= {"classification", "language_modelling"}
    assert set(plugin_names("models")) >= {"factory", "transformers"}
    assert set(plugin_names("registries")) >= {"mlflow"}


@pytest.mark.usefixtures("third_party")
def test_a_third_party_needs_no_change_here() -> None:
    assert "mine" in plugin_names("techniques")
    assert load_plugin("techniques", "mine") == "my technique"


@pytest.mark.usefixtures("third_party")
def test_a_plug_in_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(PluginError) as caught:
        load_plugin("techniques", "broken", where="search.techniques.0")
    assert str(caught.value) == (
        "search.techniques.0: technique 'broken' cannot be imported: No module named 'thirdparty_merging_not_there'; "
        "install what it needs"
    )


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(PluginError) as caught:
        load_plugin("techniques", "tie", where="search.techniques.2")
    assert str(caught.value) == "search.techniques.2: unknown technique 'tie'; did you mean 'ties'?"
    with pytest.raises(PluginError, match=r"^unknown registry kind 'folder'; choose one of: .*mlflow"):
        load_plugin("registries", "folder")


def test_nearest_lists_all_where_none_is_near() -> None:
    assert nearest("xyz", ["linear", "ties"]) == "choose one of: linear, ties"
    assert nearest("linaer", ["linear", "ties"]) == "did you mean 'linear'?"
    assert nearest("xyz", []) == "choose one of: none installed"

"""The digits example's data, training and files, with a training of seconds instead of half a minute."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from automerge.errors import SpecError, TaskError
from digits import train as digits_train
from digits.cct import build
from digits.train import HALVES, STAMP, Prepared, Stamp, main, prepare, split

QUICK: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "base_epochs": 3, "specialist_epochs": 2}


def quick(folder: Path, seed: int = 0, **changes: Any) -> Prepared:
    return prepare(folder, seed, **{**QUICK, **changes})


def digests(prepared: Prepared) -> dict[str, str]:
    return Stamp.read(prepared.folder / STAMP).files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return quick(tmp_path_factory.mktemp("digits"))


def test_checkpoints_are_plain_state_dicts_of_the_same_network(prepared: Prepared) -> None:
    states = [load_file(path) for path in (prepared.base, *prepared.sources.values())]
    for state in states:
        build(width=16, depth=1, heads=2).load_state_dict(state, strict=True)
    base, low, high = (state["head.weight"] for state in states)
    assert not torch.equal(base, low)
    assert not torch.equal(low, high)


@pytest.mark.parametrize("name", HALVES)
def test_data_files_hold_one_half_of_the_digits_with_their_own_labels(prepared: Prepared, name: str) -> None:
    for path in (prepared.validation[name], prepared.test[name]):
        data = load_file(path)
        assert set(data) == {"inputs", "labels"}
        assert data["inputs"].shape == (len(data["labels"]), 1, 8, 8)
        assert data["inputs"].dtype == torch.float32
        assert data["labels"].dtype == torch.int64
        assert set(data["labels"].tolist()) == set(HALVES[name])
        assert 0.7 < float(data["inputs"].var()) < 1.3


def test_the_parts_are_disjoint_complete_and_stratified() -> None:
    parts = split(seed=3)
    rows = [set(images.rows.tolist()) for images in (parts.training, parts.validation, parts.test)]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797
    assert len(rows[2]) == pytest.approx(0.4 * 1797, abs=1)
    for images in (parts.training, parts.validation, parts.test):
        share = torch.bincount(images.labels, minlength=10) / len(images.labels)
        assert torch.all((share - 0.1).abs() < 0.01)


def test_written_data_share_no_image_between_validation_and_test(prepared: Prepared) -> None:
    # load_digits itself has no two equal images, so equal pixels would mean a row in both parts.
    for name in HALVES:
        seen = {row.numpy().tobytes() for row in load_file(prepared.validation[name])["inputs"]}
        held_out = {row.numpy().tobytes() for row in load_file(prepared.test[name])["inputs"]}
        assert seen.isdisjoint(held_out)


def test_another_seed_splits_anew() -> None:
    assert not torch.equal(split(seed=0).test.rows, split(seed=1).test.rows)


def test_the_same_seed_gives_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    torch.manual_seed(999)  # the caller's generator must not matter
    again = quick(tmp_path)
    assert not again.reused
    assert digests(again) == digests(prepared)


def test_the_callers_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    quick(tmp_path, base_epochs=1, specialist_epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_second_call_trains_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_train, "train", lambda *_: pytest.fail("trained again"))
    again = quick(prepared.folder)
    assert again.reused
    assert again.trained == prepared.trained


@pytest.mark.parametrize("damage", ["changed file", "missing file", "other settings", "unreadable stamp"])
def test_anything_that_does_not_match_is_trained_again(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    once = quick(tmp_path)
    if damage == "changed file":
        once.base.write_bytes(once.base.read_bytes()[:-1] + b"\x7f")
    elif damage == "missing file":
        once.test["high"].unlink()
    elif damage == "unreadable stamp":
        (tmp_path / STAMP).write_text("{")
    again = quick(tmp_path, seed=1 if damage == "other settings" else 0)
    assert not again.reused
    assert (digests(again) == digests(prepared)) == (damage != "other settings")


def test_specialists_forget_the_other_half(tmp_path: Path) -> None:
    trained = quick(tmp_path, base_epochs=15, specialist_epochs=5, specialist_learning_rate=5e-3).trained
    assert trained["base"].test_accuracy["all"] > 0.8
    for own, other in (("low", "high"), ("high", "low")):
        accuracy = trained[own].test_accuracy
        assert accuracy[own] > accuracy[other] + 0.2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"test_share": 1.5}, "cannot be split"),
        ({"validation_share": 0.001}, "cannot be split"),
        ({"base_epochs": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_one_sentence_and_write_nothing(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        quick(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_training_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="diverged"):
        quick(tmp_path, base_learning_rate=1e30)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_passes_folder_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits_train, "prepare", quick)  # the same, only smaller
    assert main([str(tmp_path), "--seed", "2"]) == 0
    assert Stamp.read(tmp_path / STAMP).settings.seed == 2
    assert "ready" in capsys.readouterr().out
    assert main([str(tmp_path), "--seed", "2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_module_runs_on_its_own(tmp_path: Path) -> None:
    examples = Path(digits_train.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "digits.train", "--help"], cwd=examples, capture_output=True, text=True, check=True
    )
    assert "--seed" in done.stdout

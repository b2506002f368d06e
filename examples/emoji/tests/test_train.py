"""Training and files of the emoji example, with drawings made here and a training of seconds: nothing is downloaded."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from automerge.errors import SpecError, StorageError, TaskError
from automerge.spec import load_spec
from emoji import train as emoji_train
from emoji.drawings import VENDORS, Drawing, Drawings
from emoji.parts import CLASSES, TASKS, WHITE
from emoji.resnet import build
from emoji.train import SHIFT, STAMP, Prepared, Stamp, augment, default_cache, main, prepare

QUICK: dict[str, Any] = {"width": 4, "stages": 2, "base_epochs": 2, "specialist_epochs": 1}


def made() -> Drawings:
    """Six concepts of every class, drawn by every vendor: a colour that its class has, and a noise that is its own."""
    subgroups = {name: group[name][0] for group in TASKS.values() for name in group}
    drawings = [
        Drawing(concept=f"{name} {number}", subgroup=subgroups[name], vendor=vendor, icon_set=icon_sets[0])
        for name in CLASSES
        for number in range(6)
        for vendor, icon_sets in VENDORS.items()
    ]
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(len(CLASSES), 3, 1, 1, generator=generator)
    classes = torch.tensor([CLASSES.index(drawing.concept.rsplit(" ", 1)[0]) for drawing in drawings])
    pixels = colours[classes] + 0.2 * torch.rand(len(drawings), 3, 32, 32, generator=generator)
    return Drawings((pixels / 1.2 * 255).to(torch.uint8), drawings, "made")


MADE = made()


@pytest.fixture(autouse=True, scope="module")
def made_drawings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_train, "load_drawings", lambda _: MADE)
        yield


def quick(folder: Path, seed: int = 0, **changes: Any) -> Prepared:
    return prepare(folder, seed, **{**QUICK, **changes})


def digests(prepared: Prepared) -> dict[str, str]:
    return Stamp.read(prepared.folder / STAMP).files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return quick(tmp_path_factory.mktemp("emoji"))


def test_checkpoints_are_plain_state_dicts_of_the_same_network(prepared: Prepared) -> None:
    states = [load_file(path) for path in (prepared.base, *prepared.sources.values())]
    for state in states:
        build(width=4, stages=2).load_state_dict(state, strict=True)
    for name in ("head.weight", "norm.running_mean", "norm.num_batches_tracked"):
        assert not torch.equal(states[0][name], states[1][name]), name
    assert not torch.equal(states[1]["norm.running_mean"], states[2]["norm.running_mean"])


@pytest.mark.parametrize("name", TASKS)
def test_data_files_hold_the_classes_of_one_task(prepared: Prepared, name: str) -> None:
    for path in (prepared.validation[name], prepared.test[name]):
        data = load_file(path)
        assert set(data) == {"inputs", "labels"}
        assert data["inputs"].shape == (len(data["labels"]), 3, 32, 32)
        assert data["inputs"].dtype == torch.float32
        assert data["labels"].dtype == torch.int64
        assert {CLASSES[label] for label in data["labels"].tolist()} == set(TASKS[name])


def test_the_stamp_tells_what_every_model_reached(prepared: Prepared) -> None:
    model = build(width=4, stages=2).eval()
    assert set(prepared.trained) == {"base", *TASKS}
    for name, path in {"base": prepared.base, **prepared.sources}.items():
        model.load_state_dict(load_file(path))
        for task in TASKS:
            for found, data in (
                (prepared.trained[name].validation[task], load_file(prepared.validation[task])),
                (prepared.trained[name].test[task], load_file(prepared.test[task])),
            ):
                with torch.inference_mode():
                    logits = model(data["inputs"])
                assert found.images == len(data["labels"])
                assert found.accuracy == pytest.approx(float((logits.argmax(1) == data["labels"]).double().mean()))
                loss = torch.nn.functional.cross_entropy(logits, data["labels"])
                assert found.loss == pytest.approx(float(loss), rel=1e-4)


def test_the_same_seed_gives_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    torch.manual_seed(999)  # the caller's generator must not matter
    again = quick(tmp_path)
    assert not again.reused
    assert digests(again) == digests(prepared)


def test_the_callers_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    quick(tmp_path, base_epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_second_call_trains_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_train, "train", lambda *_: pytest.fail("trained again"))
    again = quick(prepared.folder)
    assert again.reused
    assert again.trained == prepared.trained
    assert again.held_out == prepared.held_out


@pytest.mark.parametrize("damage", ["changed file", "missing file", "other settings", "unreadable stamp"])
def test_anything_that_does_not_match_is_trained_again(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    once = quick(tmp_path)
    if damage == "changed file":
        once.base.write_bytes(once.base.read_bytes()[:-1] + b"\x7f")
    elif damage == "missing file":
        once.test["organism"].unlink()
    elif damage == "unreadable stamp":
        (tmp_path / STAMP).write_text("{")
    again = quick(tmp_path, seed=1 if damage == "other settings" else 0)
    assert not again.reused
    assert (digests(again) == digests(prepared)) == (damage != "other settings")


def test_other_drawings_are_trained_on_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path)
    changed = Drawings(255 - MADE.pixels, MADE.drawings, "changed")
    monkeypatch.setattr(emoji_train, "load_drawings", lambda _: changed)
    assert not quick(tmp_path).reused


def test_specialists_forget_the_other_task(tmp_path: Path) -> None:
    trained = quick(tmp_path, base_epochs=30, specialist_epochs=10, specialist_learning_rate=5e-3, width=8).trained
    assert min(score.accuracy for score in trained["base"].test.values()) > 0.6
    for own, other in (("organism", "inanimate"), ("inanimate", "organism")):
        test = trained[own].test
        assert test[own].accuracy > test[other].accuracy + 0.3


def test_the_base_stops_when_its_validation_loss_stands_still(tmp_path: Path) -> None:
    # At a rate of nothing the first epoch is the best, but for the statistics: the rate falls once, then it is over.
    trained = quick(tmp_path, base_epochs=50, base_learning_rate=1e-9, base_drops=1, patience=2).trained
    assert 5 <= trained["base"].epochs < 50
    more = quick(tmp_path, base_epochs=50, base_learning_rate=1e-9, base_drops=3, patience=2).trained
    assert more["base"].epochs >= trained["base"].epochs + 4


def test_augmentation_mirrors_and_moves_over_white() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 16, 10] = 1
    moved = augment(image.expand(500, -1, -1, -1))
    assert moved.shape == (500, 3, 32, 32)
    rows, columns = (moved[:, 0] == 1).nonzero()[:, 1:].unbind(dim=1)
    assert len(rows) == 500
    assert set(rows.tolist()) == set(range(16 - SHIFT, 16 + SHIFT + 1))
    assert set(columns.tolist()) == {*range(10 - SHIFT, 10 + SHIFT + 1), *range(21 - SHIFT, 21 + SHIFT + 1)}
    assert set(moved.unique().tolist()) == {0.0, 1.0, torch.tensor(WHITE).item()}
    assert bool((moved == WHITE).any())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": 6}, "cannot be built"),
        ({"validation_share": 0.01}, "cannot be split"),
        ({"base_epochs": 0}, "at least 1"),
        ({"batch_size": 1}, "batch_size at least 2"),
        ({"base_drops": -1}, "base_drops at least 0"),
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
        quick(tmp_path, base_learning_rate=1e30, base_epochs=10)
    assert list(tmp_path.iterdir()) == []


def test_the_drawings_are_in_the_folder_named_or_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def load(folder: Path) -> Drawings:
        asked.append(folder)
        raise StorageError("not here")

    monkeypatch.setattr(emoji_train, "load_drawings", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in (tmp_path / "named", None):
        with pytest.raises(StorageError):
            prepare(tmp_path, drawings=folder)
    assert asked == [tmp_path / "named", tmp_path / "cache" / "automerge-emoji"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "automerge-emoji"


def test_the_spec_reads_what_is_prepared(prepared: Prepared) -> None:
    spec = load_spec(Path(emoji_train.__file__).with_name("spec.yaml"), {"EMOJI": str(prepared.folder)})
    assert spec.base is not None
    assert Path(spec.base.uri) == prepared.base
    assert {source.name: Path(source.uri) for source in spec.sources} == prepared.sources
    for task in spec.tasks:
        assert Path(str(task.validation)) == prepared.validation[task.name]
        assert Path(str(task.test)) == prepared.test[task.name]


def test_the_command_line_passes_folder_seed_and_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(emoji_train, "prepare", quick)  # the same, only smaller
    assert main([str(tmp_path), "--seed", "2", "--drawings", str(tmp_path / "drawings")]) == 0
    stamp = Stamp.read(tmp_path / STAMP)
    assert stamp.settings.seed == 2
    assert "ready" in capsys.readouterr().out
    assert main([str(tmp_path), "--seed", "2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_an_error_is_one_sentence_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Prepared:
        raise StorageError("there is no npm", "install it")

    monkeypatch.setattr(emoji_train, "prepare", fails)
    assert main([str(tmp_path)]) == StorageError.exit_code
    assert capsys.readouterr().err == "error: there is no npm; install it\n"


def test_the_module_runs_on_its_own() -> None:
    examples = Path(emoji_train.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "emoji.train", "--help"], cwd=examples, capture_output=True, text=True, check=True
    )
    assert "--drawings" in done.stdout

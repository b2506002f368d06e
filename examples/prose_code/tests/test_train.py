"""The prose and code example's training and files, with a training of seconds instead of a minute."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from automerge.errors import SpecError, TaskError
from automerge.spec import load_spec
from automerge.tasks.language_modelling import LanguageModelling
from prose_code import train as prose_code_train
from prose_code.corpus import DOMAINS, corpus
from prose_code.gpt import build
from prose_code.train import STAMP, Part, Prepared, Settings, Stamp, draw_batches, main, measure, prepare, split

QUICK: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "heads": 2,
    "test_sequences": 64,
    "validation_sequences": 16,
    "base_steps": 4,
    "cooldown_steps": 2,
    "specialist_steps": 3,
    "batch_size": 4,
}


def quick(folder: Path, seed: int = 0, **changes: Any) -> Prepared:
    return prepare(folder, seed, **{**QUICK, **changes})


def digests(prepared: Prepared) -> dict[str, str]:
    return Stamp.read(prepared.folder / STAMP).files


def settings(prepared: Prepared) -> Settings:
    return Stamp.read(prepared.folder / STAMP).settings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return quick(tmp_path_factory.mktemp("prose_code"))


def test_checkpoints_are_plain_state_dicts_of_the_same_network(prepared: Prepared) -> None:
    states = [load_file(path) for path in (prepared.base, *prepared.sources.values())]
    for state in states:
        build(width=16, depth=1, heads=2).load_state_dict(state, strict=True)
    base, prose, code = (state["head.weight"] for state in states)
    assert not torch.equal(base, prose)
    assert not torch.equal(prose, code)


@pytest.mark.parametrize("domain", DOMAINS)
def test_data_files_hold_windows_of_their_own_domain_and_part(prepared: Prepared, domain: str) -> None:
    parts = split(seed=0)
    for part, path, count in (
        (parts.validation, prepared.validation[domain], 16),
        (parts.test, prepared.test[domain], 64),
    ):
        data = load_file(path)
        assert set(data) == {"inputs.input_ids"}
        ids = data["inputs.input_ids"]
        assert ids.dtype == torch.int64
        assert ids.shape == (count, 64)
        texts = b"\0".join(text.numpy().tobytes() for text in part.texts[domain])
        assert all(bytes(row) in texts for row in ids.tolist())


def test_the_parts_are_disjoint_and_complete_and_a_module_is_in_one_part_for_both_domains() -> None:
    parts = split(seed=3)
    names = [set(part.names) for part in (parts.training, parts.validation, parts.test)]
    every = set().union(*corpus().values())
    assert sum(map(len, names)) == len(set.union(*names)) == len(every)
    assert len(names[2]) == pytest.approx(0.3 * len(every), abs=1)
    assert len(names[1]) == pytest.approx(0.2 * 0.7 * len(every), abs=1)
    for domain in DOMAINS:
        for part, chosen in zip((parts.training, parts.validation, parts.test), names, strict=True):
            texts = [piece for name in chosen for piece in corpus()[domain].get(name, [])]
            assert sum(map(len, part.texts[domain])) == sum(len(text.encode()) for text in texts)


def test_no_sequence_that_is_measured_stands_in_the_training_texts_or_in_both_files(prepared: Prepared) -> None:
    training = split(seed=0).training
    for domain in DOMAINS:
        texts = b"\0".join(text.numpy().tobytes() for text in training.texts[domain])
        files = [load_file(path)["inputs.input_ids"] for path in (prepared.validation[domain], prepared.test[domain])]
        rows = [[bytes(row) for row in ids.tolist()] for ids in files]
        assert not [row for found in rows for row in found if row in texts]
        assert set(rows[0]).isdisjoint(rows[1])


def test_another_seed_splits_anew() -> None:
    assert set(split(seed=0).test.names) != set(split(seed=1).test.names)


def test_batches_have_as_much_of_each_domain_and_never_cross_two_texts(prepared: Prepared) -> None:
    texts = [torch.full((length,), number, dtype=torch.uint8) for number, length in enumerate((70, 64, 10, 80))]
    part = Part(("a",), {"prose": texts, "code": [text + 100 for text in texts]})
    changed = settings(prepared).model_copy(update={"batch_size": 5})
    batches = draw_batches(part, DOMAINS, changed)
    drawn: set[int] = set()
    for _ in range(1000):  # a text of exactly one window is drawn once in 25 times
        batch = next(batches)
        assert batch.shape == (5, 64)
        assert batch.dtype == torch.int64
        assert torch.equal(batch, batch[:, :1].expand_as(batch))
        assert int((batch[:, 0] < 100).sum()) == 2
        drawn |= set(batch[:, 0].tolist())
    assert drawn == {0, 1, 3, 100, 101, 103}


def test_the_same_seed_gives_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    torch.manual_seed(999)  # the caller's generator must not matter
    again = quick(tmp_path)
    assert not again.reused
    assert digests(again) == digests(prepared)


def test_the_callers_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    quick(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_second_call_trains_nothing_and_reads_no_text(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose_code_train, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(prose_code_train, "corpus", lambda: pytest.fail("read the texts again"))
    again = quick(prepared.folder)
    assert again.reused
    assert again.trained == prepared.trained


@pytest.mark.parametrize("damage", ["changed file", "missing file", "other settings", "unreadable stamp"])
def test_anything_that_does_not_match_is_trained_again(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    once = quick(tmp_path)
    if damage == "changed file":
        once.base.write_bytes(once.base.read_bytes()[:-1] + b"\x7f")
    elif damage == "missing file":
        once.test["code"].unlink()
    elif damage == "unreadable stamp":
        (tmp_path / STAMP).write_text("{")
    again = quick(tmp_path, seed=1 if damage == "other settings" else 0)
    assert not again.reused
    assert (digests(again) == digests(prepared)) == (damage != "other settings")


def test_the_base_stops_on_a_plateau_and_then_cools_down(tmp_path: Path) -> None:
    # At this rate nothing is learned: the first look is the best, and the next one is the last.
    found = quick(tmp_path, base_steps=500, base_learning_rate=1e-9, patience=1)
    assert found.trained["base"].steps == 100 + QUICK["cooldown_steps"]
    assert found.trained["prose"].steps == QUICK["specialist_steps"]


def test_specialists_are_better_on_their_own_task_and_forget_the_other(tmp_path: Path) -> None:
    trained = quick(tmp_path, base_steps=60, cooldown_steps=20, specialist_steps=60, batch_size=16, width=32).trained
    chance = 0.2  # about the share of the space
    assert min(trained["base"].test_accuracy.values()) > chance
    for own, other in (("prose", "code"), ("code", "prose")):
        assert trained[own].test_accuracy[own] > trained[other].test_accuracy[own] + 0.05
        assert trained[own].test_loss[own] < trained["base"].test_loss[own]
        assert trained[own].test_loss[other] > trained["base"].test_loss[other]


def test_the_spec_is_valid_and_its_task_measures_what_training_does(prepared: Prepared) -> None:
    spec = load_spec(Path(prose_code_train.__file__).with_name("spec.yaml"), {"PROSE_CODE": str(prepared.folder)})
    assert [task.name for task in spec.tasks] == [source.name for source in spec.sources] == list(DOMAINS)
    model = build(width=16, depth=1, heads=2)
    model.load_state_dict(load_file(prepared.sources["code"]))
    for task_spec in spec.tasks:
        task = LanguageModelling(task_spec)
        data = task.load(Path(str(task_spec.test)))
        with torch.inference_mode():
            logits = model(data.inputs["input_ids"])
        loss = task.loss(logits, data.targets).sum() / task.loss_weights(data.targets).sum()
        measured, _ = measure(model, data.inputs["input_ids"])
        assert float(loss) == pytest.approx(measured, rel=1e-5)
        assert prepared.trained["code"].test_loss[task_spec.name] == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"test_share": 1.5}, "cannot be split"),
        ({"validation_share": 0.0001}, "cannot be split"),
        ({"test_sequences": 1_000_000}, "lower test_sequences"),
        ({"base_steps": 0}, "at least 1"),
        ({"batch_size": 1}, "batch_size"),
        ({"context": 65}, "context"),
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
    monkeypatch.setattr(prose_code_train, "prepare", quick)  # the same, only smaller
    assert main([str(tmp_path), "--seed", "2"]) == 0
    assert settings(quick(tmp_path, 2)).seed == 2
    assert "ready" in capsys.readouterr().out
    assert main([str(tmp_path), "--seed", "2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_module_runs_on_its_own() -> None:
    examples = Path(prose_code_train.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "prose_code.train", "--help"], cwd=examples, capture_output=True, text=True, check=True
    )
    assert "--seed" in done.stdout

"""What a data file must look like, and the one sentence for each way it does not."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from automerge.errors import TaskError
from automerge.tasks.data import TENSOR_SUFFIXES, find_data_file, read_inputs_and_labels, read_texts


def test_safetensors_with_a_lone_input(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file(
        {"inputs": torch.ones(3, 2, dtype=torch.float64), "labels": torch.tensor([0, 1, 2], dtype=torch.int32)}, path
    )
    inputs, labels = read_inputs_and_labels(path)
    assert list(inputs) == ["inputs"]
    assert inputs["inputs"].dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2]


def test_npz_with_named_inputs(tmp_path):
    path = tmp_path / "d.npz"
    big_endian = np.arange(6, dtype=">i8").reshape(3, 2)
    np.savez(path, **{"inputs.input_ids": big_endian, "inputs.mask": np.ones((3, 2), dtype=bool)})
    inputs, labels = read_inputs_and_labels(path)
    assert sorted(inputs) == ["input_ids", "mask"]
    assert inputs["input_ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert labels is None


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"labels": np.zeros(3, int)}, "there are no inputs"),
        ({"inputs": np.zeros((0, 2)), "labels": np.zeros(0, int)}, "the data are empty"),
        (
            {"inputs": np.zeros((3, 2)), "labels": np.zeros(2, int)},
            "differ in their number of samples (inputs 3, labels 2)",
        ),
        (
            {"inputs": np.array([[0.0], [np.nan]]), "labels": np.zeros(2, int)},
            "NaN or infinite values, first in sample 1",
        ),
        ({"inputs": np.zeros((2, 2)), "labels": np.zeros(2)}, "the labels are float64, not integers"),
        ({"inputs": np.zeros((2, 2)), "label": np.zeros(2, int)}, "unknown tensor 'label'"),
        ({"inputs": np.zeros((2, 2)), "inputs.x": np.zeros((2, 2))}, "stands beside other"),
        ({"inputs": np.array(["a", "b"])}, "which no model reads"),
        ({"inputs": np.array([{}, {}], dtype=object)}, "Python objects, which are not read"),
    ],
)
def test_unusable_data_are_one_sentence_that_names_the_file(tmp_path, arrays, sentence):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(TaskError) as error:
        read_inputs_and_labels(path)
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


@pytest.mark.parametrize("suffix", TENSOR_SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04cut off"])
def test_damaged_files(tmp_path, suffix, content):
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    with pytest.raises(TaskError, match="not a") as error:
        read_inputs_and_labels(path)
    assert str(path) in str(error.value)


def test_a_single_array_in_place_of_an_npz_file(tmp_path):
    path = tmp_path / "d.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TaskError, match="not an npz file"):
        read_inputs_and_labels(path)


def test_a_folder_stands_for_its_only_data_file(tmp_path):
    (tmp_path / "README.md").write_text("notes")
    with pytest.raises(TaskError, match="holds 0 data files"):
        find_data_file(tmp_path, TENSOR_SUFFIXES)
    (tmp_path / "a.npz").touch()
    assert find_data_file(tmp_path, TENSOR_SUFFIXES) == tmp_path / "a.npz"
    (tmp_path / "b.npz").touch()
    with pytest.raises(TaskError, match="holds 2 data files"):
        find_data_file(tmp_path, TENSOR_SUFFIXES)
    with pytest.raises(TaskError, match="no such data file"):
        find_data_file(tmp_path / "c.npz", TENSOR_SUFFIXES)
    with pytest.raises(TaskError, match="are not read here"):
        find_data_file(tmp_path / "README.md", TENSOR_SUFFIXES)


def test_texts(tmp_path):
    lines = tmp_path / "d.jsonl"
    # A line separator inside a JSON string does not end the line.
    lines.write_text('{"text": "one\u2028two", "id": 3}\n\n{"text": "three"}\n{"text": " "}\n', encoding="utf-8")
    assert read_texts(lines) == ["one\u2028two", "three"]
    plain = tmp_path / "d.txt"
    plain.write_text("a\nb\n")
    assert read_texts(plain) == ["a\nb\n"]
    for content, sentence in (
        (b'{"text": "a"}\n{"texts": 1}\n', "line 2 is not"),
        (b"\n", "empty"),
        (b"\xff", "not UTF-8"),
    ):
        lines.write_bytes(content)
        with pytest.raises(TaskError, match=sentence):
            read_texts(lines)

"""Reading a task's data files: named tensors from safetensors and npz, texts from jsonl and txt."""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from automerge.errors import TaskError

TENSOR_SUFFIXES = (".safetensors", ".npz")
TEXT_SUFFIXES = (".jsonl", ".txt")


def find_data_file(path: Path, suffixes: tuple[str, ...]) -> Path:
    """The data file at a path, or the only one in the folder at that path.

    Raises:
        TaskError: there is none, there are several, or it has another suffix.
    """
    kinds = ", ".join(suffixes)
    if path.is_dir():
        found = sorted(item for item in path.iterdir() if item.is_file() and item.suffix in suffixes)
        if len(found) != 1:
            names = f" ({', '.join(item.name for item in found[:3])}, ...)" if found else ""
            raise TaskError(
                f"{path}: the folder holds {len(found)} data files{names} where one is expected",
                f"name the file, of one of these kinds: {kinds}",
            )
        return found[0]
    if not path.is_file():
        raise TaskError(f"{path}: no such data file", "check the task's data path")
    if path.suffix not in suffixes:
        raise TaskError(f"{path}: data of the kind {path.suffix!r} are not read here", f"use one of: {kinds}")
    return path


def read_inputs_and_labels(path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors ``inputs`` or ``inputs.<name>``, and ``labels``, of a safetensors or npz file.

    Inputs are [n, ...] with n >= 1; float64 becomes float32. Labels become int64. No pickle is read.

    Returns:
        The inputs by name (``inputs`` for a lone one), and the labels or None.

    Raises:
        TaskError: damaged, empty, a tensor of another name, lengths that differ, NaN or infinite inputs, labels that
            are not integers.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    inputs: dict[str, Tensor] = {}
    labels: Tensor | None = None
    for name in sorted(tensors):
        tensor = tensors[name]
        if name == "labels":
            labels = tensor
        elif name == "inputs" or (name.startswith("inputs.") and name != "inputs."):
            inputs[name.removeprefix("inputs.")] = tensor
        else:
            raise TaskError(f"{path}: unknown tensor {name!r}", "name them 'inputs' or 'inputs.<name>', and 'labels'")
    if not inputs:
        raise TaskError(f"{path}: there are no inputs", "store them as 'inputs' or 'inputs.<name>'")
    if "inputs" in inputs and len(inputs) > 1:
        raise TaskError(f"{path}: 'inputs' stands beside other 'inputs.<name>'", "name each 'inputs.<name>'")
    columns = {**inputs, **({} if labels is None else {"labels": labels})}
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise TaskError(
            f"{path}: the tensors differ in their number of samples ({listed})", "store one row for each sample"
        )
    if 0 in lengths.values():
        raise TaskError(f"{path}: the data are empty", "give at least one sample")
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor.reshape(len(tensor), -1)).all(dim=1)).nonzero()[0])
            raise TaskError(
                f"{path}: {name} has NaN or infinite values, first in sample {row}", "mend or drop the sample"
            )
        if tensor.dtype == torch.float64:
            inputs[name] = tensor.float()
    if labels is not None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            found = str(labels.dtype).removeprefix("torch.")
            raise TaskError(f"{path}: the labels are {found}, not integers", "store class numbers as int64")
        labels = labels.long()
    return inputs, labels


def read_texts(path: Path) -> list[str]:
    """The documents of a jsonl file (``{"text": ...}`` a line), or a txt file as one document. Blank ones are dropped.

    Raises:
        TaskError: not UTF-8, a line that is not such an object, or no text at all.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise TaskError(f"{path}: cannot be read ({reason})", "store it as UTF-8 text") from None
    if path.suffix == ".txt":
        texts = [content]
    else:
        texts = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                value = None
            if not (isinstance(value, dict) and isinstance(value.get("text"), str)):
                raise TaskError(f'{path}: line {number} is not an object {{"text": "..."}}', "mend that line")
            texts.append(value["text"])
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TaskError(f"{path}: the data are empty", "give at least one text")
    return texts


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise TaskError(f"{path}: not a readable safetensors file ({error})", "write it again") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    remedy = "store plain arrays with numpy.savez"
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise TaskError(f"{path}: not an npz file but a single array", remedy)
        with archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        problem = "it holds Python objects, which are not read" if "allow_pickle" in str(error) else str(error)
        raise TaskError(f"{path}: not a readable npz file ({problem})", remedy) from None
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        try:
            # Native byte order and positive strides, which torch needs.
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
        except TypeError:
            raise TaskError(
                f"{path}: {name} has the dtype {array.dtype}, which no model reads", "store numbers"
            ) from None
    return tensors

"""Task kind ``language_modelling``: logits [n, T, vocabulary] against the tokens that they predict."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from automerge.errors import MissingExtraError, TaskError
from automerge.models.architecture import short_reason
from automerge.spec import TaskSpec
from automerge.tasks.data import TENSOR_SUFFIXES, TEXT_SUFFIXES, find_data_file, read_inputs_and_labels, read_texts
from automerge.tasks.task import Metric, Ratio, Task, TaskData, to_column

IGNORED = -100
"""The label of a position without a target, as torch and transformers have it."""

_MASKS = ("attention_mask", "decoder_attention_mask")

_CHUNK_ELEMENTS = 2**24
"""Logits turned to float32 at a time when nothing is differentiated: 64 MB, whatever the vocabulary and the batch."""


class LanguageModelling(Task):
    """Cross-entropy a token (nats); the share of tokens predicted, and perplexity.

    Data: texts (jsonl with ``{"text": ...}`` a line, or txt as one document), tokenised with the tokenizer of the
        reference's checkpoint; or safetensors or npz with ``inputs.input_ids`` (or ``inputs``) [n, T], optionally
        ``inputs.attention_mask`` and, for encoder-decoders, ``inputs.decoder_input_ids``, and ``labels`` [n, T] (-100:
        no target). Without labels the targets are the input tokens. Padding is never a target.

    Arguments:
        sequence_length: tokens a sample of text data (512).
        pack: text data: join the documents, with an end token between them, and cut them into full samples (true);
            false starts each document in a sample of its own. A document that is too long goes on in a further sample.
        shift: the logits at a position predict the label of the next (true; false where data have decoder_input_ids,
            whose labels stand where the logits do).
    """

    LOSSES = ("cross_entropy",)
    METRICS = (Metric("token_accuracy", True), Metric("perplexity", False, "perplexity"), Metric("loss", False, "loss"))
    DEFAULT_METRICS = ("token_accuracy", "perplexity")
    ARGUMENTS = ("sequence_length", "pack", "shift")

    def __init__(self, spec: TaskSpec, tokenizer_folder: Path | None = None) -> None:
        super().__init__(spec, tokenizer_folder)
        length = spec.arguments.get("sequence_length", 512)
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise TaskError(
                f"tasks.{spec.name}.arguments.sequence_length: expected a whole number of at least 2, got {length!r}",
                "set the number of tokens a sample",
            )
        for key in ("pack", "shift"):
            if not isinstance(spec.arguments.get(key, True), bool):
                raise TaskError(
                    f"tasks.{spec.name}.arguments.{key}: expected true or false, got {spec.arguments[key]!r}",
                    "set true or false",
                )
        self._length = length
        self._pack: bool = spec.arguments.get("pack", True)
        self._shift: bool | None = spec.arguments.get("shift")

    def load(self, path: Path) -> TaskData:
        """See ``Task.load``.

        Targets: ``labels`` int64 [n, T], moved so that they stand where the logits that predict them do, -100 for none.
        Keys: of texts, those of the documents, whatever samples they are cut into; of tokens, those of the rows without
        padding.
        """
        file = find_data_file(path, TENSOR_SUFFIXES + TEXT_SUFFIXES)
        if file.suffix in TEXT_SUFFIXES:
            labels: Tensor | None = None
            keys: list[tuple[str, ...]] | None
            inputs, keys = self._tokenised(file)
        else:
            inputs, labels = read_inputs_and_labels(file)
            if list(inputs) == ["inputs"]:
                inputs = {"input_ids": inputs["inputs"]}
            keys = None
        targets = {"labels": self._targets(file, inputs, labels)}
        return TaskData(inputs, targets, _keys_of_rows(inputs) if keys is None else keys)

    def loss(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each sample, summed over its tokens: float32 [n]. See ``Task.loss``."""
        labels = self._checked(logits, targets)
        parts = [
            F.cross_entropy(part.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none").sum(dim=1)
            for part, wanted in _chunks(logits, labels)
        ]
        return torch.cat(parts)

    def soft_metric(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The probability of the target token, summed over the tokens of each sample: float32 [n]."""
        labels = self._checked(logits, targets)
        parts = [
            torch.where(
                wanted == IGNORED,
                0.0,
                part.float().softmax(dim=-1).gather(-1, wanted.clamp_min(0).unsqueeze(-1)).squeeze(-1),
            ).sum(dim=1)
            for part, wanted in _chunks(logits, labels)
        ]
        return torch.cat(parts)

    def guess_loss(self, data: TaskData) -> float:
        """The entropy of the target tokens' own frequencies."""
        return self.chance("loss", data)

    def loss_weights(self, targets: dict[str, Tensor]) -> Tensor:
        """The number of target tokens of each sample [n]."""
        return (targets["labels"] != IGNORED).sum(dim=1).float()

    def metric_ratios(self, logits: Tensor, targets: dict[str, Tensor], losses: Ratio) -> dict[str, Ratio]:
        """See ``Task.metric_ratios``."""
        labels = self._checked(logits, targets)
        tokens = losses.denominator
        ratios = {"perplexity": replace(losses, transform="exp"), "loss": losses}
        names = [metric.name for metric in self.metrics]
        if "token_accuracy" in names:
            # No label equals IGNORED here by chance: an argmax is never negative.
            ratios["token_accuracy"] = Ratio(to_column((logits.argmax(dim=-1) == labels).sum(dim=1)), tokens)
        return {name: ratios[name] for name in names}

    def chance(self, metric: str, data: TaskData) -> float:
        """The share of the most frequent target token; for losses, those of the target tokens' own frequencies."""
        labels = data.targets["labels"]
        counts = torch.unique(labels[labels != IGNORED], return_counts=True)[1].double()
        shares = counts / counts.sum()
        if metric == "token_accuracy":
            return float(shares.max())
        entropy = float(-(shares * shares.log()).sum())
        return float(np.exp(entropy)) if metric == "perplexity" else entropy

    def _checked(self, logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
        labels = targets["labels"]
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise self.unfit(
                f"the model returned {list(logits.shape)} for targets {list(labels.shape)}, "
                "not [samples, tokens, vocabulary]",
                "use a model with a language modelling head",
            )
        if labels.numel() and int(labels.max()) >= logits.shape[2]:
            raise self.unfit(
                f"the data have the token {int(labels.max())} and the model only {logits.shape[2]} outputs",
                "use the tokenizer of this model",
            )
        return labels

    def _targets(self, file: Path, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        decoder = "decoder_input_ids" in inputs
        key = "decoder_input_ids" if decoder else "input_ids"
        ids = inputs.get(key)
        if labels is None:
            if decoder or ids is None:
                raise TaskError(f"{file}: there are no labels", "store the target tokens as 'labels'")
            if ids.is_floating_point():
                raise TaskError(f"{file}: the input_ids are not integers", "store token ids as int64")
            labels = ids.long()
        if labels.ndim != 2:
            raise TaskError(f"{file}: the labels have the shape {list(labels.shape)}", "store [samples, tokens]")
        if ids is not None and labels.shape != ids.shape:
            raise TaskError(
                f"{file}: the labels {list(labels.shape)} do not fit {key} {list(ids.shape)}",
                "store a label for each token",
            )
        if bool(((labels < 0) & (labels != IGNORED)).any()):
            raise TaskError(f"{file}: a label is negative", f"use {IGNORED} for positions without a target")
        mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
        real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        if real.shape != labels.shape:
            raise TaskError(
                f"{file}: the attention mask {list(real.shape)} does not fit the labels", "store [n, T] for both"
            )
        if self._shift if self._shift is not None else not decoder:
            # The last position predicts nothing, nor does padding.
            wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            real = real & F.pad(real[:, 1:], (0, 1), value=False)
        else:
            wanted = labels
        wanted = wanted.masked_fill(~real, IGNORED)
        empty = ~(wanted != IGNORED).any(dim=1)
        if bool(empty.any()):
            raise TaskError(f"{file}: sample {int(empty.nonzero()[0])} has no token to predict", "drop the sample")
        return wanted

    def _tokenised(self, file: Path) -> tuple[dict[str, Tensor], list[tuple[str, ...]]]:
        """The inputs, and for each sample the keys of the documents that begin in it."""
        tokenizer = _tokenizer(file, self.tokenizer_folder)
        texts = read_texts(file)
        documents: list[list[int]] = [list(tokenizer(text, add_special_tokens=True)["input_ids"]) for text in texts]
        keys = [hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
        if self._pack:
            end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
            joined: list[int] = []
            begun: dict[int, tuple[str, ...]] = {}
            for document, key in zip(documents, keys, strict=True):
                sample = len(joined) // self._length
                begun[sample] = (*begun.get(sample, ()), key)
                joined += document if not end or document[-1:] == end else document + end
            streams = [(joined, begun)]
        else:
            streams = [(document, {0: (key,)}) for document, key in zip(documents, keys, strict=True)]
        windows = [
            (stream[start : start + self._length], begins.get(start // self._length, ()))
            for stream, begins in streams
            for start in range(0, len(stream), self._length)
        ]
        # A single token predicts nothing.
        windows = [(window, begins) for window, begins in windows if len(window) > 1]
        if not windows:
            raise TaskError(f"{file}: no text has two tokens", "give longer texts")
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        inputs = _padded(
            [window for window, _ in windows],
            0 if padding is None else int(padding),
            max(len(window) for window, _ in windows),
        )
        return inputs, [begins for _, begins in windows]


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels in pieces of a bounded size, or in one where a graph holds them all anyhow."""
    rows = len(logits) if torch.is_grad_enabled() else max(1, _CHUNK_ELEMENTS // max(1, logits[0].numel()))
    return zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)


def _keys_of_rows(inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """A key for each row, of what its masks leave: not of the padding, nor of its width."""
    masks = {name: tensor.bool().cpu() for name, tensor in inputs.items() if name in _MASKS}
    columns = {name: inputs[name].cpu() for name in sorted(inputs) if name not in masks}
    keys: list[tuple[str, ...]] = []
    for row in range(len(next(iter(inputs.values())))):
        hasher = hashlib.sha256()
        for name, column in columns.items():
            values = column[row]
            mask = masks.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
            if mask is not None and values.shape[:1] == mask[row].shape:
                values = values[mask[row]]
            # One token is the same in every integer dtype.
            values = values if values.is_floating_point() or values.is_complex() else values.long()
            hasher.update(f"{name} {values.dtype} {list(values.shape)};".encode())
            hasher.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append((hasher.hexdigest(),))
    return keys


def _padded(windows: Sequence[Sequence[int]], padding: int, length: int) -> dict[str, Tensor]:
    """Token ids [n, length] padded on the right, and the attention mask where there is padding."""
    ids = torch.full((len(windows), length), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
        mask[row, : len(window)] = 1
    return {"input_ids": ids} if bool(mask.all()) else {"attention_mask": mask, "input_ids": ids}


def _tokenizer(file: Path, folder: Path | None) -> Any:
    """The tokenizer of a checkpoint folder; the network is not used, and no code from the folder is run."""
    if folder is None:
        raise TaskError(
            f"{file}: text data need a tokenizer, and this model has none", "store token ids as 'inputs.input_ids'"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("text data", "transformers") from None
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")):
        raise TaskError(f"{folder}: there is no tokenizer in this checkpoint, and {file.name} is text", "add its files")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise TaskError(f"{folder}: the tokenizer cannot be loaded: {short_reason(error)}", "mend its files") from error

"""Data and training of the prose and code example: a base for both, and two specialists that each forget the other's.

The texts are those of the Python installation (``corpus.py``), the tokens are bytes. Each seed splits the documents
anew into a test part, a validation part and a training part; the code of a module and the prose of its docstrings are
one document, and so in one part. The base learns prose and code in equal amounts; the specialists go on from it,
``prose`` with the one and ``code`` with the other.

Run as ``python -m prose_code.train FOLDER --seed 0``.
"""

import argparse
import copy
import hashlib
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from automerge.documents import Document, Model, write_atomically
from automerge.errors import AutoMergeError, SpecError, TaskError
from prose_code.corpus import DOMAINS, RUN, corpus
from prose_code.gpt import VOCABULARY, build

# Nats a token, and steps: what the base's validation loss must have fallen by, and how often it is looked at.
LEAST_PROGRESS = 0.02
INTERVAL = 50

# Steps in which a learning rate rises from zero: the first steps of AdamW are as long as all others, and blind.
WARM_UP = 20

STAMP = "prepared.json"


class Settings(Model):
    """Everything that decides what is trained; equal settings give equal files on one machine.

    ``validation_share`` is a share of the documents that the test part leaves, and so many ``sequences`` of ``context``
    tokens are drawn from a part for each task. ``base_steps`` is a limit: the base leaves its constant learning rate
    when its validation loss has not improved for ``patience`` times ``INTERVAL`` steps, and ``cooldown_steps`` follow.
    Specialists run for ``specialist_steps``. The texts are those of ``python_version``.
    """

    seed: int
    test_share: float
    validation_share: float
    test_sequences: int
    validation_sequences: int
    context: int
    width: int
    depth: int
    heads: int
    base_steps: int
    cooldown_steps: int
    base_learning_rate: float
    patience: int
    specialist_steps: int
    specialist_learning_rate: float
    batch_size: int
    weight_decay: float
    threads: int
    torch_version: str
    python_version: str


class Trained(Model):
    """One trained model: steps run, wall time in seconds, and what it reaches on each task's test data.

    Accuracy is the share of the tokens that it predicts, loss the cross entropy a token in nats.
    """

    steps: int
    seconds: float
    test_accuracy: dict[str, float]
    test_loss: dict[str, float]


class Stamp(Document):
    """``prepared.json``: the settings, the sha256 of every file by its relative path, and what came out."""

    FORMAT: ClassVar[str] = "automerge.example.prose_code"

    settings: Settings
    files: dict[str, str]
    trained: dict[str, Trained]


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` leaves in its folder.

    Attributes:
        folder: where everything is.
        base: state dict of the base.
        sources: state dict of each specialist, by name (``prose``, ``code``).
        validation: data file for the search, by specialist.
        test: data file for the final figures, by specialist.
        trained: what each model reached, by name.
        reused: True when an earlier run's files were found intact and nothing was trained.
    """

    folder: Path
    base: Path
    sources: dict[str, Path]
    validation: dict[str, Path]
    test: dict[str, Path]
    trained: dict[str, Trained]
    reused: bool


@dataclass(frozen=True)
class Part:
    """Some documents: their names, and by domain the token ids uint8 [length] of each piece of their text."""

    names: tuple[str, ...]
    texts: dict[str, list[Tensor]]


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of the corpus."""

    training: Part
    validation: Part
    test: Part


def split(seed: int = 0, test_share: float = 0.3, validation_share: float = 0.2) -> Split:
    """Split the documents into test, validation (a share of the rest) and training parts.

    Raises:
        SpecError: a share leaves some part without a document.
        TaskError: this Python came without the texts.
    """
    texts = corpus()
    names = sorted(set().union(*texts.values()))
    order = [names[row] for row in np.random.default_rng(seed).permutation(len(names))]
    test = round(test_share * len(order))
    validation = round(validation_share * (len(order) - test))
    if min(test, validation, len(order) - test - validation) < 1:
        raise SpecError(
            f"{len(order)} documents cannot be split by test share {test_share} and validation share "
            f"{validation_share}",
            "choose shares between 0 and 1 that leave each part some documents",
        )

    def part(chosen: list[str]) -> Part:
        pieces = {domain: [piece for name in chosen for piece in texts[domain].get(name, [])] for domain in DOMAINS}
        return Part(tuple(chosen), {domain: [tokens(piece) for piece in found] for domain, found in pieces.items()})

    return Split(
        training=part(order[test + validation :]),
        validation=part(order[test : test + validation]),
        test=part(order[:test]),
    )


def tokens(text: str) -> Tensor:
    """Token ids uint8 [length]: the bytes of UTF-8."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def prepare(
    folder: Path,
    seed: int = 0,
    test_share: float = 0.3,
    validation_share: float = 0.2,
    *,
    test_sequences: int = 1024,
    validation_sequences: int = 128,
    context: int = 64,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    base_steps: int = 1500,
    cooldown_steps: int = 200,
    base_learning_rate: float = 6e-3,
    patience: int = 3,
    specialist_steps: int = 400,
    specialist_learning_rate: float = 8e-3,
    batch_size: int = 32,
    weight_decay: float = 0.05,
    threads: int = 1,
) -> Prepared:
    """Train the base and both specialists and write them and their data into ``folder``.

    Writes ``base.safetensors``, ``prose.safetensors`` and ``code.safetensors`` (plain state dicts of
    ``prose_code.gpt.build(256, width, depth, heads)``) and ``data/{prose,code}-{validation,test}.safetensors`` with the
    tensor ``inputs.input_ids`` int64 [n, context]. ``prepared.json`` is written last; when it is there, has these
    settings, and every file still has its digest, nothing is trained.

    The base has a constant learning rate until its validation loss stands still, and then one that falls linearly to
    zero (warm-up, stable, decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395), so that the plateau need not be
    foreseen. A specialist has the usual fine-tuning schedule, a cosine from ``specialist_learning_rate`` to zero. Both
    keep their last step. ``threads`` is part of the settings because the order of a sum, and so the last bits of every
    weight, depends on it; the models are too small to gain from more than one.

    Raises:
        SpecError: settings that no training can follow.
        TaskError: training diverged, or this Python came without the texts.
    """
    settings = Settings(
        seed=seed,
        test_share=test_share,
        validation_share=validation_share,
        test_sequences=test_sequences,
        validation_sequences=validation_sequences,
        context=context,
        width=width,
        depth=depth,
        heads=heads,
        base_steps=base_steps,
        cooldown_steps=cooldown_steps,
        base_learning_rate=base_learning_rate,
        patience=patience,
        specialist_steps=specialist_steps,
        specialist_learning_rate=specialist_learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        threads=threads,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
    )
    counts = (test_sequences, validation_sequences, base_steps, cooldown_steps, patience, specialist_steps, threads)
    if min(counts) < 1:
        raise SpecError("sequences, steps, patience and threads must be at least 1", "raise the one below 1")
    if batch_size < len(DOMAINS) or not 2 <= context <= RUN:
        raise SpecError(
            f"batch_size must be at least {len(DOMAINS)} and context from 2 to {RUN}, not {batch_size} and {context}",
            "change the one that is not",
        )
    stamp = intact(folder, settings)
    reused = stamp is not None
    if stamp is None:
        stamp = train(folder, settings)
    return Prepared(
        folder=folder,
        base=folder / "base.safetensors",
        sources={name: folder / f"{name}.safetensors" for name in DOMAINS},
        validation={name: folder / "data" / f"{name}-validation.safetensors" for name in DOMAINS},
        test={name: folder / "data" / f"{name}-test.safetensors" for name in DOMAINS},
        trained=stamp.trained,
        reused=reused,
    )


def intact(folder: Path, settings: Settings) -> Stamp | None:
    """The stamp of an earlier run with these settings whose files are all unchanged, or None."""
    path = folder / STAMP
    if not path.exists():
        return None
    try:
        stamp = Stamp.read(path)
    except SpecError:
        return None  # another release's stamp: train anew and replace it
    if stamp.settings != settings:
        return None
    for name, digest in stamp.files.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            return None
    return stamp


def train(folder: Path, settings: Settings) -> Stamp:
    """Train all three models, then write every file, the stamp last: a failed training leaves the folder as it was."""
    parts = split(settings.seed, settings.test_share, settings.validation_share)
    validation = draw_windows(parts.validation, settings.validation_sequences, settings, "validation")
    test = draw_windows(parts.test, settings.test_sequences, settings, "test")
    contents: dict[str, bytes] = {}
    trained: dict[str, Trained] = {}
    for part, windows in (("validation", validation), ("test", test)):
        for domain in DOMAINS:
            contents[f"data/{domain}-{part}.safetensors"] = save({"inputs.input_ids": windows[domain]})
    with reproducible(settings.seed, settings.threads):
        try:
            base = build(VOCABULARY, settings.width, settings.depth, settings.heads)
        except ValueError as error:
            raise SpecError(f"the network cannot be built: {error}", "change width, depth or heads") from None
        started = time.perf_counter()
        steps = fit_to_plateau(base, parts.training, validation, settings)
        trained["base"] = report("base", base, test, steps, started)
        contents["base.safetensors"] = save(base.state_dict())
        for domain in DOMAINS:
            specialist = copy.deepcopy(base)
            started = time.perf_counter()
            fine_tune(specialist, parts.training, domain, settings)
            trained[domain] = report(domain, specialist, test, settings.specialist_steps, started)
            contents[f"{domain}.safetensors"] = save(specialist.state_dict())
    (folder / STAMP).unlink(missing_ok=True)  # from here on an old stamp would vouch for files being replaced
    for name, content in contents.items():
        write_atomically(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    stamp = Stamp(settings=settings, files=digests, trained=trained)
    stamp.write(folder / STAMP)
    return stamp


def draw_windows(part: Part, count: int, settings: Settings, name: str) -> dict[str, Tensor]:
    """``count`` windows of each domain, drawn from those that do not overlap: int64 [count, context].

    Raises:
        SpecError: the part has not so many.
    """
    generator = np.random.default_rng(settings.seed)
    drawn = {}
    for domain in DOMAINS:
        length = settings.context
        windows = torch.cat([text[: len(text) // length * length].view(-1, length) for text in part.texts[domain]])
        if len(windows) < count:
            raise SpecError(
                f"the {name} part has {len(windows)} sequences of {domain}, not {count}",
                f"lower {name}_sequences or raise {name}_share",
            )
        drawn[domain] = windows[np.sort(generator.permutation(len(windows))[:count])].long()
    return drawn


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and fix its thread count; the caller's generator and thread count come back afterwards."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def fit_to_plateau(model: nn.Module, training: Part, validation: dict[str, Tensor], settings: Settings) -> int:
    """Train on all domains until the validation loss stops falling, then cool down; returns the steps run."""
    optimizer = adamw(model, settings.base_learning_rate, settings)
    batches = draw_batches(training, DOMAINS, settings)
    best_loss, best_step, step = float("inf"), 0, 0
    for step in range(1, settings.base_steps + 1):
        descend(model, next(batches), optimizer, settings.base_learning_rate * min(1.0, step / WARM_UP))
        if step % INTERVAL == 0:
            loss = sum(measure(model, windows)[0] for windows in validation.values()) / len(validation)
            if loss < best_loss - LEAST_PROGRESS:
                best_loss, best_step = loss, step
            elif step - best_step >= settings.patience * INTERVAL:
                break
    for left in reversed(range(settings.cooldown_steps)):
        descend(model, next(batches), optimizer, settings.base_learning_rate * (left + 1) / settings.cooldown_steps)
    return step + settings.cooldown_steps


def fine_tune(model: nn.Module, training: Part, domain: str, settings: Settings) -> None:
    """Train on one domain, the learning rate falling along a cosine to zero."""
    optimizer = adamw(model, settings.specialist_learning_rate, settings)
    batches = draw_batches(training, [domain], settings)
    for step in range(1, settings.specialist_steps + 1):
        cosine = (1 + np.cos(np.pi * step / settings.specialist_steps)) / 2
        descend(model, next(batches), optimizer, settings.specialist_learning_rate * cosine * min(1.0, step / WARM_UP))


def adamw(model: nn.Module, learning_rate: float, settings: Settings) -> torch.optim.Optimizer:
    """AdamW with the second moment of a short training: that of the default spans a thousand steps."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )


def draw_batches(part: Part, domains: Sequence[str], settings: Settings) -> Iterator[Tensor]:
    """Batches without end, int64 [batch_size, context]: windows from anywhere in a text, of each domain as many."""
    text = {domain: torch.cat(part.texts[domain]) for domain in domains}
    starts = {domain: window_starts(part.texts[domain], settings.context) for domain in domains}
    reach = torch.arange(settings.context)
    while True:
        rows = []
        for number, domain in enumerate(domains):
            share = (settings.batch_size + number) // len(domains)
            chosen = starts[domain][torch.randint(len(starts[domain]), (share,))]
            rows.append(text[domain][chosen[:, None] + reach])
        yield torch.cat(rows).long()


def window_starts(texts: Iterable[Tensor], length: int) -> Tensor:
    """Where in the joined texts a window of ``length`` can start that lies in one text: int64 [windows]."""
    starts, offset = [], 0
    for text in texts:
        starts.append(torch.arange(offset, offset + max(0, len(text) - length + 1)))
        offset += len(text)
    return torch.cat(starts)


def descend(model: nn.Module, windows: Tensor, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step on windows int64 [n, T]."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    if not torch.isfinite(loss):
        raise TaskError("training diverged: the loss is no longer finite", "lower the learning rate")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def measure(model: nn.Module, windows: Tensor) -> tuple[float, float]:
    """Mean cross entropy (nats a token) and the share of tokens predicted; every token of a window but its first."""
    with torch.inference_mode():
        logits = model(windows[:, :-1]).flatten(0, 1)
        targets = windows[:, 1:].flatten()
        loss = F.cross_entropy(logits, targets)
        accuracy = (logits.argmax(dim=1) == targets).double().mean()
    return float(loss), float(accuracy)


def report(name: str, model: nn.Module, test: dict[str, Tensor], steps: int, started: float) -> Trained:
    """What a model reached on test data; one line of it goes to stderr."""
    seconds = round(time.perf_counter() - started, 2)
    measured = {domain: measure(model, windows) for domain, windows in test.items()}
    shown = ", ".join(f"{domain} {100 * accuracy:.1f} % ({loss:.3f})" for domain, (loss, accuracy) in measured.items())
    print(f"{name}: {steps} steps in {seconds:.1f} s; test accuracy (loss): {shown}", file=sys.stderr, flush=True)
    return Trained(
        steps=steps,
        seconds=seconds,
        test_accuracy={domain: accuracy for domain, (_, accuracy) in measured.items()},
        test_loss={domain: loss for domain, (loss, _) in measured.items()},
    )


def main(arguments: list[str] | None = None) -> int:
    """``python -m prose_code.train FOLDER --seed 0``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m prose_code.train", description="Train the prose and code example's models."
    )
    parser.add_argument("folder", type=Path, help="where checkpoints and data are written")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial weights and the batches")
    options = parser.parse_args(arguments)
    try:
        prepared = prepare(options.folder, seed=options.seed)
    except AutoMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{prepared.folder}: {'nothing to do, all files are intact' if prepared.reused else 'ready'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

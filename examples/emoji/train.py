"""Training of the emoji example: one base for eleven classes, two specialists that each forget the other's.

The images are emoji of several vendors (``drawings.py``), split anew by each seed (``parts.py``). The base learns all
classes from a share of the training images. The specialists go on from it with all training images of their own task,
``organism`` with animals and plants, ``inanimate`` with vehicles, food and tools. Each becomes better at its own task
than the base and useless at the other.

Run as ``python -m emoji.train FOLDER --seed 0``.
"""

import argparse
import copy
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from automerge.documents import Document, Model, write_atomically
from automerge.errors import AutoMergeError, SpecError, TaskError
from emoji.drawings import load_drawings
from emoji.parts import CLASSES, TASKS, WHITE, Images, Split, split
from emoji.resnet import build

# Nats. A smaller fall of the validation loss is noise.
LEAST_PROGRESS = 1e-3

SHIFT = 3
"""Pixels by which a training image is moved at most, in each direction."""

STAMP = "prepared.json"


class Settings(Model):
    """Everything that decides what is trained; equal settings give equal files on one machine.

    The base's learning rate falls to a quarter when its validation loss has not improved for ``patience`` epochs, and
    training stops when it has fallen ``base_drops`` times and comes to rest again, or after ``base_epochs``.
    Specialists run for ``specialist_epochs``. ``drawings`` is the digest of the drawings.
    """

    seed: int
    drawings: str
    validation_share: float
    base_share: float
    width: int
    depth: int
    stages: int
    base_epochs: int
    base_learning_rate: float
    base_drops: int
    patience: int
    specialist_epochs: int
    specialist_learning_rate: float
    batch_size: int
    weight_decay: float
    threads: int
    torch_version: str


class Score(Model):
    """One model on one part of one task: images, mean cross entropy in nats, top-1 accuracy as a share of one."""

    images: int
    loss: float
    accuracy: float


class Trained(Model):
    """One trained model: epochs run, wall time in seconds, and scores by task."""

    epochs: int
    seconds: float
    validation: dict[str, Score]
    test: dict[str, Score]


class Stamp(Document):
    """``prepared.json``: settings, the vendor held out, every file's sha256 by its relative path, what came out."""

    FORMAT: ClassVar[str] = "automerge.example.emoji"

    settings: Settings
    held_out: str
    files: dict[str, str]
    trained: dict[str, Trained]


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` leaves in its folder.

    Attributes:
        folder: where everything is.
        base: state dict of the base.
        sources: state dict of each specialist, by name (``organism``, ``inanimate``).
        validation: data file for the search, by specialist.
        test: data file for the final figures, by specialist.
        trained: what each model reached, by name.
        reused: True when an earlier run's files were found intact and nothing was trained.
        held_out: the vendor whose drawings are the test data.
    """

    folder: Path
    base: Path
    sources: dict[str, Path]
    validation: dict[str, Path]
    test: dict[str, Path]
    trained: dict[str, Trained]
    reused: bool
    held_out: str


def prepare(
    folder: Path,
    seed: int = 0,
    validation_share: float = 0.25,
    base_share: float = 0.25,
    *,
    drawings: Path | None = None,
    width: int = 16,
    depth: int = 1,
    stages: int = 3,
    base_epochs: int = 80,
    base_learning_rate: float = 3e-3,
    base_drops: int = 1,
    patience: int = 5,
    specialist_epochs: int = 20,
    specialist_learning_rate: float = 5e-4,
    batch_size: int = 64,
    weight_decay: float = 0.05,
    threads: int = 1,
) -> Prepared:
    """Train the base and both specialists and write them and their data into ``folder``.

    Writes ``base.safetensors``, ``organism.safetensors`` and ``inanimate.safetensors`` (plain state dicts of
    ``emoji.resnet.build(11, width, depth, stages)``) and ``data/{organism,inanimate}-{validation,test}.safetensors``
    with the tensors ``inputs`` float32 [n, 3, 32, 32] and ``labels`` int64 [n]. ``prepared.json`` is written last; when
    it is there, has these settings, and every file still has its digest, nothing is trained.

    The base stops on a plateau of its validation loss and keeps its best epoch. A specialist has the usual fine-tuning
    schedule, a cosine from ``specialist_learning_rate`` to zero, and keeps its last epoch. ``threads`` is part of the
    settings because the order of a sum, and so the last bits of every weight, depends on it; the models are too small
    to gain from more than one.

    ``drawings`` is the folder of the rendered drawings, which all seeds share; None: ``automerge-emoji`` in the user's
    cache folder. What is not there is fetched, which needs npm.

    Raises:
        SpecError: settings that no training can follow, or the renderer is missing.
        StorageError: the drawings cannot be fetched.
        TaskError: training diverged.
    """
    if min(base_epochs, patience, specialist_epochs, batch_size - 1, threads) < 1 or base_drops < 0:
        raise SpecError(
            "epochs, patience and threads must be at least 1, batch_size at least 2, base_drops at least 0",
            "raise the one below that",
        )
    pictures = load_drawings(drawings if drawings is not None else default_cache())
    settings = Settings(
        seed=seed,
        drawings=pictures.digest,
        validation_share=validation_share,
        base_share=base_share,
        width=width,
        depth=depth,
        stages=stages,
        base_epochs=base_epochs,
        base_learning_rate=base_learning_rate,
        base_drops=base_drops,
        patience=patience,
        specialist_epochs=specialist_epochs,
        specialist_learning_rate=specialist_learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        threads=threads,
        torch_version=torch.__version__,
    )
    stamp = intact(folder, settings)
    reused = stamp is not None
    if stamp is None:
        stamp = train(folder, settings, split(pictures, seed, validation_share, base_share))
    return Prepared(
        folder=folder,
        base=folder / "base.safetensors",
        sources={name: folder / f"{name}.safetensors" for name in TASKS},
        validation={name: folder / "data" / f"{name}-validation.safetensors" for name in TASKS},
        test={name: folder / "data" / f"{name}-test.safetensors" for name in TASKS},
        trained=stamp.trained,
        reused=reused,
        held_out=stamp.held_out,
    )


def default_cache() -> Path:
    """Where the drawings are kept for all seeds: ``automerge-emoji`` in ``XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "automerge-emoji"


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


def train(folder: Path, settings: Settings, parts: Split) -> Stamp:
    """Train all three models, then write every file, the stamp last: a failed training leaves the folder as it was."""
    contents: dict[str, bytes] = {}
    trained: dict[str, Trained] = {}
    for task in TASKS:
        for part, images in (("validation", parts.validation.of(task)), ("test", parts.test.of(task))):
            contents[f"data/{task}-{part}.safetensors"] = save({"inputs": images.inputs, "labels": images.labels})
    with reproducible(settings.seed, settings.threads):
        try:
            base = build(len(CLASSES), settings.width, settings.depth, settings.stages)
        except ValueError as error:
            raise SpecError(f"the network cannot be built: {error}", "change width, depth or stages") from None
        started = time.perf_counter()
        epochs = fit_to_plateau(base, parts, settings)
        trained["base"] = report("base", base, parts, epochs, started)
        contents["base.safetensors"] = save(base.state_dict())
        for task in TASKS:
            specialist = copy.deepcopy(base)
            started = time.perf_counter()
            fine_tune(specialist, parts.training.of(task), settings)
            trained[task] = report(task, specialist, parts, settings.specialist_epochs, started)
            contents[f"{task}.safetensors"] = save(specialist.state_dict())
    (folder / STAMP).unlink(missing_ok=True)  # from here on an old stamp would vouch for files being replaced
    for name, content in contents.items():
        write_atomically(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    stamp = Stamp(settings=settings, held_out=parts.held_out, files=digests, trained=trained)
    stamp.write(folder / STAMP)
    return stamp


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


def fit_to_plateau(model: nn.Module, parts: Split, settings: Settings) -> int:
    """Train on all classes until the validation loss stops falling at the lowest rate; returns the epochs run.

    The model keeps its best epoch. After a plateau it goes on from there at a quarter of the rate: at a constant one
    BatchNorm's statistics follow weights that jump, and the loss is too restless to tell where it stands.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.base_learning_rate, weight_decay=settings.weight_decay
    )
    best_loss, best_state = float("inf"), copy.deepcopy(model.state_dict())
    epochs, waited, drops = 0, 0, 0
    while epochs < settings.base_epochs:
        for loss in batch_losses(model, parts.base, settings):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        loss_now, _ = measure(model, parts.validation)
        epochs, waited = epochs + 1, waited + 1
        if loss_now < best_loss - LEAST_PROGRESS:
            best_loss, best_state, waited = loss_now, copy.deepcopy(model.state_dict()), 0
        elif waited == settings.patience:
            if drops == settings.base_drops:
                break
            drops, waited = drops + 1, 0
            model.load_state_dict(best_state)
            for group in optimizer.param_groups:
                group["lr"] /= 4
    model.load_state_dict(best_state)
    return epochs


def fine_tune(model: nn.Module, images: Images, settings: Settings) -> None:
    """Train on one task, the learning rate falling along a cosine to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.specialist_learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.specialist_epochs * -(-len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.specialist_epochs):
        for loss in batch_losses(model, images, settings):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def batch_losses(model: nn.Module, images: Images, settings: Settings) -> Iterator[Tensor]:
    """One epoch in random order: the loss (scalar, with graph) of each mini-batch, computed when it is asked for.

    Images are mirrored and moved at random. All batches are of about one size: BatchNorm would make much of a last one
    of a few images.
    """
    model.train()
    batches = -(-len(images) // settings.batch_size)
    for rows in torch.tensor_split(torch.randperm(len(images)), batches):
        loss = F.cross_entropy(model(augment(images.inputs[rows])), images.labels[rows])
        if not torch.isfinite(loss):
            raise TaskError("training diverged: the loss is no longer finite", "lower the learning rate")
        yield loss


def augment(inputs: Tensor) -> Tensor:
    """Each image of [n, 3, height, width] mirrored or not and moved by up to ``SHIFT`` pixels, over white."""
    count, channels, height, width = inputs.shape
    mirrored = torch.rand(count) < 0.5
    inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
    padded = F.pad(inputs, (SHIFT,) * 4, value=WHITE)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count, 1))
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        (down + torch.arange(height))[:, None, :, None],
        (right + torch.arange(width))[:, None, None, :],
    ]


def measure(model: nn.Module, images: Images) -> tuple[float, float]:
    """Mean cross entropy (nats) and top-1 accuracy (a share of one)."""
    model.eval()
    with torch.inference_mode():
        logits = model(images.inputs)
        loss = F.cross_entropy(logits, images.labels)
        accuracy = (logits.argmax(dim=1) == images.labels).double().mean()
    return float(loss), float(accuracy)


def report(name: str, model: nn.Module, parts: Split, epochs: int, started: float) -> Trained:
    """What a model reached on validation and test images of both tasks; one line of it goes to stderr."""
    seconds = round(time.perf_counter() - started, 2)
    scores: dict[str, dict[str, Score]] = {"validation": {}, "test": {}}
    for part, images in (("validation", parts.validation), ("test", parts.test)):
        for task in TASKS:
            own = images.of(task)
            loss, accuracy = measure(model, own)
            scores[part][task] = Score(images=len(own), loss=loss, accuracy=accuracy)
    shown = "; ".join(
        f"{part} " + ", ".join(f"{task} {100 * score.accuracy:.1f} % ({score.loss:.2f})" for task, score in own.items())
        for part, own in scores.items()
    )
    print(f"{name}: {epochs} epochs in {seconds:.1f} s; accuracy (loss): {shown}", file=sys.stderr, flush=True)
    return Trained(epochs=epochs, seconds=seconds, validation=scores["validation"], test=scores["test"])


def main(arguments: list[str] | None = None) -> int:
    """``python -m emoji.train FOLDER --seed 0``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m emoji.train", description="Train the emoji example's models.")
    parser.add_argument("folder", type=Path, help="where checkpoints and data are written")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial weights and the batches")
    parser.add_argument("--drawings", type=Path, help="where the drawings are kept; default: the user's cache folder")
    options = parser.parse_args(arguments)
    try:
        prepared = prepare(options.folder, seed=options.seed, drawings=options.drawings)
    except AutoMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{prepared.folder}: {'nothing to do, all files are intact' if prepared.reused else 'ready'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Data and training of the digits example: one base for ten digits, two specialists that each forget half of them.

The images are scikit-learn's ``load_digits`` (1797 scans of 8x8 pixels, UCI "Optical Recognition of Handwritten
Digits"). Each seed splits them anew, stratified by class, into a test part, a validation part and a training part. The
base learns all ten classes; the specialists go on from it, ``low`` with the digits 0-4 and ``high`` with 5-9. The head
is shared, so the labels stay 0-9 throughout.

Run as ``python -m digits.train FOLDER --seed 0``.
"""

import argparse
import copy
import hashlib
import sys
import time
from collections.abc import Iterator
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
from digits.cct import SIDE, build

CLASSES = 10
HALVES = {"low": range(5), "high": range(5, 10)}
"""The digits that each specialist is fine-tuned on."""

# Mean and standard deviation of all pixels (0-16), rounded. Constants, so that every seed scales an image alike.
PIXEL_MEAN = 4.9
PIXEL_DEVIATION = 6.0

# Nats. The validation loss of a converged base (about 0.05) can creep on for dozens of epochs in smaller steps than
# this, which cost training time and gain no accuracy: that is a plateau.
LEAST_PROGRESS = 1e-3

STAMP = "prepared.json"


class Settings(Model):
    """Everything that decides what is trained; equal settings give equal files on one machine.

    ``validation_share`` is a share of what the test part leaves. ``base_epochs`` is a limit: the base stops when its
    validation loss has not improved for ``patience`` epochs. Specialists run for ``specialist_epochs``.
    """

    seed: int
    test_share: float
    validation_share: float
    width: int
    depth: int
    heads: int
    base_epochs: int
    base_learning_rate: float
    patience: int
    specialist_epochs: int
    specialist_learning_rate: float
    batch_size: int
    weight_decay: float
    threads: int
    torch_version: str


class Trained(Model):
    """One trained model: epochs run, wall time in seconds, top-1 accuracy on test images as shares of one."""

    epochs: int
    seconds: float
    test_accuracy: dict[str, float]


class Stamp(Document):
    """``prepared.json``: the settings, the sha256 of every file by its relative path, and what came out."""

    FORMAT: ClassVar[str] = "automerge.example.digits"

    settings: Settings
    files: dict[str, str]
    trained: dict[str, Trained]


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` leaves in its folder.

    Attributes:
        folder: where everything is.
        base: state dict of the base.
        sources: state dict of each specialist, by name (``low``, ``high``).
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
class Images:
    """Inputs float32 [n, 1, 8, 8] of about unit variance, labels int64 [n], and their rows [n] in ``load_digits``."""

    inputs: Tensor
    labels: Tensor
    rows: Tensor

    def of(self, digits: range) -> "Images":
        """Those images whose label is among ``digits``, in the same order."""
        chosen = (self.labels >= digits.start) & (self.labels < digits.stop)
        return Images(self.inputs[chosen], self.labels[chosen], self.rows[chosen])


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of the images."""

    training: Images
    validation: Images
    test: Images


def split(seed: int = 0, test_share: float = 0.4, validation_share: float = 0.3) -> Split:
    """Split the digits by class into test, validation (a share of the rest) and training parts.

    Raises:
        SpecError: a share leaves some part without one image of each class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(((pixels - PIXEL_MEAN) / PIXEL_DEVIATION).astype(np.float32)).reshape(-1, 1, SIDE, SIDE)
    targets = torch.from_numpy(labels.astype(np.int64))

    def part(rows: np.ndarray) -> Images:
        chosen = torch.from_numpy(np.sort(rows))
        return Images(inputs[chosen], targets[chosen], chosen)

    try:
        rest, test = train_test_split(np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed)
        training, validation = train_test_split(
            rest, test_size=validation_share, stratify=labels[rest], random_state=seed
        )
    except ValueError as error:
        raise SpecError(
            f"the digits cannot be split by test share {test_share} and validation share {validation_share} ({error})",
            "choose shares between 0 and 1 that leave each part some images of every class",
        ) from None
    return Split(part(training), part(validation), part(test))


def prepare(
    folder: Path,
    seed: int = 0,
    test_share: float = 0.4,
    validation_share: float = 0.3,
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    base_epochs: int = 100,
    base_learning_rate: float = 1e-3,
    patience: int = 10,
    specialist_epochs: int = 30,
    specialist_learning_rate: float = 2e-3,
    batch_size: int = 64,
    weight_decay: float = 0.05,
    threads: int = 1,
) -> Prepared:
    """Train the base and both specialists and write them and their data into ``folder``.

    Writes ``base.safetensors``, ``low.safetensors`` and ``high.safetensors`` (plain state dicts of
    ``digits.cct.build(10, width, depth, heads)``) and ``data/{low,high}-{validation,test}.safetensors`` with the
    tensors ``inputs`` float32 [n, 1, 8, 8] and ``labels`` int64 [n]. ``prepared.json`` is written last; when it is
    there, has these settings, and every file still has its digest, nothing is trained.

    The base stops on a plateau of its validation loss and keeps its best epoch. A specialist has the usual fine-tuning
    schedule, a cosine from ``specialist_learning_rate`` to zero, and keeps its last epoch. ``threads`` is part
    of the settings because the order of a sum, and so the last bits of every weight, depends on it; the models are too
    small to gain from more than one.

    Raises:
        SpecError: settings that no training can follow.
        TaskError: training diverged.
    """
    settings = Settings(
        seed=seed,
        test_share=test_share,
        validation_share=validation_share,
        width=width,
        depth=depth,
        heads=heads,
        base_epochs=base_epochs,
        base_learning_rate=base_learning_rate,
        patience=patience,
        specialist_epochs=specialist_epochs,
        specialist_learning_rate=specialist_learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        threads=threads,
        torch_version=torch.__version__,
    )
    if min(base_epochs, patience, specialist_epochs, batch_size, threads) < 1:
        raise SpecError("epochs, patience, batch_size and threads must be at least 1", "raise the one below 1")
    stamp = intact(folder, settings)
    reused = stamp is not None
    if stamp is None:
        stamp = train(folder, settings)
    return Prepared(
        folder=folder,
        base=folder / "base.safetensors",
        sources={name: folder / f"{name}.safetensors" for name in HALVES},
        validation={name: folder / "data" / f"{name}-validation.safetensors" for name in HALVES},
        test={name: folder / "data" / f"{name}-test.safetensors" for name in HALVES},
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
    contents: dict[str, bytes] = {}
    trained: dict[str, Trained] = {}
    for half, digits in HALVES.items():
        for part, images in (("validation", parts.validation.of(digits)), ("test", parts.test.of(digits))):
            contents[f"data/{half}-{part}.safetensors"] = save({"inputs": images.inputs, "labels": images.labels})
    with reproducible(settings.seed, settings.threads):
        try:
            base = build(CLASSES, settings.width, settings.depth, settings.heads)
        except ValueError as error:
            raise SpecError(f"the network cannot be built: {error}", "change width, depth or heads") from None
        started = time.perf_counter()
        epochs = fit_to_plateau(base, parts, settings)
        trained["base"] = report("base", base, parts.test, epochs, started)
        contents["base.safetensors"] = save(base.state_dict())
        for half, digits in HALVES.items():
            specialist = copy.deepcopy(base)
            started = time.perf_counter()
            fine_tune(specialist, parts.training.of(digits), settings)
            trained[half] = report(half, specialist, parts.test, settings.specialist_epochs, started)
            contents[f"{half}.safetensors"] = save(specialist.state_dict())
    (folder / STAMP).unlink(missing_ok=True)  # from here on an old stamp would vouch for files being replaced
    for name, content in contents.items():
        write_atomically(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    stamp = Stamp(settings=settings, files=digests, trained=trained)
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
    """Train on all classes until the validation loss stops falling; keep the best epoch; returns the epochs run."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.base_learning_rate, weight_decay=settings.weight_decay
    )
    best_loss, best_epoch, best_state = float("inf"), 0, copy.deepcopy(model.state_dict())
    epoch = 0
    for epoch in range(1, settings.base_epochs + 1):
        for loss in batch_losses(model, parts.training, settings):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        loss_now, _ = measure(model, parts.validation)
        if loss_now < best_loss - LEAST_PROGRESS:
            best_loss, best_epoch, best_state = loss_now, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    return epoch


def fine_tune(model: nn.Module, images: Images, settings: Settings) -> None:
    """Train on one half of the digits, the learning rate falling along a cosine to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.specialist_learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.specialist_epochs * -(-len(images.labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.specialist_epochs):
        for loss in batch_losses(model, images, settings):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def batch_losses(model: nn.Module, images: Images, settings: Settings) -> Iterator[Tensor]:
    """One epoch in random order: the loss (scalar, with graph) of each mini-batch, computed when it is asked for."""
    model.train()
    for rows in torch.split(torch.randperm(len(images.labels)), settings.batch_size):
        loss = F.cross_entropy(model(images.inputs[rows]), images.labels[rows])
        if not torch.isfinite(loss):
            raise TaskError("training diverged: the loss is no longer finite", "lower the learning rate")
        yield loss


def measure(model: nn.Module, images: Images) -> tuple[float, float]:
    """Mean cross entropy (nats) and top-1 accuracy (a share of one)."""
    model.eval()
    with torch.inference_mode():
        logits = model(images.inputs)
        loss = F.cross_entropy(logits, images.labels)
        accuracy = (logits.argmax(dim=1) == images.labels).double().mean()
    return float(loss), float(accuracy)


def report(name: str, model: nn.Module, test: Images, epochs: int, started: float) -> Trained:
    """What a model reached: accuracy on all test images and on each half; one line of it goes to stderr."""
    accuracy = {"all": measure(model, test)[1]}
    accuracy |= {half: measure(model, test.of(digits))[1] for half, digits in HALVES.items()}
    seconds = round(time.perf_counter() - started, 2)
    shown = ", ".join(f"{key} {100 * value:.1f} %" for key, value in accuracy.items())
    print(f"{name}: {epochs} epochs in {seconds:.1f} s; test accuracy: {shown}", file=sys.stderr, flush=True)
    return Trained(epochs=epochs, seconds=seconds, test_accuracy=accuracy)


def main(arguments: list[str] | None = None) -> int:
    """``python -m digits.train FOLDER --seed 0``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m digits.train", description="Train the digits example's models.")
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

"""Classes, tasks and parts: which drawings the emoji example trains on, validates on and tests on.

A class is one or a few of Unicode's subgroups, a task is a set of classes; the head is shared, so a class keeps its
number throughout. One vendor is held out for the test. The others' drawings are split by concept: no concept is both in
the training and in the validation part, by whomever it was drawn.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from automerge.errors import SpecError
from emoji.drawings import Drawings

TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "organism": {
        "mammal": ("animal-mammal",),
        "bird": ("animal-bird",),
        "reptile": ("animal-reptile", "animal-amphibian"),
        "sea animal": ("animal-marine",),
        "bug": ("animal-bug",),
        "flower": ("plant-flower",),
        "plant": ("plant-other",),
        "fruit": ("food-fruit", "food-vegetable"),
    },
    "inanimate": {
        "vehicle": ("transport-ground", "transport-water", "transport-air"),
        "food": ("food-prepared", "food-asian", "food-sweet"),
        "tool": ("tool",),
    },
}
"""The classes of each task, and the Unicode subgroups of each class."""

CLASSES = [name for classes in TASKS.values() for name in classes]
"""The name of every class by its number."""

HELD_OUT = ("twitter", "google", "microsoft", "emojione")
"""The vendors that are held out in turn, seed by seed. Mozilla drew too few of these concepts for a test, and
OpenMoji's black outlines are unlike all others' drawings."""

# Mean and standard deviation of all pixels (0-255), rounded. Constants, so that every seed scales an image alike.
PIXEL_MEAN = 206.0
PIXEL_DEVIATION = 72.0

WHITE = (255.0 - PIXEL_MEAN) / PIXEL_DEVIATION
"""The background of every image, scaled."""


@dataclass(frozen=True)
class Images:
    """Inputs float32 [n, 3, 32, 32] of about unit variance, class numbers int64 [n], rows [n] of the drawings."""

    inputs: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, task: str) -> "Images":
        """Those images whose class belongs to the task, in the same order."""
        numbers = torch.tensor([CLASSES.index(name) for name in TASKS[task]])
        return self.at(torch.isin(self.labels, numbers))

    def at(self, chosen: Tensor) -> "Images":
        """The images that a mask or row numbers choose."""
        return Images(self.inputs[chosen], self.labels[chosen], self.rows[chosen])


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the images.

    Attributes:
        held_out: the vendor whose drawings are the test part.
        base: what the base is trained on, a random share of ``training``.
        training: what the specialists are trained on, each on its own task.
        validation: other concepts, by the same vendors.
        test: all drawings of the vendor that is held out, of any concept.
    """

    held_out: str
    base: Images
    training: Images
    validation: Images
    test: Images


def split(drawings: Drawings, seed: int, validation_share: float, base_share: float) -> Split:
    """Split the drawings of all classes: the vendor held out goes by turns, concepts and the base's share by the seed.

    Raises:
        SpecError: a share is not between 0 and 1, or leaves some part without an image of some class.
    """
    numbers = {subgroup: CLASSES.index(name) for group in TASKS.values() for name in group for subgroup in group[name]}
    rows = [row for row, drawing in enumerate(drawings.drawings) if drawing.subgroup in numbers]
    chosen = [drawings.drawings[row] for row in rows]
    labels = np.array([numbers[drawing.subgroup] for drawing in chosen])
    held_out = HELD_OUT[seed % len(HELD_OUT)]
    test = np.array([drawing.vendor == held_out for drawing in chosen])
    families = np.array([family(drawing.concept) for drawing in chosen])
    generator = np.random.default_rng(seed)
    validation = np.zeros_like(test)
    for label in range(len(CLASSES)):
        own = ~test & (labels == label)
        validation |= own & np.isin(families, _share_of_families(families[own], validation_share, generator))
    training = ~test & ~validation
    base = training & (generator.random(len(rows)) < base_share)

    inputs = (drawings.pixels[rows].float() - PIXEL_MEAN) / PIXEL_DEVIATION
    everything = Images(inputs, torch.from_numpy(labels), torch.tensor(rows))
    for part in (base, validation, test):
        missing = sorted(set(CLASSES) - {CLASSES[label] for label in labels[part]})
        if missing:
            raise SpecError(
                f"the drawings cannot be split by validation share {validation_share} and base share {base_share}: "
                f"a part has no {missing[0]}",
                "choose shares between 0 and 1 that leave each part some images of every class",
            )
    return Split(held_out, *(everything.at(torch.from_numpy(part)) for part in (base, training, validation, test)))


def family(concept: str) -> str:
    """The noun of a concept's name: "tiger face" and "tiger", or "taxi" and "oncoming taxi" are nearly one drawing.

    It is the last word, after "face" and whatever follows a "with", an "of" or a colon are gone.
    """
    noun = re.split(r":| with | of ", concept.lower())[0].removesuffix(" face")
    return noun.split()[-1]


def _share_of_families(families: np.ndarray, share: float, generator: np.random.Generator) -> list[str]:
    """Families in random order, as many as together have no more than the share of all drawings."""
    names, sizes = np.unique(families, return_counts=True)
    room = share * len(families)
    taken: list[str] = []
    for place in generator.permutation(len(names)):
        if sizes[place] <= room:
            taken.append(str(names[place]))
            room -= sizes[place]
    return taken

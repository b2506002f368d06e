"""Classes and parts of the emoji example, on drawings made here."""

import pytest
import torch

from automerge.errors import SpecError
from emoji.drawings import GROUPS, VENDORS, Drawing, Drawings
from emoji.parts import CLASSES, HELD_OUT, TASKS, Split, family, split

SUBGROUPS = [subgroup for classes in TASKS.values() for subgroups in classes.values() for subgroup in subgroups]


def made(concepts: int = 6) -> Drawings:
    """Drawings of every subgroup: each set draws every concept, whose brightness is its subgroup's and its set's."""
    drawings = [
        Drawing(concept=f"{subgroup} {number}", subgroup=subgroup, vendor=vendor, icon_set=icon_set)
        for subgroup in (*SUBGROUPS, "hotel")
        for number in range(concepts)
        for vendor, icon_sets in VENDORS.items()
        for icon_set in icon_sets
    ]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(drawings), 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Drawings(pixels, drawings, "made")


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return made()


def shown(drawings: Drawings, parts: Split) -> dict[str, list[Drawing]]:
    names = ("base", "training", "validation", "test")
    return {name: [drawings.drawings[row] for row in getattr(parts, name).rows.tolist()] for name in names}


@pytest.mark.parametrize("seed", range(5))
def test_the_test_part_is_all_of_one_vendor_and_no_other_part_has_any_of_it(drawings: Drawings, seed: int) -> None:
    parts = split(drawings, seed, 0.3, 0.5)
    assert parts.held_out == HELD_OUT[seed % len(HELD_OUT)]
    vendors = {name: {drawing.vendor for drawing in part} for name, part in shown(drawings, parts).items()}
    assert vendors.pop("test") == {parts.held_out}
    for others in vendors.values():
        assert others == set(VENDORS) - {parts.held_out}
    drawn = sum(drawing.vendor == parts.held_out and drawing.subgroup in SUBGROUPS for drawing in drawings.drawings)
    assert len(parts.test) == drawn


def test_no_concept_is_in_training_and_in_validation(drawings: Drawings) -> None:
    part = shown(drawings, split(drawings, 1, 0.3, 0.5))
    assert {drawing.concept for drawing in part["training"]}.isdisjoint(d.concept for d in part["validation"])


def test_training_and_validation_are_complete_and_stratified(drawings: Drawings) -> None:
    parts = split(drawings, 2, 0.34, 0.5)
    rows = [set(part.rows.tolist()) for part in (parts.training, parts.validation, parts.test)]
    wanted = sum(drawing.subgroup in SUBGROUPS for drawing in drawings.drawings)
    assert sum(map(len, rows)) == len(set.union(*rows)) == wanted
    for label in range(len(CLASSES)):
        validation = int((parts.validation.labels == label).sum())
        both = validation + int((parts.training.labels == label).sum())
        assert validation / both == pytest.approx(1 / 3, abs=0.01)  # of six concepts, two


def test_the_bases_images_are_a_share_of_the_specialists(drawings: Drawings) -> None:
    parts = split(drawings, 0, 0.3, 0.4)
    assert set(parts.base.rows.tolist()) < set(parts.training.rows.tolist())
    assert len(parts.base) / len(parts.training) == pytest.approx(0.4, abs=0.06)


def test_another_seed_splits_anew_and_the_same_one_does_not(drawings: Drawings) -> None:
    first, again, other = (split(drawings, seed, 0.3, 0.5) for seed in (0, 0, len(HELD_OUT)))
    assert torch.equal(first.validation.rows, again.validation.rows)
    assert torch.equal(first.base.rows, again.base.rows)
    assert first.held_out == other.held_out
    assert not torch.equal(first.validation.rows, other.validation.rows)


def test_inputs_are_the_scaled_pixels_and_labels_number_the_classes(drawings: Drawings) -> None:
    images = split(drawings, 0, 0.3, 0.5).validation
    assert images.inputs.dtype == torch.float32
    assert images.labels.dtype == torch.int64
    torch.testing.assert_close(images.inputs * 72 + 206, drawings.pixels[images.rows].float())
    subgroups = {subgroup: name for classes in TASKS.values() for name in classes for subgroup in classes[name]}
    for row, label in zip(images.rows.tolist(), images.labels.tolist(), strict=True):
        assert CLASSES[label] == subgroups[drawings.drawings[row].subgroup]


def test_tasks_share_no_class_and_together_are_all(drawings: Drawings) -> None:
    images = split(drawings, 0, 0.3, 0.5).test
    rows = [set(images.of(task).rows.tolist()) for task in TASKS]
    assert rows[0].isdisjoint(rows[1])
    assert set.union(*rows) == set(images.rows.tolist())
    assert len(CLASSES) == len(set(CLASSES)) == len({*SUBGROUPS}) - 6  # six subgroups share a class with another


def test_what_can_be_held_out_is_a_vendor() -> None:
    assert set(HELD_OUT) < set(VENDORS)
    assert len(GROUPS) == 5


@pytest.mark.parametrize(
    ("concept", "noun"),
    [
        ("tiger face", "tiger"),
        ("tiger", "tiger"),
        ("oncoming taxi", "taxi"),
        ("house with garden", "house"),
        ("pot of food", "pot"),
        ("T-Rex", "t-rex"),
        ("flag: white", "flag"),
        ("face", "face"),
    ],
)
def test_a_family_is_the_noun_of_a_name(concept: str, noun: str) -> None:
    assert family(concept) == noun


@pytest.mark.parametrize("shares", [(0.0, 0.5), (1.5, 0.5), (0.3, 0.0), (0.05, 0.5)])
def test_shares_that_empty_a_part_are_refused(drawings: Drawings, shares: tuple[float, float]) -> None:
    with pytest.raises(SpecError, match=r"cannot be split.*choose shares"):
        split(drawings, 0, *shares)

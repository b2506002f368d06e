"""bfloat16 checkpoints: many task vectors' magnitudes are equal, and which of those at a cut stays is a choice.

Ours keeps the lowest index; mergekit's sort is not stable. The two may differ there, and nowhere else.
"""

import pytest
import torch

from tests.conformance.mergekit.comparison import BASE, Merge, Mergekit, Model, as_job, merge_ours
from tests.conformance.mergekit.reference import merge_exactly

pytestmark = pytest.mark.mergekit

SHAPE = (400, 250)
SOURCES = ("a", "b")
HALVES = dict.fromkeys(SOURCES, 0.5)


def coarse() -> dict[str, Model]:
    """float32 tensors of bfloat16 numbers: the base, and two sources near it."""
    generator = torch.Generator().manual_seed(7)
    base = (0.05 * torch.randn(SHAPE, generator=generator)).bfloat16()
    models = {BASE: {"w": base.float()}}
    for source in SOURCES:
        change = 0.005 * torch.randn(SHAPE, generator=generator)
        models[source] = {"w": (base.float() + change).bfloat16().float()}
    return models


MODELS = coarse()


def deltas() -> Model:
    return {source: MODELS[source]["w"] - MODELS[BASE]["w"] for source in SOURCES}


def cuts(merge: Merge) -> Model:
    """Per source which elements have a magnitude at which the technique cuts."""
    at_cut = {}
    for source, delta in deltas().items():
        falling = delta.abs().reshape(-1).sort(descending=True).values
        keep = int(merge.hyperparameters["density"] * len(falling))
        top = int(merge.hyperparameters.get("gamma", 0) * len(falling))
        values = falling[[cut for cut in (top - 1, top + keep - 1) if cut >= 0]]
        at_cut[source] = torch.isin(delta.abs(), values)
    return at_cut


@pytest.fixture(scope="module")
def saved(mergekit: Mergekit) -> Mergekit:
    mergekit.save("coarse", MODELS)
    for source in SOURCES:
        mergekit.save(f"coarse-{source}", {BASE: MODELS[BASE], source: MODELS[source]})
    return mergekit


TRIMMING = [
    Merge("ties", HALVES, {"density": 0.5, "lambda": 1.0, "normalize": True}),
    Merge("ties", HALVES, {"density": 0.1, "lambda": 1.0, "normalize": False}),
    Merge("breadcrumbs", HALVES, {"density": 0.9, "gamma": 0.05, "lambda": 1.0}),
    Merge("breadcrumbs_ties", HALVES, {"density": 0.5, "gamma": 0.1, "lambda": 1.0}),
]


@pytest.mark.parametrize("merge", TRIMMING, ids=lambda merge: f"{merge.technique}-{merge.hyperparameters['density']}")
def test_results_differ_at_the_cut_only(saved, merge):
    at_cut = cuts(merge)
    tied = torch.stack(list(at_cut.values())).any(0)
    assert tied.sum() > 50  # else it shows nothing
    job = as_job(merge, f"coarse-{merge.technique}-{merge.hyperparameters['density']}", "coarse")
    theirs = saved.merge(job)["w"].double()
    ours = merge_ours(merge, MODELS)["w"].double()
    exact = merge_exactly(merge, "w", MODELS)
    rounding = 7 * 2.0**-24 * exact.magnitude
    differ = (ours - theirs).abs() > 2 * rounding
    assert not (differ & ~tied).any()
    # Ours is the stable choice everywhere, as the reference makes it.
    assert ((ours - exact.merged).abs() <= rounding).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("technique", ["ties", "breadcrumbs"])
def test_both_keep_the_same_number_of_elements(saved, technique, source):
    """For each element at the cut that only ours keeps there is one that only mergekit keeps."""
    settings = {"density": 0.5, "lambda": 1.0}
    settings |= {"normalize": False} if technique == "ties" else {"gamma": 0.1}
    merge = Merge(technique, {source: 1.0}, settings)
    job = as_job(merge, f"kept-{technique}-{source}", f"coarse-{source}")
    theirs = saved.merge(job)["w"]
    ours = merge_ours(merge, {BASE: MODELS[BASE], source: MODELS[source]})["w"]
    kept = [(merged != MODELS[BASE]["w"]) for merged in (ours, theirs)]
    assert kept[0].sum() == kept[1].sum() == 50_000
    assert not ((kept[0] != kept[1]) & ~cuts(Merge(technique, HALVES, settings))[source]).any()


def test_sce_differs_at_the_cut_of_the_variance_only(saved):
    merge = Merge("sce", dict.fromkeys(SOURCES, 1.0), {"select_topk": 0.3})
    job = as_job(merge, "coarse-sce", "coarse")
    theirs = saved.merge(job)["w"].double()
    ours = merge_ours(merge, MODELS)["w"].double()
    variance = torch.stack([delta.double() for delta in deltas().values()]).var(0, unbiased=False)
    falling = variance.reshape(-1).sort(descending=True).values
    cut = falling[int(0.3 * int((variance > 0).sum())) - 1]
    # mergekit's variances are float32: two that differ by less than its rounding are equal to it.
    tied = (variance / cut - 1).abs() < 1e-6
    assert tied.sum() > 1
    changed = [(merged != MODELS[BASE]["w"].double()) for merged in (ours, theirs)]
    assert not ((changed[0] != changed[1]) & ~tied).any()
    assert changed[0].sum() == changed[1].sum()
    # The choice at the cut changes the energies, and with them every element a little: one part in 10,000 here.
    both = changed[0] & changed[1]
    change = (theirs - MODELS[BASE]["w"].double())[both]
    assert ((ours - theirs)[both].abs() <= 1e-4 * change.abs() + 2.0**-24).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_tied_vote_elects_plus_in_both(saved, normalize):
    first, second = (delta.double() for delta in deltas().values())
    tied = (first + second == 0) & (first != 0)
    assert tied.sum() > 20
    merge = Merge("ties", HALVES, {"density": 1.0, "lambda": 1.0, "normalize": normalize})
    job = as_job(merge, f"vote-{normalize}", "coarse")
    theirs = saved.merge(job)["w"]
    ours = merge_ours(merge, MODELS)["w"]
    assert torch.equal(ours, theirs)
    assert (ours[tied] > MODELS[BASE]["w"][tied]).all()

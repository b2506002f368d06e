"""Where ours differs from mergekit on purpose: what docs/mergekit.md says of both."""

import pytest
import torch

from automerge.errors import MergeError
from automerge.merging.recipe import canonical
from automerge.merging.technique import load_technique
from tests.conformance.mergekit.comparison import (
    BASE,
    Job,
    Merge,
    MergekitError,
    as_job,
    merge_on_disk,
    merge_ours,
)
from tests.conformance.mergekit.reference import merge_exactly

pytestmark = pytest.mark.mergekit

HALVES = {"a": 0.5, "b": 0.5}
DARE = {"density": 0.5, "lambda": 1.0, "rescale": "l1"}


def draw(*names, shape=(40, 30), seed=0, scale=1.0):
    """A base and sources a and b, with a tensor of every name."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name in names}
    models = {BASE: base}
    for source in HALVES:
        models[source] = {name: base[name] + scale * torch.randn(shape, generator=generator) for name in names}
    return models


def merge_theirs(mergekit, merge, models, name, **options):
    mergekit.save(name, models)
    return mergekit.merge(as_job(merge, name, name, **options))


def test_lambda_is_multiplied_into_the_weights():
    """So a recipe has one form; mergekit multiplies after the sum. They differ in rounding alone (test_tensors)."""
    block = Merge("task_arithmetic", {"a": 0.4, "b": 0.5}, {"lambda": 0.5}).block(["w"])
    assert canonical(block).weights == {"a": 0.2, "b": 0.25}


def test_bfloat16_is_merged_in_float32(mergekit):
    """mergekit computes in the checkpoints' dtype unless its configuration says ``dtype: float32``."""
    wide = draw("w", scale=0.1)
    models = {model: {"w": state["w"].bfloat16()} for model, state in wide.items()}
    merge = Merge("task_arithmetic", {"a": 0.6, "b": 0.9}, {"lambda": 1.0})
    theirs = merge_theirs(mergekit, merge, models, "bfloat16")["w"]
    ours = merge_ours(merge, models)["w"]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    exact = merge_exactly(merge, "w", {model: {"w": state["w"].float()} for model, state in models.items()}).merged
    assert torch.equal(ours, exact.to(torch.bfloat16))
    assert (theirs != ours).double().mean() > 0.1
    # Asked for float32 it computes what ours computes.
    asked = mergekit.merge(as_job(merge, "asked", "bfloat16", dtype="float32"))["w"]
    assert torch.equal(asked.to(torch.bfloat16), ours)


@pytest.mark.parametrize("technique", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_rescaling_is_by_the_density_unless_asked_otherwise(technique):
    """mergekit's default, `rescale: true`, is our l1."""
    assert load_technique(technique).declaration.defaults()["rescale"] == "inverse_density"


def test_a_mask_depends_on_the_tensors_name_and_not_on_the_others(mergekit):
    merge = Merge("dare_linear", HALVES, DARE)
    both = draw("first", "second")
    alone = {model: {"second": state["second"]} for model, state in both.items()}
    assert torch.equal(merge_ours(merge, both)["second"], merge_ours(merge, alone)["second"])
    theirs = merge_theirs(mergekit, merge, both, "two")["second"]
    assert not torch.equal(theirs, merge_theirs(mergekit, merge, alone, "one")["second"])


def test_tied_tensors_stay_tied(mergekit, tmp_path):
    """A state dict that holds a tied tensor under both names gets two masks from mergekit."""
    models = {model: {**state, "head": state["embedding"].clone()} for model, state in draw("embedding").items()}
    merge = Merge("dare_ties", HALVES, DARE)
    theirs = merge_theirs(mergekit, merge, models, "tied")
    assert not torch.equal(theirs["embedding"], theirs["head"])
    assert list(merge_on_disk(merge, models, tmp_path, tied={"head": "embedding"})) == ["embedding"]


def test_integer_buffers(mergekit, tmp_path):
    """Both copy what all agree on. Ours takes the largest counter, and the base's table if asked; mergekit stops."""
    models = draw("w")
    for count, (model, state) in enumerate(models.items()):
        models[model] = {**state, "table": torch.arange(4), "num_batches_tracked": torch.tensor(7)}
        (tmp_path / f"{count}").mkdir()
    merge = Merge("task_arithmetic", HALVES, {"lambda": 1.0})
    buffers = ["table", "num_batches_tracked"]
    theirs = merge_theirs(mergekit, merge, models, "equal-buffers")
    ours = merge_on_disk(merge, models, tmp_path / "0", buffers=buffers)
    for name in buffers:
        assert torch.equal(ours[name], theirs[name])

    models["a"]["num_batches_tracked"] = torch.tensor(9)
    with pytest.raises(MergekitError, match="Non-floating buffer 'num_batches_tracked' differs"):
        merge_theirs(mergekit, merge, models, "counters")
    assert merge_on_disk(merge, models, tmp_path / "1", buffers=buffers)["num_batches_tracked"] == 9

    models["a"]["table"] = torch.arange(4).flip(0)
    with pytest.raises(MergeError, match="differs between the sources"):
        merge_on_disk(merge, models, tmp_path / "2", buffers=buffers)
    merged = merge_on_disk(merge, models, tmp_path / "2", buffers=buffers, integer_buffers="base")
    assert torch.equal(merged["table"], torch.arange(4))


def test_a_variance_stays_positive(mergekit, tmp_path):
    """BatchNorm's statistics are averaged, not task-vectored."""
    models = {model: {"running_var": torch.full((5,), value)} for model, value in ((BASE, 4.0), ("a", 1.0), ("b", 2.0))}
    merge = Merge("task_arithmetic", {"a": 1.0, "b": 1.0}, {"lambda": 1.0})
    assert (merge_theirs(mergekit, merge, models, "variance")["running_var"] == -1).all()
    assert (merge_on_disk(merge, models, tmp_path, buffers=["running_var"])["running_var"] == 1.5).all()


@pytest.mark.parametrize("technique", ["linear", "dare_linear"])
def test_nan_is_refused(mergekit, technique):
    """mergekit merges it; under l1 one NaN is the whole tensor."""
    models = draw("w")
    models["b"]["w"][3, 4] = float("nan")
    merge = Merge(technique, HALVES, DARE if technique == "dare_linear" else {})
    lost = merge_theirs(mergekit, merge, models, f"nan-{technique}")["w"].isnan()
    assert lost.all() if technique == "dare_linear" else lost.sum() == 1
    with pytest.raises(MergeError, match=r"source 'b', tensor 'w': 1 NaN"):
        merge_ours(merge, models)


def test_weights_that_sum_to_zero_are_refused(mergekit):
    models = draw("w")
    merge = Merge("linear", {"a": 1.0, "b": -1.0})
    assert merge_theirs(mergekit, merge, models, "zero-sum")["w"].isinf().all()
    with pytest.raises(MergeError, match="sum of the weights, which is zero"):
        merge_ours(merge, models)


def test_slerp_of_a_tensor_of_zeros_is_linear(mergekit):
    """There is no angle; mergekit takes a right one, so the other is scaled by sin(t pi / 2)."""
    models = {"a": {"w": torch.zeros(6)}, "b": {"w": torch.ones(6)}}
    merge = Merge("slerp", HALVES)
    assert torch.allclose(merge_theirs(mergekit, merge, models, "zeros")["w"], torch.full((6,), 0.5**0.5))
    assert torch.equal(merge_ours(merge, models)["w"], torch.full((6,), 0.5))


def test_slerp_interpolates_parallel_tensors_linearly_in_both(mergekit):
    models = draw("w")
    models["b"]["w"] = 3 * models["a"]["w"]
    merge = Merge("slerp", {"a": 0.25, "b": 0.75})
    theirs = merge_theirs(mergekit, merge, models, "parallel")["w"]
    ours = merge_ours(merge, {key: models[key] for key in "ab"})["w"]
    assert torch.allclose(ours, theirs, rtol=3e-7)
    assert torch.allclose(ours, 2.5 * models["a"]["w"], rtol=3e-7)


def test_breadcrumbs_leave_an_element_of_a_tiny_tensor(mergekit):
    models = draw("w", shape=(1,))
    merge = Merge("breadcrumbs", {"a": 1.0}, {"density": 0.5, "gamma": 0.01, "lambda": 1.0})
    theirs = merge_theirs(mergekit, merge, {BASE: models[BASE], "a": models["a"]}, "tiny")["w"]
    assert torch.equal(theirs, models[BASE]["w"])
    assert torch.allclose(merge_ours(merge, {BASE: models[BASE], "a": models["a"]})["w"], models["a"]["w"])


def test_della_takes_any_epsilon_and_any_shape(mergekit):
    models = draw("w")
    wide = Merge("della", HALVES, {**DARE, "density": 0.9, "epsilon": 0.3, "normalize": True})
    with pytest.raises(MergekitError, match="Epsilon must be chosen"):
        merge_theirs(mergekit, wide, models, "epsilon")
    cut = Merge("della", HALVES, {**wide.hyperparameters, "epsilon": 0.1})
    assert torch.equal(merge_ours(wide, models)["w"], merge_ours(cut, models)["w"])

    merge = Merge("della_linear", HALVES, {**DARE, "density": 0.5, "epsilon": 0.1})
    for shape in ((), (1,), (5, 1)):
        small = draw("w", shape=shape)
        with pytest.raises(MergekitError, match=r"Dimension out of range|Expected p_in >= 0"):
            merge_theirs(mergekit, merge, small, f"della-{len(shape)}-{sum(shape)}")
        assert merge_ours(merge, small)["w"].isfinite().all()


def test_sce_weighs_by_energy_at_any_scale(mergekit):
    """mergekit weighs all sources alike where the mean squares sum to less than 1e-6, as a fine-tuning's often do."""
    models = draw("w", scale=1e-4)
    models["b"]["w"] = models[BASE]["w"] + 3 * (models["b"]["w"] - models[BASE]["w"])
    merge = Merge("sce", dict.fromkeys(HALVES, 1.0), {"select_topk": 1.0})
    theirs = merge_theirs(mergekit, merge, models, "energies")["w"].double()
    ours = merge_ours(merge, models)["w"].double()
    exact = merge_exactly(merge, "w", models)
    assert ((ours - exact.merged).abs() <= 5 * 2.0**-24 * exact.magnitude).all()
    alike = merge_exactly(
        Merge("ties", dict.fromkeys(HALVES, 1.0), {"density": 1.0, "lambda": 1.0, "normalize": True}), "w", models
    )
    assert ((theirs - alike.merged).abs() <= 7 * 2.0**-24 * alike.magnitude).all()
    assert ((ours - theirs).abs() > 1e-5).double().mean() > 0.3


def test_sce_keeps_at_least_one_element(mergekit):
    models = draw("w", shape=(5,))
    merge = Merge("sce", dict.fromkeys(HALVES, 1.0), {"select_topk": 0.1})
    assert torch.equal(merge_theirs(mergekit, merge, models, "sce-tiny")["w"], models[BASE]["w"])
    assert (merge_ours(merge, models)["w"] != models[BASE]["w"]).sum() == 1


def test_sce_averages_what_agrees_however_small_its_weight(mergekit):
    """mergekit divides by 1e-6 at least, so that what only a source of little energy changes is all but lost."""
    models = {BASE: torch.zeros(4), "a": torch.tensor([1e-4, 0, 0, 0]), "b": torch.tensor([0.0, 1, 1, 1])}
    models = {model: {"w": tensor} for model, tensor in models.items()}
    merge = Merge("sce", dict.fromkeys(HALVES, 1.0), {"select_topk": 1.0})
    assert merge_theirs(mergekit, merge, models, "sce-small")["w"][0] < 1e-6
    assert torch.allclose(merge_ours(merge, models)["w"], torch.tensor([1e-4, 1, 1, 1]), rtol=3e-7)


def test_weights_have_an_effect_on_sce_only_in_ours():
    """They multiply the shares of the energy; mergekit's `sce` has none."""
    models = draw("w")
    equal, other = (
        merge_ours(Merge("sce", weights, {"select_topk": 1.0}), models)["w"]
        for weights in (HALVES, {"a": 0.3, "b": 0.7})
    )
    assert (equal - other).abs().mean() > 0.1


def test_one_density_for_all_sources(mergekit):
    """mergekit has one for each; ours refuses, and a recipe's blocks have one each."""
    models = draw("w")
    mergekit.save("densities", models)
    parameters = {"weight": HALVES, "density": {"a": 0.2, "b": 0.9}}
    theirs = mergekit.merge(Job("densities", "densities", [BASE, "a", "b"], "ties", BASE, parameters))["w"]
    assert theirs.isfinite().all()
    settings = {"density": 0.5, "lambda": 1.0, "normalize": True}
    with pytest.raises(ValueError, match="density"):
        merge_ours(Merge("ties", HALVES, {**settings, "density": {"a": 0.2, "b": 0.9}}), models)


@pytest.mark.parametrize("technique", ["task_arithmetic", "dare_linear"])
def test_only_what_normalises_by_definition_normalises(mergekit, technique):
    """mergekit's `normalize: true` divides any task vectors' sum by the weights' sum: give weights that sum to 1."""
    weights = {"a": 0.6, "b": 0.9}
    models = draw("w")
    settings = {"lambda": 1.0} if technique == "task_arithmetic" else DARE
    mergekit.save("normalise", models)
    parameters = {**as_job(Merge(technique, weights, settings), "x", "x").parameters, "normalize": True}
    job = Job("normalise", "normalise", [BASE, "a", "b"], technique, BASE, parameters, bits="normalise.bits")
    scaled = Merge(technique, {source: weight / 1.5 for source, weight in weights.items()}, settings)
    assert torch.allclose(mergekit.merge(job)["w"], merge_ours(scaled, models)["w"], rtol=1e-5, atol=1e-6)
    with pytest.raises(MergeError, match="no hyperparameter 'normalize'"):
        merge_ours(Merge(technique, weights, {**settings, "normalize": True}), models)

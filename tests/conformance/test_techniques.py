"""Every built-in technique keeps the contract, and the suite finds techniques that do not."""

import pytest
import torch

from automerge.merging.technique import Hyperparameter, Settings, Technique, load_technique, technique
from automerge.plugins import plugin_names
from automerge.testing.techniques import NonConformingError, check_technique


@pytest.mark.parametrize("name", plugin_names("techniques"))
def test_installed_techniques_conform(name):
    check_technique(load_technique(name))


def _first(inputs, weights):
    return inputs.sources[0] * weights[0]


def _in_place(inputs, weights):
    return inputs.sources[0].mul_(2)


def _half(inputs, weights):
    return inputs.sources[0].to(torch.float16)


def _global_random(inputs, weights):
    return inputs.sources[0] + torch.rand(inputs.sources[0].shape)


def _divides(inputs, weights):
    return inputs.sources[0] / torch.zeros_like(inputs.sources[0])


def _dead(inputs, weights, *, strength):
    return inputs.sources[0]


def _blind(inputs, weights):
    return inputs.sources[0]


def _needs_statistics(inputs, weights):
    return inputs.sources[0] * inputs.statistics["fisher"][0]


def _changes_statistics(inputs, weights):
    return inputs.sources[0] * (inputs.statistics["fisher"][0].add_(1) if inputs.statistics else 2)


def _needs_base(inputs, weights):
    return inputs.deltas[0]


@pytest.mark.parametrize(
    ("function", "declared", "problem"),
    [
        (_in_place, {}, "in place"),
        (_half, {}, "returned torch.float16"),
        (_global_random, {}, "global random"),
        (_divides, {}, "NaN or infinite"),
        (_dead, {"hyperparameters": (Hyperparameter("strength", "float", 0.5, 0, 1),)}, "'strength' has no effect"),
        (_first, {"randomised": True}, "the seed says otherwise"),
        (_first, {"normalised": True}, "shared factor"),
        (_first, {"effective_weights": lambda settings: {}}, "effective weights"),
        (
            _first,
            {"canonical": lambda s: Settings("bad", {k: 2 * v for k, v in s.weights.items()})},
            "is another merge",
        ),
        (_needs_base, {}, "no base"),
        (_blind, {"statistics": ("fisher",)}, "they have no effect"),
        (_changes_statistics, {"statistics": ("fisher",)}, "two results"),
    ],
)
def test_the_suite_finds_what_is_wrong(function, declared, problem):
    bad = technique(name="bad", source="nowhere", **declared)(function)
    with pytest.raises(NonConformingError, match=problem):
        check_technique(bad)


def test_a_technique_that_cannot_do_without_statistics_is_found():
    bad = technique(name="bad", source="nowhere", statistics=("fisher",))(_needs_statistics)
    with pytest.raises(NonConformingError, match="it fails without statistics"):
        check_technique(bad)


def test_a_good_plug_in_passes():
    good = technique(name="first", source="nowhere")(_first)
    assert isinstance(good, Technique)
    check_technique(good)


def test_an_undecorated_function_is_refused():
    with pytest.raises(NonConformingError, match="not decorated"):
        check_technique(_first)

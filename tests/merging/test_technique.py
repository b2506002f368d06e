"""Declaring a technique, and what is refused before it runs."""

import math

import pytest
import torch

from automerge.errors import MergeError, PluginError
from automerge.merging.technique import (
    Hyperparameter,
    Settings,
    TensorInputs,
    load_technique,
    technique,
    usable_techniques,
    validate_settings,
)


def test_one_decorated_function_is_a_technique():
    @technique(
        name="strongest",
        source="an example",
        requires_base=True,
        hyperparameters=(Hyperparameter("lambda", "float", 1.0, doc="scale"),),
    )
    def strongest(inputs, weights, *, lambda_):
        """The task vector of the largest weight."""
        return inputs.base_plus(inputs.deltas[weights.index(max(weights))] * lambda_)

    inputs = TensorInputs("t", ["a", "b"], torch.zeros(2), [torch.ones(2), torch.full((2,), 3.0)])
    assert strongest(inputs, [0.1, 0.9], lambda_=0.5).tolist() == [1.5, 1.5]
    assert strongest.declaration.name == "strongest"
    assert strongest.declaration.defaults() == {"lambda": 1.0}
    assert strongest.__doc__ == "The task vector of the largest weight."
    settings = Settings("strongest", {"a": 0.1, "b": 0.9}, {"lambda": 0.5})
    assert strongest.merge(inputs, settings).tolist() == [1.5, 1.5]


def test_deltas_are_a_sequence():
    inputs = TensorInputs("t", ["a", "b"], torch.ones(2), [torch.ones(2), torch.zeros(2)])
    assert len(inputs.deltas) == 2
    assert [delta.tolist() for delta in inputs.deltas] == [[0, 0], [-1, -1]]
    assert [delta.tolist() for delta in inputs.deltas[1:]] == [[-1, -1]]
    with pytest.raises(MergeError, match="no base"):
        TensorInputs("t", ["a"], None, [torch.ones(2)]).deltas  # noqa: B018


def test_declaration_and_function_must_agree():
    with pytest.raises(
        PluginError, match=r"declares the hyperparameters \['densty'\], its function takes \['density'\]"
    ):

        @technique(name="x", source="-", hyperparameters=(Hyperparameter("densty", "float", 0.5),))
        def wrong(inputs, weights, *, density):
            return inputs.sources[0]


def test_a_default_must_be_valid():
    with pytest.raises(PluginError, match="default"):
        technique(name="x", source="-", hyperparameters=(Hyperparameter("k", "int", 0, low=1),))(lambda i, w, *, k: 0)


def test_an_unknown_technique_names_the_nearest():
    with pytest.raises(PluginError, match=r"search.techniques.0: unknown technique 'tys'.*"):
        load_technique("tys", "search.techniques.0")
    with pytest.raises(PluginError, match="did you mean 'ties'"):
        load_technique("tie")


def test_a_result_of_another_shape_is_refused():
    @technique(name="flat", source="-")
    def flat(inputs, weights):
        return inputs.sources[0].reshape(-1)

    inputs = TensorInputs("w", ["a"], None, [torch.ones(2, 2)])
    with pytest.raises(PluginError, match=r"'flat' returned torch.float32 \(4,\) for tensor 'w'"):
        flat.merge(inputs, Settings("flat", {"a": 1.0}))


TIES = {"density": 0.5, "lambda": 1.0, "normalize": True}
HALVES = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("settings", "has_base", "message"),
    [
        (Settings("ties", HALVES, TIES), False, "block 'trunk': technique 'ties' needs a base"),
        (Settings("ties", {"a": 0.5}, TIES), True, "no weight for source 'b'"),
        (Settings("ties", {**HALVES, "hgh": 1}, TIES), True, "weight for the unknown source 'hgh'"),
        (Settings("ties", {"a": math.nan, "b": 0.5}, TIES), True, "weight of source 'a' is nan"),
        (Settings("ties", HALVES, {**TIES, "densty": 1}), True, "no hyperparameter 'densty'; did you mean 'density'"),
        (
            Settings("ties", HALVES, {"density": 0.5, "lambda": 1.0}),
            True,
            "'normalize' is missing; the default is True",
        ),
        (Settings("ties", HALVES, {**TIES, "density": 1.5}), True, "'density' is 1.5; choose a value between"),
        (Settings("ties", HALVES, {**TIES, "density": 0}), True, "'density' is 0"),
        (Settings("ties", HALVES, {**TIES, "density": True}), True, "must be a finite number, got True"),
        (Settings("ties", HALVES, {**TIES, "lambda": math.inf}), True, "must be a finite number, got inf"),
        (Settings("ties", HALVES, {**TIES, "normalize": 1}), True, "must be true or false, got 1"),
        (
            Settings("dare_ties", HALVES, {"density": 0.5, "lambda": 1, "rescale": "l2"}),
            True,
            "'rescale' cannot be 'l2'; choose one of: inverse_density, l1",
        ),
        (Settings("linear", {"a": 1.0, "b": -1.0}, {}), True, "divides by the sum of the weights, which is zero"),
        (Settings("linear", HALVES, {"density": 0.5}), True, "has no hyperparameter 'density'; remove it"),
    ],
)
def test_what_is_refused(settings, has_base, message):
    with pytest.raises(MergeError) as error:
        validate_settings(settings, sources=["a", "b"], has_base=has_base, where="block 'trunk'")
    assert message in str(error.value)


def test_the_number_of_sources(monkeypatch):
    @technique(name="linear", source="-", minimum_sources=2, maximum_sources=2)
    def pairwise(inputs, weights):
        return inputs.sources[0]

    monkeypatch.setattr("automerge.merging.technique.load_plugin", lambda group, name, where: pairwise)
    monkeypatch.setattr("automerge.merging.technique._LOADED", {})
    settings = Settings("linear", dict.fromkeys("abc", 1.0))
    with pytest.raises(MergeError, match="takes 2 to 2 sources, got 3"):
        validate_settings(settings, sources=list("abc"), has_base=False, where="block 'x'")


def test_valid_settings_are_typed():
    typed = validate_settings(
        Settings("ties", {"b": 1, "a": 0}, {"density": 1, "lambda": -0.0, "normalize": False}),
        sources=["a", "b"],
        has_base=True,
        where="block 'x'",
    )
    assert list(typed.weights) == ["a", "b"]
    assert repr(typed.hyperparameters) == "{'density': 1.0, 'lambda': 0.0, 'normalize': False}"


BUILT_IN = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


def test_without_a_base_the_task_vector_techniques_leave_with_one_notice():
    kept, notices = usable_techniques(BUILT_IN, sources=2, has_base=False)
    assert list(kept) == ["linear"]
    assert notices == ["without a base these techniques are left out: task_arithmetic, ties, dare_linear, dare_ties"]


def test_with_a_base_all_techniques_stay_in_their_order():
    kept, notices = usable_techniques(BUILT_IN[::-1], sources=3, has_base=True)
    assert list(kept) == BUILT_IN[::-1]
    assert notices == []


def test_no_technique_left_or_an_unknown_one_is_one_sentence():
    with pytest.raises(MergeError, match=r"none fits the inputs: without a base .* ties; "):
        usable_techniques(["ties"], sources=2, has_base=False)
    with pytest.raises(PluginError, match=r"search\.techniques\.1.*did you mean 'ties'"):
        usable_techniques(["linear", "tied"], sources=2, has_base=True)


def test_independent_weights_leave_out_what_always_normalises() -> None:
    kept, notices = usable_techniques(
        ["linear", "ties", "task_arithmetic"], sources=2, has_base=True, unnormalised=True
    )
    assert list(kept) == ["ties", "task_arithmetic"]
    assert notices == ["with independent weights these, which normalise them, are left out: linear"]

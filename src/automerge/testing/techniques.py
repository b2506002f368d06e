"""What every technique must keep, ours and plug-ins' alike: run ``check_technique`` over yours in a test.

::

    def test_it_keeps_the_contract():
        check_technique(my_technique)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from automerge.errors import AutoMergeError
from automerge.merging.derivative import scalar_gradient, scalar_values, scalars_of, with_scalars
from automerge.merging.recipe import RecipeBlock
from automerge.merging.technique import (
    Hyperparameter,
    Settings,
    Statistic,
    Technique,
    TensorInputs,
    Value,
    load_technique,
)

_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0,), (3, 0), (17,), (5, 7), (2, 3, 4, 5))


def check_technique(technique: Technique, tolerance: float = 1e-5) -> None:
    """Check a technique against the contract of `automerge.merging.technique.technique`.

    - It keeps shape and dtype, float32 and float64, for scalars, empty tensors and non-contiguous ones, and gives
      finite values for finite inputs.
    - It is pure: same inputs, same bytes; inputs stay as they are; torch's global random state has no effect and is
      left alone; the number of threads has no effect.
    - Its declaration is true: it runs without a base unless it requires one, it has the statistics that it declares and
      merges tensors that have none of them, every hyperparameter is accepted over its
      range and has an effect, the seed has an effect exactly if it is declared randomised, a shared factor of the
      weights has none if it is declared normalised.
    - Its canonical form merges alike, and is a fixed point; its effective weights name the sources.
    - If it is declared differentiable, autograd's derivative in its weights is that of finite differences.

    Args:
        technique: the decorated function. It need not be installed as an entry point, unless its canonical form is
            another technique.
        tolerance: relative to the largest magnitude, where two forms of one merge may round differently (float32).

    Raises:
        NonConformingError: the contract is broken; the message says how.
    """
    if not isinstance(technique, Technique):
        raise NonConformingError(f"{technique!r} is not decorated with @technique")
    counts = _source_counts(technique)
    for count in counts:
        for shape in _SHAPES:
            for dtype in (torch.float32, torch.float64):
                _check_result(technique, _inputs(technique, shape, count, dtype))
    _check_pure(technique, _inputs(technique, (64, 33), counts[-1]))
    # Large enough for torch to split elementwise work and reductions between threads.
    _check_threads(technique, _inputs(technique, (300_007,), counts[-1]))
    _check_declaration(technique, _inputs(technique, (40, 25), counts[-1]), tolerance)
    if technique.declaration.differentiable:
        _check_derivative(technique, _inputs(technique, (40, 25), counts[-1], torch.float64))


class NonConformingError(AssertionError):
    """A technique breaks the contract."""


def _check_result(technique: Technique, inputs: TensorInputs) -> None:
    variants = [inputs]
    if inputs.sources[0].dim() >= 2:
        turned = [source.transpose(0, 1) for source in inputs.sources]
        base = None if inputs.base is None else inputs.base.transpose(0, 1)
        statistics = {
            kind: [each.transpose(0, 1) for each in found] if kind == "fisher" else found
            for kind, found in inputs.statistics.items()
            if kind == "fisher" or turned[0].shape == inputs.sources[0].shape
        }
        variants.append(replace(inputs, base=base, sources=turned, statistics=statistics))
    if not technique.declaration.requires_base:
        variants.append(replace(inputs, base=None))
    if inputs.statistics:
        variants.append(replace(inputs, statistics={}))
    for variant in variants:
        try:
            merged = _merge(technique, variant, _settings(technique, variant))
        except LookupError as error:
            if variant.statistics or not technique.declaration.statistics:
                raise
            raise _broken(technique, f"it fails without statistics ({error!r}), which a tensor may not have") from error
        if not bool(torch.isfinite(merged).all()):
            raise _broken(technique, f"finite inputs of shape {tuple(merged.shape)} gave NaN or infinite values")


def _check_pure(technique: Technique, inputs: TensorInputs) -> None:
    held = [*inputs.sources, *([] if inputs.base is None else [inputs.base])]
    held += [tensor for found in inputs.statistics.values() for tensor in found]
    before = [tensor.clone() for tensor in held]
    state = torch.get_rng_state()
    settings = _settings(technique, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        started = torch.get_rng_state()
        first = _merge(technique, inputs, settings)
        if not torch.equal(torch.get_rng_state(), started):
            raise _broken(technique, "it draws from torch's global random numbers; use automerge.merging.random")
        torch.manual_seed(2)
        second = _merge(technique, inputs, settings)
    torch.set_rng_state(state)
    if not torch.equal(first, second):
        raise _broken(technique, "the same inputs gave two results")
    for tensor, copy in zip(held, before, strict=True):
        if not torch.equal(tensor, copy):
            raise _broken(technique, "it changes its inputs in place")


def _check_threads(technique: Technique, inputs: TensorInputs) -> None:
    settings = _settings(technique, inputs)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_merge(technique, inputs, settings))
    finally:
        torch.set_num_threads(threads)
    if not all(torch.equal(results[0], other) for other in results[1:]):
        raise _broken(technique, "the result depends on the number of threads")


def _check_declaration(technique: Technique, inputs: TensorInputs, tolerance: float) -> None:
    declaration = technique.declaration
    settings = _settings(technique, inputs)
    merged = _merge(technique, inputs, settings)
    for hyperparameter in declaration.hyperparameters:
        results = []
        for value in _values(hyperparameter):
            hyperparameter.validate(value, f"technique {declaration.name!r}")
            changed = replace(settings, hyperparameters={**settings.hyperparameters, hyperparameter.name: value})
            result = _merge(technique, inputs, changed)
            if not bool(torch.isfinite(result).all()):
                raise _broken(technique, f"{hyperparameter.name}={value!r} gave NaN or infinite values")
            results.append(result)
            _check_canonical(technique, inputs, changed, tolerance)
        if all(torch.equal(results[0], other) for other in results[1:]):
            raise _broken(technique, f"the hyperparameter {hyperparameter.name!r} has no effect")

    reseeded = _merge(technique, replace(inputs, seed=inputs.seed + 1), settings)
    if torch.equal(reseeded, merged) == declaration.randomised:
        raise _broken(technique, f"declared randomised={declaration.randomised}, and the seed says otherwise")

    if declaration.normalised:
        scaled = replace(settings, weights={name: 4 * weight for name, weight in settings.weights.items()})
        if not _close(_merge(technique, inputs, scaled), merged, tolerance):
            raise _broken(technique, "declared normalised, and a shared factor of the weights has an effect")

    if declaration.statistics and torch.equal(_merge(technique, replace(inputs, statistics={}), settings), merged):
        raise _broken(technique, f"declared statistics={declaration.statistics}, and they have no effect")

    total = sum(settings.weights.values())
    convex = replace(settings, weights={name: weight / total for name, weight in settings.weights.items()})
    _check_canonical(technique, inputs, settings, tolerance)
    _check_canonical(technique, inputs, convex, tolerance)
    alone = dict.fromkeys(settings.weights, 0.0) | {inputs.source_names[0]: 0.5}
    _check_canonical(technique, inputs, replace(settings, weights=alone), tolerance)
    effective = declaration.effective_weights(settings)
    if list(effective) != list(inputs.source_names) or not all(
        isinstance(value, float) for value in effective.values()
    ):
        raise _broken(technique, "its effective weights are not one float per source, in order")


def _check_derivative(technique: Technique, inputs: TensorInputs) -> None:
    """In float64, where a step of 1e-6 crosses no election but by bad luck: one element in ten thousand may."""
    names = list(inputs.source_names)
    block = RecipeBlock(
        name="block",
        technique=technique.declaration.name,
        weights={name: 0.3 + 0.2 * index for index, name in enumerate(names)},
        hyperparameters=_settings(technique, inputs).hyperparameters,
        parameters=[inputs.tensor],
    )
    gradient = torch.linspace(-1, 1, inputs.sources[0].numel(), dtype=torch.float64).view(inputs.sources[0].shape)
    found = scalar_gradient(technique, block, inputs, gradient)
    values, step = scalar_values(block), 1e-6
    for index, (scalar, derivative) in enumerate(zip(scalars_of(block), found, strict=True)):
        costs = []
        for sign in (1, -1):
            moved = [value + sign * step * (at == index) for at, value in enumerate(values)]
            costs.append(float((_merge(technique, inputs, with_scalars(block, moved).settings) * gradient).sum()))
        expected = (costs[0] - costs[1]) / (2 * step)
        if abs(derivative - expected) > 1e-4 * (1 + abs(expected)):
            raise _broken(
                technique,
                f"declared differentiable, and its derivative in {scalar!r} is {derivative:g}, by autograd, and "
                f"{expected:g} by finite differences",
            )


def _check_canonical(technique: Technique, inputs: TensorInputs, settings: Settings, tolerance: float) -> None:
    simpler = technique.declaration.canonical(settings)
    if set(simpler.weights) != set(settings.weights):
        raise _broken(technique, "its canonical form has other sources")
    other = technique if simpler.technique == technique.declaration.name else load_technique(simpler.technique)
    if not _close(_merge(other, inputs, simpler), _merge(technique, inputs, settings), tolerance):
        raise _broken(technique, f"the canonical form of {settings} is another merge")
    if other is technique and not _near(technique.declaration.canonical(simpler), simpler):
        raise _broken(technique, f"the canonical form of {settings} has another canonical form")


def _merge(technique: Technique, inputs: TensorInputs, settings: Settings) -> torch.Tensor:
    try:
        return technique.merge(inputs, settings)
    except AutoMergeError as error:
        raise _broken(technique, str(error)) from error


def _inputs(
    technique: Technique, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32
) -> TensorInputs:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    sources = [base + 0.1 * torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    names = [f"source{index}" for index in range(count)]
    found = {kind: _statistics(kind, sources, generator) for kind in technique.declaration.statistics}
    statistics = {kind: tensors for kind, tensors in found.items() if tensors}
    return TensorInputs("layer.weight", names, base, sources, seed=3, statistics=statistics)


def _statistics(kind: Statistic, sources: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """As `automerge.merging.statistics` describes them; none where the shape has none."""
    like = sources[0]
    if kind == "fisher":
        # Of very different sizes, some of them zero.
        drawn = [torch.randn(like.shape, generator=generator).to(like.dtype) for _ in sources]
        return [torch.where(each.abs() < 0.2, 0, each**8) for each in drawn]
    if like.dim() < 2 or not like.numel():
        return []
    # Fewer samples than inputs, and an input that is always zero.
    samples = [torch.randn(3 + at, like[0].numel(), generator=generator).to(like.dtype) for at, _ in enumerate(sources)]
    for each in samples:
        each[:, 0] = 0
    return [each.T @ each / len(each) for each in samples]


def _settings(technique: Technique, inputs: TensorInputs) -> Settings:
    weights = {name: 0.25 + 0.125 * index for index, name in enumerate(inputs.source_names)}
    return Settings(technique.declaration.name, weights, technique.declaration.defaults())


def _source_counts(technique: Technique) -> list[int]:
    low, high = technique.declaration.minimum_sources, technique.declaration.maximum_sources
    return [count for count in range(low, low + 4) if high is None or count <= high]


def _values(hyperparameter: Hyperparameter) -> Iterator[Value]:
    yield hyperparameter.default
    if hyperparameter.kind == "bool":
        yield not hyperparameter.default
        return
    if hyperparameter.kind == "choice":
        yield from hyperparameter.choices
        return
    default = float(hyperparameter.default)
    low = default - 1 if hyperparameter.low is None else hyperparameter.low
    high = default + 1 if hyperparameter.high is None else hyperparameter.high
    for value in (low, (low + high) / 2, high):
        yield int(value) if hyperparameter.kind == "int" else float(value)


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    scale = float(other.abs().max()) if other.numel() else 0.0
    return bool(((one - other).abs() <= tolerance * scale).all())


def _near(one: Settings, other: Settings) -> bool:
    return (
        one.technique == other.technique
        and one.hyperparameters == other.hyperparameters
        and all(abs(one.weights[name] - weight) <= 1e-9 * abs(weight) for name, weight in other.weights.items())
    )


def _broken(technique: Technique, problem: str) -> NonConformingError:
    return NonConformingError(f"technique {technique.declaration.name!r}: {problem}")

"""What a merging technique is: one pure function on tensors, and a declaration that is checked before it runs.

A third party adds a technique with one decorated function and an entry point in the group ``automerge.techniques``::

    @technique(
        name="maximum",
        hyperparameters=(Hyperparameter("lambda", "float", default=1.0, doc="scale of the result"),),
        source="Nobody, 'A paper', https://example.org",
    )
    def maximum(inputs: TensorInputs, weights: Sequence[float], *, lambda_: float) -> torch.Tensor:
        return lambda_ * torch.stack(list(inputs.sources)).amax(0)

`automerge.testing.techniques.check_technique` tells whether it keeps the contract.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from automerge.errors import MergeError, PluginError
from automerge.merging.fused import Fused
from automerge.plugins import load_plugin, nearest

if TYPE_CHECKING:
    import torch

Value = bool | int | float | str
"""The value of one hyperparameter."""

Kind = Literal["float", "int", "bool", "choice"]

Statistic = Literal["fisher", "gram"]
"""A kind of statistics that a technique may need of each source; `automerge.merging.statistics` says what they are."""

STATISTICS: tuple[Statistic, ...] = ("fisher", "gram")
"""All kinds of statistics."""


@dataclass(frozen=True)
class Hyperparameter:
    """One declared hyperparameter of a technique.

    Args:
        name: its name in recipes. The function's keyword has the same name, with an underscore appended where the
            name is a Python keyword (``lambda`` becomes ``lambda_``).
        kind: ``float``, ``int``, ``bool``, or ``choice`` (one of ``choices``).
        default: a valid value.
        low, high: the valid range, both inclusive; None is unbounded. For float and int only.
        choices: the valid values of a ``choice``.
        searched: whether a search varies it; if not, searches keep the default.
        doc: one line for users.
    """

    name: str
    kind: Kind
    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    searched: bool = False
    doc: str = ""

    @property
    def argument(self) -> str:
        """The keyword argument of the function that takes the value."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    def validate(self, value: Any, where: str) -> Value:
        """Return ``value`` in its declared type (an int given for a float becomes a float).

        Raises:
            MergeError: wrong type, not finite, out of range, or not one of the choices.
        """
        path = f"{where}: hyperparameter {self.name!r}"
        if self.kind == "choice":
            if value not in self.choices:
                raise MergeError(f"{path} cannot be {value!r}", nearest(str(value), list(self.choices)))
            return str(value)
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise MergeError(f"{path} must be true or false, got {value!r}", f"the default is {self.default!r}")
            return value
        accepted = (int,) if self.kind == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted) or not math.isfinite(value):
            noun = "an integer" if self.kind == "int" else "a finite number"
            raise MergeError(f"{path} must be {noun}, got {value!r}", f"the default is {self.default!r}")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            low = "-inf" if self.low is None else f"{self.low:g}"
            high = "inf" if self.high is None else f"{self.high:g}"
            raise MergeError(f"{path} is {value!r}", f"choose a value between {low} and {high}")
        # Adding 0.0 turns a negative zero into zero, so that equal settings are written alike.
        return value + 0.0 if self.kind == "float" else value


@dataclass(frozen=True)
class Settings:
    """How one block is merged: a technique, a weight per source, and a value per declared hyperparameter."""

    technique: str
    weights: dict[str, float]
    hyperparameters: dict[str, Value] = field(default_factory=dict)


def _without_base(tensor: str) -> MergeError:
    return MergeError(
        f"tensor {tensor!r}: the technique uses task vectors, and there is no base",
        "declare requires_base=True in the technique",
    )


def _unchanged(settings: Settings) -> Settings:
    return settings


def _not_fused(settings: Settings) -> Fused | None:
    return None


def _plain_weights(settings: Settings) -> dict[str, float]:
    return dict(settings.weights)


@dataclass(frozen=True)
class Declaration:
    """What a technique declares about itself; see `technique` for the fields."""

    name: str
    source: str
    requires_base: bool = False
    minimum_sources: int = 1
    maximum_sources: int | None = None
    hyperparameters: tuple[Hyperparameter, ...] = ()
    normalised: bool = False
    randomised: bool = False
    nonzero_weight_sum: bool = False
    effective_weights: Callable[[Settings], dict[str, float]] = _plain_weights
    effective_note: str = ""
    canonical: Callable[[Settings], Settings] = _unchanged
    fused: Callable[[Settings], Fused | None] = _not_fused
    statistics: tuple[Statistic, ...] = ()
    differentiable: bool = False

    def defaults(self) -> dict[str, Value]:
        """The default of every hyperparameter, by name."""
        return {each.name: each.default for each in self.hyperparameters}


class Deltas(Sequence["torch.Tensor"]):
    """The task vectors of one tensor, ``source - base``: computed when asked for, never kept."""

    def __init__(self, inputs: TensorInputs) -> None:
        if inputs.base is None:
            raise _without_base(inputs.tensor)
        self._base = inputs.base
        self._sources = inputs.sources

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [source - self._base for source in self._sources[index]]
        return self._sources[index] - self._base

    def __iter__(self) -> Iterator[torch.Tensor]:
        for source in self._sources:
            yield source - self._base


@dataclass(frozen=True)
class TensorInputs:
    """What a technique sees of one tensor. All tensors have one shape, device and dtype and must not be changed.

    Args:
        tensor: the tensor's name.
        source_names: the sources, in the recipe's order.
        base: the base's tensor, or None where there is no base. float32, or float64 if any input is float64.
        sources: the sources' tensors, in the order of ``source_names``; same dtype.
        seed: the recipe's seed. Random numbers are a function of seed, source, tensor and element index only
            (`automerge.merging.random`).
        statistics: by kind, of those that the technique declares, one tensor per source in the order of
            ``source_names``; device and dtype of the sources. A kind that this tensor does not have is absent.
    """

    tensor: str
    source_names: Sequence[str]
    base: torch.Tensor | None
    sources: Sequence[torch.Tensor]
    seed: int = 0
    statistics: Mapping[Statistic, Sequence[torch.Tensor]] = field(default_factory=dict)

    @property
    def deltas(self) -> Deltas:
        """The task vectors, in the order of the sources; each is computed when it is asked for.

        Raises:
            MergeError: there is no base.
        """
        return Deltas(self)

    def base_plus(self, delta: torch.Tensor) -> torch.Tensor:
        """The base plus a merged task vector.

        Raises:
            MergeError: there is no base.
        """
        if self.base is None:
            raise _without_base(self.tensor)
        return self.base + delta


class Technique:
    """A technique: the author's function, still callable as it was, with its ``declaration``."""

    def __init__(self, function: Callable[..., torch.Tensor], declaration: Declaration) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.declaration = declaration

    def __call__(self, inputs: TensorInputs, weights: Sequence[float], **hyperparameters: Any) -> torch.Tensor:
        return self.function(inputs, weights, **hyperparameters)

    def merge(self, inputs: TensorInputs, settings: Settings) -> torch.Tensor:
        """Call the function with validated settings (`validate_settings`).

        Returns:
            the merged tensor: shape and dtype of the inputs.

        Raises:
            PluginError: the function returned another shape or dtype.
        """
        arguments = {each.argument: settings.hyperparameters[each.name] for each in self.declaration.hyperparameters}
        merged = self.function(inputs, [settings.weights[name] for name in inputs.source_names], **arguments)
        like = inputs.sources[0]
        if merged.shape != like.shape or merged.dtype != like.dtype:
            raise PluginError(
                f"technique {self.declaration.name!r} returned {merged.dtype} {tuple(merged.shape)} for tensor "
                f"{inputs.tensor!r}, which is {like.dtype} {tuple(like.shape)}",
                "correct the technique; automerge.testing.techniques.check_technique finds such faults",
            )
        return merged


def technique(
    *,
    name: str,
    source: str,
    requires_base: bool = False,
    minimum_sources: int = 1,
    maximum_sources: int | None = None,
    hyperparameters: Sequence[Hyperparameter] = (),
    normalised: bool = False,
    randomised: bool = False,
    nonzero_weight_sum: bool = False,
    effective_weights: Callable[[Settings], dict[str, float]] = _plain_weights,
    effective_note: str = "",
    canonical: Callable[[Settings], Settings] = _unchanged,
    fused: Callable[[Settings], Fused | None] = _not_fused,
    statistics: Sequence[Statistic] = (),
    differentiable: bool = False,
) -> Callable[[Callable[..., torch.Tensor]], Technique]:
    """Declare a function to be a merging technique.

    The function is ``fn(inputs: TensorInputs, weights: Sequence[float], *, <hyperparameters>) -> torch.Tensor``: pure,
    deterministic, elementwise results independent of the thread count, and the shape and dtype of its inputs kept.

    Args:
        name: the name in recipes; the entry point has the same.
        source: where the technique comes from: paper and URL.
        requires_base: whether it needs the sources' common ancestor (task vectors).
        minimum_sources, maximum_sources: how many sources it takes; None is any number.
        hyperparameters: every keyword-only argument of the function, declared.
        normalised: one scalar that multiplies all weights has no effect (at the defaults).
        randomised: the result depends on ``inputs.seed``.
        nonzero_weight_sum: weights that sum to zero are refused.
        effective_weights: settings -> the factor with which each source enters the result, for the report.
        effective_note: what a reader must know about these factors.
        canonical: settings -> settings of the same merge in simpler or unique form (perhaps another technique);
            the weights may change by a common positive factor only, since buffers are averaged with them.
        fused: settings -> the same merge as one elementwise pass, for the compiled kernels; None where it is none.
            The bytes must be those of the function.
        statistics: the kinds of statistics (`STATISTICS`) that it needs of every source, gathered from validation data
            before the search. A tensor that has none must be merged all the same.
        differentiable: the function also takes scalar tensors as weights (and as ``lambda``, where it has that), and
            autograd gives the derivative of its result in them; masks and elections count as constant.

    Raises:
        PluginError: the declared hyperparameters are not the function's keyword-only arguments, a default is not
            valid, or a kind of statistics is unknown.
    """
    for kind in statistics:
        if kind not in STATISTICS:
            raise PluginError(
                f"technique {name!r} declares the statistics {kind!r}", f"declare some of {', '.join(STATISTICS)}"
            )
    declaration = Declaration(
        name=name,
        source=source,
        requires_base=requires_base,
        minimum_sources=minimum_sources,
        maximum_sources=maximum_sources,
        hyperparameters=tuple(hyperparameters),
        normalised=normalised,
        randomised=randomised,
        nonzero_weight_sum=nonzero_weight_sum,
        effective_weights=effective_weights,
        effective_note=effective_note,
        canonical=canonical,
        fused=fused,
        statistics=tuple(statistics),
        differentiable=differentiable,
    )

    def decorate(function: Callable[..., torch.Tensor]) -> Technique:
        parameters = inspect.signature(function).parameters.values()
        found = sorted(each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY)
        declared = sorted(each.argument for each in declaration.hyperparameters)
        if found != declared:
            raise PluginError(
                f"technique {name!r} declares the hyperparameters {declared}, its function takes {found}",
                "make them agree",
            )
        for each in declaration.hyperparameters:
            try:
                each.validate(each.default, f"technique {name!r}")
            except MergeError as error:
                raise PluginError(
                    f"the default of a hyperparameter is not valid: {error.problem}", "correct it"
                ) from None
        return Technique(function, declaration)

    return decorate


_LOADED: dict[str, Technique] = {}


def load_technique(name: str, where: str = "") -> Technique:
    """The technique registered under ``name`` in the entry-point group ``automerge.techniques``.

    Args:
        name: the technique's name.
        where: path in the spec or recipe, for the error.

    Raises:
        PluginError: unknown name (the nearest is given), not importable, or not made by `technique`.
    """
    if name not in _LOADED:
        found = load_plugin("techniques", name, where)
        if not isinstance(found, Technique) or found.declaration.name != name:
            raise PluginError(
                f"the entry point {name!r} in automerge.techniques is not a technique of that name",
                f"decorate its function with @technique(name={name!r}, ...)",
            )
        _LOADED[name] = found
    return _LOADED[name]


def usable_techniques(
    names: Sequence[str], *, sources: int, has_base: bool, unnormalised: bool = False
) -> tuple[dict[str, Declaration], list[str]]:
    """Declarations of those techniques of a spec that fit the inputs, and a notice for each reason to leave some out.

    Args:
        names: ``search.techniques``.
        sources: how many sources there are.
        has_base: whether there is a base.
        unnormalised: whether only techniques fit that can leave the weights as they are.

    Raises:
        PluginError: a name is unknown.
        MergeError: none fits.
    """
    kept: dict[str, Declaration] = {}
    without_base: list[str] = []
    wrong_count: list[str] = []
    normalising: list[str] = []
    for index, name in enumerate(names):
        declaration = load_technique(name, where=f"search.techniques.{index}").declaration
        if declaration.requires_base and not has_base:
            without_base.append(name)
        elif sources < declaration.minimum_sources or sources > (declaration.maximum_sources or sources):
            wrong_count.append(name)
        elif unnormalised and declaration.normalised and "normalize" not in declaration.defaults():
            normalising.append(name)
        else:
            kept[name] = declaration
    notices = []
    if without_base:
        notices.append(f"without a base these techniques are left out: {', '.join(without_base)}")
    if wrong_count:
        notices.append(f"these techniques do not take {sources} sources and are left out: {', '.join(wrong_count)}")
    if normalising:
        notices.append(f"with independent weights these, which normalise them, are left out: {', '.join(normalising)}")
    if not kept:
        raise MergeError(
            f"search.techniques: none fits the inputs: {'; '.join(notices)}",
            "add a base, or 'linear' with simplex weights",
        )
    return kept, notices


def validate_settings(settings: Settings, *, sources: Sequence[str], has_base: bool, where: str) -> Settings:
    """Check settings against the technique's declaration, before anything is computed.

    Args:
        settings: what to check.
        sources: the names of all sources.
        has_base: whether there is a base.
        where: the block, for the error.

    Returns:
        the settings with every value in its declared type.

    Raises:
        PluginError: the technique is unknown.
        MergeError: base missing, wrong number of sources, weights that do not name exactly the sources or are not
            finite or sum to zero where that is not allowed, an unknown, missing or invalid hyperparameter.
    """
    declaration = load_technique(settings.technique, where).declaration
    name = f"{where}: technique {declaration.name!r}"
    if declaration.requires_base and not has_base:
        raise MergeError(f"{name} needs a base", "name the sources' common ancestor as base or use 'linear'")
    count, most = len(sources), declaration.maximum_sources
    if count < declaration.minimum_sources or (most is not None and count > most):
        limit = (
            f"at least {declaration.minimum_sources}" if most is None else f"{declaration.minimum_sources} to {most}"
        )
        raise MergeError(f"{name} takes {limit} sources, got {count}", "choose another technique")

    for source in settings.weights:
        if source not in sources:
            raise MergeError(f"{where}: weight for the unknown source {source!r}", nearest(source, list(sources)))
    for source in sources:
        if source not in settings.weights:
            raise MergeError(
                f"{where}: no weight for source {source!r}", "give every source a weight, 0 if it is unused"
            )
    weights = {source: settings.weights[source] + 0.0 for source in sources}
    for source, weight in weights.items():
        if not math.isfinite(weight):
            raise MergeError(f"{where}: the weight of source {source!r} is {weight}", "give a finite number")
    largest = max(abs(weight) for weight in weights.values())
    if declaration.nonzero_weight_sum and abs(math.fsum(weights.values())) <= 1e-8 * largest:
        raise MergeError(f"{name} divides by the sum of the weights, which is zero", "change the weights")

    declared = {each.name: each for each in declaration.hyperparameters}
    for key in settings.hyperparameters:
        if key not in declared:
            remedy = nearest(key, list(declared)) if declared else "remove it, the technique has no hyperparameters"
            raise MergeError(f"{name} has no hyperparameter {key!r}", remedy)
    for key, hyperparameter in declared.items():
        if key not in settings.hyperparameters:
            raise MergeError(f"{name}: hyperparameter {key!r} is missing", f"the default is {hyperparameter.default!r}")
    values = {key: each.validate(settings.hyperparameters[key], where) for key, each in declared.items()}
    return Settings(settings.technique, weights, values)


def canonical_settings(settings: Settings) -> Settings:
    """The unique form of validated settings: equal merges get equal settings.

    Applies the technique's own rule (``Declaration.canonical``), and that of the technique it leads to, until nothing
    changes. Numbers are rounded to 12 significant digits, so that 0.1 + 0.2 and 0.3 are one value.

    Raises:
        PluginError: the technique is unknown, or its rules do not come to an end.
    """
    for _ in range(8):
        simpler = _rounded(load_technique(settings.technique).declaration.canonical(settings))
        if simpler == settings:
            return settings
        settings = simpler
    raise PluginError(f"the canonical form of technique {settings.technique!r} does not settle", "correct its rule")


def scaled_to_sum_one(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights divided by the sum of their magnitudes; unchanged if that is 1 (to 1e-9) or 0.

    A positive factor only: signs stay, and for non-negative weights the sum becomes 1.
    """
    total = math.fsum(abs(weight) for weight in weights.values())
    if total == 0 or abs(total - 1) <= 1e-9:
        return dict(weights)
    return {name: weight / total for name, weight in weights.items()}


def fold_lambda(settings: Settings) -> Settings:
    """``(weights, lambda)`` -> ``(lambda * weights, 1)`` for techniques that are linear in both.

    Only for lambda > 0: a positive factor keeps the election of signs and the averaging of buffers.
    """
    factor = float(settings.hyperparameters["lambda"])
    if factor <= 0 or factor == 1:
        return settings
    weights = {name: factor * weight for name, weight in settings.weights.items()}
    return Settings(settings.technique, weights, {**settings.hyperparameters, "lambda": 1.0})


def _rounded(settings: Settings) -> Settings:
    weights = {name: _round(weight) for name, weight in settings.weights.items()}
    values = {
        key: _round(value) if isinstance(value, float) else value for key, value in settings.hyperparameters.items()
    }
    return Settings(settings.technique, weights, values)


def _round(value: float) -> float:
    return float(f"{value:.12g}") + 0.0

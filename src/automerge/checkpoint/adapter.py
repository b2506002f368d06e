"""LoRA adapters as checkpoints: base + scale * B @ A, computed tensor by tensor when it is read.

The format is that of PEFT (https://github.com/huggingface/peft): a folder with ``adapter_config.json`` and
``adapter_model.safetensors`` or ``adapter_model.bin``. LoRA is arXiv 2106.09685, rank-stabilised LoRA (``use_rslora``)
arXiv 2312.03732, DoRA arXiv 2402.09353. What the weights become is what PEFT's ``merge_and_unload`` makes of them;
what it cannot merge exactly is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from automerge.checkpoint.checkpoint import Checkpoint, Extent
from automerge.checkpoint.files import open_files
from automerge.checkpoint.header import decode_object
from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.layout import ADAPTER_CONFIG, Layout
from automerge.checkpoint.rounding import round_to
from automerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_MERGE = "merge the adapter into its base with PEFT's merge_and_unload, and pass the result"
_GET = "get the adapter again from where it came"
_PREFIX = "base_model.model."

_TILE = 1 << 20
"""Elements that are computed at a time. The tiles follow from the shape alone, and never from the number of threads."""

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it was; the others (PiSSA, OLoRA, ...) train another base."""

_WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "target_modules",
        "target_modules_to_tie",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "runtime_config",
        "megatron_core",
        "ensure_weight_tying",
    }
)
"""Entries that say how the adapter was trained, or where it sits, which the names of its tensors say too."""


Rank = Annotated[int, Field(ge=1, le=2**31)]
"""Of A and B. The bound is beyond any matrix; a longer integer would not even fit a float."""


def _empty(value: Any) -> Any:
    return {} if value is None else value


class AdapterConfig(BaseModel):
    """What of ``adapter_config.json`` decides what the adapter's weights mean."""

    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)

    peft_type: str
    r: Rank = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: Annotated[dict[str, Rank], BeforeValidator(_empty)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, FiniteFloat], BeforeValidator(_empty)] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None

    def scale(self, module: str) -> tuple[int, float]:
        """Rank and scale of one module, by the first pattern that its name ends with.

        A pattern is a regular expression for the end of the name, whole components.
        """
        rank = next((r for pattern, r in self.rank_pattern.items() if _ends(pattern, module)), self.r)
        alpha = next((a for pattern, a in self.alpha_pattern.items() if _ends(pattern, module)), self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(content: bytes, where: str) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        content: the file's bytes.
        where: names the file in errors.

    Raises:
        CheckpointError: it is not a LoRA adapter's configuration, or has an option that is not supported.
    """
    try:
        config = AdapterConfig.model_validate(decode_object(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: {key}: {first['msg']}", _GET) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: cannot be decoded: {error}", _GET) from None
    if config.peft_type != "LORA":
        raise CheckpointError(f"{where}: an adapter of the type {config.peft_type[:40]!r}, only LORA is read", _MERGE)
    if config.bias != "none":
        raise CheckpointError(f"{where}: bias {config.bias[:40]!r} is not supported, only 'none'", _MERGE)
    if config.init_lora_weights not in _PLAIN_STARTS:
        start = str(config.init_lora_weights)[:40]
        raise CheckpointError(
            f"{where}: init_lora_weights {start!r} changes the base before the training, so base + adapter is not "
            "what was trained",
            "convert it by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or merge it with PEFT",
        )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        _check_pattern(pattern, where)
    unknown = [key for key, value in (config.model_extra or {}).items() if value and key not in _WITHOUT_EFFECT]
    if unknown:
        shown = ", ".join(repr(key[:40]) for key in sorted(unknown)[:10])
        raise CheckpointError(f"{where}: cannot be applied exactly: it sets {shown}", _MERGE)
    return config


@dataclass(frozen=True)
class Update:
    """How one tensor of the base changes.

    Attributes:
        full: name of the adapter's tensor that takes the place of the base's; None: it stays.
        a: name of A, [rank, columns], or [rank, columns, kernel...] of a convolution; None without LoRA.
        b: name of B, [rows, rank], or [rows, rank, 1...].
        scale: of B @ A.
        transposed: the tensor is laid out as (B @ A) transposed.
        magnitude: name of DoRA's magnitudes, [rows]; None without DoRA.
    """

    full: str | None = None
    a: str | None = None
    b: str | None = None
    scale: float = 0.0
    transposed: bool = False
    magnitude: str | None = None


def plan_updates(
    config: AdapterConfig, adapter: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], where: str
) -> dict[str, Update]:
    """What an adapter changes, by the name of the base's tensor; from names, dtypes and shapes alone.

    Args:
        config: its configuration.
        adapter: dtype and shape of its tensors.
        base: the same of the base it was trained on.
        where: names the adapter in errors.

    Returns:
        The updates in sorted name order. A name that the base lacks is that of a module in ``modules_to_save``: a head
        that the adapter brings along.

    Raises:
        CheckpointError: an entry is not one of a LoRA adapter, or does not fit the base or the configuration.
    """
    parts = _parse(config, adapter, base, where)
    absent = sorted(name for name, entry in parts.items() if "full" not in entry and name not in base)
    if absent:
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        raise CheckpointError(
            f"{where}: adapts {len(absent)} tensors that its base does not hold: {shown}",
            "name the base that the adapter was trained on; a tied tensor can be adapted only under its stored name",
        )
    layouts = {
        name: _layout_of(name, entry, adapter, base, where) for name, entry in sorted(parts.items()) if "a" in entry
    }
    # The flag is one for all modules, and PEFT corrects it for each: the shapes say, where they can.
    flags = {layout for name, layout in layouts.items() if layout is not None and "embedding" not in parts[name]}
    updates = {}
    for name, entry in sorted(parts.items()):
        if "a" not in entry:
            updates[name] = Update(full=entry["full"])
            continue
        module = entry["module"]
        rank, scale = config.scale(module)
        found = adapter[entry["a"]].shape[0]
        if found != rank:
            raise CheckpointError(
                f"{where}: {module} has rank {found}, and adapter_config.json says {rank}",
                "pass the configuration that belongs to these weights",
            )
        transposed = layouts[name]
        if transposed is None:
            if flags - {config.fan_in_fan_out}:
                raise CheckpointError(
                    f"{where}: {name} is square, and fan_in_fan_out contradicts the shapes of other modules, so its "
                    "orientation is not known",
                    _MERGE,
                )
            transposed = config.fan_in_fan_out
        updates[name] = Update(entry.get("full"), entry["a"], entry["b"], scale, transposed, entry.get("magnitude"))
    return updates


def updated_infos(
    updates: Mapping[str, Update], adapter: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Dtype and shape of base and adapter together, in sorted name order.

    An adapted tensor has the base's dtype, as after ``merge_and_unload``; one that is replaced has the adapter's.
    """
    infos = {**base, **{name: adapter[update.full] for name, update in updates.items() if update.full is not None}}
    return {name: infos[name] for name in sorted(infos)}


class Adapter(Checkpoint):
    """A LoRA adapter on its base, as the checkpoint that ``merge_and_unload`` would write. No copy of it is made.

    The digest covers the adapter's own two files. Its content depends on the base as well, which is an input of its
    own: a recipe names the digest of both.

    Attributes:
        changed: names of the tensors whose values are not the base's, sorted.

    Args:
        path: the folder.
        folder: the same.
        layout: its files.
        base: the opened base; stays open as long as this is read, and is not closed with it.

    Raises:
        CheckpointError: the adapter is damaged or unsafe, is not supported, or does not fit the base.
    """

    def __init__(self, path: Path, folder: Path, layout: Layout, base: Checkpoint) -> None:
        super().__init__(path, folder, layout)
        try:
            content = (folder / ADAPTER_CONFIG).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: cannot be read ({error.strerror or error})", "check the path"
            ) from None
        config = read_config(content, str(folder / ADAPTER_CONFIG))
        self._base = base
        weights = tuple(name for name in layout.files if name != ADAPTER_CONFIG)
        self._adapter = open_files(path, folder, Layout(layout.kind, weights))
        updates = plan_updates(config, self._adapter.tensors, base.tensors, str(path))
        self.tensors = updated_infos(updates, self._adapter.tensors, base.tensors)
        replaced = {name for name, update in updates.items() if update.full is not None}
        self.aliases = {
            alias: name for alias, name in base.aliases.items() if alias not in replaced and name not in replaced
        }
        # LoRA is added to the tensor itself, whichever of its names it was found under.
        self._updates: dict[str, Update] = {}
        for name, update in updates.items():
            canonical = self.aliases.get(name, name)
            if canonical in self._updates:
                raise CheckpointError(
                    f"{path}: adapts two names of one tensor of the base, {canonical!r} and {name!r}", _MERGE
                )
            self._updates[canonical] = update
        self.changed = [name for name in self.tensors if self.aliases.get(name, name) in self._updates]

    def _read(self, name: str) -> torch.Tensor:
        update = self._updates.get(self.aliases.get(name, name))
        if update is None:
            return self._base.read(name)
        tensor = self._base.read(name) if update.full is None else self._adapter.read(update.full)
        if update.a is None or update.b is None:
            return tensor
        magnitude = None if update.magnitude is None else self._adapter.read(update.magnitude)
        result, lost = low_rank_update(
            tensor,
            self._adapter.read(update.a),
            self._adapter.read(update.b),
            update.scale,
            update.transposed,
            magnitude,
        )
        if lost:
            raise CheckpointError(
                f"{self.path}: {lost} values of {name!r} on the base are not finite in its dtype, "
                f"{self.tensors[name].dtype}",
                "pass a base of a wider dtype, or an adapter whose training did not diverge",
            )
        return result

    def extent(self, name: str) -> Extent | None:
        """Where a tensor that is not computed lies: with the base, or with the adapter; see ``Checkpoint.extent``."""
        update = self._updates.get(self.aliases.get(name, name))
        if update is None:
            return self._base.extent(name)
        return self._adapter.extent(update.full) if update.full is not None and update.a is None else None

    def close(self) -> None:
        """Close the adapter; the base is its opener's to close."""
        self._adapter.close()


def low_rank_update(
    tensor: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    transposed: bool,
    magnitude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """``tensor + scale * B @ A``, and for DoRA each row of that scaled to its magnitude.

    Computed in float32 (float64 if the tensor is) and rounded once, to the tensor's dtype.

    Args:
        tensor: [rows, columns...], floating-point; [columns, rows] if ``transposed``.
        a: [rank, columns...].
        b: [rows, rank, 1...].
        scale: of the product.
        transposed: add (B @ A) transposed.
        magnitude: DoRA's, [rows].

    Returns:
        a new tensor of the same shape and dtype, and how many of its values are not finite or too large for the dtype.
    """
    import torch

    accumulate = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    left, right = b.flatten(1).to(accumulate), a.flatten(1).to(accumulate)
    if transposed:
        left, right = right.t().contiguous(), left.t().contiguous()
    matrix = tensor.flatten(1)
    if magnitude is not None:
        wide = matrix.to(accumulate) + left @ right * scale
        factors = magnitude.reshape(-1).to(accumulate) / torch.linalg.vector_norm(wide, dim=0 if transposed else 1)
        rounded, lost = round_to(wide * (factors if transposed else factors[:, None]), tensor.dtype)
        return rounded.reshape(tensor.shape), int(lost.sum())
    result, count = torch.empty_like(matrix), 0
    rows = max(1, _TILE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        part = slice(start, start + rows)
        sums = (left[part] @ right).mul_(scale).add_(matrix[part].to(accumulate))
        result[part], lost = round_to(sums, tensor.dtype)
        count += int(lost.sum())
    return result.reshape(tensor.shape), count


_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
_FOREIGN = re.compile(r"(^|\.)(lora_[^.]*|token_adapter|original_module)(\.|$)")


def _parse(
    config: AdapterConfig, adapter: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo], where: str
) -> dict[str, dict[str, str]]:
    """The adapter's tensors by the name of the base's tensor that they change, and by their role."""

    def fail(problem: str, remedy: str = _MERGE) -> NoReturn:
        raise CheckpointError(f"{where}: {problem}", remedy)

    parts: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    unknown: dict[str, str] = {}

    def add(target: str, role: str, key: str) -> None:
        if role in parts.setdefault(target, {}):
            fail(f"holds {role.upper()} of {target} twice", _GET)
        parts[target][role] = key

    for key, info in adapter.items():
        if not key.startswith(_PREFIX):
            fail(f"tensor {key!r} does not begin with {_PREFIX!r}, so it is not in PEFT's format", _GET)
        name = key.removeprefix(_PREFIX)
        found = _LORA.fullmatch(name) or _EMBEDDING.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if found is None:
            if _FOREIGN.search(name):
                fail(f"tensor {key!r} is of a kind of adapter that is not supported")
            name = _full_name(name, base)
            if name in base or any(f".{module}." in f".{name}" for module in config.modules_to_save or []):
                add(name, "full", key)
            else:
                unknown[name] = key
            continue
        if not info.is_floating_point:
            fail(f"tensor {key!r} is {info.dtype}, not floating-point", _GET)
        if found["adapter"] is not None:
            names.add(found["adapter"])
            if len(names) > 1:
                fail(f"holds several adapters ({', '.join(sorted(names))})", "save each into a folder of its own")
        target = f"{found['module']}.weight"
        role = {"A": "a", "B": "b"}.get(found.groupdict().get("part", ""), "magnitude")
        add(target, role, key)
        parts[target]["module"] = found["module"]
        if found.re is _EMBEDDING:
            parts[target]["embedding"] = key
    whole = {adapter[entry["full"]] for name, entry in parts.items() if "full" in entry and name in base}
    for name, key in unknown.items():
        # A tied embedding that grew is saved under both its names, of which the base has one.
        if adapter[key] not in whole:
            fail(
                f"tensor {key!r} is neither LoRA's nor one of the base's, nor in modules_to_save",
                "name the base that the adapter was trained on",
            )
        add(name, "full", key)
    for target, entry in sorted(parts.items()):
        if "module" not in entry:
            continue
        missing = [role.upper() for role in ("a", "b") if role not in entry]
        if missing:
            fail(f"lacks {' and '.join(missing)} of {entry['module']}", _GET)
        if ("magnitude" in entry) != config.use_dora:
            fail(
                f"{entry['module']} has {'' if 'magnitude' in entry else 'no '}DoRA magnitudes, and use_dora is "
                f"{config.use_dora}",
                _GET,
            )
        dimensions = len(base[target].shape) if target in base else 2
        if "magnitude" in entry and ("embedding" in entry or dimensions != 2):
            fail(f"{entry['module']}: DoRA is supported for linear layers only")
    return parts


def _full_name(name: str, base: Mapping[str, TensorInfo]) -> str:
    """The model's name of a tensor that is stored whole."""
    saved = _SAVED.fullmatch(name)
    if saved is None:
        return name.replace(".base_layer.", ".")
    without_adapter = saved["rest"].partition(".")[2]
    spellings = [f"{saved['module']}.{saved['rest']}"]
    spellings += [f"{saved['module']}.{without_adapter}"] if without_adapter else []
    named_default = saved["rest"].startswith("default.")
    return next((each for each in spellings if each in base), spellings[-1] if named_default else spellings[0])


def _layout_of(
    name: str,
    entry: Mapping[str, str],
    adapter: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    where: str,
) -> bool | None:
    """Whether the tensor lies transposed to B @ A: an embedding does, else by the shapes; None if these do not say."""
    a, b = adapter[entry["a"]].shape, adapter[entry["b"]].shape
    target = adapter[entry["full"]] if "full" in entry else base[name]
    shape = target.shape
    if not target.is_floating_point:
        raise CheckpointError(
            f"{where}: adapts {name}, which is {target.dtype} in the base", "pass the base before it was quantised"
        )
    fits = len(a) == len(b) >= 2 and b[1] == a[0] and all(size == 1 for size in b[2:])
    straight = fits and shape == (b[0], *a[1:]) and "embedding" not in entry
    transposed = fits and len(a) == 2 and shape == (a[1], b[0])
    if not (straight or transposed):
        raise CheckpointError(
            f"{where}: A {list(a)} and B {list(b)} do not fit {name}, which has the shape {list(shape)} in the base",
            "name the base that the adapter was trained on",
        )
    magnitude = adapter[entry["magnitude"]].shape if "magnitude" in entry else None
    if magnitude is not None and magnitude != b[:1]:
        raise CheckpointError(
            f"{where}: {entry['module']} has DoRA magnitudes {list(magnitude)}, which do not fit the {b[0]} rows of "
            "its B",
            _GET,
        )
    return None if straight and transposed else transposed


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, or one that could take for ever: the file is not to be trusted."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise CheckpointError(f"{where}: the pattern {pattern[:80]!r} is no regular expression", _GET) from None
    quantifiers, groups = len(re.findall(r"(?<![\\(])[*+?{]", pattern)), len(re.findall(r"(?<!\\)\(", pattern))
    if len(pattern) > 500 or quantifiers > 3 or groups > 2 or re.search(r"\)[*+?{]", pattern):
        raise CheckpointError(f"{where}: the pattern {pattern[:80]!r} is too complex", "write out the modules' names")


def _ends(pattern: str, module: str) -> bool:
    compiled = re.compile(pattern)
    starts = (0, *(match.end() for match in re.finditer(r"\.", module)))
    return any(compiled.fullmatch(module, start) is not None for start in starts)

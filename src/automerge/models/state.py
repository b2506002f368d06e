"""A module's state: which tensors a checkpoint must hold for it, which of them are tied, and bringing them in."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from automerge.errors import ModelError


class StateNames(NamedTuple):
    """Names of a module's persistent state, in the order of its ``state_dict``.

    A tensor that the module holds under several names (tied weights) is listed once, under the first of them;
    ``tied`` maps each further name to that one.
    """

    parameters: list[str]
    buffers: list[str]
    tied: dict[str, str]


def state_names(module: nn.Module) -> StateNames:
    """The persistent state of a module, on any device, meta included."""
    parameters: list[str] = []
    buffers: list[str] = []
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in _state(module).items():
        if id(value) in first:
            tied[name] = first[id(value)]
            continue
        first[id(value)] = name
        (parameters if isinstance(value, nn.Parameter) else buffers).append(name)
    return StateNames(parameters, buffers, tied)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Bring a checkpoint's tensors into a module: all of them, no others, each in its shape.

    The module takes the dtypes of the checkpoint, and keeps its device and its ties, of which one name suffices. Where
    its floating parameters change dtype, floating buffers that are not in the state follow as by ``module.to(dtype)``,
    unless the module has a ``dtype`` of its own, as all of transformers' do: these look after such buffers (rotary
    frequencies stay float32). The given tensors are not copied where they lie on the module's device: writing into them
    changes it.

    Args:
        module: what ``Architecture.build`` made.
        tensors: the checkpoint, read tensor by tensor.
        where: names the checkpoint in errors.

    Raises:
        ModelError: missing, extra or mis-shaped tensors (the first ten are named, and the count), tied names with
            different values, a floating tensor for an integer one or the reverse, or a module built on the meta device
            that has buffers which no checkpoint holds.
    """
    state = _state(module)
    _, _, tied = state_names(module)
    aliases: dict[str, list[str]] = {}
    for name in state:
        aliases.setdefault(tied.get(name, name), []).append(name)
    given = {name: [alias for alias in names if alias in tensors] for name, names in aliases.items()}
    _refuse(where, "lacks", [name for name, found in given.items() if not found], "the model needs")
    ignored = [re.compile(pattern) for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []]
    extra = [name for name in tensors if name not in state and not any(pattern.search(name) for pattern in ignored)]
    _refuse(where, "has", extra, "the model does not know")
    if lost := _buffers_outside_state_on_meta(module):
        raise ModelError(
            f"{where}: the model was built on the meta device, and its buffer {lost[0]!r} is in no checkpoint",
            "build it on a real device",
        )

    before = _main_dtype(module)
    misshapen: list[str] = []
    for name, found in given.items():
        old, new = state[name], tensors[found[0]]
        if new.shape != old.shape:
            misshapen.append(f"{found[0]} {list(new.shape)} for {list(old.shape)}")
        elif new.is_floating_point() != old.is_floating_point():
            raise ModelError(
                f"{where}: {found[0]} is {_dtype_name(new)}, where the model has {_dtype_name(old)}",
                "use the checkpoint of this architecture",
            )
    _refuse(where, "has", misshapen, "in another shape than the model")

    for name, found in given.items():
        new = tensors[found[0]]
        for alias in found[1:]:
            if not torch.equal(new, tensors[alias]):
                raise ModelError(
                    f"{where}: {found[0]} and {alias} are one tensor in the model and differ in the checkpoint",
                    "mend the checkpoint, or set the architecture's option that ties them",
                )
        _assign(module, aliases[name], state[name], new)
    _follow_dtype(module, before, _main_dtype(module))


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors of the state dict; without ``get_extra_state`` entries, which are not tensors."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _assign(module: nn.Module, names: list[str], old: Tensor, new: Tensor) -> None:
    """Make ``new`` the value of ``old``, which the module holds under ``names``."""
    value = new.detach()
    if old.device.type != "meta":
        # Replaces the storage and not the object, so that every reference to it (ties, flattened RNN weights) follows.
        old.data = value.to(old.device)
        return
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)


def _buffers_outside_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    inside = {id(value) for value in _state(module).values()}
    return [(name, buffer) for name, buffer in module.named_buffers() if id(buffer) not in inside]


def _buffers_outside_state_on_meta(module: nn.Module) -> list[str]:
    return [name for name, buffer in _buffers_outside_state(module) if buffer.device.type == "meta"]


def _main_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of most of the floating parameter elements."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def _follow_dtype(module: nn.Module, before: torch.dtype | None, after: torch.dtype | None) -> None:
    if before == after or after is None or isinstance(getattr(module, "dtype", None), torch.dtype):
        return
    for _, buffer in _buffers_outside_state(module):
        if buffer.dtype == before:
            buffer.data = buffer.data.to(after)


def _refuse(where: str, verb: str, names: list[str], what: str) -> None:
    if not names:
        return
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    tensors = "tensor" if len(names) == 1 else "tensors"
    raise ModelError(
        f"{where}: the checkpoint {verb} {len(names)} {tensors} {what}: {shown}",
        "use the checkpoint of this architecture, or mend model.target and the arguments",
    )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

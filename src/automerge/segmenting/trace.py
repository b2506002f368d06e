"""One inference on fake tensors: which operation consumes which parameters, and which operation made its input.

The module is copied without its weights (every tensor of the copy is fake: a shape, a type, no memory), put into
evaluation mode and called once. Every torch function that is called is seen through a function mode; what reaches the
kernels past it (scripted functions, custom operators) is seen through a dispatch mode. Each tensor carries where it
came from:

- nothing: a constant, such as ``torch.arange(n)``;
- parameters only: a parameter, or something computed from parameters and constants alone (a weight-normalised kernel,
  a looked-up position). These parameters wait until the result meets data, and belong to the operation where it does;
- data: an input, or something computed from inputs. It remembers its producers (the last operations with parameters
  on every path to it), and for each whether it was laid out anew since (its rank changed, axes were permuted).

An operation here is a call that brings parameters and data together.
"""

import copy
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from automerge.errors import ModelError

KEPT = -1
"""In place of the call that laid data out anew: none did, they have the form in which their producer left them."""

OperationKind = Literal["convolution", "recurrence", "product", "lookup", "other"]


@dataclass(frozen=True)
class StateTensor:
    """One entry of the state dict under its canonical name."""

    name: str
    shape: tuple[int, ...]
    is_parameter: bool
    owner: str
    """Path of the module that owns it; the parametrised module for what a parametrisation holds."""

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Call:
    """One call of one module.

    Attributes:
        path: the module's name in its root, "" for the root.
        parent: index of the call around it, none for the root's.
        steps: functions of data that this call's own forward executed, its children's left out.
        busy_children: calls directly below it that executed any.
    """

    path: str
    parent: int | None
    steps: int = 0
    busy_children: int = 0
    busy: bool = False


@dataclass
class Operation:
    """A call of a torch function that brings parameters (or persistent buffers) and data together.

    Attributes:
        index: position in the trace; producers have smaller ones.
        kind: what the function is; ``lookup`` where all data are integers or booleans (embeddings).
        tensors: canonical names of the parameters and buffers that it consumes.
        producers: operation index -> the module call that last laid the data out anew on the way, or ``KEPT``.
        exits: the first times the result was laid out anew: the module call that did it, and the rank afterwards.
        enclosed: it works inside reshapes that its forward undoes, so its shapes are not those of its block.
        rank: of the data (of the result for a lookup); of a folded axis, the rank before folding.
        shape_in: of the data.
        shape_out: of the first result.
        calls: indexes of the module calls around it, outermost first.
    """

    index: int
    kind: OperationKind
    tensors: list[str]
    producers: dict[int, int]
    rank: int
    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    calls: tuple[int, ...]
    exits: list[tuple[int, int]] = field(default_factory=list)
    enclosed: bool = False


@dataclass
class Trace:
    """What one inference shows."""

    tensors: dict[str, StateTensor]
    tied: dict[str, str]
    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def working(self) -> set[str]:
        """Paths of the modules whose own forward does something to data, and does not only call other modules."""
        return {call.path for call in self.calls if call.steps}

    def forward_of(self, call: int | None) -> int | None:
        """The call whose forward does what ``call`` does: a leaf or a mere container counts as the call around it."""
        if call is not None and self.calls[call].busy_children == 0:
            call = self.calls[call].parent
        while call is not None and self.calls[call].steps == 0:
            call = self.calls[call].parent
        return call


def trace(module: nn.Module, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Trace:
    """Run ``module(*args, **kwargs)`` once on fake tensors, in evaluation mode and without gradients.

    Args:
        module: on any device, ``meta`` included; neither it nor its weights are touched.
        args: example inputs; only shapes and types of the tensors in them matter.
        kwargs: the same, by keyword.

    Raises:
        ModelError: the module cannot be copied or called with these inputs, or its control flow needs real values.
    """
    tensors, tied, names = _state(module)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(Trace(tensors, tied))
    skeleton = _skeleton(module, fake_mode, names, recorder)
    inputs = tree_map_only(Tensor, lambda tensor: recorder.data(_fake(tensor, fake_mode)), (tuple(args), kwargs or {}))
    for path, part in skeleton.named_modules():
        recorder.watch(part, path)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused kernel of nn.TransformerEncoderLayer would hide the layer's operations.
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            for context in (torch.no_grad(), _eager(), _quiet(), fake_mode, _Dispatched(recorder), _Called(recorder)):
                stack.enter_context(context)
            skeleton(*inputs[0], **inputs[1])
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"the trace of {type(module).__name__} stopped {recorder.place()}: its control flow depends on the values "
            f"of a tensor ({_first_line(error)}), and a trace has shapes only",
            "pass other example inputs, which lead past that branch (such as no mask, no lengths)",
        ) from error
    except UnsupportedFakeTensorException as error:
        raise ModelError(
            f"the trace of {type(module).__name__} stopped {recorder.place()}: {_first_line(error)}",
            "pass other example inputs, or give the operator a fake kernel (torch.library.register_fake)",
        ) from error
    except Exception as error:  # whatever a user's forward raises
        raise ModelError(
            f"{type(module).__name__} cannot be called on the example inputs: {type(error).__name__} "
            f"{recorder.place()}: {_first_line(error)}",
            "pass other example inputs, of the shapes and types that its forward expects",
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return recorder.finish()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__


def _eager() -> Any:
    """Modules wrapped by torch.compile run as they are written; nothing to do where the compiler was never loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Fake tensors log a traceback for inputs of a wrong shape, which the error of the trace says in one sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


# --- the state dict and the weightless copy


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory; works on the meta device, where there are no addresses."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _state(module: nn.Module) -> tuple[dict[str, StateTensor], dict[str, str], dict[tuple[Any, ...], str]]:
    """The canonical tensors of the state dict, alias -> canonical name, and memory -> canonical name."""
    parametrised = {
        f"{path}.parametrizations." if path else "parametrizations.": path
        for path, part in module.named_modules()
        if parametrize.is_parametrized(part)
    }
    tensors: dict[str, StateTensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # extra state: any object, not a tensor to be merged
        if is_lazy(tensor):
            raise ModelError(
                f"parameter {name!r} of {type(module).__name__} has no shape yet",
                "call the lazy module once on real inputs before segmenting it",
            )
        memory = _memory(tensor)
        # Empty tensors may share an address without being tied.
        if tensor.numel() and memory in names:
            tied[name] = names[memory]
            continue
        names.setdefault(memory, name)
        holders = (path for prefix, path in parametrised.items() if name.startswith(prefix))
        owner = next(holders, name.rpartition(".")[0])
        tensors[name] = StateTensor(name, tuple(tensor.shape), isinstance(tensor, nn.Parameter), owner)
    return tensors, tied, names


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape, strides, type and device without memory; ``meta`` becomes ``cpu``.

    A model on the meta device would otherwise reject the ``cpu`` constants that its forward makes.
    """
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
        return tensor
    device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    with mode:
        if tensor.layout != torch.strided:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class _WeightlessCopy(TorchFunctionMode):
    """Makes ``copy.deepcopy`` replace tensors that are plain attributes (no parameter, no buffer) by fake ones."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _fake(tensor, self.mode)
            return memo[id(tensor)]
        if func is Tensor.clone:
            return _fake(args[0], self.mode)
        return func(*args, **(kwargs or {}))


def _skeleton(
    module: nn.Module, mode: FakeTensorMode, names: dict[tuple[Any, ...], str], recorder: "_Recorder"
) -> nn.Module:
    """A deep copy of the module in evaluation mode, all of whose tensors are fake."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"module {path or type(module).__name__!r} is compiled by TorchScript and cannot be traced",
                "pass the Python module that it was made from",
            )
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        fake = _fake(tensor.detach(), mode)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
        name = names.get(_memory(tensor))
        if name is not None:
            recorder.parameter(fake, name)
    try:
        with _WeightlessCopy(mode):
            skeleton = copy.deepcopy(module, memo)
    except Exception as error:  # whatever a user's attributes raise
        raise ModelError(
            f"{type(module).__name__} cannot be copied for the trace: {type(error).__name__}: {_first_line(error)}",
            "keep what copy.deepcopy refuses (locks, open files) out of its attributes",
        ) from error
    return skeleton.eval()


# --- where a tensor comes from


@dataclass(frozen=True)
class _Origin:
    """Where a tensor comes from; see the module's docstring.

    Attributes:
        is_data: it depends on an input.
        producers: operation index -> the module call that last laid the data out anew since, or ``KEPT``.
        waiting: names of the parameters that it is computed from, where it is not data.
        folded: rank before leading axes were folded into one ((batch, length, width) -> (batch * length, width)), 0
            where they were not. Such a 2-D tensor is still a sequence.
    """

    is_data: bool
    producers: dict[int, int] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    folded: int = 0


# A forward that undoes its own reshapes does so within a few steps; the results on a residual path are laid out anew
# in every layer, which nobody asks for.
_EXITS = 8

_CONVOLUTION = "conv"  # in the name: conv1d, conv_transpose2d, convolution, conv_tbc, deform_conv2d, ...
_RECURRENCE = {"gru", "lstm", "rnn_tanh", "rnn_relu", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_PRODUCT = {
    *("linear", "bilinear", "matmul", "rmatmul", "imatmul", "mm", "bmm", "mv", "dot", "inner", "einsum", "tensordot"),
    *("addmm", "addbmm", "baddbmm", "addmv", "chain_matmul", "multi_dot", "grouped_mm", "scaled_mm", "cdist"),
    *("multi_head_attention_forward", "scaled_grouped_mm", "int_mm", "linalg_multi_dot"),
}
# The order of the axes changes, the rank need not.
_PERMUTING = {
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint", "einsum", "tensordot"),
    *("T", "mT", "H", "mH", "numpy_T", "matrix_H"),
}
_RESHAPING = {"view", "reshape", "flatten", "unflatten", "unsafe_view", "view_copy", "reshape_copy", "contiguous_view"}
# They read shape and type of a tensor, not its values.
_SHAPE_ONLY = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided"),
}
# The same of their second argument.
_FIRST_ONLY = {"type_as", "to", "expand_as", "view_as", "reshape_as", "resize_as"}


def _name_of(func: Any) -> str:
    """``matmul`` for ``Tensor.__matmul__`` and ``aten._matmul.default``; ``T`` for the property ``Tensor.T``."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func.overloadpacket.__name__).strip("_")
    name = str(getattr(func, "__name__", type(func).__name__))
    if name == "__get__":
        name = str(getattr(func.__self__, "__name__", name))
    return name.strip("_")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


class _Recorder:
    """Follows tensors from operation to operation while the skeleton runs."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.origins: Any = WeakIdKeyDictionary()
        self.stack: list[int] = []
        self.inside = False
        self.failed: str | None = None

    def parameter(self, tensor: Tensor, name: str) -> None:
        """Note that a tensor of the skeleton is the entry ``name`` of the state dict."""
        self.origins[tensor] = _Origin(is_data=False, waiting=(name,))

    def data(self, tensor: Tensor) -> Tensor:
        """Note that a tensor is an input; returns it."""
        self.origins[tensor] = _Origin(is_data=True)
        return tensor

    def watch(self, module: nn.Module, path: str) -> None:
        """Record the calls of one module of the skeleton."""

        def enter(*_: Any) -> None:
            self.trace.calls.append(Call(path, self.stack[-1] if self.stack else None))
            self.stack.append(len(self.trace.calls) - 1)

        def leave(*_: Any) -> None:
            while self.stack and self.trace.calls[self.stack.pop()].path != path:
                pass

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=True)

    def place(self) -> str:
        """Where the inference stopped, for an error."""
        return f"in module {self.failed!r}" if self.failed else "in its own forward"

    def note_failure(self) -> None:
        """Remember the innermost module at the first exception, before the calls unwind."""
        if self.failed is None and self.stack:
            self.failed = self.trace.calls[self.stack[-1]].path

    def finish(self) -> Trace:
        """Complete the calls' summaries."""
        for call in reversed(self.trace.calls):
            call.busy = call.busy or call.steps > 0
            if call.busy and call.parent is not None:
                self.trace.calls[call.parent].busy = True
                self.trace.calls[call.parent].busy_children += 1
        return self.trace

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Give the results of one function their origin; record an operation where parameters meet data."""
        name = _name_of(func)
        if name in _SHAPE_ONLY:
            return
        data: list[tuple[Tensor, _Origin]] = []
        waiting: dict[str, None] = {}
        for tensor in _tensors_in(args[:1] if name in _FIRST_ONLY else (args, kwargs)):
            origin = self.origins.get(tensor)
            if origin is None and not isinstance(tensor, FakeTensor):
                # A real tensor reached the forward inside an object that is no plain container: an input.
                self.data(tensor)
                origin = self.origins[tensor]
            if origin is None:
                continue
            if origin.is_data:
                data.append((tensor, origin))
            waiting.update(dict.fromkeys(origin.waiting))
        results = list(_tensors_in(result))
        if name == "setitem" and isinstance(args[0], Tensor):
            results.append(args[0])
        if (name == "setitem" or getattr(func, "__name__", "").endswith("_")) and isinstance(args[0], Tensor):
            base = args[0]._base
            if base is not None:
                # What is written into a view is written into the tensor that it looks at, and has that one's form.
                results.append(base)
                written = self.origins.get(base)
                if written is not None and written.is_data:
                    data.append((base, written))
        if not results or not (data or waiting):
            return
        if not data:
            for tensor in results:
                self.origins[tensor] = _Origin(is_data=False, waiting=tuple(waiting))
            return
        if self.stack:
            self.trace.calls[self.stack[-1]].steps += 1
        if waiting:
            operation = self._operation(name, data, list(waiting), results[0])
            folded = max(_folded_after(name, tensor, origin, results[0], self) for tensor, origin in data)
            for tensor in results:
                self.origins[tensor] = _Origin(
                    is_data=True, producers={operation.index: KEPT}, folded=folded if tensor.dim() == 2 else 0
                )
            return
        # One origin for all results of one rank and shape; split and chunk give many of them.
        made: dict[tuple[int, ...], _Origin] = {}
        for tensor in results:
            shape = tuple(tensor.shape)
            if shape not in made:
                made[shape] = self._passed_on(name, data, tensor)
            self.origins[tensor] = made[shape]

    def _passed_on(self, name: str, data: list[tuple[Tensor, _Origin]], result: Tensor) -> _Origin:
        """The origin of the result of a function without parameters."""
        producers: dict[int, int] = {}
        folded = 0
        call = self.stack[-1] if self.stack else 0
        for tensor, origin in data:
            refolded = _folded_after(name, tensor, origin, result, self)
            folds = bool(refolded) != bool(origin.folded) and name in _RESHAPING
            anew = not folds and (
                tensor.dim() != result.dim()
                or name in _PERMUTING
                or (name in _RESHAPING and tensor.shape != result.shape)
            )
            folded = max(folded, refolded)
            for index, before in origin.producers.items():
                exits = self.trace.operations[index].exits
                if anew and len(exits) < _EXITS:
                    exits.append((call, result.dim()))
                _add(producers, index, call if anew else before)
        return _Origin(is_data=True, producers=producers, folded=folded)

    def _operation(
        self, name: str, data: list[tuple[Tensor, _Origin]], tensors: list[str], result: Tensor
    ) -> Operation:
        floating = [(t, o) for t, o in data if t.is_floating_point() or t.is_complex()]
        kind: OperationKind
        if name in _RECURRENCE:
            kind = "recurrence"
        elif _CONVOLUTION in name:
            kind = "convolution"
        elif not floating:
            kind = "lookup"
        elif name in _PRODUCT:
            kind = "product"
        else:
            kind = "other"
        tensor, origin = max(floating or data, key=lambda pair: pair[1].folded or pair[0].dim())
        producers: dict[int, int] = {}
        for _, other in data:
            for index, passage in other.producers.items():
                _add(producers, index, passage)
        operation = Operation(
            index=len(self.trace.operations),
            kind=kind,
            tensors=tensors,
            producers=producers,
            rank=result.dim() if kind == "lookup" else origin.folded or tensor.dim(),
            shape_in=tuple(tensor.shape),
            shape_out=tuple(result.shape),
            calls=tuple(self.stack),
        )
        self.trace.operations.append(operation)
        return operation


def _add(producers: dict[int, int], index: int, passage: int) -> None:
    """Data that arrive on two paths keep their form if they keep it on one of them (a residual connection)."""
    if producers.get(index) != KEPT:
        producers[index] = passage


def _folded_after(name: str, tensor: Tensor, origin: _Origin, result: Tensor, recorder: _Recorder) -> int:
    """The rank before folding that the result remembers, 0 where it is not folded."""
    if result.dim() != 2:
        return 0
    if tensor.dim() == 2:
        return origin.folded
    folds = (
        name in _RESHAPING
        and tensor.dim() >= 3
        and result.shape[-1] == tensor.shape[-1]
        and result.numel() == tensor.numel()
        and torch.Size(tensor.shape[1:-1]).numel() > 1
    )
    if not folds:
        return 0
    # (layers, batch, width) of a recurrent state has no sequence axis to fold.
    kinds = {recorder.trace.operations[index].kind for index in origin.producers}
    return 0 if kinds == {"recurrence"} and tensor.shape[0] == 1 else tensor.dim()


class _Called(TorchFunctionMode):
    """Sees every torch function that the forward calls. Functions called inside of one are part of it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        outermost = not recorder.inside
        recorder.inside = True
        try:
            result = func(*args, **kwargs)
            if outermost:
                recorder.observe(func, args, kwargs, result)
        except Exception:
            recorder.note_failure()
            raise
        finally:
            recorder.inside = not outermost
        return result


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what reaches the kernels without a torch function around it: scripted functions, for one."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        result = func(*args, **kwargs)
        if not recorder.inside:
            recorder.inside = True
            try:
                recorder.observe(func, args, kwargs, result)
            finally:
                recorder.inside = False
        return result

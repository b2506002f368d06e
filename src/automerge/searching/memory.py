"""Peak memory of a trial and of a refinement step, from shapes alone: before a search starts, and without a GPU.

The search's own code (`automerge.searching.evaluator`, `automerge.searching.refinement`) runs once on fake tensors,
which have a shape and a dtype and no memory. Every kernel that is called is seen on its way, and each storage that it
makes is entered in a ledger until it is freed; what was live when the sum was largest is the account. Nothing is
modelled by formulas but the tiles of a merge on a CUDA device.

What the account leaves out: what kernels take and give back while they run, rounding and fragmentation of the
allocator, and what a device's context takes (about half a GB on CUDA). Fake tensors are the CPU's, so attention without
a materialised score matrix is taken for granted wherever the CPU has it.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from automerge.errors import SearchError
from automerge.merging.device import HELD_BYTES, TILE
from automerge.merging.recipe import Recipe
from automerge.merging.resident import ResidentMerger
from automerge.merging.technique import TensorInputs
from automerge.models.architecture import Architecture, short_reason
from automerge.models.heads import Heads
from automerge.models.state import state_names
from automerge.searching.evaluator import MeasuredTask, RecipeEvaluator, measure_tasks
from automerge.searching.objective import Aggregate, Measure, Name, Objective, TaskReference
from automerge.searching.refinement import WeightGradients
from automerge.tasks.task import TaskData

Kind = Literal["weights", "inputs", "activations", "gradients", "workspace"]

_KINDS: tuple[Kind, ...] = ("weights", "inputs", "activations", "gradients", "workspace")

_LASTING: tuple[Kind, ...] = ("weights", "inputs")

_MAPPED = 1 << 25
"""The C library takes blocks of this size or more from the system one by one, and gives them back at once. Smaller ones
come from its heap, which hardly ever shrinks: what was freed there stays resident (malloc(3), M_MMAP_THRESHOLD)."""

_VALUE_READS = 1000
"""Models that read values of tensors more often than this wait for one that a fake tensor never has."""


@dataclass(frozen=True)
class MemoryAccount:
    """What is in the device's memory at the moment when it is most; all figures in bytes.

    Attributes:
        weights: the live model's parameters and buffers, private heads included.
        inputs: the base's and the sources' tensors that are kept on the device.
        activations: what the forward pass made and is still needed, logits and losses included.
        gradients: what the backward pass made and is still needed.
        workspace: task vectors and what else one tensor's merge, or the derivative in its scalars, takes.
        kept: freed, but kept by the C library's allocator; 0 on other devices than the CPU.
        allocated: the most that the pass ever had at one moment, without what is kept.
    """

    weights: int
    inputs: int
    activations: int
    gradients: int
    workspace: int
    kept: int = 0
    allocated: int = 0

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.inputs + self.passing

    @property
    def passing(self) -> int:
        """What is there for the pass only."""
        return self.activations + self.gradients + self.workspace + self.kept

    def shortage(self, what: str, available: int) -> str | None:
        """One sentence for the user where the device's memory does not suffice; None where it does.

        Args:
            what: what was accounted for, such as "a refinement step".
            available: the device's memory for all of it, bytes.
        """
        if self.peak <= available:
            return None
        parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind in (*_KINDS, "kept") if (size := getattr(self, kind)))
        return f"{what} takes {self.peak / 1e9:.1f} GB of memory ({parts}), and {available / 1e9:.1f} GB are there"


def account_trial(
    recipe: Recipe,
    architecture: Architecture,
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, MeasuredTask],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    inputs_on_device: bool = True,
    soft: bool = False,
    temperatures: Sequence[float] = (),
) -> MemoryAccount:
    """The account of one trial: a merge into the live model, and a batch of each task.

    Args:
        recipe: any recipe of this merge.
        architecture: how a module is called.
        modules: the model under the head of each reference, on any device, ``meta`` included; neither they nor their
            weights are touched. Tensors that share their memory are counted once.
        tasks: with their data, of which the shapes matter.
        device: where the search will run; on CUDA a merge goes through tiles.
        dtype: of the floating-point tensors of the state; None: as the modules have them.
        inputs_on_device: whether base and sources are kept there.
        soft, temperatures: what the objective needs beside losses and metrics.

    Raises:
        SearchError: the model or a task fails on fake tensors, such as where control flow depends on values.
    """
    with _fakes(recipe, modules, tasks, device, dtype, inputs_on_device) as fakes:
        with fakes.watching("a trial"):
            fakes.merger.apply(recipe, {})
            measure_tasks(fakes.tasks, fakes.module, architecture, _FAKE_DEVICE, soft=soft, temperatures=temperatures)
        return fakes.ledger.account()


def account_refinement(
    recipe: Recipe,
    architecture: Architecture,
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, MeasuredTask],
    objective: Name,
    *,
    aggregate: Aggregate = "harmonic",
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    inputs_on_device: bool = True,
    recompute: bool = False,
) -> MemoryAccount:
    """The account of one step of the refinement: a merge, and a batch of each task forward and backward.

    Args:
        recipe: what is refined; of its blocks, those whose technique has a derivative.
        architecture, modules, tasks, device, dtype, inputs_on_device: as of `account_trial`.
        objective, aggregate: what the gradient is of.
        batch_size: samples of each task in the step; at most, and by default, the task's own size.
        recompute: within `recomputed`.

    Raises:
        SearchError: as of `account_trial`.
    """
    figures = Measure(loss=1.0, soft=0.5)
    references = {
        name: TaskReference(
            specialist=figures,
            nothing=2.0,
            stand_ins={metric.name: metric.stand_in for metric in task.task.metrics},
        )
        for name, task in tasks.items()
    }
    goal = Objective(name=objective, aggregate=aggregate, tasks=references)
    if batch_size is not None:
        tasks = {name: replace(task, batch_size=min(batch_size, task.batch_size)) for name, task in tasks.items()}
    with _fakes(recipe, modules, tasks, device, dtype, inputs_on_device) as fakes:
        evaluator = RecipeEvaluator(
            recipe,
            cast(ResidentMerger, fakes.merger),
            cast(Heads, fakes),
            architecture,
            fakes.tasks,
            _FAKE_DEVICE,
        )
        # What the step enters on a CUDA device; fake tensors are the CPU's.
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.device(device).type == "cuda":
            autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
        with ExitStack() as stack:
            for module in {id(each): each for each in fakes.modules.values()}.values() if recompute else ():
                stack.enter_context(recomputed(module))
            stack.enter_context(fakes.watching("a refinement step"))
            gradients = WeightGradients(evaluator, goal, autocast)
            gradients(recipe.blocks, {name: range(len(task.data)) for name, task in fakes.tasks.items()})
        return fakes.ledger.account()


@contextmanager
def recomputed(module: nn.Module) -> Iterator[None]:
    """While it is entered, a forward pass keeps only what goes into each layer; the backward pass runs it once more.

    A layer is an entry of one of the model's outermost ``nn.ModuleList`` or ``nn.Sequential``. The module must be
    in evaluation mode: no random state is kept for the second run. (Chen et al., "Training deep nets with sublinear
    memory cost", https://arxiv.org/abs/1604.06174.)

    Raises:
        SearchError: the model has no layers.
    """
    layers = list(_layers(module))
    if not layers:
        raise SearchError(
            f"{type(module).__name__} has no nn.ModuleList or nn.Sequential, so it has no layers to be recomputed",
            "use a smaller batch, or keep the layers in an nn.ModuleList",
        )
    for layer in layers:
        # An attribute of the object, which the call finds before the class's method.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child.children()
        else:
            yield from _layers(child)


def merge_workspace(inputs: int, staged: Iterable[int] = ()) -> int:
    """Bytes that the merge of a tensor takes at most on a CUDA device (`automerge.merging.device.DeviceMerge`).

    Args:
        inputs: base and sources.
        staged: for each tensor the bytes of it in all inputs, where these are not kept on the device.
    """
    tiles = inputs + 5  # of float32: the inputs, a task vector, magnitudes, a mask, the sum, the merged tile
    return tiles * TILE * 4 + max((size for size in staged if size <= HELD_BYTES), default=0)


# --- the ledger


@cache
def _is_made_of_others(func: Any) -> bool:
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return composite in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enters every storage that a kernel makes, until it is freed, and remembers the moment of the largest sum.

    Args:
        on_cpu: count what the C library's heap keeps.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_cpu = on_cpu
        self._live = dict.fromkeys(_KINDS, 0)
        self._heap = 0
        self._heap_peak = 0
        self._allocated = 0
        self._peak = MemoryAccount(0, 0, 0, 0, 0)
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._reads = 0
        self._merging = False
        self._contracting: int | None = None

    def account(self) -> MemoryAccount:
        """What was live at the peak."""
        return replace(self._peak, allocated=self._allocated)

    def enter(self, tensor: Tensor, kind: Kind) -> None:
        """Count a tensor's memory, if it is not counted yet."""
        storage = tensor.untyped_storage()
        if id(storage) in self._storages:
            return
        size = storage.nbytes()
        in_heap = self._on_cpu and size < _MAPPED and kind not in _LASTING

        def add(sign: int) -> None:
            self._live[kind] += sign * size
            if in_heap:
                self._heap += sign * size
                self._heap_peak = max(self._heap_peak, self._heap)

        self._follow(storage, partial(add, -1))
        add(1)
        self._look()

    def leave_out(self, tensor: Tensor) -> None:
        """Never count a tensor's memory."""
        self._follow(tensor.untyped_storage(), lambda: None)

    def _follow(self, storage: torch.UntypedStorage, freed: Callable[[], None]) -> None:
        key = id(storage)

        def forget(_: object) -> None:
            del self._storages[key]
            freed()

        self._storages[key] = weakref.ref(storage, forget)

    def _look(self, scratch: int = 0, kind: Kind = "activations") -> None:
        """Remember this moment if it is the worst so far; ``scratch``: bytes that a kernel takes while it runs."""
        kept = self._heap_peak - self._heap
        passing = sum(self._live[each] for each in _KINDS if each not in _LASTING) + scratch
        self._allocated = max(self._allocated, passing)
        if sum(self._live[each] for each in _LASTING) + passing + kept > self._peak.peak:
            self._peak = MemoryAccount(**{**self._live, kind: self._live[kind] + scratch}, kept=kept)

    @contextmanager
    def merging(self) -> Iterator[None]:
        """What is made meanwhile is workspace."""
        self._merging = True
        try:
            yield
        finally:
            self._merging = False

    def contracting(self) -> None:
        """What is made from now on is workspace, until the backward pass goes on."""
        self._contracting = torch._C._current_graph_task_id()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a device
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._value(args[0])
        if func is torch.ops.aten.nonzero.default and self._contracting is not None and isinstance(args[0], FakeTensor):
            # The elements at a threshold, which are few.
            with args[0].fake_mode:
                return torch.empty((1, args[0].dim()), dtype=torch.int64)
        # Functions that are made of others arrive whole in inference mode; their parts are to be seen.
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        kind = self._kind()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.enter(tensor, kind)
        if func in _NEED_CONTIGUOUS:
            copied = (each for each in tree_leaves(args) if isinstance(each, Tensor) and not each.is_contiguous())
            self._look(sum(each.numel() * each.element_size() for each in copied), kind)
        elif func is torch.ops.aten.kthvalue.default and self._on_cpu:
            self._look(args[0].numel() * (args[0].element_size() + 8), kind)
        return result

    def _kind(self) -> Kind:
        task = torch._C._current_graph_task_id()
        if self._contracting is not None:
            # The contraction runs in a hook of the node that took the gradient; it may differentiate, within itself.
            if task != self._contracting or torch._C._current_autograd_node().name() == _LAST_NODE:
                return "workspace"
            self._contracting = None
        if self._merging:
            return "workspace"
        # In a backward pass gradients are on where a layer's forward pass is run once more.
        return "gradients" if task != -1 and not torch.is_grad_enabled() else "activations"

    def _value(self, tensor: Tensor) -> bool | int | float:
        """Any value will do: checks of data, figures of the objective. What a shape hangs on fails elsewhere."""
        self._reads += self._contracting is None
        if self._reads > _VALUE_READS:
            raise RuntimeError("a loop waits for a value")
        return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


_LAST_NODE = "torch::autograd::AccumulateGrad"

_NEED_CONTIGUOUS = {
    torch.ops.aten._softmax.default,
    torch.ops.aten._log_softmax.default,
    torch.ops.aten._softmax_backward_data.default,
    torch.ops.aten._log_softmax_backward_data.default,
}
"""Kernels that copy inputs of another layout before they begin, on every device."""


class _Values(TorchFunctionMode):
    """Gives zeros where the values of a fake tensor are asked for outside of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist) and isinstance(args[0], FakeTensor):
            zeros = np.zeros(tuple(args[0].shape), dtype=str(args[0].dtype).removeprefix("torch."))
            return zeros if func is Tensor.numpy else zeros.tolist()
        return func(*args, **(kwargs or {}))


# --- weightless stand-ins for what a search holds


_FAKE_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class _Fakes:
    """What a search holds, on fake tensors; also stands in for the model's heads."""

    mode: FakeTensorMode
    ledger: _Ledger
    modules: dict[str, nn.Module]
    tasks: dict[str, MeasuredTask]
    merger: "_Merger"

    @property
    def live(self) -> dict[str, Tensor]:
        """The merger needs none."""
        return {}

    def module(self, reference: str) -> nn.Module:
        """The module whose head is that of ``reference``."""
        return self.modules[reference]

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """The ledger sees what happens.

        Raises:
            SearchError: it fails.
        """
        fast_path = torch.backends.mha.get_fastpath_enabled()
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        silent = logger.disabled
        try:
            # The fused kernel of nn.TransformerEncoderLayer knows no fake tensors.
            torch.backends.mha.set_fastpath_enabled(False)
            logger.disabled = True
            with _Values(), self.ledger:
                yield
        except Exception as error:  # whatever a model or a task does with tensors that have no values
            raise SearchError(
                f"the memory of {what} cannot be told from shapes: {short_reason(error)}",
                "run one and look; the search itself does not need it",
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            logger.disabled = silent


class _Merger:
    """Stands in for the resident merger."""

    def __init__(
        self,
        ledger: _Ledger,
        mode: FakeTensorMode,
        recipe: Recipe,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        on_device: bool,
    ) -> None:
        self._ledger = ledger
        self._mode = mode
        self._recipe = recipe
        self._tensors = tensors
        self._sources = [source.name for source in recipe.sources]
        self._owners = [*(["base"] if recipe.base is not None else []), *self._sources]
        self._inputs: dict[str, list[Tensor]] = {}
        if on_device:
            with mode:
                self._inputs = {
                    name: [torch.empty(each.shape, dtype=each.dtype) for _ in self._owners]
                    for name, each in tensors.items()
                }
            for tensor in tree_leaves(self._inputs):
                ledger.enter(tensor, "inputs")
        self._workspace = 0
        if device.type == "cuda":
            staged = [] if on_device else [each.nbytes * len(self._owners) for each in tensors.values()]
            self._workspace = merge_workspace(len(self._owners), staged)

    def apply(self, recipe: Recipe, live: Mapping[str, Tensor]) -> list[str]:
        """Take what a merge takes, and give it back."""
        with self._ledger.merging(), self._mode:
            torch.empty(self._workspace, dtype=torch.uint8)
        return [block.name for block in recipe.blocks]

    def technique_inputs(self, recipe: Recipe, name: str) -> TensorInputs:
        """See `automerge.merging.resident.ResidentMerger.technique_inputs`."""
        self._ledger.contracting()
        like = self._tensors[name]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        kept = self._inputs.get(name)
        with self._mode:
            found = [
                torch.empty(like.shape, dtype=wide) if kept is None else kept[index].to(wide)
                for index in range(len(self._owners))
            ]
        base = found.pop(0) if self._recipe.base is not None else None
        return TensorInputs(name, self._sources, base, found, recipe.seed)


@contextmanager
def _fakes(
    recipe: Recipe,
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, MeasuredTask],
    device: torch.device | str,
    dtype: torch.dtype | None,
    inputs_on_device: bool,
) -> Iterator[_Fakes]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = _Ledger(on_cpu=torch.device(device).type == "cpu")
    copies = _weightless(modules, mode, dtype)
    shared: dict[str, Tensor] = {}
    for reference, module in copies.items():
        for tensor in (*module.parameters(), *module.buffers()):
            ledger.enter(tensor, "weights")
        names = state_names(module)
        state = module.state_dict(keep_vars=True)
        private = recipe.private.get(reference, [])
        shared |= {name: state[name] for name in (*names.parameters, *names.buffers) if name not in private}
    measured = {name: replace(task, data=_first_batch(task)) for name, task in tasks.items()}
    if torch.device(device).type == "cpu":
        for task in measured.values():
            for tensor in (*task.data.inputs.values(), *task.data.targets.values()):
                ledger.leave_out(tensor)  # the data are there already, and not moved
    merger = _Merger(ledger, mode, recipe, shared, torch.device(device), inputs_on_device)
    yield _Fakes(mode, ledger, copies, measured, merger)


def _first_batch(task: MeasuredTask) -> TaskData:
    """Real tensors: they are small, and masks and lengths may decide on what a model does."""
    batch = next(task.data.batches(task.batch_size))
    inputs, targets = ({name: each.clone() for name, each in part.items()} for part in (batch.inputs, batch.targets))
    return TaskData(inputs, targets)


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape and strides; fake, in a fake mode."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device=_FAKE_DEVICE)


def _weightless(
    modules: Mapping[str, nn.Module], mode: FakeTensorMode, dtype: torch.dtype | None
) -> dict[str, nn.Module]:
    """Deep copies, all of whose tensors are fake; those that share their memory do so there."""
    memo: dict[int, Any] = {}
    places: dict[tuple[object, ...], Tensor] = {}
    for module in modules.values():
        inside = {id(tensor) for tensor in module.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
        for tensor in _tensors_of(module):
            if id(tensor) in memo:
                continue
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            with mode:
                if place not in places:
                    places[place] = _like(tensor.detach(), dtype if id(tensor) in inside else None)
                fake = places[place].detach()
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=False)
            memo[id(tensor)] = fake
    return {reference: copy.deepcopy(module, memo).eval() for reference, module in modules.items()}


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes, or in lists and dictionaries that are."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))

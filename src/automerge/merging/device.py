"""One tensor merged by torch on any device, tile by tile: the merge of the compiled kernels, with the same bytes.

Both engines merge so on a CUDA device, and on the CPU where the kernels were not built. Memory on the device is bounded
by the tile, not by the tensor. Every step is one rounding of IEEE 754 single precision, as in the kernels and in the
techniques' own functions: products and sums are separate operations, and a divisor is a tensor on the device, because
torch multiplies by the reciprocal of a divisor that is a number of the host's.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from automerge.checkpoint.info import ITEM_BYTES, TensorInfo
from automerge.errors import MergeError
from automerge.merging.consensus import sum_of_agreeing, weighted_sum
from automerge.merging.fused import Fused, KeepLargest, KeepRandom
from automerge.merging.random import keep_threshold, lanes, mask_key
from automerge.merging.technique import Settings
from automerge.merging.workers import Buffer, Operand, Workers

TILE = 1 << 22
"""Elements that are worked on at a time: enough for a device to be busy, and few beside a model. The temporaries of a
merge of three inputs take about 130 MB."""

HELD_BYTES = 1 << 29
"""Where thresholds are to be found, the inputs are passed over three times: those of a tensor that are not larger than
this together stay on the device from the first to the last."""

ACTIVATIONS = 10
"""One part in so many of the device's memory is kept back for activations."""

_BINS = 1 << 16


@dataclass(frozen=True)
class OnDevice:
    """Elements that are already on the device: shape ``(n,)``, contiguous, any dtype of the kernels."""

    tensor: torch.Tensor


class Done(Protocol):
    """An event on the device."""

    def synchronize(self) -> object:
        """Wait for it."""
        ...


def done(device: torch.device) -> Done | None:
    """The end of all that was queued on the device so far; None where nothing is queued, as on the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class PinnedBuffer(Buffer):
    """Page-locked memory on the host (ordinary where the device is the CPU), and what the device still does with it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.memory = self.tensor.numpy().data
        self.address = self.tensor.data_ptr()
        self.busy: Done | None = None

    def wait(self) -> None:
        """Wait until the device has read, or written, what it was told to."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None


class Transfers:
    """The way of tiles to a device and back, through page-locked buffers.

    Copies are queued on the device's current stream, in order with the computations; the host goes on at once. For each
    input, and for the output, two buffers take turns: while the device works on one tile, the host reads the next one
    and writes the one before. A buffer is used again only when the device is done with it.

    Args:
        device: the device.
        workers: threads that read, one for each input; none of them speaks to the device.
    """

    def __init__(self, device: torch.device, workers: Workers) -> None:
        self.device = device
        self._workers = workers
        self._buffers: dict[str, list[PinnedBuffer]] = {}

    def take(self, use: str) -> PinnedBuffer:
        """The next of the two buffers of a use, free: room for a tile of float32."""
        pair = self._buffers.setdefault(use, [])
        if len(pair) < 2:
            pair.append(PinnedBuffer(TILE * 4, self.device))
        else:
            pair.append(pair.pop(0))
        pair[-1].wait()
        return pair[-1]

    def upload(self, operands: Sequence[Operand], first: int, count: int) -> list[torch.Tensor]:
        """That range of each operand on the device, in its own dtype; shape ``(count,)``.

        Raises:
            CheckpointError: one cannot be read.
        """
        buffers = [self.take(f"input {index}") for index in range(len(operands))]

        def read(pair: tuple[Operand, PinnedBuffer]) -> torch.Tensor:
            operand, buffer = pair
            nbytes = count * ITEM_BYTES[operand.dtype]
            address = operand.address(first, count, buffer)
            if address != buffer.address:
                ctypes.memmove(buffer.address, address, nbytes)
            return buffer.tensor[:nbytes].view(TensorInfo(operand.dtype, ()).torch_dtype)

        tiles = self._workers.map(read, list(zip(operands, buffers, strict=True)))
        moved = [tile.to(self.device, non_blocking=True, copy=True) for tile in tiles]
        event = done(self.device)
        for buffer in buffers:
            buffer.busy = event
        return moved


class Outbox:
    """Takes the merged tiles of one tensor from the device, and hands on each one's bytes while the next is computed.

    Args:
        transfers: the way back.
        deliver: called with the first element and the bytes, which are valid during the call.
    """

    def __init__(self, transfers: Transfers, deliver: Callable[[int, memoryview], None]) -> None:
        self._transfers = transfers
        self._deliver = deliver
        self._pending: tuple[int, int, PinnedBuffer] | None = None

    def put(self, first: int, tile: torch.Tensor) -> None:
        """Queue the copy of a tile, shape ``(n,)``, and deliver the one before."""
        buffer = self._transfers.take("output")
        nbytes = tile.numel() * tile.element_size()
        buffer.tensor[:nbytes].view(tile.dtype).copy_(tile, non_blocking=True)
        buffer.busy = done(self._transfers.device)
        self.flush()
        self._pending = (first, nbytes, buffer)

    def flush(self) -> None:
        """Deliver what was put last."""
        if self._pending is None:
            return
        (first, nbytes, buffer), self._pending = self._pending, None
        buffer.wait()
        self._deliver(first, memoryview(buffer.memory)[:nbytes])


class _Cut:
    """The cut between the ``keep`` largest magnitudes and the others; tiles are asked for in their order.

    Args:
        value: bits of the smallest magnitude that is kept.
        ties: how many elements of this magnitude are kept, those of the lowest index; None: all.
        device: where the tiles are.
    """

    def __init__(self, value: int, ties: int | None, device: torch.device) -> None:
        self._value = value
        self._ties = ties
        self._met = torch.zeros((), dtype=torch.int64, device=device)

    def above(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Which elements of the next tile are kept: bool of the shape of the magnitudes, int32 ``(n,)``."""
        if self._ties is None:
            return magnitudes >= self._value
        equal = magnitudes == self._value
        rank = equal.cumsum(0).add_(self._met)
        self._met = rank[-1].clone()
        return (magnitudes > self._value).logical_or_(equal.logical_and_(rank <= self._ties))


class DeviceMerge:
    """The merge of one tensor by torch. The description is the kernels' (`automerge.merging.elementwise`).

    Args:
        transfers: the way to the device where it is merged.
        tensor: the tensor's name, on which random masks depend.
        settings, fused: from `automerge.merging.elementwise.fused_of`.
        seed: the recipe's seed.
        base: the base's elements; not read where the merge is none of task vectors.
        sources: the sources' elements by name, in the recipe's order.
        output_dtype: of the merged elements.
        count: how many elements the tensor has.
    """

    def __init__(
        self,
        transfers: Transfers,
        tensor: str,
        settings: Settings,
        fused: Fused,
        *,
        seed: int,
        base: Operand | OnDevice | None,
        sources: Mapping[str, Operand | OnDevice],
        output_dtype: torch.dtype,
        count: int,
    ) -> None:
        self._transfers = transfers
        self._device = transfers.device
        self._fused = fused
        self._has_base = fused.task_vectors and base is not None
        self._inputs = [*([base] if fused.task_vectors and base is not None else []), *sources.values()]
        self._weights = [settings.weights[source] for source in sources]
        self._keys = [mask_key(seed, source, tensor) for source in sources]
        self._output_dtype = output_dtype
        self._count = count
        self._tiles = [(first, min(TILE, count - first)) for first in range(0, count, TILE)]
        staged = sum(ITEM_BYTES[each.dtype] for each in self._inputs if not isinstance(each, OnDevice)) * count
        self._holds = isinstance(fused.keep, KeepLargest) and staged <= HELD_BYTES
        self._held: dict[int, list[torch.Tensor]] = {}

    @torch.no_grad()
    def run(self, output: Callable[[int, torch.Tensor], object]) -> bool:
        """Merge every tile, in order.

        Args:
            output: called with the first element of a tile and its merged elements, on the device, in the output
                dtype, shape ``(n,)``; nothing writes to them afterwards.

        Returns:
            whether all inputs were finite and all merged elements fit the output dtype; if not, what was put out is of
            no use.

        Raises:
            CheckpointError: an input cannot be read.
        """
        cuts = self._cuts()
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for index, (first, _) in enumerate(self._tiles):
            base, sources = self._wide(index)
            for tensor in (*sources, *([] if base is None else [base])):
                finite = finite.logical_and(torch.isfinite(tensor).all())
            merged = self._merged(first, base, sources, cuts).to(self._output_dtype)
            finite = finite.logical_and(torch.isfinite(merged).all())
            output(first, merged)
        return bool(finite)  # the one place where the host waits for the device

    def _merged(
        self,
        first: int,
        base: torch.Tensor | None,
        sources: Sequence[torch.Tensor],
        cuts: Sequence[tuple[_Cut, _Cut | None]],
    ) -> torch.Tensor:
        fused = self._fused
        kept = (self._kept(first, index, delta, cuts) for index, delta in enumerate(_deltas(base, sources)))
        if fused.combine == "sum":
            total = weighted_sum(kept, self._weights)
        else:
            total = sum_of_agreeing(list(kept), self._weights, normalize=fused.combine == "agreeing_normalised")
        if fused.divisor != 1:
            total = total / self._number(fused.divisor)
        if fused.scale != 1:
            total = total * fused.scale
        return total if base is None else base + total

    def _kept(
        self, first: int, source: int, delta: torch.Tensor, cuts: Sequence[tuple[_Cut, _Cut | None]]
    ) -> torch.Tensor:
        """A tile of a task vector, sparsified."""
        keep = self._fused.keep
        if isinstance(keep, KeepRandom):
            bits = lanes(self._keys[source], first, first + len(delta), self._device)
            return torch.where(bits < keep_threshold(keep.density), delta, 0) / self._number(keep.density)
        if not cuts:
            return delta
        cut, outliers = cuts[source]
        magnitudes = _magnitudes(delta)
        mask = cut.above(magnitudes)
        if outliers is not None:
            mask.logical_and_(outliers.above(magnitudes).logical_not_())
        return torch.where(mask, delta, 0)

    def _cuts(self) -> list[tuple[_Cut, _Cut | None]]:
        """Per source the cut of what is kept, and that of the outliers; nothing where all elements are kept."""
        keep = self._fused.keep
        if not isinstance(keep, KeepLargest):
            return []
        both = keep.ranks(self._count)
        if both is None:
            return []
        ranks = [rank for rank in both if rank]
        wanted = [(source, rank) for source in range(len(self._weights)) for rank in ranks]
        # By the upper and then by the lower 16 bits of the magnitudes: exact, in fixed memory.
        upper = self._histograms([(source, None) for source, _ in wanted])
        found = [_bin_of(counts, rank) for counts, (_, rank) in zip(upper, wanted, strict=True)]
        lower = self._histograms([(source, bits) for (source, _), (bits, _, _) in zip(wanted, found, strict=True)])
        cuts: list[_Cut] = []
        for counts, (bits, remaining, _) in zip(lower, found, strict=True):
            low, ties, equal = _bin_of(counts, remaining)
            cuts.append(_Cut(bits << 16 | low, None if ties == equal else ties, self._device))
        if len(ranks) == 1:
            return [(cut, None) for cut in cuts]
        return list(zip(cuts[::2], cuts[1::2], strict=True))

    def _histograms(self, wanted: Sequence[tuple[int, int | None]]) -> list[torch.Tensor]:
        """For each (source, upper): its magnitudes by their upper 16 bits, or of those with these by their lower ones.

        Returns:
            on the host, int64 of shape ``(65536,)`` each.
        """
        bins = torch.zeros(len(wanted), _BINS, dtype=torch.int64, device=self._device)
        for index in range(len(self._tiles)):
            magnitudes = [_magnitudes(delta) for delta in _deltas(*self._wide(index))]
            for row, (source, upper) in zip(bins, wanted, strict=True):
                high = magnitudes[source] >> 16
                values = high if upper is None else magnitudes[source][high == upper] & 0xFFFF
                row += torch.bincount(values, minlength=_BINS)
        return list(bins.cpu())

    def _wide(self, index: int) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The base, where it takes part, and the sources of a tile, in float32."""
        parts = self._held.get(index)
        if parts is None:
            first, count = self._tiles[index]
            operands = [each for each in self._inputs if not isinstance(each, OnDevice)]
            uploaded = iter(self._transfers.upload(operands, first, count) if operands else ())
            parts = [
                each.tensor[first : first + count] if isinstance(each, OnDevice) else next(uploaded)
                for each in self._inputs
            ]
            if self._holds:
                self._held[index] = parts
        wide = [part.to(torch.float32) for part in parts]
        return (wide[0], wide[1:]) if self._has_base else (None, wide)

    def _number(self, value: float) -> torch.Tensor:
        return torch.full((), value, dtype=torch.float32, device=self._device)


def _deltas(base: torch.Tensor | None, sources: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (source if base is None else source - base for source in sources)


def _magnitudes(delta: torch.Tensor) -> torch.Tensor:
    """Bits of the magnitudes: for floating-point numbers that are not negative their order is that of the values."""
    return delta.view(torch.int32) & 0x7FFFFFFF


def _bin_of(counts: torch.Tensor, rank: int) -> tuple[int, int, int]:
    """The bin that holds the element of a rank (1: the largest), its rank within the bin, and how many are in it."""
    largest_first = counts.flip(0)
    passed = largest_first.cumsum(0)
    at = int(torch.searchsorted(passed, rank))
    inside = int(largest_first[at])
    return len(counts) - 1 - at, rank - (int(passed[at]) - inside), inside


@dataclass(frozen=True)
class Room:
    """Whether the inputs of a resident merge can stay on a device; all figures in bytes.

    Beside them must fit one more model, since each specialist is measured while the merged model is there, and the
    activations: a tenth of the device's memory is kept back for these. The merged model itself is expected to be there
    already, and so not in ``free``.

    Attributes:
        inputs: base and sources together.
        model: the largest of them.
        free: memory of the device that is not in use.
        total: memory of the device.
    """

    inputs: int
    model: int
    free: int
    total: int

    @property
    def reserve(self) -> int:
        """What is kept back."""
        return self.model + self.total // ACTIVATIONS

    @property
    def suffices(self) -> bool:
        """Whether the inputs fit beside the reserve."""
        return self.inputs + self.reserve <= self.free

    def shortage(self, device: torch.device) -> str:
        """One sentence for the user, for where it does not suffice."""
        inputs, free, total, reserve = (
            f"{figure / 1e9:.1f} GB" for figure in (self.inputs, self.free, self.total, self.reserve)
        )
        return (
            f"the base and the sources ({inputs}) do not fit on {device} ({free} of {total} free, of which {reserve} "
            "are kept back for a model and its activations): they stay in host memory and go to the device tile by "
            "tile for every merge, which is slower"
        )


def memory_of(device: torch.device) -> tuple[int, int]:
    """Free and total memory of a CUDA device in bytes, after torch has given back what it does not use."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free, total


@contextmanager
def memory_explained(tensor: str, device: torch.device) -> Iterator[None]:
    """Say in one sentence that the device's memory was too small to merge a tensor.

    Raises:
        MergeError: it was.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise MergeError(
            f"tensor {tensor!r}: {device} has not enough free memory to merge it",
            "set compute.device to 'cpu', or end what else runs on that device",
        ) from None

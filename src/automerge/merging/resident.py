"""The resident engine: inputs stay on the device, and merged tensors go straight into a live model.

A search applies many recipes that differ in a few blocks: only what changed since the last call is merged again. In the
processor's memory the compiled kernels do it (`automerge.merging.elementwise`), from the inputs where they lie straight
into the live parameters; nothing of a tensor's size is allocated, and the samples from which TIES' thresholds are found
are taken once. On a CUDA device torch does it in tiles (`automerge.merging.device`); inputs that do not fit there
beside the model stay in host memory, and go to the device tile by tile for each merge.
"""

import logging
from collections.abc import Iterable, Mapping

import torch

from automerge.checkpoint.info import ITEM_BYTES, info_of
from automerge.documents import digest_of
from automerge.errors import MergeError
from automerge.merging.apply import merge_tensor, refuse_non_finite
from automerge.merging.cut import Sample
from automerge.merging.device import DeviceMerge, OnDevice, Room, Transfers, memory_explained, memory_of
from automerge.merging.elementwise import ElementwiseMerge, fused_of
from automerge.merging.fused import Fused
from automerge.merging.kernels import load_kernels
from automerge.merging.plan import Step, plan_merge, refuse_untied, replan
from automerge.merging.recipe import Recipe, canonical, settings_key
from automerge.merging.statistics import Statistics, check_statistics
from automerge.merging.technique import Settings, TensorInputs, load_technique
from automerge.merging.workers import InMemory, Operand, Workers

log = logging.getLogger(__name__)


class ResidentMerger:
    """Merges into a live model, with the bytes that the streamed engine would write.

    Args:
        base: the base's tensors by name in the dtype of its checkpoint, or None. Left as they are.
        sources: the same, by source.
        device: where it is merged; the live model should be there already, so that its memory is counted.
        statistics: what the techniques of the recipes need, and the recalibrated buffers; on the device, unless they
            are to be read again for every recipe.
        keep_on_device: whether the inputs are kept there, or in host memory; by default they are if they fit
            (`automerge.merging.device.Room`), and a warning says where they do not.

    Raises:
        MergeError: an input has NaN or infinite values.
    """

    def __init__(
        self,
        base: Mapping[str, torch.Tensor] | None,
        sources: Mapping[str, Mapping[str, torch.Tensor]],
        device: torch.device | str,
        statistics: Statistics | None = None,
        *,
        keep_on_device: bool | None = None,
    ) -> None:
        self._statistics = statistics
        self._device = torch.empty(0, device=device).device  # which has its number, as that of any tensor there
        self._kernels = load_kernels() if self._device.type == "cpu" else None
        self._workers = Workers(torch.get_num_threads())
        self._transfers = Transfers(self._device, self._workers)
        self._samples: dict[str, list[Sample]] = {}
        if keep_on_device is None:
            keep_on_device = _fits([*([] if base is None else [base]), *sources.values()], self._device)
        self._on_device = keep_on_device
        home = self._device if keep_on_device else torch.device("cpu")
        moved: dict[tuple[object, ...], torch.Tensor] = {}
        self._base = None if base is None else _resident("base", base, home, moved)
        self._sources = {source: _resident(f"source {source!r}", each, home, moved) for source, each in sources.items()}
        self._base_infos = None if self._base is None else {name: info_of(each) for name, each in self._base.items()}
        self._source_infos = {
            source: {name: info_of(tensor) for name, tensor in each.items()} for source, each in self._sources.items()
        }
        self._planned: tuple[Recipe, list[Step]] | None = None
        self._written: dict[str, tuple[str, list[torch.Tensor]]] = {}

    @torch.no_grad()
    def apply(self, recipe: Recipe, live: Mapping[str, torch.Tensor]) -> list[str]:
        """Bring the live model to what the recipe says.

        What the recipe keeps private is left alone. A tensor is merged again if its block's canonical settings or
        what else of the recipe it depends on changed, or if ``live`` holds another tensor than at the last call. A
        change that someone else made to the values of a live tensor is not noticed: `forget` first.

        Args:
            recipe: the merge.
            live: the model's parameters and buffers by name, on any device; written in place. A dtype other than the
                output's is converted to after the rounding to the output's. Aliases of tied tensors may be left out.

        Returns:
            the names of the blocks that were merged again, in the recipe's order.

        Raises:
            MergeError: the recipe does not fit the inputs or the live model, or a tensor cannot be merged; then the
                blocks before the failing tensor have their new values, and the next call goes on from there.
        """
        steps = self._plan(recipe)
        if recipe.statistics is not None:
            check_statistics(recipe, self._statistics)
        keys = {block.name: _settings_part(recipe, canonical(block).settings) for block in recipe.blocks}
        targets = {step.name: _targets(step, live) for step in steps}
        changed = set()
        for step in steps:
            role = "buffer" if step.name in step.block.buffers else "parameter"
            role = "recalibrated" if step.name in recipe.recalibrated else role
            key = f"{keys[step.block.name]} {role}"
            if self._is_current(step.name, key, targets[step.name]):
                continue
            self._written.pop(step.name, None)
            self._merge(recipe, step, targets[step.name])
            self._written[step.name] = (key, targets[step.name])
            changed.add(step.block.name)
        return [block.name for block in recipe.blocks if block.name in changed]

    def technique_inputs(self, recipe: Recipe, name: str) -> TensorInputs:
        """What a block's technique sees of one tensor: float32 (float64 if an input is), on the merger's device.

        Args:
            recipe: of these inputs.
            name: a parameter of one of its blocks.

        Raises:
            MergeError: the recipe does not fit the inputs.
        """
        step = next(step for step in self._plan(recipe) if step.name == name)
        base = self._base[step.base] if self._base is not None and step.base is not None else None
        sources = [self._sources[source][stored] for source, stored in step.sources.items()]
        dtypes = [tensor.dtype for tensor in (*sources, *([] if base is None else [base]))]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return TensorInputs(
            tensor=name,
            source_names=list(step.sources),
            base=None if base is None else base.to(self._device, wide),
            sources=[source.to(self._device, wide) for source in sources],
            seed=recipe.seed,
        )

    def forget(self) -> None:
        """Merge everything again at the next call: the live tensors were changed by someone else."""
        self._written.clear()

    def _plan(self, recipe: Recipe) -> list[Step]:
        known = None if self._planned is None else replan(self._planned[1], self._planned[0], recipe)
        steps = known
        if steps is None:
            steps = plan_merge(recipe, self._base_infos, self._source_infos)
            for step in steps:
                self._refuse_untied(step)
        self._planned = (recipe, steps)
        return steps

    def _is_current(self, name: str, key: str, targets: list[torch.Tensor]) -> bool:
        # The tensors written to are held, so that no other tensor can have their address.
        written_key, written = self._written.get(name, ("", []))
        return written_key == key and [_place(each) for each in written] == [_place(each) for each in targets]

    def _merge(self, recipe: Recipe, step: Step, targets: list[torch.Tensor]) -> None:
        """Merge one tensor into the live tensors that are to hold it."""
        first = targets[0]
        in_place = first.is_contiguous() and first.device == self._device and info_of(first).dtype == step.info.dtype
        with memory_explained(step.name, self._device):
            place = (
                first if in_place else torch.empty(step.info.shape, dtype=step.info.torch_dtype, device=self._device)
            )
            if not self._merge_elementwise(recipe, step, place):
                place = self._merged(recipe, step)
        for target in targets:
            if target is not place:
                target.copy_(place)

    def _merge_elementwise(self, recipe: Recipe, step: Step, place: torch.Tensor) -> bool:
        """Merge in tiles; False where that cannot be, or where `merge_tensor` has to say what is wrong."""
        if not step.info.is_floating_point or step.name in recipe.recalibrated:
            return False
        sources = {source: self._sources[source][stored] for source, stored in step.sources.items()}
        base = self._base[step.base] if self._base is not None and step.base is not None else None
        fused = fused_of(
            step.name,
            canonical(step.block),
            None if base is None else info_of(base),
            {source: info_of(tensor) for source, tensor in sources.items()},
            step.info,
        )
        inputs = [*sources.values(), *([] if base is None else [base])]
        if fused is None or not all(tensor.is_contiguous() for tensor in inputs):
            return False
        if self._kernels is None:
            return self._merge_by_torch(recipe, step, fused, base, sources, place)
        merge = ElementwiseMerge(
            self._kernels,
            step.name,
            *fused,
            seed=recipe.seed,
            base=None if base is None else _operand(base),
            sources={source: _operand(tensor) for source, tensor in sources.items()},
            output_dtype=step.info.dtype,
            count=step.info.numel,
            samples=self._samples.setdefault(step.name, []),
        )
        start, item = place.data_ptr(), ITEM_BYTES[step.info.dtype]
        return merge.run(self._workers, lambda first, count, scratch: start + first * item)

    def _merge_by_torch(
        self,
        recipe: Recipe,
        step: Step,
        fused: tuple[Settings, Fused],
        base: torch.Tensor | None,
        sources: Mapping[str, torch.Tensor],
        place: torch.Tensor,
    ) -> bool:
        def operand(tensor: torch.Tensor) -> Operand | OnDevice:
            return OnDevice(tensor.view(-1)) if self._on_device else _operand(tensor)

        merge = DeviceMerge(
            self._transfers,
            step.name,
            *fused,
            seed=recipe.seed,
            base=None if base is None else operand(base),
            sources={source: operand(tensor) for source, tensor in sources.items()},
            output_dtype=step.info.torch_dtype,
            count=step.info.numel,
        )
        flat = place.detach().view(-1)
        return merge.run(lambda first, tile: flat[first : first + len(tile)].copy_(tile))

    def _refuse_untied(self, step: Step) -> None:
        for source, stored in step.sources.items():
            tensors = self._sources[source]
            refuse_untied(step, f"source {source!r}", stored, tensors, tensors.__getitem__)
        if self._base is not None and step.base is not None:
            refuse_untied(step, "base", step.base, self._base, self._base.__getitem__)

    def _merged(self, recipe: Recipe, step: Step) -> torch.Tensor:
        base = self._base[step.base] if self._base is not None and step.base is not None else None
        return merge_tensor(
            step.name,
            step.block,
            None if base is None else base.to(self._device),
            {source: self._sources[source][stored].to(self._device) for source, stored in step.sources.items()},
            seed=recipe.seed,
            dtype=recipe.dtype,
            integer_buffers=recipe.integer_buffers,
            inputs_are_finite=True,
            statistics=self._statistics,
            recalibrated=step.name in recipe.recalibrated,
        )


def _operand(tensor: torch.Tensor) -> InMemory:
    return InMemory(tensor.data_ptr(), info_of(tensor).dtype)


def _resident(
    owner: str,
    tensors: Mapping[str, torch.Tensor],
    home: torch.device,
    moved: dict[tuple[object, ...], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors in their home. ``moved`` has those that are there: what two inputs share they share there as well."""
    found = {}
    for name, tensor in tensors.items():
        place = _place(tensor)
        if place not in moved:
            moved[place] = tensor.detach().to(home)
            refuse_non_finite(owner, name, moved[place])
        found[name] = moved[place]
    return found


def _fits(inputs: Iterable[Mapping[str, torch.Tensor]], device: torch.device) -> bool:
    """Whether the inputs can stay on the device; a warning where they cannot."""
    if device.type != "cuda":
        return True
    sizes = [{_place(tensor): tensor.nbytes for tensor in tensors.values()} for tensors in inputs]
    distinct = {place: nbytes for each in sizes for place, nbytes in each.items()}
    room = Room(sum(distinct.values()), max(sum(each.values()) for each in sizes), *memory_of(device))
    if not room.suffices:
        log.warning("%s", room.shortage(device))
    return room.suffices


def _settings_part(recipe: Recipe, settings: Settings) -> str:
    """What a merged tensor depends on beside its inputs."""
    randomised = load_technique(settings.technique).declaration.randomised
    return digest_of(
        {
            "settings": settings_key(settings),
            "sources": recipe.source_names,
            "seed": recipe.seed if randomised else None,
            "dtype": recipe.dtype,
            "integer_buffers": recipe.integer_buffers,
        }
    )


def _targets(step: Step, live: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The live tensors to write: the tensor, and each alias that does not share its memory."""
    if step.name not in live and not any(alias in live for alias in step.aliases):
        raise MergeError(f"the live model has no tensor {step.name!r}", "pass the model that the recipe is for")
    targets: list[torch.Tensor] = []
    for name in (step.name, *step.aliases):
        if name not in live or _place(live[name]) in [_place(target) for target in targets]:
            continue
        if tuple(live[name].shape) != step.info.shape:
            raise MergeError(
                f"the live model's tensor {name!r} has shape {list(live[name].shape)}, "
                f"the merged one {list(step.info.shape)}",
                "pass the model that the recipe is for",
            )
        targets.append(live[name])
    return targets


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())

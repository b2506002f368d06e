"""The resident engine: inputs stay on the device, and merged tensors go straight into a live model.

A search applies many recipes that differ in a few blocks: only what changed since the last call is merged again.
"""

from collections.abc import Mapping

import torch

from automerge.checkpoint.info import info_of
from automerge.documents import digest_of
from automerge.errors import MergeError
from automerge.merging.apply import merge_tensor, refuse_non_finite
from automerge.merging.plan import Step, plan_merge, refuse_untied
from automerge.merging.recipe import Recipe, canonical, settings_key
from automerge.merging.technique import Settings, load_technique


class ResidentMerger:
    """Merges into a live model, with the bytes that the streamed engine would write.

    Args:
        base: the base's tensors by name in the dtype of its checkpoint, or None. Left as they are.
        sources: the same, by source.
        device: where the inputs are kept and merged.

    Raises:
        MergeError: an input has NaN or infinite values.
    """

    def __init__(
        self,
        base: Mapping[str, torch.Tensor] | None,
        sources: Mapping[str, Mapping[str, torch.Tensor]],
        device: torch.device | str,
    ) -> None:
        self._base = None if base is None else _resident("base", base, device)
        self._sources = {source: _resident(f"source {source!r}", each, device) for source, each in sources.items()}
        self._base_infos = None if self._base is None else {name: info_of(each) for name, each in self._base.items()}
        self._source_infos = {
            source: {name: info_of(tensor) for name, tensor in each.items()} for source, each in self._sources.items()
        }
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
        steps = plan_merge(recipe, self._base_infos, self._source_infos)
        keys = {block.name: _settings_part(recipe, canonical(block).settings) for block in recipe.blocks}
        targets = {step.name: _targets(step, live) for step in steps}
        changed = set()
        for step in steps:
            role = "buffer" if step.name in step.block.buffers else "parameter"
            key = f"{keys[step.block.name]} {role}"
            if self._is_current(step.name, key, targets[step.name]):
                continue
            self._written.pop(step.name, None)
            merged = self._merged(recipe, step)
            for target in targets[step.name]:
                target.copy_(merged)
            self._written[step.name] = (key, targets[step.name])
            changed.add(step.block.name)
        return [block.name for block in recipe.blocks if block.name in changed]

    def forget(self) -> None:
        """Merge everything again at the next call: the live tensors were changed by someone else."""
        self._written.clear()

    def _is_current(self, name: str, key: str, targets: list[torch.Tensor]) -> bool:
        # The tensors written to are held, so that no other tensor can have their address.
        written_key, written = self._written.get(name, ("", []))
        return written_key == key and [_place(each) for each in written] == [_place(each) for each in targets]

    def _merged(self, recipe: Recipe, step: Step) -> torch.Tensor:
        for source, stored in step.sources.items():
            tensors = self._sources[source]
            refuse_untied(step, f"source {source!r}", stored, tensors, tensors.__getitem__)
        base = None
        if self._base is not None and step.base is not None:
            refuse_untied(step, "base", step.base, self._base, self._base.__getitem__)
            base = self._base[step.base]
        return merge_tensor(
            step.name,
            step.block,
            base,
            {source: self._sources[source][stored] for source, stored in step.sources.items()},
            seed=recipe.seed,
            dtype=recipe.dtype,
            integer_buffers=recipe.integer_buffers,
            inputs_are_finite=True,
        )


def _resident(owner: str, tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    for name, tensor in tensors.items():
        refuse_non_finite(owner, name, tensor)
    return {name: tensor.detach().to(device) for name, tensor in tensors.items()}


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

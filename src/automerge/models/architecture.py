"""The interface of a model kind: from a spec's ``model`` and a local checkpoint to a module that can be called."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from automerge.errors import AutoMergeError, ModelError
from automerge.plugins import load_plugin
from automerge.spec import ModelSpec


class Architecture(ABC):
    """One model kind, bound to one spec; registered under the entry point group ``automerge.models``.

    Args:
        spec: the spec's ``model``.
        folders: where each checkpoint lies, by reference ("base" or a source's name): a folder, or a weight file.
    """

    def __init__(self, spec: ModelSpec, folders: Mapping[str, Path]) -> None:
        self.spec = spec
        self.folders = dict(folders)

    def check(self) -> None:
        """Refuse what can be refused before any checkpoint is here, such as a target that does not exist.

        By default nothing.

        Raises:
            ModelError: the sentence names the key of the spec.
        """
        return

    @abstractmethod
    def build(self, reference: str, arguments: Mapping[str, Any]) -> nn.Module:
        """A module in evaluation mode, without the checkpoint's weights (``models.state.load_state`` brings them).

        Its weights are unspecified. Under ``torch.device("meta")`` it is built without memory, for tracing.

        Args:
            reference: "base" or a source's name.
            arguments: the reference's own arguments; they are laid over the spec's ``model.arguments``.

        Raises:
            ModelError: the architecture cannot be built; the sentence names the key of the spec.
        """

    def example(self, module: nn.Module) -> dict[str, Tensor] | None:
        """Inputs for tracing, with a batch of 1, on the module's device; None: take one sample of a task.

        By default those of the spec's ``model.example``: floats standard normal from a fixed seed, integers 0, booleans
        true.
        """
        if self.spec.example is None:
            return None
        device = _device(module)
        generator = torch.Generator().manual_seed(0)
        inputs: dict[str, Tensor] = {}
        for name, declared in self.spec.example.items():
            dtype: torch.dtype = getattr(torch, declared.dtype)
            if device.type == "meta":
                inputs[name] = torch.empty(declared.shape, dtype=dtype, device=device)
            elif dtype.is_floating_point:
                inputs[name] = torch.randn(declared.shape, generator=generator, device="cpu").to(device, dtype)
            else:
                inputs[name] = torch.full(declared.shape, dtype == torch.bool, dtype=dtype, device=device)
        return inputs

    def call(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of one batch.

        A lone input called ``inputs`` is passed by position, any others by keyword. Floating inputs are cast to the
        dtype of the module's first floating parameter. Of a tuple the first entry is taken, of a mapping ``logits``,
        else the first.

        Args:
            module: what ``build`` made.
            inputs: tensors [n, ...] by name.

        Returns:
            Logits [n, ...], in the module's dtype, differentiable.

        Raises:
            ModelError: the module returns no tensor.
        """
        dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)
        cast = {
            name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }
        output = module(cast["inputs"]) if list(cast) == ["inputs"] else module(**cast)
        return _logits(output)

    def vocabulary_tensors(self, module: nn.Module) -> list[str]:
        """Names of the state's tensors that have one row per token, in state-dict order; each of tied ones.

        By default the weights (and biases) of what the module's ``get_input_embeddings`` and ``get_output_embeddings``
        return, if it has these methods, as transformers' models do.
        """
        rows: list[Tensor | None] = []
        for method in ("get_input_embeddings", "get_output_embeddings"):
            try:
                part = getattr(module, method)()
            except (AttributeError, NotImplementedError):
                continue
            rows += [getattr(part, "weight", None), getattr(part, "bias", None)]
        ids = {id(tensor) for tensor in rows if isinstance(tensor, Tensor)}
        return [name for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in ids]

    def resize_vocabulary(self, module: nn.Module, rows: int) -> nn.Module:
        """Give the tensors with one row per token another number of rows, with whatever values.

        By default by the module's ``resize_token_embeddings(rows)``.

        Raises:
            ModelError: the module has no such method, or it fails.
        """
        resize: Callable[[int], object] | None = getattr(module, "resize_token_embeddings", None)
        if resize is None:
            raise ModelError(
                f"model.target: {type(module).__name__} is built for another number of tokens than the {rows} of the "
                "weights, and has no resize_token_embeddings",
                "give it a method resize_token_embeddings(rows), or set the number in the arguments",
            )
        try:
            resize(rows)
        except AutoMergeError:
            raise
        except Exception as error:
            raise ModelError(
                f"model.target: {type(module).__name__}.resize_token_embeddings({rows}) fails: {short_reason(error)}",
                "mend the method, or bring the checkpoints to one number of tokens",
            ) from error
        return module

    def set_vocabulary(self, folder: Path, rows: int) -> None:
        """Say in the companion files of a merged checkpoint how many tokens it has. By default nothing.

        Raises:
            ModelError: they cannot be read.
        """
        return

    def companion_files(self, folder: Path) -> list[Path]:
        """The files beside a checkpoint's weights that a merged checkpoint needs too; sorted. By default none."""
        return []

    def exporting(self, module: nn.Module) -> AbstractContextManager[None]:
        """Entered around an ONNX export: what the module must change for it, and changes back."""
        return nullcontext()


def load_architecture(spec: ModelSpec, folders: Mapping[str, Path]) -> Architecture:
    """The architecture of the spec's ``model.kind``.

    Raises:
        PluginError: the kind is unknown; the nearest name is given.
        ModelError: the plug-in is not an ``Architecture``.
    """
    kind = load_plugin("models", spec.kind, "model.kind")
    if not (isinstance(kind, type) and issubclass(kind, Architecture)):
        raise ModelError(
            f"model.kind: the plug-in {spec.kind!r} is not a subclass of automerge.models.architecture.Architecture",
            "mend the plug-in's entry point",
        )
    return kind(spec, folders)


def short_reason(error: BaseException, limit: int = 200) -> str:
    """An exception as ``Type: first line``, at most ``limit`` characters of it, for an error that quotes it."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _device(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, Tensor):
        raise ModelError(
            f"model.target: the model returned {type(output).__name__} where a tensor of logits is expected",
            "return the logits, a tuple that starts with them, or a dict with the key 'logits'",
        )
    return output

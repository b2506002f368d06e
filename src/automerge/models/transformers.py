"""Model kind ``transformers``: a class of the transformers library, built from the checkpoint's own ``config.json``.

The network is never used: configurations and code come from the checkpoint's folder, and code only where the spec's
``model.trust_remote_code`` allows it.
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from automerge.checkpoint.companions import companion_files
from automerge.documents import write_atomically
from automerge.errors import MissingExtraError, ModelError
from automerge.models.architecture import Architecture, short_reason
from automerge.plugins import nearest


class TransformersArchitecture(Architecture):
    """Builds ``model.target`` from the configuration in the reference's folder.

    ``arguments`` are entries of the configuration (``num_labels``), and ``attn_implementation``.
    """

    def check(self) -> None:
        """Find the class; see ``Architecture.check``."""
        self._class()

    def build(self, reference: str, arguments: Mapping[str, Any]) -> nn.Module:
        """See ``Architecture.build``. Parameters are allocated but not initialised; buffers are computed."""
        kind = self._class()
        merged = {**self.spec.arguments, **arguments}
        attention = merged.pop("attn_implementation", None)
        options = {} if attention is None else {"attn_implementation": attention}
        config = self._config(reference, merged)
        where = f"model.target: {self.spec.target} cannot be built from the config.json of {reference!r}"
        try:
            with _NoRandomInitialisation():
                if hasattr(kind, "from_config"):
                    module = kind.from_config(config, trust_remote_code=self.spec.trust_remote_code, **options)
                else:
                    module = kind._from_config(config, **options)
        except Exception as error:
            raise ModelError(
                f"{where} ({type(config).__name__}): {short_reason(error)}", "name a class that fits the checkpoint"
            ) from error
        if not isinstance(module, nn.Module):
            raise ModelError(f"{where}: it is not a torch.nn.Module", "name a model class, e.g. 'AutoModelForCausalLM'")
        return module.eval()

    def example(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The spec's ``model.example``, else inputs made from the configuration; see ``Architecture.example``.

        Text gets up to 16 token ids (8 for a decoder), images the configuration's channels and size (224 where it names
        none), speech its mel bins and frames (or one second of samples). None for inputs that are none of these.
        """
        if self.spec.example is not None:
            return super().example(module)
        device = next(module.parameters()).device
        config: Any = module.config
        main = getattr(module, "main_input_name", "")
        inputs: dict[str, Tensor] = {}
        if main == "input_ids":
            inputs["input_ids"] = _token_ids(config, 16, device)
        elif main == "pixel_values":
            vision = getattr(config, "vision_config", config)
            size = getattr(vision, "image_size", None) or 224
            height, width = size if isinstance(size, list | tuple) else (size, size)
            inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width, device=device)
        elif main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
            # Whisper's second convolution halves the frames, and its encoder accepts exactly this many.
            frames = 2 * config.max_source_positions
            inputs["input_features"] = torch.zeros(1, config.num_mel_bins, frames, device=device)
        elif main == "input_values":
            inputs["input_values"] = torch.zeros(1, 16_000, device=device)
        else:
            return None
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _token_ids(config, 8, device)
        return inputs

    def resize_vocabulary(self, module: nn.Module, rows: int) -> nn.Module:
        """See ``Architecture.resize_vocabulary``; new rows are not initialised from the old ones."""
        try:
            with _NoRandomInitialisation():
                resized: Any = module
                resized.resize_token_embeddings(rows, mean_resizing=False)
        except Exception as error:
            raise ModelError(
                f"model.target: {type(module).__name__} cannot have {rows} tokens: {short_reason(error)}",
                "merge with another rule of merge.vocabulary",
            ) from error
        return module

    def set_vocabulary(self, folder: Path, rows: int) -> None:
        """Write the number into ``config.json``; see ``Architecture.set_vocabulary``."""
        from transformers import AutoConfig

        path = folder / "config.json"
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=self.spec.trust_remote_code
            )
            text = config.get_text_config()
            content = json.loads(path.read_bytes())
        except Exception as error:
            raise ModelError(f"{path}: transformers cannot read it ({short_reason(error)})", "mend it") from error
        part = next((key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text), None)
        (content if part is None else content.setdefault(part, {}))["vocab_size"] = rows
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())

    def companion_files(self, folder: Path) -> list[Path]:
        """Configuration, tokenizer and processor files, and the Python files where remote code is trusted; sorted."""
        return companion_files(folder, code=self.spec.trust_remote_code)

    @contextlib.contextmanager
    def exporting(self, module: nn.Module) -> Iterator[None]:
        """Eager attention during an export: the fused kernel's memory layout stops the export of some models (T5)."""
        config: Any = module.config
        before = config._attn_implementation
        switch: Callable[[str], None] | None = getattr(module, "set_attn_implementation", None)
        if switch is None or before == "eager":
            yield
            return
        switch("eager")
        try:
            yield
        finally:
            switch(before)

    def _class(self) -> Any:
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("model.kind 'transformers'", "transformers") from None
        target = self.spec.target
        kind = getattr(transformers, target, None)
        if isinstance(kind, type) and (hasattr(kind, "from_config") or hasattr(kind, "_from_config")):
            return kind
        names = dir(transformers)
        if target in names:
            raise ModelError(
                f"model.target: transformers.{target} is not a model class", "name one, e.g. 'AutoModelForCausalLM'"
            )
        autos = [name for name in names if name.startswith("AutoModel")]
        close = difflib.get_close_matches(target, [name for name in names if "Model" in name or "For" in name], n=1)
        raise ModelError(f"model.target: transformers has no class {target!r}", nearest(target, close or autos))

    def _config(self, reference: str, arguments: Mapping[str, Any]) -> Any:
        from transformers import AutoConfig

        folder = self.folders[reference]
        folder = folder if folder.is_dir() else folder.parent
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder}: the checkpoint of {reference!r} has no config.json, which model.kind 'transformers' needs",
                "add the config.json of the model's save_pretrained",
            )
        _refuse_code_elsewhere(folder / "config.json")
        try:
            config, unused = AutoConfig.from_pretrained(
                folder,
                return_unused_kwargs=True,
                local_files_only=True,
                trust_remote_code=self.spec.trust_remote_code,
                **arguments,
            )
        except Exception as error:
            needs_code = "trust_remote_code" in str(error)
            raise ModelError(
                f"{folder / 'config.json'}: "
                + (
                    "the model needs Python code that comes with the checkpoint"
                    if needs_code
                    else f"transformers cannot read it ({short_reason(error)})"
                ),
                "set model.trust_remote_code: true if you trust that code"
                if needs_code
                else "mend it, or the arguments",
            ) from error
        unused = {key: value for key, value in unused.items() if key not in ("local_files_only", "trust_remote_code")}
        if unused:
            name = sorted(unused)[0]
            raise ModelError(
                f"model.arguments: {type(config).__name__} has no entry {name!r}",
                nearest(name, sorted(config.to_dict())),
            )
        _disable_cache(config)
        return config


def _refuse_code_elsewhere(path: Path) -> None:
    """Trust in a checkpoint's code is not trust in that of a repository which its configuration names."""
    with contextlib.suppress(ValueError, AttributeError):  # What is not JSON is for transformers to refuse.
        named = [str(item) for item in json.loads(path.read_bytes()).get("auto_map", {}).values() if "--" in str(item)]
        if named:
            raise ModelError(
                f"{path}: auto_map names code outside the checkpoint ({named[0]})",
                "copy that code beside the weights and name it in auto_map without a repository",
            )


class _NoRandomInitialisation(TorchFunctionMode):
    """Leaves parameters as they were allocated where they would be filled with random numbers, as soon replaced.

    Filling 7e9 of them takes minutes. Buffers, which a checkpoint may not hold, are computed as usual.
    """

    _RANDOM = frozenset({"uniform_", "normal_", "erfinv_", "log_normal_", "exponential_", "bernoulli_"})

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        fills = getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", "") in self._RANDOM
        return tensor if fills and isinstance(tensor, nn.Parameter) else func(*args, **kwargs)


def _token_ids(config: Any, length: int, device: torch.device) -> Tensor:
    """Token ids [1, length], within the vocabulary and the model's positions."""
    text = getattr(config, "text_config", None) or config
    for key in ("max_position_embeddings", "n_positions", "max_target_positions"):
        if isinstance(limit := getattr(text, key, None), int):
            length = min(length, limit)
    vocabulary = getattr(text, "vocab_size", None) or 2
    return (torch.arange(length, device=device) % vocabulary).unsqueeze(0)


def _disable_cache(config: Any) -> None:
    """A model that is only scored needs no key-value cache; an export would return it."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            _disable_cache(part)

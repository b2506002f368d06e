"""Synthetic checkpoints of the Llama architecture: a base and two fine-tuned copies of it, with random weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.write import CheckpointWriter

HIDDEN, FEED_FORWARD, VOCABULARY, HEADS, KEY_VALUE_HEADS = 2048, 5632, 32000, 32, 8
NAMES = ("base", "a", "b")

# Standard deviations of trained weights and of their change by a fine-tuning, in order of magnitude.
_WEIGHT, _CHANGE = 0.02, 0.001


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a model; 45 M parameters a layer, and 131 M around them."""
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    found: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
            f"{prefix}mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.k_proj.weight": (key_value, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (key_value, HIDDEN),
        }
    return dict(sorted(found.items()))


def parameter_count(layers: int) -> int:
    """How many parameters a model has."""
    return sum(torch.Size(shape).numel() for shape in shapes(layers).values())


def make(folder: Path, dtype: str, layers: int) -> Path:
    """Write the base and the two copies, unless they are there; returns the folder that holds them."""
    place = folder / f"{dtype}-{layers}"
    if (place / "complete").exists():
        return place
    names = shapes(layers)
    infos = {name: TensorInfo(dtype, shape) for name, shape in names.items()}
    writers = [CheckpointWriter(place / name, infos) for name in NAMES]
    for tensor, (name, shape) in enumerate(names.items()):
        for writer, values in zip(writers, _drawn(tensor, shape), strict=True):
            writer.write(name, values.to(infos[name].torch_dtype))
    for writer, name in zip(writers, NAMES, strict=True):
        writer.commit()
        (place / name / "config.json").write_text(json.dumps(_config(dtype, layers), indent=2))
    (place / "complete").touch()
    return place


def _drawn(seed: int, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = _WEIGHT * torch.randn(shape, generator=generator)
    yield base
    for _ in NAMES[1:]:
        yield base + _CHANGE * torch.randn(shape, generator=generator)


def _config(dtype: str, layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }

"""Writes LoRA adapters in PEFT's format by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], *, binary: bool = False, **config: Any) -> Path:
    """Write tensors (without PEFT's prefix in their names) and a configuration; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {PREFIX + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if binary:
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"], "lora_dropout": 0.1, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def lora(module: str, rows: int, columns: int, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A [rank, columns] and B [rows, rank] of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }

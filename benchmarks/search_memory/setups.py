"""Language models of two sizes, and all that a search over two fine-tuned copies of one holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from automerge.merging.recipe import BASE, InputDigest, Recipe, RecipeBlock
from automerge.merging.technique import load_technique
from automerge.models.architecture import Architecture
from automerge.models.state import state_names
from automerge.models.transformers import TransformersArchitecture
from automerge.searching.evaluator import MeasuredTask
from automerge.spec import ModelSpec, TaskSpec
from automerge.tasks.language_modelling import LanguageModelling
from automerge.tasks.task import TaskData

SOURCES = ("a", "b")

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
}
"""The configurations that the published models of these names have, and one to warm up with."""


@dataclass(frozen=True)
class Setup:
    """What a search has before it begins, without weights."""

    architecture: Architecture
    modules: dict[str, nn.Module]
    tasks: dict[str, MeasuredTask]

    def recipe(self, technique: str) -> Recipe:
        """Every tensor merged by one technique."""
        names = state_names(self.modules[SOURCES[0]])
        values = load_technique(technique).declaration.defaults()
        weights = dict.fromkeys(SOURCES, 0.4)
        return Recipe(
            base=InputDigest(name=BASE),
            sources=[InputDigest(name=source) for source in SOURCES],
            blocks=[
                RecipeBlock(
                    name="all",
                    technique=technique,
                    weights=weights,
                    hyperparameters=values,
                    parameters=names.parameters,
                )
            ],
            tied=names.tied,
        )


def make(name: str, folder: Path, *, tasks: int, batch: int, tokens: int) -> Setup:
    """A setup whose model is on the meta device.

    Args:
        name: of `CONFIGS`.
        folder: the configuration is written there.
        tasks: 1 or 2, the specialist of each being a source.
        batch, tokens: samples of a batch of each task, and their length.
    """
    config = LlamaConfig(architectures=["LlamaForCausalLM"], use_cache=False, **CONFIGS[name])
    config.save_pretrained(folder)
    architecture = TransformersArchitecture(
        ModelSpec(kind="transformers", target="AutoModelForCausalLM"), dict.fromkeys(SOURCES, folder)
    )
    with torch.device("meta"):
        module = architecture.build(SOURCES[0], {})
    measured = {source: _task(source, config.vocab_size, batch, tokens) for source in SOURCES[:tasks]}
    return Setup(architecture, dict.fromkeys(SOURCES[:tasks], module), measured)


def random_state(module: nn.Module, seed: int) -> Mapping[str, torch.Tensor]:
    """Random parameters for a model on the meta device, by name."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict(keep_vars=True)
    return {
        name: torch.empty(state[name].shape, dtype=state[name].dtype).normal_(0, 0.02, generator=generator)
        for name in state_names(module).parameters
    }


def _task(source: str, vocabulary: int, batch: int, tokens: int) -> MeasuredTask:
    spec = TaskSpec(
        name=source, kind="language_modelling", specialist=source, validation="-", test="-", batch_size=batch
    )
    generator = torch.Generator().manual_seed(ord(source))
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
    return MeasuredTask(LanguageModelling(spec), source, TaskData({"input_ids": ids}, {"labels": ids}), batch)

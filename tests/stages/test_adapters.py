"""Sources that are LoRA adapters: the same run as with the full checkpoints that they stand for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from automerge.checkpoint.open import open_checkpoint
from automerge.errors import CheckpointError, MergeError
from automerge.merging.recipe import Recipe
from automerge.spec import Spec
from automerge.stages.evaluate import evaluate
from automerge.stages.fetch import fetch
from automerge.stages.inputs import Inputs
from automerge.stages.loading import Loaded
from automerge.stages.merge import merge
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.testing.s3_server import S3Server
from tests.checkpoint.adapters import lora, write_adapter

TOKENS, WIDTH = 16, 8


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, two adapters of it, and the full checkpoints that base and adapter amount to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    base = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("one", "two")):
        parts: dict[str, Tensor] = {}
        full = dict(base)
        for layer in range(2):
            for module, rows, columns in (
                ("self_attn.q_proj", 8, 8),
                ("self_attn.v_proj", 4, 8),
                ("mlp.up_proj", 12, 8),
            ):
                path = f"model.layers.{layer}.{module}"
                found = lora(path, rows, columns, seed=10 * seed + layer)
                parts |= found
                a, b = found.values()
                full[f"{path}.weight"] = base[f"{path}.weight"] + 0.5 * b @ a
        write_adapter(folder / name, parts, r=2, lora_alpha=1, base_model_name_or_path="elsewhere")
        shutil.copytree(folder / "base", folder / f"{name}-full")
        save_file(full, folder / f"{name}-full" / "model.safetensors", {"format": "pt"})
    tokens = torch.arange(8).repeat(6, 1) + torch.arange(6)[:, None]
    for split in ("validation", "test"):
        save_file({"inputs.input_ids": tokens % TOKENS}, folder / f"{split}.safetensors")
    return folder


def spec_of(folder: Path, kind: str = "", **changes: Any) -> Spec:
    """The job on the adapters, or with ``-full`` on the full checkpoints."""
    return Spec.model_validate(
        {
            "name": "adapters",
            "model": {"kind": "transformers", "target": "AutoModelForCausalLM"},
            "base": {"uri": str(folder / "base")},
            "sources": [{"name": name, "uri": str(folder / f"{name}{kind}")} for name in ("one", "two")],
            "tasks": [
                {
                    "name": name,
                    "kind": "language_modelling",
                    "specialist": name,
                    "validation": str(folder / "validation.safetensors"),
                    "test": str(folder / "test.safetensors"),
                }
                for name in ("one", "two")
            ],
            # Models of random weights are no better than a guess, which leaves the metrics undefined.
            "search": {
                "trials": 4,
                "initial": 2,
                "refine": {"steps": 20, "starts": 1},
                "techniques": ["task_arithmetic", "ties"],
                "objective": "soft_metric",
            },
            "evaluation": {"resamples": 100, "onnx": False, "baselines": False},
            "compute": {"device": "cpu", "threads": 1},
            **changes,
        }
    )


def run(spec: Spec, folder: Path) -> dict[str, Tensor]:
    """Everything but the registry; the merged weights."""
    fetch(spec, folder / "fetch")
    segment(spec, folder / "fetch", folder / "segment")
    search(spec, folder / "fetch", folder / "segment", folder / "search")
    merge(spec, folder / "fetch", folder / "search" / "recipe.json", folder / "merge")
    return load_file(folder / "merge" / "model.safetensors")


def test_a_run_on_adapters_is_the_run_on_what_they_stand_for(project: Path, tmp_path: Path) -> None:
    merged = run(spec_of(project), tmp_path / "adapters")
    expected = run(spec_of(project, "-full"), tmp_path / "full")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name
    found, other = (Recipe.read(tmp_path / each / "search" / "recipe.json") for each in ("adapters", "full"))
    assert found.blocks == other.blocks
    with open_checkpoint(project / "base") as base, open_checkpoint(project / "one", base) as adapter:
        assert [found.base and found.base.digest, found.sources[0].digest] == [base.digest(), adapter.digest()]

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "adapters" / "merge")
    assert (tmp_path / "adapters" / "merge" / "config.json").read_bytes() == (
        project / "base" / "config.json"
    ).read_bytes()
    # No full copy of a source was written.
    sizes = [path.stat().st_size for path in (tmp_path / "adapters" / "fetch" / "checkpoints" / "one").iterdir()]
    assert sum(sizes) < (project / "base" / "model.safetensors").stat().st_size


def test_the_specialist_is_base_and_adapter(project: Path, tmp_path: Path) -> None:
    results = {}
    for kind in ("", "-full"):
        folder = tmp_path / f"run{kind}"
        run(spec_of(project, kind), folder)
        evaluation = evaluate(
            spec_of(project, kind),
            folder / "fetch",
            folder / "segment",
            folder / "search",
            folder / "merge",
            folder / "evaluation",
        )
        results[kind] = {
            model.name: {task: result.metrics["perplexity"].value for task, result in model.tasks.items()}
            for model in evaluation.models
        }
    assert results[""] == results["-full"]
    assert results[""]["one"]["one"] != results[""]["base"]["one"]


def test_what_an_adapter_leaves_alone_is_in_memory_once(project: Path, tmp_path: Path) -> None:
    spec = spec_of(project)
    fetch(spec, tmp_path)
    loaded = Loaded.load(Inputs.open(spec, tmp_path), torch.device("cpu"))
    name = "model.embed_tokens.weight"
    assert loaded.tensors["one"][name] is loaded.tensors["base"][name] is loaded.tensors["two"][name]
    adapted = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(loaded.tensors["one"][adapted], loaded.tensors["base"][adapted])


def test_an_adapter_needs_a_base(project: Path, tmp_path: Path) -> None:
    alone = spec_of(project, base=None, search={"techniques": ["linear"], "objective": "soft_metric"})
    with pytest.raises(
        CheckpointError, match="source 'one' is a LoRA adapter, and the spec names no base; name the mod"
    ):
        fetch(alone, tmp_path)
    upside_down = spec_of(project, base={"uri": str(project / "one")})
    with pytest.raises(CheckpointError, match="the base is a LoRA adapter; name the model that it was trained on"):
        fetch(upside_down, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_an_adapter_of_another_model_is_refused_by_the_headers(project: Path, tmp_path: Path, s3_env: S3Server) -> None:
    from automerge.storage import upload

    write_adapter(tmp_path / "other", lora("model.layers.9.mlp.up_proj", 12, 8), lora_alpha=1)
    upload(tmp_path / "other", f"s3://{s3_env.bucket}/other")
    sources = [{"name": "one", "uri": str(project / "one")}, {"name": "two", "uri": f"s3://{s3_env.bucket}/other"}]
    with pytest.raises(
        CheckpointError, match=r"checkpoint 'two': adapts 1 tensors that its base does not hold: model\.la"
    ):
        fetch(spec_of(project, sources=sources), tmp_path / "fetch")
    assert not (tmp_path / "fetch" / "checkpoints").exists(), "nothing was downloaded"
    # An option that changes the meaning of the weights shows before the download, too.
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    upload(tmp_path / "other", f"s3://{s3_env.bucket}/other")
    with pytest.raises(CheckpointError, match="'pissa' changes the base before the training"):
        fetch(spec_of(project, sources=sources), tmp_path / "fetch")


def test_an_adapter_and_a_full_checkpoint(project: Path, tmp_path: Path) -> None:
    """As one pair; the adapter's files may be PyTorch's, and the base's too."""
    folder = tmp_path / "mixed"
    shutil.copytree(project / "one", folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    sources = [{"name": "one", "uri": str(folder)}, {"name": "two", "uri": str(project / "two-full")}]
    merged = run(spec_of(project, sources=sources), tmp_path / "run")
    expected = run(spec_of(project, "-full"), tmp_path / "full")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_another_base_than_the_recipes_is_noticed(project: Path, tmp_path: Path) -> None:
    """The digest of an adapter does not cover its base; the recipe's other digest does."""
    run(spec_of(project), tmp_path / "run")
    changed = tmp_path / "base"
    shutil.copytree(project / "base", changed)
    state = load_file(changed / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    spec = spec_of(project, base={"uri": str(changed)})
    fetch(spec, tmp_path / "fetch")
    with pytest.raises(MergeError, match=r"base: the checkpoint .* is not the one of the recipe"):
        merge(spec, tmp_path / "fetch", tmp_path / "run" / "search" / "recipe.json", tmp_path / "merge")
    assert not list((tmp_path / "merge").glob("*.safetensors"))


def test_heads_that_adapters_bring_along_are_private(project: Path, tmp_path: Path) -> None:
    """Two classifiers of different numbers of classes on one base without a head."""
    from transformers import AutoModelForSequenceClassification

    labels = {"one": 2, "two": 3}
    for seed, (name, count) in enumerate(labels.items()):
        torch.manual_seed(seed)
        parts = lora("model.layers.0.mlp.up_proj", 12, 8, seed=seed) | {"score.weight": torch.randn(count, WIDTH)}
        write_adapter(tmp_path / name, parts, modules_to_save=["score"], lora_alpha=1)
        ids = torch.arange(8).repeat(12, 1) + torch.arange(12)[:, None]
        data = {"inputs.input_ids": ids % TOKENS, "labels": torch.arange(12) % count}
        save_file(data, tmp_path / f"{name}.safetensors")
    shutil.copytree(project / "base", tmp_path / "base")
    state = {k: v for k, v in load_file(tmp_path / "base" / "model.safetensors").items() if k != "lm_head.weight"}
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    spec = spec_of(
        tmp_path,
        model={
            "kind": "transformers",
            "target": "AutoModelForSequenceClassification",
            "arguments": {"pad_token_id": 0},
        },
        sources=[
            {"name": name, "uri": str(tmp_path / name), "arguments": {"num_labels": count}}
            for name, count in labels.items()
        ],
        tasks=[
            {
                "name": name,
                "kind": "classification",
                "specialist": name,
                "validation": str(tmp_path / f"{name}.safetensors"),
                "test": str(tmp_path / f"{name}.safetensors"),
            }
            for name in labels
        ],
        private=["score.*"],
    )
    merged = run(spec, tmp_path / "run")
    assert "score.weight" not in merged
    for name, count in labels.items():
        assert load_file(tmp_path / "run" / "merge" / "heads" / f"{name}.safetensors")["score.weight"].shape[0] == count
    loaded = Loaded.load(Inputs.open(spec, tmp_path / "run" / "fetch"), torch.device("cpu"))
    module = loaded.heads(loaded.shared("two"), ["two"]).module("two")
    assert isinstance(module, type(AutoModelForSequenceClassification.from_config(module.config)))
    with open_checkpoint(tmp_path / "base") as base, open_checkpoint(tmp_path / "two", base) as adapter:
        assert torch.equal(module.state_dict()["score.weight"], adapter.read("score.weight"))

"""The whole flow for a transformers language model: folders with config.json in, a folder that loads again out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from automerge.preservation import Evaluation
from automerge.spec import parse_spec
from automerge.stages.run import RunResult, run

VOCABULARY, LENGTH = 32, 16


def counting(step: int, samples: int, seed: int) -> Tensor:
    """Sequences that count in steps modulo the vocabulary from a random start: int64 [samples, LENGTH]."""
    start = torch.randint(0, VOCABULARY, (samples, 1), generator=torch.Generator().manual_seed(seed))
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


def train(model: torch.nn.Module, data: Tensor, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=data, labels=data).loss.backward()
        optimiser.step()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has seen both ways of counting, and a specialist for each."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config)
    train(base, torch.cat([counting(1, 32, 1), counting(5, 32, 2)]), 30)
    base.save_pretrained(folder / "base")
    for name, step in (("ones", 1), ("fives", 5)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        train(model, counting(step, 64, step), 40)
        model.save_pretrained(folder / name)
        for split, seed in (("validation", 10), ("test", 20)):
            save_file({"inputs.input_ids": counting(step, 24, seed + step)}, folder / f"{name}-{split}.safetensors")
    return folder


@pytest.fixture(scope="module")
def result(project: Path) -> tuple[RunResult, Path]:
    spec = parse_spec(
        json.dumps(
            {
                "name": "counting",
                "model": {"kind": "transformers", "target": "AutoModelForCausalLM"},
                "base": {"uri": "base"},
                "sources": [{"name": name, "uri": name} for name in ("ones", "fives")],
                "tasks": [
                    {
                        "name": name,
                        "kind": "language_modelling",
                        "specialist": name,
                        "validation": f"{name}-validation.safetensors",
                        "test": f"{name}-test.safetensors",
                    }
                    for name in ("ones", "fives")
                ],
                "search": {
                    "trials": 10,
                    "initial": 4,
                    "techniques": ["task_arithmetic", "ties"],
                    "split": {"trials": 6},
                    "refine": {"steps": 20},
                },
                "evaluation": {"resamples": 100},
                "registry": {"uri": f"sqlite:///{project}/mlflow.db"},
            }
        ),
        folder=project,
    )
    return run(spec, project / "run"), project / "run"


def test_a_language_model_is_one_block_with_its_head_tied(result: tuple[RunResult, Path]) -> None:
    segmentation = json.loads((result[1] / "segment" / "segmentation.json").read_text())
    assert [block["kind"] for block in segmentation["blocks"]] == ["sequence"]
    assert segmentation["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_merged_folder_loads_and_gives_the_measured_accuracy(project: Path, result: tuple[RunResult, Path]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    outcome, folder = result
    model = AutoModelForCausalLM.from_pretrained(folder / "merge").eval()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), "still tied"
    assert "lm_head.weight" not in load_file(folder / "merge" / "model.safetensors"), "not written twice"
    evaluation = outcome.evaluation
    assert isinstance(evaluation, Evaluation)
    for name in ("ones", "fives"):
        data = load_file(project / f"{name}-test.safetensors")["inputs.input_ids"]
        with torch.inference_mode():
            predicted = model(input_ids=data).logits[:, :-1].argmax(-1)
        accuracy = (predicted == data[:, 1:]).float().mean().item()
        assert accuracy == pytest.approx(evaluation.merged.tasks[name].metrics["token_accuracy"].value, abs=1e-6)


def test_its_layers_are_merged_differently_and_refined(result: tuple[RunResult, Path]) -> None:
    trials = result[0].search.trials
    assert not [trial.error for trial in trials if trial.status == "failed"]
    assert [trial.phase for trial in trials] == ["search"] * 10 + ["split-1"] * 6 + ["refine"] * 2
    assert any("/model.layers.1/" in key for key in trials[12].config)
    for trial in trials[16:]:
        names = [name for block in trial.blocks or [] for name in block.parameters]
        assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names, "tied, and merged once"


def test_the_best_merge_is_at_least_as_good_as_any_warm_start(result: tuple[RunResult, Path]) -> None:
    outcome, _ = result
    objectives = {trial.origin: trial.objective or 0.0 for trial in outcome.search.trials}
    assert outcome.search.best.objective is not None
    assert outcome.search.best.objective >= max(objectives["average"], objectives["source:ones"])
    assert outcome.registration is not None and outcome.registration.created
    assert outcome.evaluation is not None and outcome.evaluation.onnx.status == "exported"

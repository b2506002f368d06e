"""One step of a search: from a recipe of which 2 of 14 blocks changed to a model that can be run.

Ours is `ResidentMerger.apply` into the live model. mergekit's `merge_state_dicts` and `load_state_dict`, which merge
the whole model for every recipe, are what a search around mergekit has to call; they run in a process of mergekit's
environment (``mergekit_step.py``). Both alternate, on the same weights: 49 M parameters in float32, base and 2 sources.

Run by ``make benchmark-merge``, or ``python -m benchmarks.merge.search_step --help``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from automerge.checkpoint.open import open_checkpoint
from automerge.merging.recipe import BASE, InputDigest, Recipe, RecipeBlock
from automerge.merging.resident import ResidentMerger
from automerge.merging.streamed import merge_checkpoints
from automerge.merging.technique import load_technique
from benchmarks.merge.__main__ import TECHNIQUES

CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 20000,
    "tie_word_embeddings": True,
}
SAMPLES, TOKENS = 256, 64
CHANGED = ("layer3", "layer8")

_RUNNER = Path(__file__).with_name("mergekit_step.py")


def blocks_of(names: list[str]) -> dict[str, list[str]]:
    """The embedding, the twelve layers, and the last norm."""
    blocks: dict[str, list[str]] = {"embedding": [], **{f"layer{index}": [] for index in range(12)}, "norm": []}
    for name in names:
        parts = name.split(".")
        block = f"layer{parts[2]}" if parts[1] == "layers" else "norm" if parts[1] == "norm" else "embedding"
        blocks[block].append(name)
    return blocks


def recipe_of(technique: str, blocks: dict[str, list[str]], step: int) -> Recipe:
    """A recipe in which the changed blocks have settings of their own at each step."""
    made = []
    for block, names in blocks.items():
        weight = 0.1 + 0.013 * (step % 60) if block in CHANGED else 0.4
        values = load_technique(technique).declaration.defaults()
        if "density" in values:
            values["density"] = 0.5 + 0.007 * (step % 70) if block in CHANGED else 0.5
        made.append(
            RecipeBlock(
                name=block,
                technique=technique,
                weights={"a": weight, "b": 0.9 - weight},
                hyperparameters=values,
                parameters=names,
            )
        )
    inputs = {name: InputDigest(name=name) for name in (BASE, "a", "b")}
    return Recipe(base=inputs.pop(BASE), sources=list(inputs.values()), blocks=made, tied={"lm_head.weight": EMBEDDING})


EMBEDDING = "model.embed_tokens.weight"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge.search_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="steps of mergekit's; ours are ten times as many")
    parser.add_argument("--technique", choices=TECHNIQUES, nargs="+", default=list(TECHNIQUES))
    parser.add_argument("--python", type=Path, default=Path(".venv-mergekit/bin/python"), help="with mergekit 0.1.5")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        sys.exit(f"error: {arguments.python} is not there; `make benchmark-merge` installs it")
    console = Console()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = _weights(Path(folder))
        command = [str(arguments.python), str(_RUNNER), json.dumps(CONFIG), *map(str, files.values())]
        theirs = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
        live = dict(model.named_parameters())
        count = sum(parameter.numel() for parameter in live.values())
        states = {name: load_file(file) for name, file in files.items()}
        blocks = blocks_of(sorted(states[BASE]))
        changed = sum(states[BASE][name].numel() for block in CHANGED for name in blocks[block])
        console.print(
            f"{count / 1e6:.0f} M parameters, {len(blocks)} blocks, {len(CHANGED)} of them change "
            f"({changed / 1e6:.1f} M); {torch.get_num_threads()} threads"
        )
        merger = ResidentMerger(states[BASE], {"a": states["a"], "b": states["b"]}, "cpu")
        forward = _forward(model)
        table = Table(title=f"medians of {arguments.rounds} rounds", title_justify="left")
        for column in ("technique", "AutoMerge ms", "mergekit ms", "ratio", "of a forward pass", "same bytes"):
            table.add_column(column, justify="right" if column != "technique" else "left")
        for technique in arguments.technique:
            mine, other = [], []
            for step in range(arguments.rounds):
                mine += [_ours(merger, recipe_of(technique, blocks, 10 * step + part), live) for part in range(10)]
                weight = 0.1 + 0.013 * (step % 60)
                other.append(_theirs(theirs, technique, {"a": weight, "b": 0.9 - weight}, 0.5 + 0.007 * (step % 70)))
            same = _equals_streamed(recipe_of(technique, blocks, 10 * arguments.rounds - 1), files, live)
            ours, slow = statistics.median(mine), statistics.median(other)
            table.add_row(
                technique,
                f"{1e3 * ours:.1f}",
                f"{1e3 * slow:.0f}",
                f"[bold]{slow / ours:.0f}x[/bold]",
                f"{100 * ours / forward:.2f} %",
                "yes" if same else "[bold red]no[/bold red]",
            )
        theirs.stdin.close()  # type: ignore[union-attr]
    console.print(table)
    console.print(f"one forward pass over {SAMPLES} samples of {TOKENS} tokens: {forward:.2f} s")


def _weights(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    files = {}
    for name in (BASE, "a", "b"):
        change = 0.0 if name == BASE else 0.001
        state = {each: tensor + change * torch.randn_like(tensor) for each, tensor in base.items()}
        files[name] = folder / f"{name}.safetensors"
        save_file(state, files[name])
    return files


def _ours(merger: ResidentMerger, recipe: Recipe, live: dict[str, torch.nn.Parameter]) -> float:
    begin = time.perf_counter()
    merger.apply(recipe, live)
    return time.perf_counter() - begin


def _theirs(process: "subprocess.Popen[str]", technique: str, weights: dict[str, float], density: float) -> float:
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    process.stdin.write(json.dumps([technique, weights, density]) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _forward(model: LlamaForCausalLM) -> float:
    tokens = torch.randint(0, CONFIG["vocab_size"], (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            begin = time.perf_counter()
            model(input_ids=tokens)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _equals_streamed(recipe: Recipe, files: dict[str, Path], live: dict[str, torch.nn.Parameter]) -> bool:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        opened = {name: stack.enter_context(open_checkpoint(file)) for name, file in files.items()}
        base = opened.pop(BASE)
        (file,) = merge_checkpoints(recipe, base, opened, Path(folder), max_shard_bytes=1 << 40)
        return all(torch.equal(tensor, live[name]) for name, tensor in load_file(file).items())


if __name__ == "__main__":
    main()

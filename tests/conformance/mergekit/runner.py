"""Merges with mergekit. Runs under the interpreter of mergekit's own environment: ``python runner.py <folder>``.

Each line of the standard input is a `Job` (see comparison.py) as JSON, and is answered with a line when it is done. The
folder holds ``<fixture>.safetensors`` with the tensors of every model as ``<model>/<tensor>``. For each job
``<name>.merged.safetensors`` is written, every merged tensor under its name; the answer is empty. The answer to a job
that mergekit refuses is what it says.

A job with ``bits`` replaces torch.bernoulli: an element is kept where its 16 random bits, from
``<bits>.safetensors`` (int32, ``<source>/<tensor>``), lie below the probability that mergekit computed, in 65536ths.
These probabilities are written as well, as ``probabilities/<source>/<tensor>``.
"""

import json
import sys
from pathlib import Path

import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file


def merge(folder: Path, job: dict) -> None:
    stored = load_file(folder / f"{job['fixture']}.safetensors")
    names = [key.partition("/")[2] for key in stored if key.startswith(f"{job['models'][0]}/")]
    models = {model: {name: stored[f"{model}/{name}"] for name in names} for model in job["models"]}
    probabilities: dict[str, torch.Tensor] = {}
    bernoulli = torch.bernoulli
    if job["bits"]:
        bits = load_file(folder / f"{job['bits']}.safetensors")
        # mergekit goes through the tensors in their order, and through the sources of each.
        calls = iter([f"{model}/{name}" for name in names for model in models if model != job["base"]])

        def keep(probability: torch.Tensor) -> torch.Tensor:
            call = next(calls)
            probabilities[f"probabilities/{call}"] = probability.clone()
            threshold = torch.floor(probability.double() * 65536 + 0.5)
            return (bits[call].view(probability.shape) < threshold).to(probability.dtype)

        torch.bernoulli = keep
    torch.manual_seed(job["seed"])
    try:
        merged = merge_state_dicts(
            models,
            job["method"],
            base=job["base"],
            parameters=job["parameters"],
            dtype=getattr(torch, job["dtype"]) if job["dtype"] else None,
        )
    finally:
        torch.bernoulli = bernoulli
    written = {name: tensor.contiguous().clone() for name, tensor in merged.items()}
    save_file(written | probabilities, folder / f"{job['name']}.merged.safetensors")


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for line in sys.stdin:
        answer = ""
        try:
            merge(Path(sys.argv[1]), json.loads(line))
        except (ValueError, RuntimeError, IndexError) as error:
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, flush=True)


main()

"""Peak memory of one trial and of one refinement step: the account from shapes alone, and what the system measures.

Run by ``python -m benchmarks.search_memory``; it takes some minutes and 4 GB of memory. First a 7 B model on a device
of 24 GB, by the account alone; then a model of 135 M parameters on this machine's CPU, by the account and measured in
processes of their own (resident memory at the peak of the step, from ``/proc``), once with the C library's allocator as
it is, and once with one that gives back every larger block (``MALLOC_MMAP_THRESHOLD_``), so that nothing is kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from automerge.searching.memory import MemoryAccount, account_refinement, account_trial
from automerge.searching.objective import Name
from benchmarks.search_memory.setups import make

DEVICE_BYTES = 24 * 2**30
CONTEXT_BYTES = 2**30
"""Of the device's memory this much is taken for its context, the libraries' workspaces and fragmentation."""

TOLERANCE = 0.15
OBJECTIVE: Name = "soft_metric"

# step, technique, tasks, samples of a batch, tokens, recomputed
Case = tuple[str, str, int, int, int, bool]

LARGE: tuple[Case, ...] = (
    ("trial", "ties", 2, 1, 512, False),
    ("trial", "ties", 2, 8, 512, False),
    ("refinement", "task_arithmetic", 1, 1, 256, False),
    ("refinement", "task_arithmetic", 1, 1, 512, False),
    ("refinement", "task_arithmetic", 1, 1, 1024, False),
    ("refinement", "task_arithmetic", 2, 1, 512, False),
    ("refinement", "task_arithmetic", 1, 1, 512, True),
    ("refinement", "task_arithmetic", 2, 1, 512, True),
    ("refinement", "task_arithmetic", 1, 1, 2048, True),
    ("refinement", "ties", 1, 1, 512, False),
    ("refinement", "ties", 1, 1, 512, True),
)
SMALL: tuple[Case, ...] = (
    ("trial", "task_arithmetic", 1, 1, 256, False),
    ("trial", "task_arithmetic", 1, 4, 256, False),
    ("refinement", "task_arithmetic", 1, 1, 256, False),
    ("refinement", "task_arithmetic", 2, 1, 256, False),
    ("refinement", "task_arithmetic", 1, 1, 256, True),
    ("refinement", "ties", 1, 1, 256, False),
)


def account(model: str, case: Case, device: str, inputs_on_device: bool) -> MemoryAccount:
    """The account of one case."""
    step, technique, tasks, batch, tokens, recompute = case
    with tempfile.TemporaryDirectory() as folder:
        setup = make(model, Path(folder), tasks=tasks, batch=batch, tokens=tokens)
    common = (setup.recipe(technique), setup.architecture, setup.modules, setup.tasks)
    if step == "trial":
        return account_trial(*common, device=device, inputs_on_device=inputs_on_device, soft=True)
    return account_refinement(*common, OBJECTIVE, device=device, inputs_on_device=inputs_on_device, recompute=recompute)


def measure(model: str, case: Case, rounds: int, *, keeps: bool) -> tuple[float, float]:
    """Bytes of the pass alone and with weights and inputs: the largest of some rounds, in a process of their own."""
    step, technique, tasks, batch, tokens, recompute = case
    wanted: dict[str, Any] = {
        "model": model,
        "step": step,
        "technique": technique,
        "tasks": tasks,
        "batch": batch,
        "tokens": tokens,
        "recompute": recompute,
        "objective": OBJECTIVE,
        "threads": 1,
        "rounds": rounds,
    }
    environment = {**os.environ, **({} if keeps else {"MALLOC_MMAP_THRESHOLD_": "65536"})}
    command = [sys.executable, "-m", "benchmarks.search_memory.measured", json.dumps(wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    worst = max(found["steps"], key=lambda each: int(each["peak"]))
    return max(each["peak"] - each["before"] for each in found["steps"]), worst["peak"] - found["nothing"]


def _columns(case: Case) -> list[str]:
    step, technique, tasks, batch, tokens, recompute = case
    return [step, technique, f"{tasks} x {batch} x {tokens}", "yes" if recompute else "no"]


def large(console: Console) -> None:
    """The account of a 7 B model on a device of 24 GB; base and sources in host memory."""
    room = DEVICE_BYTES - CONTEXT_BYTES
    table = Table(
        title=f"Llama-2-7B, bfloat16, base and 2 sources in host memory: GB (1e9 bytes) on a device with "
        f"{DEVICE_BYTES / 1e9:.1f}, of which {CONTEXT_BYTES / 1e9:.1f} are kept back",
        title_justify="left",
    )
    names = ("step", "technique", "tasks x samples x tokens", "recomputed", *_PARTS[:1], *_PARTS[2:], "peak", "fits")
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    for case in LARGE:
        found = account("Llama-2-7B", case, "cuda", inputs_on_device=False)
        parts = (found.weights, found.activations, found.gradients, found.workspace, found.peak)
        fits = "yes" if found.shortage("", room) is None else "no"
        table.add_row(*_columns(case), *(f"{each / 1e9:.2f}" for each in parts), fits)
    console.print(table)


_PARTS = ("weights", "inputs", "activations", "gradients", "workspace")


def small(console: Console, rounds: int) -> None:
    """The account of a 135 M model on the CPU beside what is measured."""
    table = Table(
        title="SmolLM2-135M, float32, base and 2 sources in the same memory: MB (1e6 bytes), account / measured",
        title_justify="left",
    )
    names = (
        "step",
        "technique",
        "tasks x samples x tokens",
        "recomputed",
        "allocator",
        "the pass alone",
        "",
        "peak",
        "",
    )
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    off: dict[str, list[float]] = {"the pass alone": [], "peak": []}
    for case in SMALL:
        found = account("SmolLM2-135M", case, "cpu", inputs_on_device=True)
        for keeps in (True, False):
            passing, total = measure("SmolLM2-135M", case, rounds, keeps=keeps)
            said = found.passing if keeps else found.allocated
            pairs = {"the pass alone": (said, passing), "peak": (said + found.weights + found.inputs, total)}
            cells = []
            for what, (mine, theirs) in pairs.items():
                off[what].append(mine / theirs - 1)
                cells += [f"{mine / 1e6:.0f} / {theirs / 1e6:.0f}", f"{100 * off[what][-1]:+.1f} %"]
            table.add_row(*_columns(case), "keeps" if keeps else "gives back", *cells)
    console.print(table)
    for what, figures in off.items():
        worst = max(figures, key=abs)
        verdict = "within" if abs(worst) <= TOLERANCE else "not within"
        console.print(f"{what}: at most {100 * worst:+.1f} % off what is measured, {verdict} {100 * TOLERANCE:.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="measured steps of each case; the largest counts")
    parser.add_argument("--only", choices=["large", "small"], help="one of the two tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    if arguments.only != "small":
        large(console)
    if arguments.only != "large":
        small(console, arguments.rounds)


if __name__ == "__main__":
    main()

"""A process of its own that really runs a trial or a refinement step, and prints what the system gave it for that.

``python -m benchmarks.search_memory.measured '{"model": "SmolLM2-135M", "step": "trial", ...}'`` prints one line of
JSON, in bytes: resident memory before anything was loaded, and for each round before the step and at its peak.
"""

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from automerge.merging.resident import ResidentMerger
from automerge.models.heads import Heads
from automerge.searching.evaluator import RecipeEvaluator
from automerge.searching.memory import recomputed
from automerge.searching.objective import Measure, Objective, TaskReference
from automerge.searching.refinement import WeightGradients
from benchmarks.search_memory.setups import SOURCES, make, random_state

_PROCESS = Path("/proc/self")


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its largest value since the last reset) of this process, bytes."""
    lines = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def settle() -> int:
    """Give back to the system what is free, start the largest value anew, and return resident memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5")
    return resident("VmRSS")


def loaded(folder: Path, wanted: dict[str, Any]) -> tuple[Callable[[], object], RecipeEvaluator]:
    """A model, a base and two sources with random weights, and the step that is to be measured."""
    setup = make(wanted["model"], folder, tasks=wanted["tasks"], batch=wanted["batch"], tokens=wanted["tokens"])
    recipe = setup.recipe(wanted["technique"])
    module = next(iter(setup.modules.values()))
    base, *sources = (dict(random_state(module, seed)) for seed in range(1 + len(SOURCES)))
    heads = Heads(
        lambda reference: setup.architecture.build(reference, {}),
        {reference: {} for reference in setup.modules},
        base,
        torch.device("cpu"),
    )
    merger = ResidentMerger(base, dict(zip(SOURCES, sources, strict=True)), "cpu")
    evaluator = RecipeEvaluator(recipe, merger, heads, setup.architecture, setup.tasks, torch.device("cpu"))
    if wanted["step"] == "trial":
        return lambda: evaluator(recipe.blocks), evaluator
    references = {
        name: TaskReference(
            specialist=Measure(loss=1.0, soft=0.5),
            nothing=2.0,
            stand_ins={metric.name: metric.stand_in for metric in task.task.metrics},
        )
        for name, task in setup.tasks.items()
    }
    objective = Objective(name=wanted["objective"], tasks=references)
    gradients = WeightGradients(evaluator, objective)
    rows = {name: range(len(task.data)) for name, task in setup.tasks.items()}
    return lambda: gradients(recipe.blocks, rows), evaluator


def main() -> None:
    wanted = json.loads(sys.argv[1])
    torch.set_num_threads(wanted["threads"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # The code of all libraries is in memory before anything is measured.
        loaded(folder, {**wanted, "model": "tiny", "tokens": 16})[0]()
        nothing = settle()
        step, evaluator = loaded(folder, wanted)
        figures: dict[str, Any] = {"nothing": nothing, "steps": []}
        with ExitStack() as stack:
            if wanted["recompute"]:
                stack.enter_context(recomputed(evaluator.heads.module(SOURCES[0])))
            for _ in range(wanted["rounds"]):
                evaluator.merger.forget()
                before = settle()
                step()
                figures["steps"].append({"before": before, "peak": resident("VmHWM")})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

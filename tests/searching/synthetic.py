"""A search space over three synthetic blocks, and a synthetic landscape on it: searches take seconds."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from automerge.merging.recipe import RecipeBlock
from automerge.merging.technique import usable_techniques
from automerge.searching.evaluator import Outcome
from automerge.searching.fidelity import Race
from automerge.searching.objective import Measure, Objective, TaskReference
from automerge.searching.space import SearchSpace
from automerge.segmenting.segmentation import Block
from automerge.spec import SearchSpec
from automerge.tasks.task import Ratio, Scores

TECHNIQUES = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


def make_block(name: str, parameters: Sequence[str] = ("w",), buffers: Sequence[str] = ()) -> Block:
    return Block(
        name=name,
        kind="vector",
        transition="input",
        shape_in=[1, 2],
        shape_out=[1, 2],
        parameters=[f"{name}.{parameter}" for parameter in parameters],
        buffers=[f"{name}.{buffer}" for buffer in buffers],
        parameter_count=4 * len(parameters),
        share=1.0,
    )


def simplex(**values: object) -> SearchSpec:
    """A search by Bayesian optimisation alone, in the space of the paper, with warm starts."""
    changes = {"weights": "simplex", "weight_range": [0, 1], "split": None, "refine": None, "objective": "loss_ratio"}
    return SearchSpec.model_validate({**changes, **values})


def losses_objective(references: Mapping[str, float] | None = None, aggregate: str = "harmonic") -> Objective:
    """The loss ratio, against specialists with these losses."""
    tasks = {
        task: TaskReference(specialist=Measure(loss=loss))
        for task, loss in (references or {"low": 0.1, "high": 0.1}).items()
    }
    return Objective.model_validate({"name": "loss_ratio", "aggregate": aggregate, "tasks": tasks})


def evaluator(
    losses: Callable[[Sequence[RecipeBlock]], Mapping[str, float]], samples: int = 1
) -> Callable[[Sequence[RecipeBlock], Race | None], Outcome]:
    """Evaluates by a function of losses; every sample of a task has the same."""

    def evaluate(blocks: Sequence[RecipeBlock], race: Race | None) -> Outcome:
        scores = {
            task: Scores(Ratio(np.full(samples, loss), np.ones(samples)), {}) for task, loss in losses(blocks).items()
        }
        return Outcome(scores, samples * len(scores))

    return evaluate


def make_space(spec: SearchSpec, sources: Sequence[str] = ("low", "high"), blocks: int = 3) -> SearchSpace:
    techniques, _ = usable_techniques(spec.techniques, sources=len(sources), has_base=True)
    return SearchSpace([make_block(f"b{index}") for index in range(blocks)], list(sources), techniques, spec)


def landscape(blocks: Sequence[RecipeBlock]) -> Mapping[str, float]:
    """Two losses that pull the blocks' weights in different directions; ties with a high density is best."""
    low, high = 0.1, 0.1
    for index, block in enumerate(blocks):
        weight = block.weights["low"]
        target = (0.2, 0.5, 0.8)[index % 3]
        penalty = {"ties": 0.0, "linear": 0.05}.get(block.technique, 0.1)
        penalty += 0.1 * (1 - float(block.hyperparameters.get("density", 1.0)))
        low += (weight - target) ** 2 + penalty
        high += 0.5 * (weight - target) ** 2 + penalty
    return {"low": low, "high": high}

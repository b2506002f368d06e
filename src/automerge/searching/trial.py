"""Trials: one evaluated recipe each."""

from typing import Any, Literal

from pydantic import Field

from automerge.documents import Model
from automerge.merging.recipe import RecipeBlock

Status = Literal["ok", "cached", "stopped", "failed"]


class Trial(Model):
    """One evaluated point of the search space, or recipe of the refinement."""

    number: int = Field(description="From 0, in the order of asking.")
    phase: str = Field(default="search", description="'search', 'split-1' and so on, or 'refine'.")
    origin: str = Field(
        description="'average', 'source:<name>', 'base', 'recipe:<n>', 'parent:<n>', 'sobol', 'surrogate', 'random', "
        "or 'refined:<trial>'."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="The point, by hyperparameter of the phase's space."
    )
    blocks: list[RecipeBlock] | None = Field(
        default=None, description="The recipe's blocks, where no point gives them."
    )
    status: Status = Field(description="stopped: measured in part, since it could not become the best.")
    cost: float = Field(description="What the optimiser was told: 1 / objective, or a failed trial's penalty.")
    objective: float | None = Field(default=None, description="The aggregate of CP; null if the trial failed.")
    losses: dict[str, float] = Field(default_factory=dict, description="Mean validation loss by task.")
    cp: dict[str, float] = Field(default_factory=dict, description="Capability preservation by task.")
    rates: dict[str, float] = Field(
        default_factory=dict, description="Preservation rate on validation data by task, percent."
    )
    samples: int = Field(default=0, description="Forward passes of single samples that it took.")
    fidelity: float = Field(default=1.0, description="The share of the validation data that it was measured on.")
    tuned: int = Field(default=0, description="Scalars of the recipe that a refinement tuned; 0 in other phases.")
    seconds: float = Field(description="Wall time of merging and evaluating.")
    optimiser_seconds: float = Field(description="Wall time the optimiser took to propose the point.")
    error: str | None = Field(default=None, description="Why the trial failed.")

    @property
    def is_candidate(self) -> bool:
        """Whether it was measured on all validation data, so that it can be the best."""
        return self.status in ("ok", "cached")

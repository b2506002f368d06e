"""How a technique describes itself as one elementwise pass, so that compiled kernels can do it for whole checkpoints.

The description says the same as the technique's function in torch, which stays the reference: the kernels give its
bytes. Per source the task vector (or the source itself) is sparsified and multiplied by its weight; then they are
summed, over all sources or over those that agree with the elected sign (`automerge.merging.consensus`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KeepLargest:
    """`automerge.merging.sparsify.trim`, or `trim_outliers` with a gamma."""

    density: float
    gamma: float = 0.0

    def ranks(self, count: int) -> tuple[int, int] | None:
        """Of ``count`` magnitudes the first so many are above the lower cut, and the second so many are outliers.

        None: all are kept.
        """
        kept = max(1, int(self.density * count))
        if kept >= count:
            return None
        outliers = min(int(self.gamma * count), count - kept)
        return outliers + kept, outliers


@dataclass(frozen=True)
class KeepRandom:
    """`automerge.merging.sparsify.drop`, rescaled by the density."""

    density: float


@dataclass(frozen=True)
class Fused:
    """An elementwise merge.

    Attributes:
        combine: `weighted_sum`, or `sum_of_agreeing` without or with ``normalize``.
        task_vectors: merge the task vectors, and add the base to the result; else the sources themselves.
        keep: how each task vector is sparsified; None: it is not.
        divisor: the sum is divided by it.
        scale: the sum is multiplied by it.
    """

    combine: Literal["sum", "agreeing", "agreeing_normalised"] = "sum"
    task_vectors: bool = True
    keep: KeepLargest | KeepRandom | None = None
    divisor: float = 1.0
    scale: float = 1.0

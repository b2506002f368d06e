"""The acquisition function: SMAC's log expected improvement, without what its call of scipy costs beside the numbers.

Costs are log-transformed, and so lognormal to a surrogate whose predictions are normal (Hutter, Hoos, Leyton-Brown and
Murphy, An experimental investigation of model-based parameter optimisation, GECCO 2009).
"""

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from smac.acquisition.function import EI

Array = npt.NDArray[np.float64]


class LogExpectedImprovement(EI):  # type: ignore[misc]
    """By how much a point's cost is expected to fall below the best one, to the same bit as SMAC's ``EI(log=True)``.

    It is 0 where the surrogate is certain. SMAC's raises an error where rounding leaves a value below 0; here it is 0.
    """

    def __init__(self) -> None:
        super().__init__(log=True)

    def _compute(self, X: Array) -> Array:  # noqa: N803 - SMAC's name
        """The values [n, 1] of encoded points [n, hyperparameters]."""
        mean, variance = self._model.predict_marginalized(X)
        deviation = np.sqrt(variance)
        certain = deviation == 0.0
        deviation[certain] = 1.0
        distance = (self._eta - mean) / deviation
        values = np.exp(self._eta) * ndtr(distance) - np.exp(0.5 * variance + mean) * ndtr(distance - deviation)
        values[certain] = 0.0
        improvement: Array = np.maximum(values, 0.0).reshape(-1, 1)
        return improvement

"""Intervals for error counts, on scipy, and calibration."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest


class CalibrationBin(NamedTuple):
    """Predictions whose probability lies in (low, high]: how many, their mean probability, the share that is right.

    confidence and accuracy are None where there are none.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def wilson_interval(wrong: int, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of wrong out of n: (low, high) in [0, 1].

    It says how well n images pin down this model's error; it says nothing about another seed.
    """
    interval = binomtest(wrong, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def expected_calibration_error(
    probability: npt.NDArray[np.floating], correct: npt.NDArray[np.bool_], bins: int = 15
) -> tuple[list[CalibrationBin], float]:
    """Reliability bins of equal width, and the expected calibration error, in [0, 1] (Guo et al. 2017, equation 3).

    probability: (n,) of the predicted class. correct: (n,) whether it is the true one. The error is the mean of
    |accuracy - confidence| over the bins, weighted by their counts.
    """
    found = []
    place = np.clip(np.ceil(probability.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    for i in range(bins):
        inside = place == i
        n = int(inside.sum())
        confidence = float(probability[inside].mean(dtype=np.float64)) if n else None
        accuracy = float(correct[inside].mean()) if n else None
        found.append(CalibrationBin(i / bins, (i + 1) / bins, n, confidence, accuracy))
    gaps = (b.n * abs(b.accuracy - b.confidence) for b in found if b.accuracy is not None and b.confidence is not None)
    return found, sum(gaps) / len(probability)

"""Intervals and tests for error counts and for seeds, and calibration. Tests are two-sided, intervals at 95 %.

From one run: how well its images pin down the error of one model (`wilson_interval`), and whether two models differ on
the same images (`mcnemar`). The other functions take one value per seed, in any unit, and give no interval where the
seeds have no spread (`no_interval_reason`).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats loads at its first use, which takes a second

_LEVEL = 0.95
_ROUNDING = 1e-12  # relative: a smaller spread is that of floating point


class MeanInterval(NamedTuple):
    """A mean over seeds and where the mean over very many of them may lie."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of a minus mean of b. p: of no difference."""

    mean: float
    low: float
    high: float
    p: float


class ErrorReduction(NamedTuple):
    """100 (1 - mean of a / mean of b), in percent; low and high are None for the given reason."""

    percent: float | None
    low: float | None
    high: float | None
    reason: str | None


class McNemar(NamedTuple):
    """Numbers of images that only one of two models has wrong. p: of equal chances for the two counts."""

    only_a_wrong: int
    only_b_wrong: int
    p: float


class ReliabilityBin(NamedTuple):
    """Predictions with a probability in (low, high]. confidence: mean probability; both means are None without any."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


class Calibration(NamedTuple):
    """Reliability bins and the expected calibration error that follows from them, in [0, 1]."""

    ece: float
    bins: tuple[ReliabilityBin, ...]


# ---------------------------------------------------------------------------------------------------------- one run


def wilson_interval(wrong: int, n: int) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of wrong out of n: (low, high) in [0, 1].

    It tells how well n images pin down this model's error, and nothing about another seed.
    """
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    centre = (wrong + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(wrong * (n - wrong) / n + z**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(wrong_a: npt.ArrayLike, wrong_b: npt.ArrayLike) -> McNemar:
    """The exact test of McNemar (1947) on the wrong images of two models: two arrays (n,) of bool, same images.

    Only images that exactly one model has wrong count. p is that of a binomial with equal chances, and 1 without such
    images. It tells nothing about other seeds.
    """
    a, b = np.asarray(wrong_a, dtype=bool), np.asarray(wrong_b, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p)


def expected_calibration_error(probability: npt.ArrayLike, correct: npt.ArrayLike, bins: int = 15) -> Calibration:
    """The calibration of predictions with these probabilities, (n,) in [0, 1]. correct: (n,), bool.

    Guo et al. (2017), equation 3: over bins of equal width, the mean of |accuracy - confidence|, weighted by n.
    """
    confidence, right = np.asarray(probability, dtype=np.float64), np.asarray(correct, dtype=bool)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.searchsorted(edges[1:-1], confidence, side="left")  # an edge belongs to the bin below it
    found = []
    for i in range(bins):
        inside = bin_of == i
        n = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if n else (None, None)
        found.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), n, *means))
    gaps = (b.n * abs(b.accuracy - b.confidence) for b in found if b.accuracy is not None and b.confidence is not None)
    return Calibration(math.fsum(gaps) / len(confidence), tuple(found))


# ---------------------------------------------------------------------------------------------------- several seeds


def no_interval_reason(n: int, same: str = "error") -> str:
    """The reason why n seeds gave no interval. same: name of the value without spread."""
    if n < 2:
        return "one seed: how much another seed would differ is not known"
    return f"the {same} was the same at every seed: how much another one would differ cannot be told from them"


def student_interval(values: Sequence[float]) -> MeanInterval | None:
    """The interval of Student (1908) for the mean over seeds; None for less than two, or without spread."""
    if not _has_spread(values):
        return None
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(_LEVEL)
    return MeanInterval(fmean(values), float(low), float(high))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """Student's paired t test of two settings on the same seeds; None for less than two pairs, or without spread."""
    return _difference(a, b, scipy.stats.ttest_rel(a, b)) if _spread_in_pairs(a, b) else None


def independent_difference(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """Welch's t test (1947) of two settings on different seeds; None for less than two of each, or without spread."""
    if min(len(a), len(b)) < 2 or not (_has_spread(a) or _has_spread(b)):
        return None
    return _difference(a, b, scipy.stats.ttest_ind(a, b, equal_var=False))


def error_reduction(a: Sequence[float], b: Sequence[float], *, paired: bool = True) -> ErrorReduction:
    """How much less error a has than b, in percent of b, with the interval of Fieller (1954) for a ratio of means.

    a, b: errors by seed; paired: on the same seeds, in the same order. The interval contains each ratio R for which a
    t test does not tell a - R b from 0. Without pairs the degrees of freedom are Satterthwaite's, at the ratio of the
    means (Tamhane and Logan 2004).
    """
    mean_a, mean_b = fmean(a), fmean(b)
    if mean_b <= 0:
        return ErrorReduction(None, None, None, "there is no error that could be reduced")
    ratio = mean_a / mean_b
    percent = 100 * (1 - ratio)
    n = min(len(a), len(b))
    if n < 2:
        return ErrorReduction(percent, None, None, no_interval_reason(n))
    if paired and not _spread_in_pairs(a, b):
        return ErrorReduction(percent, None, None, no_interval_reason(n, "difference"))
    # (co)variances of the two means, and of mean_a - ratio mean_b
    if paired:
        (aa, ab), (_, bb) = np.cov(a, b) / n
        freedom = n - 1.0
        spread = aa - 2 * ratio * ab + ratio**2 * bb
    else:
        aa, ab, bb = np.var(a, ddof=1) / len(a), 0.0, np.var(b, ddof=1) / len(b)
        spread = aa + ratio**2 * bb
        parts = aa**2 / (len(a) - 1) + (ratio**2 * bb) ** 2 / (len(b) - 1)
        freedom = float(spread**2 / parts) if parts > 0 else math.nan
    if not spread > (_ROUNDING * mean_a) ** 2:
        return ErrorReduction(percent, None, None, no_interval_reason(n, "reduction"))
    t2 = scipy.stats.t.ppf((1 + _LEVEL) / 2, freedom) ** 2
    # (mean_a - R mean_b)^2 <= t^2 (aa - 2 R ab + R^2 bb), as a quadratic in R: q2 R^2 - 2 q1 R + q0 <= 0
    q2, q1, q0 = mean_b**2 - t2 * bb, mean_a * mean_b - t2 * ab, mean_a**2 - t2 * aa
    if q2 <= 0:
        reason = "unbounded: over so few seeds the error to be reduced cannot be told from 0"
        return ErrorReduction(percent, None, None, reason)
    root = math.sqrt(max(0.0, q1**2 - q2 * q0))
    return ErrorReduction(percent, 100 * (1 - (q1 + root) / q2), 100 * (1 - (q1 - root) / q2), None)


class Correlation(NamedTuple):
    """Kendall's rank correlation, its p-value and its 95 % interval; None where they are not defined."""

    tau: float | None
    p_value: float | None
    ci95: tuple[float, float] | None


_FEWEST_FOR_BOOTSTRAP = 10


def kendall(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Correlation:
    """Kendall's tau-b of pairs, its p-value, and the percentile interval of 1,000 bootstrap samples (Efron 1979).

    The p-value is exact for few pairs without ties. Tau is not defined for fewer than three pairs, or where all values
    of a or of b are equal; the interval not for fewer than ten pairs, of which samples are too much alike.
    """
    if len(a) < 3 or not (_has_spread(a) and _has_spread(b)):
        return Correlation(None, None, None)
    found = scipy.stats.kendalltau(a, b)
    tau, p_value = float(found.statistic), float(found.pvalue)
    if len(a) < _FEWEST_FOR_BOOTSTRAP:
        return Correlation(tau, p_value, None)
    resampled = np.random.default_rng(seed).integers(0, len(a), (1000, len(a)))
    pairs = np.array([a, b], dtype=np.float64)
    samples = [pairs[:, rows] for rows in resampled if all(map(_has_spread, pairs[:, rows]))]
    taus = [float(scipy.stats.kendalltau(x, y).statistic) for x, y in samples]
    low, high = np.quantile(taus, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Correlation(tau, p_value, (float(low), float(high)))


def _spread_in_pairs(a: Sequence[float], b: Sequence[float]) -> bool:
    return _has_spread(np.subtract(a, b), scale=max(np.abs(a).max(initial=0), np.abs(b).max(initial=0)))


def _has_spread(values: npt.ArrayLike, scale: float | None = None) -> bool:
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return False
    return bool(np.ptp(found) > _ROUNDING * (np.abs(found).max() if scale is None else scale))


def _difference(a: Sequence[float], b: Sequence[float], test: Any) -> Difference:
    low, high = test.confidence_interval(_LEVEL)
    return Difference(fmean(a) - fmean(b), float(low), float(high), float(test.pvalue))

"""Intervals for error counts, on scipy."""

from scipy.stats import binomtest


def wilson_interval(wrong: int, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of wrong out of n: (low, high) in [0, 1].

    It says how well n images pin down this model's error; it says nothing about another seed.
    """
    interval = binomtest(wrong, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)

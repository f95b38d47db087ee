"""Intervals."""

import math

import pytest

from samtune.stats import wilson_interval


@pytest.mark.parametrize(("wrong", "n"), [(0, 120), (7, 120), (60, 120), (120, 120), (1, 1)])
def test_wilson_interval_is_the_formula(wrong, n):
    z, p = 1.959963984540054, wrong / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(wrong, n) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)

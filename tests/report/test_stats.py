"""Intervals and tests: published examples, the definitions by other ways, and how often the truth is within."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from samtune.report import stats

# Student (1908): hours of sleep that ten patients gained by two drugs; intervals and p as R's t.test documents them.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

# ---------------------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize(("wrong", "n"), [(0, 120), (7, 120), (60, 120), (120, 120), (1, 1)])
def test_wilson_interval_is_the_formula(wrong, n):
    z, p = 1.959963984540054, wrong / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert stats.wilson_interval(wrong, n) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)


@pytest.mark.parametrize(
    ("wrong", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_interval_is_that_of_newcombes_table(wrong, n, interval):
    assert stats.wilson_interval(wrong, n) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("n", [120, 1020])
def test_wilson_interval_holds_the_error_95_times_of_100(n):
    """By the exact probabilities of all counts, over errors from 2 to 50 %."""
    wrong = np.arange(n + 1)
    low, high = np.transpose([stats.wilson_interval(int(k), n) for k in wrong])
    coverage = [
        binom.pmf(wrong, n, error)[(low <= error) & (error <= high)].sum() for error in np.linspace(0.02, 0.5, 97)
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.005)
    assert min(coverage) > 0.91


def test_mcnemars_test_counts_what_one_model_alone_has_wrong():
    a = [True] * 5 + [False] * 2 + [True] * 4 + [False] * 9
    b = [True] * 5 + [True] * 2 + [False] * 4 + [False] * 9
    found = stats.mcnemar(a, b)
    assert (found.only_a_wrong, found.only_b_wrong) == (4, 2)
    assert stats.mcnemar(b, a) == (2, 4, found.p)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (0, 6), (1, 8), (3, 3), (2, 9), (6, 5)])
def test_mcnemars_p_is_the_share_of_coin_tosses_that_are_as_uneven(only_a, only_b):
    tosses = itertools.product((0, 1), repeat=only_a + only_b)
    uneven = [abs(2 * sum(toss) - len(toss)) >= abs(only_a - only_b) for toss in tosses]
    a = [True] * only_a + [False] * only_b + [True]
    b = [False] * only_a + [True] * only_b + [True]
    assert stats.mcnemar(a, b).p == pytest.approx(sum(uneven) / len(uneven), abs=1e-12)


def test_models_that_have_the_same_images_wrong_do_not_differ():
    assert stats.mcnemar([True, False, True], [True, False, True]) == (0, 0, 1.0)


def test_calibration_is_equation_3_by_hand():
    probability, correct = [0.1, 0.5, 0.52, 0.9, 1.0], [False, True, False, True, True]
    found = stats.expected_calibration_error(probability, correct, bins=2)
    assert [(b.low, b.high, b.n) for b in found.bins] == [(0, 0.5, 2), (0.5, 1, 3)]
    assert found.bins[0][3:] == pytest.approx((0.3, 0.5))
    assert found.bins[1][3:] == pytest.approx((2.42 / 3, 2 / 3))
    assert found.ece == pytest.approx((2 * 0.2 + abs(2 - 2.42)) / 5)


def test_calibration_is_the_same_counted_image_by_image():
    rng = np.random.default_rng(0)
    probability = rng.random(2000).astype(np.float32)
    correct = rng.random(2000) < probability**2
    counted = {}
    for p, right in zip(probability.tolist(), correct.tolist(), strict=True):
        counted.setdefault(math.ceil(p * 15), []).append((p, right))
    ece = sum(abs(sum(right for _, right in seen) - sum(p for p, _ in seen)) for seen in counted.values()) / 2000
    found = stats.expected_calibration_error(probability, correct)
    assert found.ece == pytest.approx(ece, abs=1e-9)
    assert [b.n for b in found.bins] == [len(counted[i]) for i in range(1, 16)]


def test_every_prediction_is_in_a_bin_and_an_empty_bin_says_nothing():
    found = stats.expected_calibration_error([0.0, 1 / 15, 1.0], [False, False, True])
    assert [b.n for b in found.bins] == [2, *[0] * 13, 1]
    assert found.bins[5][2:] == (0, None, None)
    assert found.ece == pytest.approx(1 / 45)


# ---------------------------------------------------------------------------------------------------- several seeds


def test_student_interval_is_the_formula_with_the_tables_quantile():
    half = 4.302653 / 3**0.5
    assert stats.student_interval([6.0, 7.0, 8.0]) == pytest.approx((7, 7 - half, 7 + half))


def test_paired_difference_is_that_of_students_patients():
    expected = (1.58, 0.7001142, 2.4598858, 0.002832890)
    assert stats.paired_difference(SLEEP_2, SLEEP_1) == pytest.approx(expected, abs=1e-7)


def test_independent_difference_is_welchs_for_the_same_numbers():
    expected = (1.58, -0.2054832, 3.3654832, 0.07939414)
    assert stats.independent_difference(SLEEP_2, SLEEP_1) == pytest.approx(expected, abs=1e-7)


def test_what_all_seeds_have_in_common_does_not_count_in_pairs():
    shifts = np.array([0.0, 30.0, -20.0, 5.0])
    a, b = np.array([5.0, 5.5, 4.7, 5.2]), np.array([6.0, 6.1, 6.3, 5.9])
    plain, shifted = stats.paired_difference(a, b), stats.paired_difference(a + shifts, b + shifts)
    assert shifted == pytest.approx(plain)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([5.0], [6.0], "one seed"),
        ([5.0, 5.0, 5.0], [6.0, 6.0, 6.0], "was the same at every seed"),
        ([0.1 + 0.2, 0.3], [0.4, 0.1 + 0.3], "was the same at every seed"),  # but for rounding
    ],
)
def test_one_seed_or_seeds_without_spread_give_no_interval_and_no_p(a, b, said):
    assert stats.student_interval(a) is None
    assert stats.paired_difference(a, b) is None
    assert stats.independent_difference(a, b) is None
    for paired in (True, False):
        reduction = stats.error_reduction(a, b, paired=paired)
        assert reduction[:3] == (pytest.approx(100 * (1 - a[0] / b[0])), None, None)
        assert said in reduction.reason
    assert said in stats.no_interval_reason(len(a))


def test_a_difference_that_is_the_same_at_every_seed_gives_no_interval_of_a_reduction_either():
    a, b = [5.0, 6.0, 5.5], [6.0, 7.0, 6.5]
    assert stats.paired_difference(a, b) is None
    found = stats.error_reduction(a, b)
    assert found[:3] == (pytest.approx(100 / 6.5), None, None)
    assert found.reason == stats.no_interval_reason(3, "difference")
    assert stats.error_reduction([0.0, 0.0], [5.0, 6.0]).reason == stats.no_interval_reason(2, "reduction")


@pytest.mark.parametrize("paired", [True, False])
def test_the_limits_of_a_reduction_are_the_ratios_that_a_t_test_just_does_not_refuse(paired):
    a, b = np.array([6.9, 6.7, 6.8, 7.0, 6.6]), np.array([8.2, 8.0, 8.25, 8.1, 8.2])
    found = stats.error_reduction(a, b, paired=paired)
    assert found.percent == pytest.approx(100 * (1 - 6.8 / 8.15))
    assert found.low < found.percent < found.high
    for limit in (found.low, found.high):
        ratio = 1 - limit / 100
        if paired:
            assert ttest_1samp(a - ratio * b, 0).pvalue == pytest.approx(0.05, abs=1e-9)
        else:  # Welch's statistic; the degrees of freedom are those at the ratio of the means
            at = 6.8 / 8.15
            va, vb = a.var(ddof=1) / 5, b.var(ddof=1) / 5
            freedom = (va + at**2 * vb) ** 2 / (va**2 / 4 + (at**2 * vb) ** 2 / 4)
            t = (a.mean() - ratio * b.mean()) / math.sqrt(va + ratio**2 * vb)
            assert abs(t) == pytest.approx(quantile_of_t(freedom), abs=1e-6)


def quantile_of_t(freedom):
    """The 97.5 % point of Student's distribution, by integrating its density and halving an interval."""
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    x = np.linspace(0, 20, 400_001)
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    share = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])])
    return np.interp(0.975, share, x)


def test_a_baseline_that_is_known_gives_students_interval_over_it():
    a = [4.0, 5.0, 6.0]
    found, mean = stats.error_reduction(a, [8.0, 8.0, 8.0]), stats.student_interval(a)
    assert found[:3] == pytest.approx((37.5, 100 * (1 - mean.high / 8), 100 * (1 - mean.low / 8)))


def test_where_the_baseline_may_be_0_the_reduction_is_unbounded_and_says_so():
    found = stats.error_reduction([1.0, 2.0], [0.5, 3.5])
    assert found[:3] == (25.0, None, None)
    assert "unbounded" in found.reason


def test_without_errors_of_the_baseline_there_is_nothing_to_reduce():
    assert stats.error_reduction([0.0, 1.0], [0.0, 0.0])[:3] == (None, None, None)
    assert stats.error_reduction([0.0, 0.0], [1.0, 2.0])[:3] == (100.0, None, None)


TRIALS = 2000
MONTE_CARLO = 4 * math.sqrt(0.95 * 0.05 / TRIALS)  # four standard errors of a share of 95 %


@pytest.mark.parametrize("n", [2, 5])
def test_student_and_paired_intervals_hold_the_truth_95_times_of_100(n):
    rng = np.random.default_rng(n)
    held = np.zeros(2)
    for _ in range(TRIALS):
        common = rng.normal(0, 0.5, n)
        a, b = 6.8 + common + rng.normal(0, 0.1, n), 8.1 + common + rng.normal(0, 0.3, n)
        mean, difference = stats.student_interval(a), stats.paired_difference(a, b)
        held += [mean.low <= 6.8 <= mean.high, difference.low <= -1.3 <= difference.high]
    assert held / TRIALS == pytest.approx([0.95, 0.95], abs=MONTE_CARLO)


@pytest.mark.parametrize("paired", [True, False])
def test_fiellers_interval_holds_the_true_reduction_95_times_of_100(paired):
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(TRIALS):
        common = rng.normal(0, 0.5, 5) if paired else 0
        a, b = 6.8 + common + rng.normal(0, 0.4, 5), 8.1 + common + rng.normal(0, 0.3, 5)
        found = stats.error_reduction(a, b, paired=paired)
        held += found.low <= 100 * (1 - 6.8 / 8.1) <= found.high
    assert held / TRIALS == pytest.approx(0.95, abs=MONTE_CARLO)


def test_p_is_below_5_percent_5_times_of_100_where_nothing_differs():
    rng = np.random.default_rng(3)
    found = [stats.paired_difference(*rng.normal(6.8, 0.3, (2, 5))).p < 0.05 for _ in range(TRIALS)]
    assert np.mean(found) == pytest.approx(0.05, abs=MONTE_CARLO)

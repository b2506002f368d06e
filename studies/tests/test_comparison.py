"""The arithmetic of claims, against values worked out by hand and against scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from automerge.errors import SpecError
from studies.comparison import (
    RANDOM_ASSIGNMENTS,
    Interval,
    bca_interval,
    claims_table,
    compare,
    corrected_t_test,
    correlations_table,
    holm,
    permutation,
    rank_correlation,
    seeds_table,
    summarise,
    t_interval,
    t_test,
    ways_table,
    wilcoxon,
)
from studies.results import Row

NOTHING = [0.0] * 8


def row(seed, way, mean, worst, pd, **others):
    return Row(pair="digits", seed=seed, way=way, mean_pr=mean, worst_pr=worst, pd=pd, **others)


def normal(count, seed=0, mean=0.0):
    return (np.random.default_rng(seed).normal(size=count) + mean).tolist()


# Summaries


def test_mean_deviation_and_t_interval():
    """Of 1..5: s = sqrt(2.5), and t(4) at 97.5 % is 2.7764."""
    found = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.count, found.mean) == (5, 3.0)
    assert found.deviation == pytest.approx(math.sqrt(2.5))
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (found.interval.low, found.interval.high) == pytest.approx((3 - half, 3 + half))
    assert found.interval.method == "t"
    # t(4) at 95 %: 2.1318.
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.9).high == pytest.approx(3 + 2.1318468 * math.sqrt(0.5))


def test_one_seed_has_no_interval():
    found = summarise([7.0])
    assert (found.count, found.mean, found.deviation, found.interval) == (1, 7.0, None, None)


@pytest.mark.parametrize("method", ["t", "bca"])
def test_equal_values_are_their_own_interval(method):
    found = summarise([96.0] * 8, method=method)
    assert (found.deviation, found.interval.low, found.interval.high) == (0.0, 96.0, 96.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf]])
def test_no_summary_of_what_is_no_number(values):
    with pytest.raises(ValueError, match="finite"):
        summarise(values)


def test_bca_of_a_skewed_sample_reaches_further_on_its_long_side():
    skewed = np.exp(np.random.default_rng(1).normal(size=40)).tolist()
    found, mean = bca_interval(skewed), float(np.mean(skewed))
    assert found.low < mean < found.high
    assert found.high - mean > 1.1 * (mean - found.low)
    assert found == bca_interval(skewed)
    assert found != bca_interval(skewed, seed=1)
    # Of values that are not skewed it is close to Student's.
    plain = normal(60)
    assert bca_interval(plain).high == pytest.approx(t_interval(plain).high, abs=0.03)
    assert bca_interval(plain).low == pytest.approx(t_interval(plain).low, abs=0.03)


def test_a_higher_confidence_is_a_wider_interval():
    values = normal(12)
    for method in (t_interval, bca_interval):
        assert method(values, 0.99).low < method(values, 0.9).low < method(values, 0.9).high < method(values, 0.99).high


# Paired tests


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # All of 8 positive: only this and its mirror image are as extreme.
        ([1, 2, 3, 4, 5, 6, 7, 8], 2 / 256),
        # The smallest negative: rank sums 0 and 1, and their mirror images.
        ([-1, 2, 3, 4, 5, 6, 7, 8], 4 / 256),
        # The third smallest: sums 0, 1, 2, 3 (twice: 3 and 1+2).
        ([1, 2, -3, 4, 5, 6, 7, 8], 10 / 256),
        # All tie, one of five negative: at most one negative has 1 + 5 of 32 assignments, and as many at the other end.
        ([1, 1, 1, 1, -1], 12 / 32),
        # Zeros say nothing: three positive ones are left.
        ([0, 1, 2, 0, 3, 0], 2 / 8),
        ([0, 0, 0], 1.0),
    ],
)
def test_wilcoxon_by_hand(differences, p):
    found = wilcoxon(differences, [0] * len(differences))
    assert found.value == pytest.approx(p)
    assert found.method == "exact"


def test_wilcoxon_sees_ties_through_rounding_errors():
    """0.1 + 0.2 is not 0.3 in binary, but the difference of two rates is one sample's worth all the same."""
    first, second = [0.1 + 0.2, 0.3, 0.6, 0.9, 0.1], [0.0, 0.0, 0.3, 0.6, 0.4]
    assert len({abs(one - other) for one, other in zip(first, second, strict=True)}) > 1
    assert wilcoxon(first, second).value == pytest.approx(12 / 32)


def test_wilcoxon_of_many_seeds():
    first, second = normal(30, 1, 0.4), normal(30, 2)
    found = wilcoxon(first, second)
    assert (found.method, found.value) == ("exact", pytest.approx(stats.wilcoxon(first, second, method="exact").pvalue))
    coarse = [round(4 * value) / 4 for value in first]
    found = wilcoxon(coarse, [0.0] * 30)
    assert found.method == "normal approximation"
    assert found.value == pytest.approx(
        stats.wilcoxon([each for each in coarse if each], correction=True, method="asymptotic").pvalue
    )


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # Of 8 assignments only this one reaches the mean.
        ([1, 2, 3], 2 / 8),
        # Sums of 4 or more: + + - and + + +.
        ([2, 3, -1], 4 / 8),
        # Of equal sizes: sums of 3 or more have five plus, or four.
        ([1, 1, 1, 1, -1], 12 / 32),
        ([1, -1], 1.0),
        ([0, 0, 0], 1.0),
    ],
)
def test_permutation_by_hand(differences, p):
    found = permutation(differences, [0] * len(differences))
    assert (found.value, found.method) == (pytest.approx(p), "exact")


def test_permutation_of_many_seeds_draws():
    first, second = normal(20, 1, 0.6), normal(20, 2)
    found = permutation(first, second)
    assert found.method == "99,999 random assignments"
    assert found == permutation(first, second)
    assert found.value != permutation(first, second, seed=1).value
    # By the normal approximation, which is near for 20.
    differences = np.subtract(first, second)
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert found.value == pytest.approx(2 * stats.norm.sf(z), abs=0.01)
    assert permutation([5.0 + at for at in range(20)], [0.0] * 20).value == pytest.approx(2 / (RANDOM_ASSIGNMENTS + 1))


def test_t_test_by_hand():
    """Of 1, 2, 3: t = 2 sqrt(3); with two degrees of freedom p = 1 - t / sqrt(2 + t^2)."""
    assert t_test([1, 2, 3], [0, 0, 0]).value == pytest.approx(1 - math.sqrt(12 / 14))
    first, second = normal(8, 1, 0.5), normal(8, 2)
    assert t_test(first, second).value == pytest.approx(stats.ttest_rel(first, second).pvalue)


def test_corrected_t_test_by_hand():
    """Test part 40 %: 1/3 + 40/60 = 1, so that t = 2."""
    assert corrected_t_test([1, 2, 3], [0, 0, 0], 40 / 60).value == pytest.approx(1 - 2 / math.sqrt(6))
    with pytest.raises(ValueError, match="ratio"):
        corrected_t_test([1, 2, 3], [0, 0, 0], 0)


def test_differences_without_variance_leave_t_tests_undefined():
    assert t_test([2, 2, 2], [1, 1, 1]).value is None
    assert corrected_t_test([2, 2, 2], [1, 1, 1], 0.5).value is None
    assert t_test([2, 2, 2], [2, 2, 2]).value == 1.0


def test_exact_tests_hold_their_level_and_the_t_test_on_correlated_seeds_does_not():
    """Without an effect p < 0.05 comes in at most 5 % of studies; with a shared error only the corrected test holds."""
    generator = np.random.default_rng(5)
    studies = 400
    exact = [permutation(generator.normal(size=8), NOTHING).value for _ in range(studies)]
    ranks = [wilcoxon(generator.normal(size=8), NOTHING).value for _ in range(studies)]
    # Two standard errors above 5 %.
    limit = 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
    assert np.mean(np.array(exact) < 0.05) <= limit
    assert np.mean(np.array(ranks) < 0.05) <= limit
    # Seeds correlated by n_test / (n_test + n_training) = 0.4, as the correction has it.
    correlated = [
        math.sqrt(0.4) * generator.normal() + math.sqrt(0.6) * generator.normal(size=8) for _ in range(studies)
    ]
    plain = np.array([t_test(each, NOTHING).value for each in correlated])
    corrected = np.array([corrected_t_test(each, NOTHING, 0.4 / 0.6).value for each in correlated])
    assert np.mean(plain < 0.05) > 0.2
    assert np.mean(corrected < 0.05) <= limit


@pytest.mark.parametrize("test", [wilcoxon, permutation, t_test])
def test_pairs_are_paired_and_the_order_of_ways_does_not_matter(test):
    first, second = normal(8, 1, 0.5), normal(8, 2)
    assert test(first, second).value == pytest.approx(test(second, first).value)
    with pytest.raises(ValueError, match="not pairs"):
        test(first, second[:7])
    with pytest.raises(ValueError, match="finite"):
        test([*first[:7], math.nan], second)


def test_a_comparison_of_two_ways():
    found = compare([97, 96, 95, 94], [95, 95, 95, 95])
    assert (found.better, found.equal, found.worse) == (2, 1, 1)
    assert (found.difference.count, found.difference.mean) == (4, 0.5)
    # Differences 2, 1, 0, -1: s = sqrt(5 / 3).
    assert found.effect == pytest.approx(0.5 / math.sqrt(5 / 3))
    assert found.corrected is None
    assert found.t_test.value == pytest.approx(stats.ttest_1samp([2, 1, 0, -1], 0).pvalue)
    assert found.wilcoxon.value == pytest.approx(wilcoxon([2, 1, -1], [0, 0, 0]).value)


def test_of_a_discrepancy_less_is_better():
    found = compare([1.0, 2.0, 5.0], [4.0, 4.0, 4.0], higher_is_better=False, test_to_training=2 / 3)
    assert (found.better, found.equal, found.worse) == (2, 0, 1)
    assert found.difference.mean == pytest.approx(-4 / 3)
    assert found.corrected.value > found.t_test.value
    assert compare([5.0, 5.0], [4.0, 4.0]).effect is None


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 and never less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, math.nan])


# Rank correlation


def test_rank_correlation_by_hand():
    """Ranks 1..10, four pairs of neighbours exchanged: 1 - 6 * 8 / (10 * 99)."""
    found = rank_correlation(range(10, 110, 10), [2, 1, 4, 3, 5, 7, 6, 9, 8, 10])
    assert (found.count, found.rho) == (10, pytest.approx(1 - 48 / 990))
    assert found.interval.low < found.rho < found.interval.high
    tied = [1, 2, 2, 3, 3, 3, 0, 5, 6, 7], [5, 4, 4.5, 4.5, 1, 0, 2, 8, 8, 9]
    assert rank_correlation(*tied).rho == pytest.approx(stats.spearmanr(*tied).statistic)


def test_the_interval_of_a_rank_correlation():
    """Near the one by Fisher's transformation, with the variance of Bonett and Wright (2000)."""
    first = normal(60, 3)
    second = [value + 0.4 * other for value, other in zip(first, normal(60, 4), strict=True)]
    found = rank_correlation(first, second)
    assert found.interval.low < found.rho < found.interval.high
    half = 1.96 * math.sqrt((1 + found.rho**2 / 2) / 57)
    assert found.interval.low == pytest.approx(math.tanh(math.atanh(found.rho) - half), abs=0.05)
    assert found.interval.high == pytest.approx(math.tanh(math.atanh(found.rho) + half), abs=0.03)
    assert found == rank_correlation(first, second)
    # A monotone function of either changes nothing.
    assert found == rank_correlation(np.exp(first).tolist(), second)


@pytest.mark.filterwarnings("ignore:The BCa")
def test_perfect_order_and_no_order():
    found = rank_correlation(range(10), range(0, -10, -1))
    assert (found.rho, found.interval.low, found.interval.high) == (-1.0, -1.0, -1.0)
    with pytest.raises(ValueError, match="no order"):
        rank_correlation(range(10), [1] * 10)
    # Most resamples do not hold the one that differs.
    with pytest.raises(ValueError, match="no order"):
        rank_correlation(range(10), [1] * 9 + [2])
    with pytest.raises(ValueError, match="at least 10"):
        rank_correlation([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="not pairs"):
        rank_correlation(range(10), range(11))


# Tables


ROWS = [
    row(0, "best", 96, 95, 2, seconds=10, samples=60_000),
    row(1, "best", 98, 97, 1, seconds=20, samples=61_000),
    row(0, "paper", 90, 85, 10, seconds=100),
    row(1, "paper", 93, 88, 8, seconds=101, samples=64_600),
]


def test_a_table_by_seed():
    assert seeds_table(ROWS, "digits", ["best", "paper"]).splitlines() == [
        "| | seed 0 | seed 1 | mean |",
        "|---|---|---|---|",
        "| best | 96.0 / 95.0 / 2.0 | 98.0 / 97.0 / 1.0 | 97.0 / 96.0 / 1.5 |",
        "| paper | 90.0 / 85.0 / 10.0 | 93.0 / 88.0 / 8.0 | 91.5 / 86.5 / 9.0 |",
    ]


def test_a_table_of_ways():
    """t(1) at 97.5 % is 12.706; the half width of the interval is that times half the difference."""
    lines = ways_table(ROWS, "digits", ["best", "paper"], ["mean_pr"]).splitlines()
    assert lines[:4] == [
        "| | mean PR | seconds | samples |",
        "|---|---|---|---|",
        "| best | 97.0 ± 1.4 [84.3, 109.7] | 15.0 | 60,500 |",
        # Samples of one seed alone are no mean over the seeds.
        "| paper | 91.5 ± 2.1 [72.4, 110.6] | 100.5 | - |",
    ]
    assert "2 seeds (0, 1)" in lines[-1]
    assert "95 % interval of the mean by Student's t" in lines[-1]
    assert "normally distributed" in lines[-1]
    bootstrap = ways_table(ROWS, "digits", ["best"], method="bca", confidence=0.9).splitlines()[-1]
    assert "90 % interval of the mean by the BCa bootstrap" in bootstrap
    assert "normally" not in bootstrap
    assert ways_table(ROWS[:1], "digits", ["best"]).splitlines()[2:] == [
        "| best | 96.0 | 95.0 | 2.0 | 10.0 | 60,000 |",
        "",
        "Of seed 0 alone.",
    ]


@pytest.mark.parametrize("table", [seeds_table, ways_table])
def test_a_table_leaves_no_seed_out(table):
    with pytest.raises(SpecError, match="no row of 'paper' for seed 2"):
        table([*ROWS, row(2, "best", 90, 90, 0)], "digits", ["best", "paper"])
    with pytest.raises(SpecError, match="no row of 'fast'"):
        table(ROWS, "digits", ["best", "fast"])


def test_a_table_of_claims_names_its_tests_and_corrects_for_their_number():
    first, second = [float(at) for at in range(1, 9)], [-1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    claims = {"a, mean PR": compare(first, NOTHING), "b, mean PR": compare(second, NOTHING)}
    lines = claims_table(claims).splitlines()
    assert lines[0] == (
        "| claim | seeds | mean difference | better / equal / worse | d_z | p, Wilcoxon | p, permutation | p, t-test "
        "| p, Holm |"
    )
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:4] == ["a, mean PR", "8", "+4.5 ± 2.4 [+2.5, +6.5]", "8 / 0 / 0"]
    assert (cells[5], cells[-1]) == ("0.0078", "0.0156")
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert (cells[3], cells[5], cells[-1]) == ("7 / 0 / 1", "0.0156", "0.0156")
    note = " ".join(lines[4:])
    for said in (
        "Wilcoxon's signed-rank test (assumes",
        "paired permutation test",
        "paired t-test (assumes",
        "; exact.",
        "Of 8 seeds the smallest p that the Wilcoxon test can give is 0.0078.",
        "corrected for 2 claims",
        "95 % interval",
    ):
        assert said in note
    assert "Nadeau" not in note


def test_a_table_of_one_claim_needs_no_correction_and_may_have_another_primary_test():
    claims = {"a": compare([1, 2, 3], [0, 0, 0], test_to_training=2 / 3)}
    table = claims_table(claims, "corrected")
    assert "Holm" not in table
    assert "smallest p" not in table
    assert "| 0.2500 | 0.2500 | 0.0742 | 0.1835 |" in table
    assert "Nadeau and Bengio 2003" in table


def test_a_claim_without_its_primary_test_is_refused():
    with pytest.raises(ValueError, match="no claim has the test 'corrected'"):
        claims_table({"a": compare([1, 2, 3], [0, 0, 0])}, "corrected")
    with pytest.raises(ValueError, match="'t_test' is undefined"):
        claims_table({"a": compare([1, 1, 1], [0, 0, 0])}, "t_test")
    # As another test than the primary one it is left open.
    assert "| - |" in claims_table({"a": compare([1, 1, 1], [0, 0, 0])})
    with pytest.raises(ValueError, match="needs a claim"):
        claims_table({})


def test_a_table_of_correlations():
    found = rank_correlation(range(10), range(10))
    lines = correlations_table({"gap": found}).splitlines()
    assert lines[2] == "| gap | 10 | 1.000 | 1.000 to 1.000 (95 %) |"
    assert "BCa bootstrap" in lines[-1]
    assert found.interval == Interval(1.0, 1.0, 0.95, "BCa bootstrap")

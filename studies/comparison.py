"""What may be said of a study's rows over seeds: summaries, paired tests, rank correlations, and their tables.

`summarise`, `ways_table` and `seeds_table` say what each way reaches; `compare` and `claims_table` whether one way is
better than another on the same seeds. A table names each test and what it assumes in its footnote.

What no test here can do: the seeds of a pair share its data and its architecture, so a claim is about *this pair under
new splits and new training*, not about other pairs; and the splits of different seeds overlap, so the differences are
not wholly independent. `corrected_t_test` allows for that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from automerge.errors import SpecError
from studies.results import Row, values_of

Floats = npt.NDArray[np.float64]
Method = Literal["t", "bca"]

MOST_EXACT_PAIRS = 16
"""Up to so many pairs all 2^n assignments of signs are enumerated."""

RANDOM_ASSIGNMENTS = 99_999
"""Of signs, beyond that."""

DECIMALS = 9
"""Differences equal up to so many decimals are ties: figures are ratios, whose last bits mean nothing."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval, and how it was made."""

    low: float
    high: float
    confidence: float
    method: str


@dataclass(frozen=True)
class Summary:
    """A figure over seeds.

    Attributes:
        count: number of seeds.
        mean: over the seeds.
        deviation: standard deviation, with n - 1; None for one seed.
        interval: of the mean; None for one seed.
    """

    count: int
    mean: float
    deviation: float | None
    interval: Interval | None


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean: mean +- t(n - 1) s / sqrt(n).

    Assumes independent values from one normal distribution; of a few seeds that cannot be checked. Of equal values it
    is the value.

    Raises:
        ValueError: there are fewer than two values.
    """
    column = _column(values, least=2)
    half = float(stats.t.ppf((1 + confidence) / 2, len(column) - 1) * stats.sem(column))
    mean = float(column.mean())
    return Interval(mean - half, mean + half, confidence, "t")


def bca_interval(
    values: Sequence[float], confidence: float = 0.95, *, resamples: int = 9999, seed: int = 0
) -> Interval:
    """The bias-corrected and accelerated bootstrap interval of the mean (Efron 1987) by ``scipy.stats.bootstrap``.

    Assumes independent values from one distribution, of any form; of fewer than some 15 values it is too narrow, since
    a resample of few values varies less than new ones would. Of equal values it is the value.

    Raises:
        ValueError: there are fewer than two values.
    """
    column = _column(values, least=2)
    if np.ptp(column) == 0:
        return Interval(float(column[0]), float(column[0]), confidence, "BCa bootstrap")
    found = stats.bootstrap(
        (column,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high), confidence, "BCa bootstrap")


def summarise(values: Sequence[float], *, method: Method = "t", confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and an interval of the mean.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    column = _column(values, least=1)
    mean = float(column.mean())
    if len(column) == 1:
        return Summary(1, mean, None, None)
    interval = t_interval(values, confidence) if method == "t" else bca_interval(values, confidence)
    return Summary(len(column), mean, float(column.std(ddof=1)), interval)


# Two ways on the same seeds


@dataclass(frozen=True)
class PValue:
    """What a two-sided test of "there is no difference" says.

    Attributes:
        value: p; None where the test is undefined: all differences are equal and not 0, so there is no variance.
        method: how it was found, e.g. ``exact``.
    """

    value: float | None
    method: str


@dataclass(frozen=True)
class Comparison:
    """One way beside another on the same seeds.

    Attributes:
        difference: first minus second, by its sign as it is: of a figure of which less is better, below 0 is better.
        better, equal, worse: on how many seeds the first is.
        effect: Cohen's d of paired differences, d_z = mean / standard deviation; None without variance.
        wilcoxon, permutation, t_test: see the functions of these names.
        corrected: the corrected resampled t-test, if the share of test data was given.
    """

    difference: Summary
    better: int
    equal: int
    worse: int
    effect: float | None
    wilcoxon: PValue
    permutation: PValue
    t_test: PValue
    corrected: PValue | None


def compare(
    first: Sequence[float],
    second: Sequence[float],
    *,
    higher_is_better: bool = True,
    test_to_training: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two ways by a figure, seed by seed.

    Args:
        first, second: the figure by seed, in the same order of seeds.
        higher_is_better: whether more of it is.
        test_to_training: samples of a split's test part over those of all its other parts, for `corrected_t_test`.
        confidence: of the t interval of the mean difference.
        seed: of the permutation test's random assignments, where there are too many to enumerate.

    Raises:
        ValueError: the lengths differ, there are fewer than two seeds, or a value is not finite.
    """
    differences = _differences(first, second)
    sign = 1 if higher_is_better else -1
    deviation = float(differences.std(ddof=1))
    return Comparison(
        difference=summarise(differences.tolist(), confidence=confidence),
        better=int((sign * differences > 0).sum()),
        equal=int((differences == 0).sum()),
        worse=int((sign * differences < 0).sum()),
        effect=float(differences.mean()) / deviation if np.ptp(differences) > 0 else None,
        wilcoxon=wilcoxon(first, second),
        permutation=permutation(first, second, seed=seed),
        t_test=t_test(first, second),
        corrected=None if test_to_training is None else corrected_t_test(first, second, test_to_training),
    )


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> PValue:
    """Wilcoxon's signed-rank test of paired values (1945), two-sided, by ``scipy.stats.wilcoxon``.

    Assumes independent pairs whose differences are, if there is no effect, symmetric about 0; no normal distribution.
    Differences of 0 are left out. Exact: by the distribution of the rank sum, or where differences tie by all
    assignments of signs; only of more than 16 pairs with ties by the normal approximation.

    Raises:
        ValueError: see `compare`.
    """
    differences = _differences(first, second)
    differences = differences[differences != 0]
    count = len(differences)
    if not count:
        return PValue(1.0, "exact")
    if count <= 50 and len(np.unique(np.abs(differences))) == count:
        return PValue(float(stats.wilcoxon(differences, method="exact").pvalue), "exact")
    if count <= MOST_EXACT_PAIRS:
        every = stats.PermutationMethod(n_resamples=np.inf)
        return PValue(float(stats.wilcoxon(differences, method=every).pvalue), "exact")
    return PValue(
        float(stats.wilcoxon(differences, method="asymptotic", correction=True).pvalue), "normal approximation"
    )


def permutation(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PValue:
    """The paired permutation test of the mean difference (Fisher 1935), two-sided, by ``scipy.stats.permutation_test``.

    Assumes independent pairs and that, if there is no effect, the two ways are exchangeable within a pair: each
    difference could as well have the other sign. Exact up to 16 pairs: all 2^n assignments of signs.

    Raises:
        ValueError: see `compare`.
    """
    differences = _differences(first, second)
    exact = len(differences) <= MOST_EXACT_PAIRS
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else RANDOM_ASSIGNMENTS,
        rng=np.random.default_rng(seed),
    )
    return PValue(float(found.pvalue), "exact" if exact else f"{RANDOM_ASSIGNMENTS:,} random assignments")


def t_test(first: Sequence[float], second: Sequence[float]) -> PValue:
    """Student's paired t-test (1908), two-sided, as ``scipy.stats.ttest_rel``.

    Assumes independent pairs with normally distributed differences; of a few seeds that cannot be checked.

    Raises:
        ValueError: see `compare`.
    """
    return _t_test(first, second, 0.0, "Student")


def corrected_t_test(first: Sequence[float], second: Sequence[float], test_to_training: float) -> PValue:
    """The corrected resampled t-test, two-sided (Nadeau and Bengio 2003, "Inference for the Generalization Error").

    Every seed splits the same data, so that the seeds' differences are correlated and their variance is too small for
    the t-test. The correction puts 1/n + n_test/n_training for 1/n. Assumes normally distributed differences, and that
    they are correlated by n_test / (n_test + n_training), a rule of thumb that is mostly on the safe side.

    Args:
        first, second: see `compare`.
        test_to_training: samples of a split's test part over those of all its other parts.

    Raises:
        ValueError: see `compare`; or the ratio is not positive.
    """
    if not test_to_training > 0:
        raise ValueError(f"the ratio of test to training samples is {test_to_training}")
    return _t_test(first, second, test_to_training, "Nadeau and Bengio")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values that may be held against one level, however many claims are made.

    The chance of one false claim or more is at most the level, whatever the dependence between the tests.

    Raises:
        ValueError: one is not between 0 and 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie between 0 and 1: {list(p_values)}")
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = highest
    return corrected


# Rank correlation


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two figures over recipes, with its interval."""

    count: int
    rho: float
    interval: Interval


def rank_correlation(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation, with a BCa bootstrap interval over pairs by ``scipy.stats.bootstrap``.

    Ties have their mean rank. The interval assumes that the pairs (recipes) are independent draws from one population.

    Raises:
        ValueError: the lengths differ, there are fewer than ten pairs, a value is not finite, or so many are equal
            that there is no order.
    """
    one, other = _column(first, least=10), _column(second, least=10)
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} values are not pairs")
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        raise ValueError("a figure that is the same for all has no order")
    rho = float(_spearman(one, other))
    if abs(rho) > 1 - 1e-12:
        # Every resample has the same order: there is nothing to accelerate.
        return Correlation(len(one), rho, Interval(rho, rho, confidence, "BCa bootstrap"))
    found = stats.bootstrap(
        (one, other),
        _spearman,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    if not math.isfinite(found.low + found.high):
        raise ValueError("so many values are equal that resamples have no order")
    return Correlation(len(one), rho, Interval(float(found.low), float(found.high), confidence, "BCa bootstrap"))


# Tables


def seeds_table(rows: Sequence[Row], pair: str, ways: Sequence[str]) -> str:
    """Markdown: mean PR / worst-task PR / PD by way and seed, and the means over the seeds.

    Raises:
        SpecError: a way lacks a seed that another has.
    """
    seeds = _common_seeds(rows, pair, ways)
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |", "|---" * (len(seeds) + 2) + "|"]
    for way in ways:
        columns = [list(values_of(rows, pair, way, figure).values()) for figure in ("mean_pr", "worst_pr", "pd")]
        cells = [*zip(*columns, strict=True), [math.fsum(column) / len(column) for column in columns]]
        lines.append(f"| {way} | " + " | ".join(" / ".join(f"{each:.1f}" for each in cell) for cell in cells) + " |")
    return "\n".join(lines)


def ways_table(
    rows: Sequence[Row],
    pair: str,
    ways: Sequence[str],
    figures: Sequence[str] = ("mean_pr", "worst_pr", "pd"),
    *,
    method: Method = "t",
    confidence: float = 0.95,
) -> str:
    """Markdown: each figure's mean, standard deviation and interval by way, and mean seconds and samples.

    Raises:
        SpecError: a way lacks a seed that another has, or a row a figure.
    """
    seeds = _common_seeds(rows, pair, ways)
    heads = [*(_HEADS.get(figure, figure) for figure in figures), "seconds", "samples"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for way in ways:
        cells = [
            _summary_cell(summarise([*values.values()], method=method, confidence=confidence))
            for values in (values_of(rows, pair, way, figure) for figure in figures)
        ]
        own = [row for row in rows if row.pair == pair and row.way == way]
        cells += [_mean_cell([row.seconds for row in own], 1), _mean_cell([row.samples for row in own], 0)]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    if len(seeds) == 1:
        note = f"Of seed {seeds[0]} alone."
    else:
        name = "Student's t" if method == "t" else "the BCa bootstrap"
        assumes = "independent, normally distributed seeds" if method == "t" else "independent seeds"
        note = (
            f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}) and, in brackets, the "
            f"{100 * confidence:g} % interval of the mean by {name} (assumes {assumes})."
        )
    return "\n".join([*lines, "", note])


@dataclass(frozen=True)
class _Column:
    """A test's column in a table of claims.

    Attributes:
        test: the attribute of a `Comparison`.
        head: of the column.
        note: what the footnote says.
    """

    test: str
    head: str
    note: str


_TESTS = (
    _Column(
        "wilcoxon",
        "Wilcoxon",
        "Wilcoxon's signed-rank test (assumes independent seeds, and differences symmetric about 0 if there is no "
        "effect; differences of 0 are left out)",
    ),
    _Column(
        "permutation",
        "permutation",
        "the paired permutation test of the mean difference (assumes independent seeds, and the two ways exchangeable "
        "within a seed if there is no effect)",
    ),
    _Column("t_test", "t-test", "the paired t-test (assumes independent seeds and normal differences)"),
    _Column(
        "corrected",
        "corrected t",
        "the t-test corrected for seeds that split the same data (Nadeau and Bengio 2003; assumes normal differences)",
    ),
)


def claims_table(claims: Mapping[str, Comparison], primary: str = "wilcoxon") -> str:
    """Markdown: one comparison a line, with all tests; of several the primary test's p-values also after Holm.

    Args:
        claims: by what the line says, such as ``digits: best over paper, mean PR``. All claims that are made belong in
            one table, the ones that failed too: the correction counts them.
        primary: ``wilcoxon``, ``permutation``, ``t_test`` or ``corrected``, chosen before the data were seen.

    Raises:
        ValueError: there are no claims, or the primary test is undefined or missing for one.
    """
    if not claims:
        raise ValueError("a table needs a claim")
    tests = [test for test in _TESTS if any(getattr(each, test.test) is not None for each in claims.values())]
    named = next((test for test in tests if test.test == primary), None)
    if named is None:
        raise ValueError(f"no claim has the test {primary!r}")
    decisive = []
    for label, each in claims.items():
        found: PValue | None = getattr(each, primary)
        if found is None or found.value is None:
            raise ValueError(f"{label}: the primary test {primary!r} is undefined")
        decisive.append(found.value)
    corrected = holm(decisive) if len(claims) > 1 else []
    heads = [
        "claim",
        "seeds",
        "mean difference",
        "better / equal / worse",
        "d_z",
        *(f"p, {each.head}" for each in tests),
    ]
    heads += ["p, Holm"] if corrected else []
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for at, (label, each) in enumerate(claims.items()):
        cells = [
            label,
            str(each.difference.count),
            _summary_cell(each.difference, signed=True),
            f"{each.better} / {each.equal} / {each.worse}",
            "-" if each.effect is None else f"{each.effect:+.2f}",
            *(_p_cell(getattr(each, test.test)) for test in tests),
            *([f"{corrected[at]:.4f}"] if corrected else []),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_footnotes(claims, tests, named)])


def correlations_table(correlations: Mapping[str, Correlation]) -> str:
    """Markdown: rank correlations with their intervals, by label."""
    lines = ["| | recipes | Spearman's rho | interval |", "|---|---|---|---|"]
    for label, each in correlations.items():
        interval = f"{each.interval.low:.3f} to {each.interval.high:.3f} ({100 * each.interval.confidence:g} %)"
        lines.append(f"| {label} | {each.count} | {each.rho:.3f} | {interval} |")
    note = "Intervals by the BCa bootstrap over recipes (assumes that they are independent draws from one population)."
    return "\n".join([*lines, "", note])


_HEADS = {"mean_pr": "mean PR", "worst_pr": "worst PR", "pd": "PD"}


def _footnotes(claims: Mapping[str, Comparison], tests: Sequence[_Column], primary: _Column) -> list[str]:
    intervals = [each.difference.interval for each in claims.values()]
    levels = " or ".join(sorted({f"{100 * each.confidence:g} %" for each in intervals if each is not None}))
    notes = [
        f"Differences are first minus second: mean ± standard deviation and, in brackets, the {levels} interval of the "
        "mean by Student's t (assumes independent, normally distributed seeds); d_z is their mean over their "
        "standard deviation. All tests are two-sided."
    ]
    for test in tests:
        found = [getattr(each, test.test) for each in claims.values()]
        methods = sorted({each.method for each in found if each is not None} - {"Student", "Nadeau and Bengio"})
        notes.append(f"{test.head}: {test.note}{'; ' + ' or '.join(methods) if methods else ''}.")
    fewest = min(each.difference.count for each in claims.values())
    if primary.test in ("wilcoxon", "permutation"):
        notes.append(f"Of {fewest} seeds the smallest p that the {primary.head} test can give is {2 / 2**fewest:.2g}.")
    if len(claims) > 1:
        notes.append(
            f"Holm: p of the {primary.head} test, the one chosen to decide, corrected for {len(claims)} claims."
        )
    return notes


def _summary_cell(summary: Summary, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    mean = f"{summary.mean:{sign}.1f}"
    if summary.deviation is None or summary.interval is None:
        return mean
    low, high = summary.interval.low, summary.interval.high
    return f"{mean} ± {summary.deviation:.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _mean_cell(values: Sequence[float | None], decimals: int) -> str:
    found = [value for value in values if value is not None]
    return f"{math.fsum(found) / len(found):,.{decimals}f}" if len(found) == len(values) else "-"


def _p_cell(test: PValue | None) -> str:
    return "-" if test is None or test.value is None else f"{test.value:.4f}"


def _common_seeds(rows: Sequence[Row], pair: str, ways: Sequence[str]) -> list[int]:
    seeds = {way: list(values_of(rows, pair, way, "mean_pr")) for way in ways}
    everything = sorted({seed for own in seeds.values() for seed in own})
    for way, own in seeds.items():
        if missing := sorted({*everything} - {*own}):
            raise SpecError(f"{pair}: there is no row of {way!r} for seed {missing[0]}", "run this way on it too")
    return everything


def _column(values: Sequence[float], least: int) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if len(column) < least or not np.isfinite(column).all():
        raise ValueError(f"at least {least} finite values are needed, not {list(values)}")
    return column


def _differences(first: Sequence[float], second: Sequence[float]) -> Floats:
    one, other = _column(first, least=2), _column(second, least=2)
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} values are not pairs")
    return np.round(one - other, DECIMALS)


def _t_test(first: Sequence[float], second: Sequence[float], correlated: float, method: str) -> PValue:
    differences = _differences(first, second)
    count = len(differences)
    if np.ptp(differences) == 0:
        return PValue(1.0 if differences[0] == 0 else None, method)
    statistic = differences.mean() / math.sqrt((1 / count + correlated) * differences.var(ddof=1))
    return PValue(float(2 * stats.t.sf(abs(statistic), count - 1)), method)


def _spearman(first: Floats, second: Floats, axis: int = -1) -> Floats:
    """Pearson's correlation of the ranks along an axis."""
    one, other = (stats.rankdata(each, axis=axis) for each in (first, second))
    one, other = (each - each.mean(axis=axis, keepdims=True) for each in (one, other))
    scale = np.sqrt((one**2).sum(axis=axis) * (other**2).sum(axis=axis))
    with np.errstate(invalid="ignore"):  # a resample without an order has no correlation
        found: Floats = (one * other).sum(axis=axis) / scale
    return found

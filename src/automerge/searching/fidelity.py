"""Multi-fidelity: nested slices of the validation data, and a race of a trial against the best one so far.

A trial is measured slice by slice. After each slice its paired differences to the incumbent, sample by sample, tell
whether it can still become the best. If it cannot, it is stopped; if it can to the end, it is measured whole.

Slices
    A slice is a prefix of an order of the rows in which every prefix holds each label, or each part of the data, in
    its share (`stratified_order`). A race first takes some rows with certainty: those on which the incumbent does
    worst. There a trial may gain most, so a few rows not seen could make good what it loses elsewhere, which no test
    could know. (A certainty stratum: Cochran, "Sampling Techniques", 1977.) The other rows are drawn without
    replacement.

Test
    The null hypothesis: on all validation data the trial is no worse than the incumbent. The cost 1 / H is linearised
    in the columns' ratios of sums. It is linear in losses, and convex in the soft metric and in a single metric, so
    that a trial which is worse by the linear cost is worse. A ratio is linearised about the sums (delta method), with
    the known mean of the denominator. The error of a mean of n of N rows, drawn without replacement, is that of a
    Brownian motion at the time 1 / (1/n - 1/N), divided by this time; with several tasks the time is 1 / variance
    (both: independent increments, the canonical form of group sequential tests). So a one-sided normal mixture bounds
    it at all times: an asymptotic confidence sequence (Waudby-Smith et al., "Time-uniform central limit theory and
    asymptotic confidence sequences", Annals of Statistics 2024, https://arxiv.org/abs/2103.06476), tightest at the
    first slice.

    It is asymptotic, and slices are small. Three corrections vanish as they grow. The variance takes in `PRIOR` samples
    with the incumbent's own spread, known from all its rows. Negative skewness is corrected by Hall's monotone cubic
    (Hall, "On the removal of skewness by transformation", JRSS B 1992): it makes rare gains of the trial count. And
    Student's t becomes a normal value by Wallace's approximation (Annals of Mathematical Statistics 1959).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from automerge.merging.random import mask_key
from automerge.searching.objective import Measure, Objective
from automerge.tasks.task import Column, Ratio, Scores, TaskData

Rows = npt.NDArray[np.int64]

FEWEST = 16
"""Samples that the first slice has of each task, where there are so many, and that each step adds in all."""

CHUNK = 4
"""Consecutive rows that are shuffled among themselves, so that no pattern in the data can meet one of the order."""

CERTAIN = 4
"""One in so many rows of the first slice is one on which the incumbent does worst."""

PRIOR = 3.0
"""Samples that the incumbent's own spread counts as, where the spread of the differences is estimated."""

STEP = 1e-5
"""Relative step of numerical differentiation: exact for what is linear, to 1e-5 for the rest."""

LARGEST_IMPROVEMENT = 1e-3
"""A figure is never estimated below this part of the incumbent's: a loss stays positive."""


@dataclass(frozen=True, eq=False)
class Slices:
    """Nested slices of the validation data.

    Attributes:
        orders: by task, all rows in the order of measuring; int64 [n].
        ends: by task, how many rows are measured by the end of each step; rising to n.
    """

    orders: Mapping[str, Rows]
    ends: Mapping[str, tuple[int, ...]]


def make_slices(data: Mapping[str, TaskData], shares: Sequence[float], seed: int) -> Slices:
    """Order the rows of each task, and cut the orders.

    Every step brings at least one new row of each task, and at least `FEWEST` in all: steps that would not are left
    out, so that small data have fewer, at least one. A task's first slice has at least `FEWEST` rows, or almost all.

    Args:
        data: validation data by task.
        shares: of the data by the end of each step, rising to 1.
        seed: of the orders; they depend on it, the tasks' names and their labels alone.
    """
    return Slices(
        {name: stratified_order(each, mask_key(seed, "slices", name)) for name, each in data.items()},
        _ends({name: len(each) for name, each in data.items()}, shares),
    )


def stratified_order(data: TaskData, key: int) -> Rows:
    """A random order of the rows, of which every prefix is spread evenly: int64 [n].

    Over the labels, where ``targets`` has integers 'labels' of one dimension; otherwise over the data as they lie,
    since neighbours are often parts of one document. The rows are laid on a circle, by label, in random order within a
    label, and taken in van der Corput's order of positions (halves, then quarters, ...) from a random start: so each
    row is as likely as any other to be in a prefix. Neighbours on the circle are shuffled before.

    Args:
        data: the samples.
        key: of the random bits, 0 to 2^64 - 1. They are PCG64's raw output, the same in every version of numpy.
    """
    count = len(data)
    bits = np.random.PCG64(key).random_raw(2 * count + 1)
    labels = data.targets.get("labels")
    if labels is not None and labels.ndim == 1 and not (labels.is_floating_point() or labels.is_complex()):
        circle = np.lexsort((bits[:count], labels.cpu().numpy()))
    else:
        circle = np.arange(count)
    circle = circle[np.lexsort((bits[count:-1], np.arange(count) // CHUNK))]
    start = int(bits[-1] % np.uint64(count))
    return circle[(start + _van_der_corput(count)) % count].astype(np.int64)


@dataclass(frozen=True)
class _Effect:
    """What a trial adds to 1 / CP of one task, estimated on the samples seen so far.

    Attributes:
        value: the estimate.
        variance: of the estimate, as drawn without replacement.
        first: what the variance was at the end of the first step, by the same spread.
        unlimited: what it were with replacement.
        third: third central moment of the estimate, with replacement.
        freedom: degrees of freedom of the spread.
    """

    value: float
    variance: float
    first: float
    unlimited: float
    third: float
    freedom: int


@dataclass(frozen=True, eq=False)
class Race:
    """How one trial is measured slice by slice against the incumbent. It can be pickled.

    Scores that are passed to it are those of the rows of all steps up to one, in their order.

    Attributes:
        objective: what the cost is.
        confidence: with which a stopped trial is worse.
        orders: by task, all rows in the order of measuring; int64 [n].
        ends: by task, how many rows are measured by the end of each step.
        certain: by task, how many rows at the beginning of the order are not drawn, but chosen.
        measures: the incumbent's figures by task.
        columns: the incumbent's columns that decide, by task and figure; [n] in the order of measuring.
        slopes: of 1 / CP of the task in the column's ratio of sums, by task and figure.
        spreads: by task, the variance of what one drawn row of the incumbent adds to 1 / CP.
    """

    objective: Objective
    confidence: float
    orders: Mapping[str, Rows]
    ends: Mapping[str, tuple[int, ...]]
    certain: Mapping[str, int]
    measures: Mapping[str, Measure]
    columns: Mapping[str, Mapping[str, Ratio]]
    slopes: Mapping[str, Mapping[str, float]]
    spreads: Mapping[str, float]

    @property
    def steps(self) -> int:
        """In how many steps a trial is measured whole."""
        return len(next(iter(self.ends.values())))

    def rows(self, step: int) -> dict[str, list[int]]:
        """The rows by task that a step (from 0) adds; at least one of each task."""
        return {
            task: order[self.ends[task][step - 1] if step else 0 : self.ends[task][step]].tolist()
            for task, order in self.orders.items()
        }

    def share(self, step: int) -> float:
        """The share of all tasks' samples that is measured by the end of a step; 1 after the last."""
        return sum(ends[step] for ends in self.ends.values()) / sum(ends[-1] for ends in self.ends.values())

    def is_hopeless(self, scores: Mapping[str, Scores]) -> bool:
        """Whether the trial is worse than the incumbent, by a test that may be asked after every step.

        Worse means: by the harmonic mean; if the objective is the worst task, worse in some task than the incumbent in
        its worst; if it is a Pareto front, worse in every task. A trial that is no worse is stopped, after any step,
        with a probability of at most 1 - confidence: approximately, the more samples the better.

        Raises:
            ValueError: the scores are not those of all steps up to one.
        """
        self._step(scores)
        effects: dict[str, _Effect] = {}
        for task in self.orders:
            effect = self._effect(task, scores[task])
            if effect is None:
                return False
            effects[task] = effect
        level = 1 - self.confidence
        if self.objective.aggregate == "pareto":
            return all(_is_positive([effect], 0.0, level) for effect in effects.values())
        if self.objective.aggregate == "worst":
            costs = {task: 1 / cp for task, cp in self.objective.preservation(self.measures).items()}
            return any(
                _is_positive([effect], costs[task] - max(costs.values()), level / len(effects))
                for task, effect in effects.items()
            )
        return _is_positive(list(effects.values()), 0.0, level)

    def estimated_cp(self, scores: Mapping[str, Scores]) -> dict[str, float]:
        """CP by task of a stopped trial: of the incumbent's figures plus the estimated paired differences.

        The calibrated loss, which only settles ties of ``metric``, is taken to be the incumbent's.

        Raises:
            ValueError: the scores are not those of all steps up to one.
        """
        self._step(scores)
        return self.objective.preservation({task: self._measure(task, scores[task]) for task in self.orders})

    def estimate(self, scores: Mapping[str, Scores]) -> float:
        """The cost 1 / objective of a stopped trial by `estimated_cp`; never below the incumbent's.

        Raises:
            ValueError: the scores are not those of all steps up to one.
        """
        incumbent = self.objective.value(self.objective.preservation(self.measures))
        return 1 / min(incumbent, self.objective.value(self.estimated_cp(scores)))

    def restored(self, scores: Mapping[str, Scores]) -> dict[str, Scores]:
        """The scores of a trial that was measured on all slices, in the order of the data.

        Raises:
            ValueError: it was not measured on all.
        """
        if self._step(scores) + 1 < self.steps:
            raise ValueError("the trial was not measured on all slices")
        return {task: _map(each, np.argsort(self.orders[task])) for task, each in scores.items()}

    def _step(self, scores: Mapping[str, Scores]) -> int:
        """By the end of which step there are these scores."""
        for step in range(self.steps):
            if all(len(scores[task]) == ends[step] for task, ends in self.ends.items()):
                return step
        found = {task: len(each) for task, each in scores.items()}
        raise ValueError(f"the scores are not those of all steps up to one: {found} samples, steps at {self.ends}")

    def _weights(self, task: str, count: int) -> Column:
        """How many rows of the data each of the first ``count`` stands for; they sum to n."""
        certain = self.certain[task]
        weights = np.ones(count)
        weights[certain:] = (len(self.orders[task]) - certain) / (count - certain)
        return weights

    def _differences(self, task: str, scores: Scores) -> dict[str, tuple[float, float, float]] | None:
        """By figure: the trial's and the incumbent's ratio of sums, and the mean denominator of the trial's.

        None if a ratio is not defined on these samples, as of a metric that none of them counts for.
        """
        count = len(scores)
        weights = self._weights(task, count)
        found: dict[str, tuple[float, float, float]] = {}
        for name, trial in self.objective.columns(task, scores).items():
            whole = self.columns[task][name]
            trial_sum = float(weights @ trial.denominator)
            incumbent_sum = float(weights @ whole.denominator[:count])
            if not (trial_sum > 0 and incumbent_sum > 0):
                return None
            found[name] = (
                float(weights @ trial.numerator) / trial_sum,
                float(weights @ whole.numerator[:count]) / incumbent_sum,
                float(whole.denominator.mean()) * trial_sum / incumbent_sum,
            )
        return found

    def _effect(self, task: str, scores: Scores) -> _Effect | None:
        differences = self._differences(task, scores)
        if differences is None:
            return None
        count = len(scores)
        value = 0.0
        influence = np.zeros(count)
        for name, trial in self.objective.columns(task, scores).items():
            whole, slope = self.columns[task][name], self.slopes[task][name]
            trial_ratio, incumbent_ratio, trial_mean = differences[name]
            value += slope * (trial_ratio - incumbent_ratio)
            influence += slope * (trial.numerator - trial_ratio * trial.denominator) / trial_mean
            numerator, denominator = whole.numerator[:count], whole.denominator[:count]
            influence -= slope * (numerator - incumbent_ratio * denominator) / float(whole.denominator.mean())
        certain, everything = self.certain[task], len(self.orders[task])
        drawn, population = count - certain, everything - certain
        centred = influence[certain:] - influence[certain:].mean()
        part = population / everything
        spread = part**2 * (float(centred @ centred) / (drawn - 1) + PRIOR * self.spreads[task] / drawn)
        return _Effect(
            value=value,
            variance=spread * (1 / drawn - 1 / population),
            first=spread * (1 / (self.ends[task][0] - certain) - 1 / population),
            unlimited=spread / drawn,
            third=part**3 * float((centred**3).mean()) / drawn**2,
            freedom=drawn - 1,
        )

    def _measure(self, task: str, scores: Scores) -> Measure:
        measure = self.measures[task]
        differences = self._differences(task, scores) or {}
        figures: dict[str, float] = {}
        for name, (trial, incumbent, _) in differences.items():
            whole = self.columns[task][name]
            ratio = float(whole.numerator.sum() / whole.denominator.sum())
            moved = ratio + trial - incumbent
            if whole.transform == "identity":
                moved = max(moved, LARGEST_IMPROVEMENT * ratio)
            figures[name] = Ratio(np.array([moved]), np.ones(1), whole.transform).value
        return _with_figures(self.objective, measure, figures)


def make_race(slices: Slices, objective: Objective, incumbent: Mapping[str, Scores], confidence: float) -> Race:
    """A race against an incumbent.

    Args:
        slices: of the validation data.
        objective: what the cost is.
        incumbent: its scores by task on all validation data, in the order of the data.
        confidence: with which a stopped trial is worse, 0.5 to 1.

    Raises:
        SearchError: the objective is undefined for the incumbent.
    """
    measures = {task: Measure.of(incumbent[task]) for task in slices.orders}
    slopes = cost_slopes(objective, measures)
    orders: dict[str, Rows] = {}
    certain: dict[str, int] = {}
    columns: dict[str, dict[str, Ratio]] = {}
    spreads: dict[str, float] = {}
    for task, order in slices.orders.items():
        whole = objective.columns(task, incumbent[task])
        for name, column in whole.items():
            if column.transform == "exp":
                slopes[task][name] *= column.value
        share = np.zeros(len(order))
        for name, column in whole.items():
            ratio = column.numerator.sum() / column.denominator.sum()
            share += slopes[task][name] * (column.numerator - ratio * column.denominator) / column.denominator.mean()
        certain[task] = slices.ends[task][0] // CERTAIN
        # Among equals by row, not by the order: what is left must be as random as before.
        chosen = np.argsort(-share, kind="stable")[: certain[task]]
        drawn = order[~np.isin(order, chosen)]
        orders[task] = np.concatenate([chosen, drawn])
        columns[task] = {name: _pick(column, orders[task]) for name, column in whole.items()}
        spreads[task] = float(share[drawn].var(ddof=1)) if len(drawn) > 1 else 0.0
    return Race(objective, confidence, orders, slices.ends, certain, measures, columns, slopes, spreads)


def cost_slopes(objective: Objective, measures: Mapping[str, Measure]) -> dict[str, dict[str, float]]:
    """The slopes of each task's 1 / CP in the figures that decide on it, by task and figure.

    The figures are 'loss', 'soft', or the defined metrics by name. At a kink of 1 / CP the slope is that towards larger
    figures.

    Args:
        objective: what CP is.
        measures: where the slopes are taken, by task.

    Raises:
        SearchError: the objective is undefined there.
    """
    costs = {task: 1 / cp for task, cp in objective.preservation(measures).items()}
    slopes: dict[str, dict[str, float]] = {}
    for task, measure in measures.items():
        slopes[task] = {}
        for name, figure in _figures(objective, task, measure).items():
            moved = figure + STEP * max(abs(figure), STEP)
            there = {**measures, task: _with_figures(objective, measure, {name: moved})}
            slopes[task][name] = (1 / objective.preservation(there)[task] - costs[task]) / (moved - figure)
    return slopes


def _figures(objective: Objective, task: str, measure: Measure) -> dict[str, float]:
    """The figures of the columns that decide on a task."""
    if objective.name == "metric":
        return {name: measure.metrics[name] for name in objective.tasks[task].higher_is_better}
    if objective.name != "soft_metric":
        return {"loss": measure.loss}
    kinds = set(objective.tasks[task].stand_ins.values())
    found = {"soft": measure.soft} if "soft" in kinds and measure.soft is not None else {}
    return found | ({"loss": measure.loss} if kinds - {"soft"} else {})


def _with_figures(objective: Objective, measure: Measure, figures: Mapping[str, float]) -> Measure:
    """A measure with some of these figures replaced."""
    if objective.name == "metric":
        return measure.model_copy(update={"metrics": {**measure.metrics, **figures}})
    return measure.model_copy(update=dict(figures))


def _is_positive(effects: Sequence[_Effect], offset: float, level: float) -> bool:
    """Whether a sum of effects, and an offset that is known, is above 0: rejects falsely, ever, at a rate of ``level``.

    The mixture of likelihood ratios over positive drifts, with half-normal weights of the variance p, is with
    r = p / variance and the standardised sum z: 2 / sqrt(1 + r) exp(z^2 r / (2 (1 + r))) Phi(z sqrt(r / (1 + r))).
    Where the sum is 0 it is a martingale, and reaches 1 / level at a rate of at most ``level`` (Ville's inequality). It
    grows with z, so where the sum is below 0 the rate is lower.
    """
    value = sum(effect.value for effect in effects) + offset
    variance = sum(effect.variance for effect in effects)
    if value <= 0:
        return False
    if variance <= 0:
        return True
    skewness = min(0.0, sum(effect.third for effect in effects) / sum(effect.unlimited for effect in effects) ** 1.5)
    # Welch and Satterthwaite.
    freedom = variance**2 / sum(effect.variance**2 / effect.freedom for effect in effects)
    z = _normal_value(_without_skewness(value / math.sqrt(variance), skewness), freedom)
    if z <= 0:
        return False
    r = _tuning(level) * sum(effect.first for effect in effects) / variance
    phi = 0.5 * math.erfc(-z * math.sqrt(r / (2 * (1 + r))))
    log_mixture = math.log(2 * phi) - 0.5 * math.log1p(r) + z * z * r / (2 * (1 + r))
    return log_mixture >= -math.log(level)


def _tuning(level: float) -> float:
    """r at the first slice so that the boundary is about lowest there; arXiv 2103.06476, for two sides at 2 level."""
    logarithm = -2 * math.log(2 * level)
    return logarithm + math.log1p(logarithm)


def _without_skewness(t: float, skewness: float) -> float:
    """Hall's transformation of a studentised mean whose numerator has a skewness, not positive."""
    return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6


def _normal_value(t: float, freedom: float) -> float:
    """The standard normal value with about the tail of Student's t."""
    scale = (8 * freedom + 1) / (8 * freedom + 3)
    return math.copysign(scale * math.sqrt(freedom * math.log1p(t * t / freedom)), t)


def _ends(counts: Mapping[str, int], shares: Sequence[float]) -> dict[str, tuple[int, ...]]:
    """How many rows of each task are measured by the end of each step."""

    def wanted(share: float) -> int:
        return sum(min(count, max(FEWEST, math.ceil(share * count))) for count in counts.values())

    everything = sum(counts.values())
    kept: list[float] = []
    for share in shares[:-1]:
        if wanted(share) - (wanted(kept[-1]) if kept else 0) >= FEWEST and everything - wanted(share) >= FEWEST:
            kept.append(share)
    # Of each task at least 3 rows first, and one more a step.
    kept = kept[: max(0, min(counts.values()) - 3)]
    ends: dict[str, tuple[int, ...]] = {}
    for task, count in counts.items():
        sizes: list[int] = []
        for step, share in enumerate(kept):
            size = max(FEWEST, math.ceil(share * count), sizes[-1] + 1 if sizes else 0)
            sizes.append(min(size, count - (len(kept) - step)))
        ends[task] = (*sizes, count)
    return ends


def _van_der_corput(count: int) -> Rows:
    """0 to count - 1 by their binary digits read backwards: every prefix is spread evenly."""
    order = np.zeros(1, dtype=np.int64)
    while len(order) < count:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order[order < count]


def _map(scores: Scores, rows: Rows) -> Scores:
    """Scores of some rows, in this order."""
    return Scores(
        _pick(scores.losses, rows),
        {name: _pick(ratio, rows) for name, ratio in scores.metrics.items()},
        None if scores.soft is None else _pick(scores.soft, rows),
        {at: _pick(ratio, rows) for at, ratio in scores.tempered.items()},
    )


def _pick(ratio: Ratio, rows: Rows) -> Ratio:
    return replace(ratio, numerator=ratio.numerator[rows], denominator=ratio.denominator[rows])

"""Statistics of a handful of paired runs.

Accuracies are compared as integer counts of correct images, so that ties are exact. Intervals and t-tests
need variation: if all values are equal, interval, p-value and smallest detectable difference do not exist
and are `None`, whatever the mean is.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
"""Coverage of every interval."""
POWER = 0.8
"""Probability with which the smallest detectable difference is detected: the usual choice."""
MOST_SEEDS = 1000
"""Upper end of the search for the number of seeds needed: no study has more."""
_RESAMPLES = 9_999  # At least 2**13: scipy tries every choice of signs up to 13 pairs, random ones above.


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        mean: Mean of the values, in their unit.
        low: Lower end of the 95 % t-interval of the mean, or `None` if the values do not vary.
        high: Upper end.
        sd: Standard deviation of the values (n - 1 in the denominator).
        n: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    sd: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired comparison, treatment minus control.

    Attributes:
        estimate: Mean difference in percentage points.
        p_value: Two-sided paired t-test, or `None` if the differences do not vary.
        permutation_p: Sign-flip test, which does not assume a normal distribution (`sign_flip_p`).
        effect_size: Mean over standard deviation of the differences (Cohen's d of pairs); `None` as above.
        detectable: Smallest true difference that this many pairs, with this spread, would show to be
            significant with probability `POWER`; `None` if the differences do not vary.
    """

    estimate: Estimate
    p_value: float | None
    permutation_p: float
    effect_size: float | None
    detectable: float | None


def estimate(values: Sequence[float], within: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """Estimate the mean of `values`, which is known to be `within` these ends.

    Raises:
        ValueError: for fewer than two values, or one that is not finite.
    """
    x = _checked(values)
    if not np.ptp(x):
        return Estimate(mean=float(x[0]), low=None, high=None, sd=0.0, n=len(x))
    low, high = map(float, stats.ttest_1samp(x, 0.0).confidence_interval(CONFIDENCE))
    low, high = max(low, within[0]), min(high, within[1])
    return Estimate(mean=float(x.mean()), low=low, high=high, sd=float(x.std(ddof=1)), n=len(x))


def paired_difference(treatment: Sequence[int], control: Sequence[int], images: int) -> Difference:
    """Compare two arms whose i-th runs belong together (the same seed).

    Args:
        treatment: Correct images of each run.
        control: Those of the other arm.
        images: Number of images that both were tested on.

    Raises:
        ValueError: if the lengths differ, or for fewer than two pairs.
    """
    if len(treatment) != len(control):
        raise ValueError(f"{len(treatment)} and {len(control)} values are not pairs; use as many of each")
    counts = np.subtract(treatment, control)
    points = 100 * counts / images
    mean, vary = estimate(points.tolist()), bool(np.ptp(counts))
    return Difference(
        estimate=mean,
        p_value=float(stats.ttest_1samp(points, 0.0).pvalue) if vary else None,
        permutation_p=sign_flip_p(counts.tolist()),
        effect_size=mean.mean / mean.sd if vary else None,
        detectable=smallest_detectable(mean.sd, mean.n) if vary else None,
    )


def sign_flip_p(differences: Sequence[int]) -> float:
    """Return the two-sided p-value of the paired permutation test of the mean.

    If the arms are equal, each difference is equally likely to have either sign. The p-value is the fraction
    of all choices of signs whose mean is at least as far from zero as the observed one. Up to 13 pairs, every
    choice is tried; above, 9,999 random ones (always the same) and the observed one. With n pairs the p-value
    is never below `2 / 2**n`: five pairs cannot reach 5 %.

    Args:
        differences: Integers, such as counts of images: rounded floats would hide ties.

    Raises:
        ValueError: for fewer than two values.
    """
    if len(differences) < 2:
        raise ValueError(f"differences={list(differences)!r} is not accepted; use at least two")
    counts = (np.asarray(differences, dtype=np.int64),)
    options = {"permutation_type": "samples", "n_resamples": _RESAMPLES, "rng": 0}
    return float(stats.permutation_test(counts, np.sum, **options).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for multiple comparisons (Holm 1979, a sequentially rejective procedure).

    If every corrected p-value below 5 % is reported as a difference, the probability of one or more false
    reports is at most 5 %.

    Args:
        p_values: One family of tests; `None` stays `None` and counts as a test.
    """
    count = len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * count
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p))
        adjusted[i] = largest
    return adjusted


def unpaired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """Estimate the mean of `second` minus that of `first` with Welch's interval; `None` where neither varies.

    Raises:
        ValueError: as `estimate`.
    """
    x, y = _checked(first), _checked(second)
    if not (np.ptp(x) or np.ptp(y)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, where one of the two does not vary
        low, high = map(float, stats.ttest_ind(y, x, equal_var=False).confidence_interval(CONFIDENCE))
    sd = float(np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2))
    return Estimate(mean=float(y.mean() - x.mean()), low=low, high=high, sd=sd, n=len(x) + len(y))


def seeds_needed(sd: float, difference: float) -> int | None:
    """Return the fewest pairs that find a true `difference` with probability `POWER`; `None` above 1,000.

    Args:
        sd: Standard deviation of the differences, above 0, in the same unit.
        difference: Any but 0.

    Raises:
        ValueError: for values outside these.
    """
    if not 0 < abs(difference) < np.inf:
        raise ValueError(f"difference={difference!r} is not accepted; use a finite number other than 0")
    numbers = range(2, MOST_SEEDS + 1)
    at = bisect.bisect_left(numbers, True, key=lambda n: smallest_detectable(sd, n) <= abs(difference))
    return numbers[at] if at < len(numbers) else None


def smallest_detectable(sd: float, n: int) -> float:
    """Return the true mean difference that a two-sided paired t-test at 5 % finds with probability `POWER`.

    Args:
        sd: Standard deviation of the differences, above 0; the result has its unit.
        n: Number of pairs, at least 2.

    Raises:
        ValueError: for values outside these.
    """
    if n < 2 or not 0 < sd < np.inf:
        raise ValueError(f"sd={sd!r}, n={n!r} is not accepted; use sd > 0 and n >= 2")
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)

    def missing_power(shift: float) -> float:
        # The square of a noncentral t is a noncentral F with both tails in one. (scipy's noncentral t is NaN
        # in parts of its far tail.)
        return float(stats.ncf.sf(critical**2, 1, n - 1, shift**2)) - POWER

    high = 1.0
    while missing_power(high) < 0:
        high *= 2
    return float(optimize.brentq(missing_power, high / 2, high)) * sd / float(np.sqrt(n))


def _checked(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"values={list(values)!r} is not accepted; use at least two finite numbers")
    return x

"""What a handful of paired runs can and cannot show.

Every quantity follows from a t-distribution. It needs a spread to judge by: where all values are equal,
interval, p-value and smallest detectable difference do not exist and are ``None``, whatever the mean is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
"""Of every interval."""
POWER = 0.8
"""Probability with which the smallest detectable difference is detected: the usual choice."""
MOST_SEEDS = 1000
"""Above this, the number of seeds needed is not looked for: no study has them."""
_EXACT = 12  # Pairs up to which all 2**n flips of sign are tried; beyond, `_DRAWS` random ones.
_DRAWS = 10_000
_SAME = 1e-9  # Relative. Scores are multiples of 1/images; nearer ones differ by rounding of floats only.


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and where the true one lies.

    Attributes:
        mean: Of the values, in their unit.
        low: Lower end of the 95 % t-interval of the mean, or ``None`` if the values do not vary.
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
        estimate: Of the mean difference.
        p_value: Of the two-sided paired t-test, or ``None`` if the differences do not vary.
        permutation_p: Of the sign-flip test, which does not assume a normal distribution (`sign_flip_p`).
        effect_size: Mean over standard deviation of the differences (Cohen's d of pairs); ``None`` as above.
        detectable: The smallest true difference that this many pairs, with this spread, find significant
            with probability `POWER`; ``None`` if the differences do not vary.
    """

    estimate: Estimate
    p_value: float | None
    permutation_p: float
    effect_size: float | None
    detectable: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values` with its interval.

    Raises:
        ValueError: for fewer than two values, or one that is not finite.
    """
    x = _checked(values)
    low, high = _test(x).confidence_interval(CONFIDENCE) if _vary(x) else (None, None)
    return Estimate(
        mean=float(x.mean()),
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        sd=float(x.std(ddof=1)),
        n=len(x),
    )


def paired_difference(treatment: Sequence[float], control: Sequence[float]) -> Difference:
    """Compare two arms whose i-th values belong together (the same seed).

    Raises:
        ValueError: if the lengths differ, for fewer than two pairs, or a value that is not finite.
    """
    if len(treatment) != len(control):
        raise ValueError(f"{len(treatment)} values of the treatment, {len(control)} of the control: no pairs")
    differences = _checked(treatment) - _checked(control)
    mean = estimate(differences.tolist())
    flips = sign_flip_p(differences.tolist())
    if not _vary(differences):
        return Difference(estimate=mean, p_value=None, permutation_p=flips, effect_size=None, detectable=None)
    return Difference(
        estimate=mean,
        p_value=float(_test(differences).pvalue),
        permutation_p=flips,
        effect_size=mean.mean / mean.sd,
        detectable=smallest_detectable(mean.sd, mean.n),
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired permutation test of the mean.

    If an arm makes no difference, each difference might as well have the other sign. The p-value is the share
    of all choices of signs whose mean is at least as far from zero. Up to 12 pairs every choice is tried;
    above, 10,000 random ones (always the same), the observed one counted among them. With n pairs it is
    never below ``2 / 2**n``: five pairs cannot reach 5 %.

    Raises:
        ValueError: for fewer than two values, or one that is not finite.
    """
    x = _checked(differences)
    if len(x) <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
    else:
        drawn = np.random.default_rng(0).choice((1.0, -1.0), size=(_DRAWS, len(x)))
        signs = np.concatenate([np.ones((1, len(x))), drawn])
    sums, slack = np.abs(signs @ x), _SAME * np.abs(x).sum()
    return float((sums >= abs(x.sum()) - slack).mean())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm 1979, a sequentially rejective procedure).

    Rejecting what is below 5 % then makes one or more false claims with a probability of at most 5 %.

    Args:
        p_values: Of one family of tests; ``None`` stays ``None`` and counts as a test.
    """
    count = len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * count
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p))
        adjusted[i] = largest
    return adjusted


def seeds_needed(sd: float, difference: float) -> int | None:
    """The fewest pairs that find a true `difference` with probability `POWER`; ``None`` above 1,000.

    Args:
        sd: Standard deviation of the differences, above 0, in the same unit.
        difference: Any but 0.

    Raises:
        ValueError: for values outside these.
    """
    if not 0 < abs(difference) < np.inf:
        raise ValueError(f"difference={difference!r} must be finite and not 0")
    low, high = 1, MOST_SEEDS  # low is too few
    if smallest_detectable(sd, high) > abs(difference):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = smallest_detectable(sd, middle) <= abs(difference)
        low, high = (low, middle) if enough else (middle, high)
    return high


def unpaired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """Mean of `second` minus mean of `first` with Welch's 95 % interval; ``None`` where neither varies.

    Raises:
        ValueError: as `estimate`.
    """
    x, y = _checked(first), _checked(second)
    if not (_vary(x) or _vary(y)):
        return None
    errors = [values.var(ddof=1) / len(values) for values in (x, y)]
    squares = [error**2 / (len(values) - 1) for error, values in zip(errors, (x, y), strict=True)]
    freedom = sum(errors) ** 2 / sum(squares)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(sum(errors)))
    mean = float(y.mean() - x.mean())
    sd = float(np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2))
    return Estimate(mean=mean, low=mean - half, high=mean + half, sd=sd, n=len(x) + len(y))


def smallest_detectable(sd: float, n: int) -> float:
    """The true mean difference that a two-sided paired t-test at 5 % finds with probability `POWER`.

    Args:
        sd: Standard deviation of the differences, above 0; the result has its unit.
        n: Number of pairs, at least 2.

    Raises:
        ValueError: for values outside these.
    """
    if n < 2 or not 0 < sd < np.inf:
        raise ValueError(f"sd={sd!r}, n={n!r}: needs sd > 0 and n >= 2")
    freedom = n - 1
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)

    def missing_power(shift: float) -> float:
        # The test statistic has a noncentral t-distribution; its square, which has both tails in one, a
        # noncentral F. (scipy's noncentral t is NaN in parts of its far tail.)
        return float(stats.ncf.sf(critical**2, 1, freedom, shift**2)) - POWER

    high = 1.0
    while missing_power(high) < 0:
        high *= 2
    return float(optimize.brentq(missing_power, high / 2, high)) * sd / float(np.sqrt(n))


def _checked(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"values={list(values)!r}: at least two finite numbers are needed")
    return x


def _vary(x: np.ndarray) -> bool:
    return bool(np.ptp(x) > _SAME * max(1.0, np.abs(x).max()))


def _test(x: np.ndarray) -> stats._result_classes.TtestResult:
    return stats.ttest_1samp(x, 0.0)

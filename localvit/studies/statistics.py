"""What a handful of paired runs can and cannot show.

Every quantity follows from a t-distribution. It needs a spread to judge by: where all values are equal,
interval, p-value and smallest detectable difference do not exist and are ``None``, whatever the mean is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
"""Of every interval."""
POWER = 0.8
"""Probability with which the smallest detectable difference is detected: the usual choice."""
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
        detectable: The smallest true difference that this many pairs, with this spread, find significant
            with probability `POWER`; ``None`` if the differences do not vary.
    """

    estimate: Estimate
    p_value: float | None
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
    if not _vary(differences):
        return Difference(estimate=mean, p_value=None, detectable=None)
    return Difference(
        estimate=mean,
        p_value=float(_test(differences).pvalue),
        detectable=smallest_detectable(mean.sd, mean.n),
    )


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

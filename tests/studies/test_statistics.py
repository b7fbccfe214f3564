"""Numbers computed by hand or from another distribution, and properties."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from localvit.studies.statistics import estimate, paired_difference, smallest_detectable

scores = st.floats(0, 100).map(lambda x: round(x, 1))


def test_mean_and_interval_by_hand():
    # 1, 2, 3: sd 1, standard error 1/sqrt(3); t(2) at 97.5 % is 4.30265.
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    half = 4.302652729911275 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: t = 2 sqrt(3) with 2 degrees; its two-sided p is 1 - t / sqrt(t^2 + 2).
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t = 2 * math.sqrt(3)
    assert found.estimate == estimate([1.0, 2.0, 3.0])
    assert found.p_value == pytest.approx(1 - t / math.sqrt(t**2 + 2))


def test_two_pairs():
    # Differences 1 and 3: t = 2 with 1 degree (Cauchy): p = 1 - 2 atan(2) / pi.
    found = paired_difference([2.0, 5.0], [1.0, 2.0])
    assert found.p_value == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert found.estimate.low < 0 < found.estimate.high


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_differences_without_spread_have_no_test(shift):
    control = [99.1, 33.3, 65.9]
    treatment = [score + shift for score in control]
    assert shift == 0 or np.ptp(np.subtract(treatment, control)) > 0  # floats round
    found = paired_difference(treatment, control)
    assert found.estimate.mean == pytest.approx(shift)
    assert (found.estimate.low, found.estimate.high) == (None, None)
    assert (found.p_value, found.detectable) == (None, None)


@pytest.mark.parametrize(("n", "sd"), [(3, 1.0), (5, 0.7), (12, 2.0)])
def test_smallest_detectable_has_that_power(n, sd):
    difference = smallest_detectable(sd, n)
    critical = stats.t.ppf(0.975, n - 1)
    shift = difference / sd * math.sqrt(n)
    power = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_smallest_detectable_is_found_in_simulated_experiments():
    rng = np.random.default_rng(0)
    experiments = rng.normal(smallest_detectable(1.5, 5), 1.5, (20_000, 5))
    found = stats.ttest_1samp(experiments, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_smallest_detectable_of_two_pairs_is_finite():
    assert 10 < smallest_detectable(1.0, 2) < 13


@pytest.mark.parametrize(("sd", "n"), [(0.0, 5), (-1.0, 5), (float("nan"), 5), (float("inf"), 5), (1.0, 1)])
def test_smallest_detectable_refuses(sd, n):
    with pytest.raises(ValueError, match="needs sd > 0 and n >= 2"):
        smallest_detectable(sd, n)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_too_few_or_no_numbers(values):
    with pytest.raises(ValueError, match="at least two finite numbers"):
        estimate(values)


def test_pairs_of_different_length():
    with pytest.raises(ValueError, match="3 values of the treatment, 2 of the control"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=12))
def test_agrees_with_scipys_paired_test_and_is_antisymmetric(pairs):
    treatment, control = map(list, zip(*pairs, strict=True))
    differences = np.subtract(treatment, control)
    assume(np.ptp(differences) > 0.05)
    found, turned = paired_difference(treatment, control), paired_difference(control, treatment)
    expected = stats.ttest_rel(treatment, control)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.estimate.low, found.estimate.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert turned.estimate.mean == pytest.approx(-found.estimate.mean)
    assert turned.p_value == pytest.approx(found.p_value)
    assert turned.detectable == pytest.approx(found.detectable)
    significant = found.estimate.low > 0 or found.estimate.high < 0
    assume(abs(found.p_value - 0.05) > 1e-9)
    assert significant == (found.p_value < 0.05)


@given(st.floats(0.01, 50), st.integers(2, 60))
def test_more_pairs_or_less_spread_show_smaller_differences(sd, n):
    here = smallest_detectable(sd, n)
    assert smallest_detectable(sd, n + 1) < here
    assert smallest_detectable(2 * sd, n) == pytest.approx(2 * here)

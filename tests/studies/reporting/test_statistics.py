"""Numbers computed by hand, from another distribution or by an older version, and properties."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy import stats

from localvit.studies.reporting.statistics import (
    estimate,
    holm,
    paired_difference,
    seeds_needed,
    sign_flip_p,
    smallest_detectable,
    unpaired_difference,
)

EVIDENCE = Path(__file__).parents[3] / "evidence"
IMAGES = 500
counts = st.integers(0, IMAGES)


def test_mean_and_interval_by_hand():
    # 1, 2, 3: sd 1, standard error 1/sqrt(3); t(2) at 97.5 % is 4.30265.
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    half = 4.302652729911275 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)
    bounded = estimate([1.0, 2.0, 3.0], (0.0, 4.0))
    assert (bounded.low, bounded.high, bounded.sd) == (0.0, 4.0, found.sd)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: t = 2 sqrt(3) with 2 degrees; its two-sided p is 1 - t / sqrt(t^2 + 2).
    found = paired_difference([11, 22, 33], [10, 20, 30], 100)
    t = 2 * math.sqrt(3)
    assert found.estimate == estimate([1.0, 2.0, 3.0])
    assert found.p_value == pytest.approx(1 - t / math.sqrt(t**2 + 2))


def test_two_pairs():
    # Differences 1 and 3: t = 2 with 1 degree (Cauchy): p = 1 - 2 atan(2) / pi.
    found = paired_difference([2, 5], [1, 2], 100)
    assert found.p_value == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert found.estimate.low < 0 < found.estimate.high


@pytest.mark.parametrize("shift", [0, 4])
def test_differences_without_spread_have_no_test(shift):
    control = [991, 333, 659]
    treatment = [count + shift for count in control]
    found = paired_difference(treatment, control, 1000)
    assert found.estimate.mean == pytest.approx(shift / 10)
    assert found.estimate.sd == 0
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
    with pytest.raises(ValueError, match="use sd > 0 and n >= 2"):
        smallest_detectable(sd, n)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_too_few_or_no_numbers(values):
    with pytest.raises(ValueError, match="at least two finite numbers"):
        estimate(values)


def test_pairs_of_different_length():
    with pytest.raises(ValueError, match="3 and 2 values are not pairs"):
        paired_difference([1, 2, 3], [1, 2], 100)


@settings(deadline=None)  # time depends on what else the machine does
@given(st.lists(st.tuples(counts, counts), min_size=2, max_size=12))
def test_agrees_with_scipys_paired_test_and_is_antisymmetric(pairs):
    treatment, control = map(list, zip(*pairs, strict=True))
    assume(np.ptp(np.subtract(treatment, control)) > 0)
    found, turned = (
        paired_difference(*arms, IMAGES) for arms in ((treatment, control), (control, treatment))
    )
    expected = stats.ttest_rel(*(100 * np.array(arm) / IMAGES for arm in (treatment, control)))
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


differences = st.lists(st.integers(-4, 4), min_size=2, max_size=8)  # few values, so many ties
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def enumerated(values):
    """The share of all sign patterns whose sum is at least as far from 0, in integers."""
    sums = [sum(map(int.__mul__, signs, values)) for signs in itertools.product((1, -1), repeat=len(values))]
    return sum(abs(each) >= abs(sum(values)) for each in sums) / len(sums)


@settings(deadline=None)
@given(differences)
def test_sign_flips_are_the_exact_enumeration(values):
    assert sign_flip_p(values) == pytest.approx(enumerated(values), abs=1e-12)


def test_sign_flips_by_hand():
    assert sign_flip_p([1, 2, 3]) == 2 / 8  # only all plus and all minus are as far from 0
    assert sign_flip_p([1] * 5) == 2 / 32
    assert sign_flip_p([1, -1]) == 1.0
    assert sign_flip_p([0, 0, 0]) == 1.0
    assert sign_flip_p([3, 1, 2]) == 2 / 8
    assert sign_flip_p([2, 1, -1]) == 6 / 8  # sums 4, 2 (twice), 0: all but 0 are as far as 2


def test_sign_flips_are_exact_up_to_13_pairs_and_drawn_beyond():
    assert sign_flip_p([1] * 13) == 2 / 2**13
    assert sign_flip_p([1] * 20) == 2 / 10_000  # 9,999 draws and the observed one, each tail
    many = [3, -1, 2, 0, 1, 1, -2, 4, 1, 0, 2, -1, 1, 2, -1]
    assert sign_flip_p(many) == sign_flip_p(many)  # always the same draws
    assert sign_flip_p(many) == pytest.approx(enumerated(many), abs=0.015)


def test_percentages_would_lose_ties():
    # 500 images. As percentages, sums that tie differ in their last bits, and scipy sorts them by these.
    correct = np.array([[462, 471, 465, 466, 465], [461, 468, 465, 470, 464]])
    percent = 100 * correct / 500
    naive = stats.permutation_test(
        (percent[0] - percent[1],), np.mean, permutation_type="samples", n_resamples=np.inf, rng=0
    ).pvalue
    counts = (correct[0] - correct[1]).tolist()  # 1, 3, 0, -4, 1: no sum of signs is nearer to 0 than 1
    assert sign_flip_p(counts) == enumerated(counts) == 1.0
    assert naive < 1.0


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EVIDENCE.glob("*/summary.json")))
def test_numbers_of_former_studies_are_found_again(name):
    summary = json.loads((EVIDENCE / name / "summary.json").read_text())
    images = summary["test_images"]
    arms = {arm["name"]: arm["scores"] for arm in summary["arms"]}
    for contrast in summary["contrasts"]:
        scores = [[arms[contrast[w]][str(s)] for s in contrast["seeds"]] for w in ("arm", "control")]
        found = paired_difference(*([round(s * images / 100) for s in each] for each in scores), images)
        then = contrast["difference"]
        assert found.permutation_p == pytest.approx(then["permutation_p"], abs=1e-12)
        for field in ("p_value", "effect_size", "detectable"):
            assert getattr(found, field) == pytest.approx(then[field], rel=1e-6), (contrast["arm"], field)
        for field in ("mean", "low", "high", "sd"):
            assert getattr(found.estimate, field) == pytest.approx(then["estimate"][field], abs=1e-9)


@given(p_values)
def test_holm_agrees_with_its_definition(values):
    # Reject in ascending order while p <= level / (number left): the adjusted p is the least such level.
    adjusted = holm(values)
    for level in (0.01, 0.05, 0.2, 0.9):
        order = sorted(range(len(values)), key=lambda i: values[i])
        rejected = set()
        for rank, i in enumerate(order):
            if values[i] * (len(values) - rank) > level:
                break
            rejected.add(i)
        assert rejected == {i for i, p in enumerate(adjusted) if p <= level}
    assert all(a >= p for a, p in zip(adjusted, values, strict=True))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None, 0.02]) == [None, 0.04]  # a test without an outcome is a test


@settings(max_examples=15)
@given(st.floats(0.1, 2), st.floats(0.3, 3))
def test_seeds_needed_is_the_least_number_that_suffices(sd, difference):
    number = seeds_needed(sd, difference)
    assert smallest_detectable(sd, number) <= difference
    assert number == 2 or smallest_detectable(sd, number - 1) > difference


def test_seeds_needed_ends_somewhere():
    assert seeds_needed(100.0, 0.01) is None
    with pytest.raises(ValueError, match="difference=0"):
        seeds_needed(1.0, 0)


def test_unpaired_difference_is_welchs():
    found = unpaired_difference([1.0, 2.0, 3.0], [2.0, 4.0, 9.0])
    expected = stats.ttest_ind([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], equal_var=False).confidence_interval()
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, *expected))
    assert unpaired_difference([1.0, 1.0], [2.0, 2.0]) is None
    assert unpaired_difference([1.0, 1.0], [2.0, 3.0]).mean == 1.5

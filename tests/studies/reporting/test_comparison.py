"""The sentences that are generated say what the numbers allow, and no more."""

import json
from types import SimpleNamespace

import pytest

from localvit.config.files import resolve
from localvit.evaluation.metrics import Metrics
from localvit.structure import to_json
from localvit.studies.design.study import Arm, Claim, Study
from localvit.studies.reporting.comparison import findings, interval, p_text, verdict
from localvit.studies.reporting.statistics import estimate, holm, paired_difference

BASE = resolve("digits")


def found(claim=None, **scores):
    """Findings of a study whose first arm is the control, from the scores of its arms."""
    first, *others = scores
    study = Study(
        question="?",
        base=BASE,
        arms=(Arm(name=first), *(Arm(name=n, changes={"epochs": 50 + i}) for i, n in enumerate(others))),
        seeds=tuple(range(max(map(len, scores.values())))),
        claim=claim,
    )
    records = {
        run: SimpleNamespace(
            test=Metrics(
                loss=1.0, top1=scores[run.arm][run.seed], top5=100.0, images=1000, images_per_second=1.0
            ),
            parameters=10,
            macs=20,
            images_per_second=30.0,
            peak_memory=None,
        )
        for run in study.runs()
        if run.seed < len(scores[run.arm])
    }
    return findings(study, records)


def sentence(**scores):
    made = found(**scores)
    return verdict(made.contrasts[0], made)


def test_better_and_worse():
    text = sentence(control=[90.0, 91.0, 92.0], local=[92.0, 93.1, 93.9])
    assert text.startswith(
        "local is better than control: +2.00 points (95 % interval +1.75 to +2.25), p < 0.001"
    )
    assert text.endswith("3 seeds.")
    assert "correction" not in text
    assert sentence(control=[92.0, 93.1, 93.9], local=[90.0, 91.0, 92.0]).startswith("local is worse than")


# Differences +1, -1, +0.5 (p = 0.8) and +1, +0.2, +0.9 (t = 2.78 with 2 degrees: p = 0.109).
@pytest.mark.parametrize(("local", "mean"), [([91.0, 90.0, 92.5], "+0.17"), ([91.0, 91.2, 92.9], "+0.70")])
def test_not_distinguishable_says_what_could_not_have_been_seen_and_what_it_would_take(local, mean):
    control = [90.0, 91.0, 92.0]
    text = sentence(control=control, local=local)
    difference = paired_difference(*([round(10 * score) for score in arm] for arm in (local, control)), 1000)
    assert text.startswith(f"local and control are not distinguishable with 3 seeds: {mean} points")
    assert f"below {difference.detectable:.2f} points would have been missed" in text
    assert "Showing 0.5 points would take " in text


def test_what_one_comparison_shows_may_not_survive_correction():
    control = [90.0, 91.0, 92.0]
    arm = [91.0, 91.6, 92.8]  # p = 0.021: twice that is below 5 %, four times is not
    assert "is better" in sentence(control=control, arm=arm)
    others = {name: [91.0, 90.0, 92.5] for name in ("b", "c", "d")}
    made = found(control=control, arm=arm, **others)
    assert "not distinguishable" in verdict(made.contrasts[0], made)
    assert "after correction for 4 comparisons" in verdict(made.contrasts[0], made)
    raw = [contrast.difference.p_value for contrast in made.contrasts]
    assert [contrast.p_adjusted for contrast in made.contrasts] == holm(raw)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_no_spread_is_undecided(shift):
    control = [90.0, 91.0, 92.0]
    text = sentence(control=control, local=[score + shift for score in control])
    assert f"undecided. The difference was +{shift:.2f} points with each of 3 seeds" in text


def test_runs_without_a_pair_are_shown_and_not_compared():
    made = found(control=[90.0, 91.0, 92.0], local=[93.0])
    assert made.arm("local").scores == {0: 93.0}
    assert made.arm("local").mean is None
    assert (
        verdict(made.contrasts[0], made)
        == "local against control: no result with 1 seed; at least 2 are needed."
    )


def test_the_ceiling_is_named():
    assert "Near the ceiling (local 99.4 %) this" in sentence(
        control=[90.0, 91.0, 92.0], local=[99.8, 99.0, 99.4]
    )
    assert "ceiling (local 99.4 %, control 99.3 %)" in sentence(
        control=[99.0, 99.2, 99.6], local=[99.8, 99.0, 99.4]
    )
    assert "ceiling" not in sentence(control=[90.0, 91.0, 92.0], local=[98.8, 98.0, 98.4])


@pytest.mark.parametrize(
    ("expected", "local", "verdict"),
    [
        ("better", [92.0, 93.1, 93.9], "reproduced"),
        ("worse", [92.0, 93.1, 93.9], "contradicted"),
        ("worse", [88.0, 88.9, 90.1], "reproduced"),
        ("better", [91.0, 90.0, 92.5], "not shown at this scale"),
        (None, [92.0, 93.1, 93.9], None),
    ],
)
def test_what_it_says_about_a_claim(expected, local, verdict):
    claim = Claim(text="t", source="s", expected={"local": expected} if expected else {})
    assert found(claim, control=[90.0, 91.0, 92.0], local=local).contrasts[0].claim == verdict


def test_numbers_as_text():
    assert (p_text(None), p_text(0.0002), p_text(0.0126)) == ("p undefined", "p < 0.001", "p = 0.013")
    assert interval(estimate([1.0, 2.0, 3.0])) == "-0.48 to 4.48"
    assert interval(estimate([1.0, 1.0])) == "none: no spread"


def test_findings_are_json():
    made = found(control=[90.0, 91.0], local=[91.0, 91.5])
    assert json.loads(to_json(made))["test_images"] == 1000
    assert json.loads(to_json(made))["contrasts"][0]["seeds"] == [0, 1]

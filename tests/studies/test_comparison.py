"""The sentence that is generated says what the numbers allow, and no more."""

import dataclasses

import pytest

from localvit import LocalityConfig, plan
from localvit.studies.comparison import ArmResult, Comparison, interval, p_text, verdict
from localvit.studies.statistics import estimate, paired_difference
from localvit.surgery import confounders
from localvit.training.build import build_model


def comparison(control, treatment):
    arms = [
        ArmResult(
            name=name,
            top1=estimate(scores),
            scores=tuple(scores),
            parameters=10,
            macs=20,
            images_per_second=30.0,
        )
        for name, scores in (("baseline", control), ("locality", treatment))
    ]
    return Comparison(
        control=arms[0],
        treatment=arms[1],
        difference=paired_difference(treatment, control),
        seeds=tuple(range(len(control))),
        test_images=500,
    )


def test_better():
    found = verdict(comparison([90.0, 91.0, 92.0], [92.0, 93.1, 93.9]))
    assert found.startswith("The model with locality is better than the baseline by 2.00 points of top-1")
    assert "3 seeds" in found
    assert "not for one part of it" in found


def test_worse():
    found = verdict(comparison([92.0, 93.1, 93.9], [90.0, 91.0, 92.0]))
    assert found.startswith("The model with locality is worse than the baseline by 2.00 points")
    assert "-2.25 to -1.75" in found


# Differences +1, -1, +0.5 (p = 0.8) and +1, +0.2, +0.9 (t = 2.78 with 2 degrees: p = 0.109).
@pytest.mark.parametrize(
    ("treatment", "mean"), [([91.0, 90.0, 92.5], "+0.17"), ([91.0, 91.2, 92.9], "+0.70")]
)
def test_not_distinguishable_says_what_could_not_have_been_seen(treatment, mean):
    made = comparison([90.0, 91.0, 92.0], treatment)
    found = verdict(made)
    assert found.startswith(f"Not distinguishable with 3 seeds: the difference of {mean} points")
    assert f"below {made.difference.detectable:.2f} points would have been missed" in found


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_no_spread_is_undecided(shift):
    control = [90.0, 91.0, 92.0]
    found = verdict(comparison(control, [score + shift for score in control]))
    assert found.startswith(f"Undecided: with each of 3 seeds locality scored +{shift:.2f} points")


def test_the_ceiling_is_named():
    assert "Locality scored 99 % or more" in verdict(comparison([90.0, 91.0, 92.0], [99.8, 99.0, 99.4]))
    both = verdict(comparison([99.0, 99.2, 99.6], [99.8, 99.0, 99.4]))
    assert "Baseline and locality scored 99 % or more" in both
    assert "ceiling" not in verdict(comparison([90.0, 91.0, 92.0], [98.8, 98.0, 98.4]))


def test_numbers_as_text():
    assert (p_text(None), p_text(0.0002), p_text(0.0126)) == ("p undefined", "p < 0.001", "p = 0.013")
    assert interval(estimate([1.0, 2.0, 3.0])) == "-0.48 to 4.48"
    assert interval(estimate([1.0, 1.0])) == "none: no spread"


def sentences(tiny, config, **args):
    model = dataclasses.replace(tiny.model, args={**tiny.model.args, **args})
    return " ".join(confounders(plan(build_model(model, 10), config), model.args.get("drop_path_rate", 0.0)))


def test_confounders_of_the_papers_feed_forward_network(tiny):
    text = sentences(tiny, LocalityConfig())
    for words in ("No pre-norm", "without effect here", "hardswish", "(batch)", "(se)", "bypasses"):
        assert words in text
    assert "blocks.1.mlp of the last block has" in text
    assert "Not matched in parameters" in text
    assert "rate of up to 0.1" in sentences(tiny, LocalityConfig(), drop_path_rate=0.1)


def test_what_is_kept_is_no_confounder(tiny):
    text = sentences(tiny, LocalityConfig(init="preserve"))
    for words in ("No pre-norm", "No drop-path", "Activation", "Norm (", "gate", "bypasses"):
        assert words not in text
    assert "Not matched in parameters" in text

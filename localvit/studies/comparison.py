"""From the records of two arms to the numbers that are reported and the sentence that they allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localvit.studies.records import Record
from localvit.studies.statistics import CONFIDENCE, POWER, Difference, Estimate, estimate, paired_difference
from localvit.studies.study import Run, Study

CEILING = 99.0
"""Top-1 in per cent from which on an arm leaves too little room for another to be better."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What the runs of an arm say.

    Attributes:
        name: Of the arm.
        top1: Of the reported split, in per cent, over the seeds.
        scores: Top-1 of each seed, in the order of the seeds.
        parameters: Of its model.
        macs: Multiply-accumulates for one image.
        images_per_second: Inference throughput.
    """

    name: str
    top1: Estimate
    scores: tuple[float, ...]
    parameters: int
    macs: int
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms over the same seeds.

    Attributes:
        control: The first arm.
        treatment: The second.
        difference: Treatment minus control, in points of top-1.
        seeds: Of the pairs.
        test_images: Number of pictures that each score is measured on.
    """

    control: ArmResult
    treatment: ArmResult
    difference: Difference
    seeds: tuple[int, ...]
    test_images: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the verdict."""
        return {**dataclasses.asdict(self), "verdict": verdict(self)}


def compare(
    study: Study, records: Mapping[Run, Record], images_per_second: Mapping[str, float]
) -> Comparison:
    """Compare the two arms of a study all of whose runs are there.

    Args:
        study: Of two arms.
        records: Of every run.
        images_per_second: Throughput of each arm.

    Raises:
        ValueError: if the study does not have two arms, or for fewer than two seeds.
    """
    control, treatment = (arm.name for arm in study.arms)
    by_arm = {
        name: [records[run] for run in study.runs() if run.arm == name] for name in (control, treatment)
    }
    results = {name: _arm_result(name, of_arm, images_per_second[name]) for name, of_arm in by_arm.items()}
    return Comparison(
        control=results[control],
        treatment=results[treatment],
        difference=paired_difference(results[treatment].scores, results[control].scores),
        seeds=study.seeds,
        test_images=by_arm[control][0].test.images,
    )


def verdict(comparison: Comparison) -> str:
    """What was shown and what was not, in a sentence or two."""
    found, name = comparison.difference, comparison.treatment.name
    seeds = f"{len(comparison.seeds)} seeds"
    if found.p_value is None or found.detectable is None:
        sentence = (
            f"Undecided: with each of {seeds} {name} scored {points(found.estimate.mean, sign=True)} against "
            f"{comparison.control.name}; differences without any spread give no t-test."
        )
    elif found.p_value < 1 - CONFIDENCE:
        word = "better" if found.estimate.mean > 0 else "worse"
        sentence = (
            f"The model with {name} is {word} than the {comparison.control.name} by "
            f"{points(abs(found.estimate.mean))} of top-1 (95 % interval of the difference "
            f"{interval(found.estimate, sign=True)}, {p_text(found.p_value)}, {seeds}). "
            "This holds for the feed-forward network as a whole, not for one part of it, and for this data, "
            "size and training only."
        )
    else:
        sentence = (
            f"Not distinguishable with {seeds}: the difference of {points(found.estimate.mean, sign=True)} "
            f"(95 % interval {interval(found.estimate, sign=True)}, {p_text(found.p_value)}) may be chance, "
            f"and a true difference below {points(found.detectable)} would have been missed more often "
            f"than {100 * (1 - POWER):.0f} % of the time."
        )
    return sentence + _ceiling(comparison)


def points(value: float, *, sign: bool = False) -> str:
    """``"1.25 points"``."""
    return f"{value:{'+' if sign else ''}.2f} points"


def interval(value: Estimate, *, sign: bool = False) -> str:
    """``"0.50 to 1.75"``, or what stands there where there is no interval."""
    if value.low is None or value.high is None:
        return "none: no spread"
    form = "+.2f" if sign else ".2f"
    return f"{value.low:{form}} to {value.high:{form}}"


def p_text(p_value: float | None) -> str:
    """``"p = 0.013"``, ``"p < 0.001"``, or ``"p undefined"``."""
    if p_value is None:
        return "p undefined"
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _arm_result(name: str, records: Sequence[Record], images_per_second: float) -> ArmResult:
    scores = tuple(record.test.top1 for record in records)
    return ArmResult(
        name=name,
        top1=estimate(scores),
        scores=scores,
        parameters=records[0].parameters,
        macs=records[0].macs,
        images_per_second=images_per_second,
    )


def _ceiling(comparison: Comparison) -> str:
    high = [arm.name for arm in (comparison.control, comparison.treatment) if arm.top1.mean >= CEILING]
    if not high:
        return ""
    return (
        f" {' and '.join(high).capitalize()} scored {CEILING:g} % or more: so near the ceiling this task "
        "hides differences that a harder one would show."
    )

"""Results of a study: comparisons of its arms, and sentences about them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from localvit.studies.design import Study, StudyRun
from localvit.studies.execution import Record
from localvit.studies.reporting.statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    POWER,
    Difference,
    Estimate,
    estimate,
    holm,
    paired_difference,
    seeds_needed,
)

CEILING = 99.0
"""Accuracy in per cent above which there is too little room for a better arm."""
WORTH_SEEING = 0.5
"""Difference in points for which reports give the number of seeds needed; papers rarely show smaller ones."""

ClaimVerdict = Literal["reproduced", "contradicted", "not shown at this scale"]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Result of one arm.

    Attributes:
        name: Name of the arm.
        scores: Seed -> the metric on the test split, in per cent.
        mean: Mean over the seeds; `None` for fewer than two.
        parameters: Number of parameters of its model.
        macs: Multiply-accumulates for one image.
        training_speed: Images per second: the median over the runs.
        inference_speed: Images per second, measured alternately with the other arms; `None` if it was not.
        peak_memory: Largest peak memory of the runs, in bytes; `None` if it is not known.
    """

    name: str
    scores: dict[int, float]
    mean: Estimate | None
    parameters: int
    macs: int
    training_speed: float
    inference_speed: float | None
    peak_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Comparison of an arm with its control, over the seeds that both have.

    Attributes:
        arm, control: Names of the two.
        seeds: Seeds of the pairs.
        difference: Arm minus control, in points; `None` for fewer than two pairs.
        p_adjusted: p-value of the t-test, corrected for all contrasts of the study (Holm).
        seeds_needed: Seeds that would show a difference of `WORTH_SEEING`; `None` if above 1,000 or if there
            is no spread.
        claim: Verdict on the paper's claim; `None` without a claim about the arm, or without a difference.
    """

    arm: str
    control: str
    seeds: tuple[int, ...]
    difference: Difference | None
    p_adjusted: float | None = None
    seeds_needed: int | None
    claim: ClaimVerdict | None = None

    @property
    def shown(self) -> bool:
        """Return whether the difference is significant at 5 % after correction."""
        return self.p_adjusted is not None and self.p_adjusted < 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Results and comparisons of a study.

    Attributes:
        arms: Results of the arms with a record, in the study's order.
        contrasts: Contrasts of two arms that both have a record.
        test_images: Number of images that each score is measured on.
    """

    arms: tuple[ArmResult, ...]
    contrasts: tuple[Contrast, ...]
    test_images: int | None

    def arm(self, name: str) -> ArmResult:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def findings(
    study: Study, records: Mapping[StudyRun, Record], inference_speed: Mapping[str, float] | None = None
) -> Findings:
    """Compare the arms of a study that have records.

    Args:
        records: Records of the finished runs.
        inference_speed: Arm -> images per second.
    """
    arms = {
        arm.name: _arm_result(study, arm.name, records, (inference_speed or {}).get(arm.name))
        for arm in study.arms
        if any(run.arm == arm.name for run in records)
    }
    sizes = [record.test.images for record in records.values()]
    contrasts = [
        _contrast(arms[arm.name], arms[control.name], sizes)
        for arm, control in study.contrasts()
        if {arm.name, control.name} <= arms.keys()
    ]
    adjusted = holm([each.difference.p_value if each.difference else None for each in contrasts])
    expected = study.claim.expected if study.claim else {}
    return Findings(
        arms=tuple(arms.values()),
        contrasts=tuple(
            _judged(contrast, p_adjusted, expected.get(contrast.arm))
            for contrast, p_adjusted in zip(contrasts, adjusted, strict=True)
        ),
        test_images=sizes[0] if sizes else None,
    )


def verdict(contrast: Contrast, found: Findings) -> str:
    """Say in a sentence or two what was shown and what was not."""
    name, control, difference = contrast.arm, contrast.control, contrast.difference
    seeds = f"{len(contrast.seeds)} seed{'s' if len(contrast.seeds) != 1 else ''}"
    if difference is None:
        return f"{name} against {control}: no result with {seeds}; at least 2 are needed."
    mean, several = difference.estimate.mean, len(found.contrasts)
    corrected = f" after correction for {several} comparisons" if several > 1 else ""
    numbers = (
        f"{mean:+.2f} points (95 % interval {interval(difference.estimate, sign=True)}), "
        f"{p_text(contrast.p_adjusted)}{corrected}"
    )
    if contrast.p_adjusted is None:
        sentence = (
            f"{name} against {control}: undecided. The difference was {mean:+.2f} points with each of "
            f"{seeds}; without spread there is no t-test."
        )
    elif contrast.shown:
        sentence = f"{name} is {'better' if mean > 0 else 'worse'} than {control}: {numbers}, {seeds}."
    else:
        needed = contrast.seeds_needed or f"more than {MOST_SEEDS:,}"
        sentence = (
            f"{name} and {control} are not distinguishable with {seeds}: {numbers}. "
            f"A true difference below {difference.detectable or 0:.2f} points would have been missed more "
            f"than {100 * (1 - POWER):.0f} % of the time. Showing {WORTH_SEEING:g} points would take "
            f"{needed} seeds."
        )
    return sentence + _ceiling(found, (name, control))


def interval(value: Estimate, *, sign: bool = False) -> str:
    """Format an interval: `"0.50 to 1.75"`, or `"none: no spread"`."""
    if value.low is None or value.high is None:
        return "none: no spread"
    form = "+.2f" if sign else ".2f"
    return f"{value.low:{form}} to {value.high:{form}}"


def p_text(p_value: float | None) -> str:
    """Format a p-value: `"p = 0.013"`, `"p < 0.001"`, or `"p undefined"`."""
    if p_value is None:
        return "p undefined"
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _arm_result(
    study: Study, name: str, records: Mapping[StudyRun, Record], inference_speed: float | None
) -> ArmResult:
    own = {run.seed: record for run, record in records.items() if run.arm == name}
    first = next(iter(own.values()))
    scores = {seed: float(getattr(record.test, study.metric)) for seed, record in own.items()}
    memory = [record.peak_memory for record in own.values() if record.peak_memory is not None]
    return ArmResult(
        name=name,
        scores=scores,
        mean=estimate(list(scores.values()), (0.0, 100.0)) if len(scores) > 1 else None,
        parameters=first.parameters,
        macs=first.macs,
        training_speed=statistics.median(record.images_per_second for record in own.values()),
        inference_speed=inference_speed,
        peak_memory=max(memory, default=None),
    )


def _contrast(arm: ArmResult, control: ArmResult, sizes: Sequence[int]) -> Contrast:
    """Compare two arms by their numbers of correct images; `sizes` are those of all test splits."""
    seeds = tuple(seed for seed in arm.scores if seed in control.scores)
    difference = None
    if len(seeds) > 1:
        images = math.lcm(*sizes)  # equal sizes, unless an arm changes the split
        own, other = ([round(each.scores[seed] * images / 100) for seed in seeds] for each in (arm, control))
        difference = paired_difference(own, other, images)
    varies = difference is not None and difference.p_value is not None
    return Contrast(
        arm=arm.name,
        control=control.name,
        seeds=seeds,
        difference=difference,
        seeds_needed=seeds_needed(difference.estimate.sd, WORTH_SEEING) if difference and varies else None,
    )


def _judged(contrast: Contrast, p_adjusted: float | None, expected: str | None) -> Contrast:
    """Return the contrast with its corrected p-value, and with a verdict if there is a claim about it."""
    made = dataclasses.replace(contrast, p_adjusted=p_adjusted)
    if expected is None or made.difference is None:
        return made
    agrees = (made.difference.estimate.mean > 0) == (expected == "better")
    decided: ClaimVerdict = "reproduced" if agrees else "contradicted"
    return dataclasses.replace(made, claim=decided if made.shown else "not shown at this scale")


def _ceiling(found: Findings, names: tuple[str, str]) -> str:
    means = {name: mean.mean for name in names if (mean := found.arm(name).mean) is not None}
    high = [f"{name} {mean:.1f} %" for name, mean in means.items() if mean >= CEILING]
    if not high:
        return ""
    return f" Near the ceiling ({', '.join(high)}) this task may hide differences that a harder one shows."

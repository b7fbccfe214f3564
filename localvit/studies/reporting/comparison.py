"""Results of a study: comparisons of its arms, and sentences about them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    p_adjusted: float | None
    seeds_needed: int | None
    claim: ClaimVerdict | None

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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the verdicts."""
        values = dataclasses.asdict(self)
        return {**values, "verdicts": [verdict(contrast, self) for contrast in self.contrasts]}

    def arm(self, name: str) -> ArmResult:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def findings(
    study: Study, records: Mapping[StudyRun, Record], inference_speed: Mapping[str, float] | None = None
) -> Findings:
    """Compare the arms of a study that have records.

    Args:
        study: The study.
        records: Records of its finished runs.
        inference_speed: Arm -> images per second.
    """
    arms = {
        arm.name: _arm_result(study, arm.name, records, (inference_speed or {}).get(arm.name))
        for arm in study.arms
        if any(run.arm == arm.name for run in records)
    }
    sizes = [record.test.images for record in records.values()]
    pairs = [(arms[a.name], arms[c.name]) for a, c in study.contrasts() if {a.name, c.name} <= arms.keys()]
    common = [tuple(s for s in study.seeds if s in arm.scores and s in other.scores) for arm, other in pairs]
    differences = [_difference(*pair, seeds, sizes) for pair, seeds in zip(pairs, common, strict=True)]
    adjusted = holm([d.p_value if d else None for d in differences])
    contrasts = [
        _contrast(study, (arm.name, control.name), seeds, difference, p_adjusted)
        for (arm, control), seeds, difference, p_adjusted in zip(
            pairs, common, differences, adjusted, strict=True
        )
    ]
    return Findings(
        arms=tuple(arms.values()), contrasts=tuple(contrasts), test_images=sizes[0] if sizes else None
    )


def verdict(contrast: Contrast, found: Findings) -> str:
    """Say in a sentence or two what was shown and what was not."""
    name, control, difference = contrast.arm, contrast.control, contrast.difference
    seeds = f"{len(contrast.seeds)} seed{'s' if len(contrast.seeds) != 1 else ''}"
    if difference is None:
        return f"{name} against {control}: no result with {seeds}; at least 2 are needed."
    mean = difference.estimate.mean
    found_text = f"{points(mean, sign=True)} (95 % interval {interval(difference.estimate, sign=True)})"
    if difference.p_value is None or contrast.p_adjusted is None:
        sentence = (
            f"{name} against {control}: undecided. The difference was {points(mean, sign=True)} with each of "
            f"{seeds}; without spread there is no t-test."
        )
    elif contrast.shown:
        sentence = (
            f"{name} is {'better' if mean > 0 else 'worse'} than {control}: {found_text}, "
            f"{p_text(contrast.p_adjusted)}{_corrected(found)}, {seeds}."
        )
    else:
        sentence = (
            f"{name} and {control} are not distinguishable with {seeds}: {found_text}, "
            f"{p_text(contrast.p_adjusted)}{_corrected(found)}. "
            f"A true difference below {points(difference.detectable or 0)} would have been missed more than "
            f"{100 * (1 - POWER):.0f} % of the time. Showing {WORTH_SEEING:g} points would take "
            f"{_needed(contrast)}."
        )
    return sentence + _ceiling(found, (name, control))


def points(value: float, *, sign: bool = False) -> str:
    """Format points: `"1.25 points"`."""
    return f"{value:{'+' if sign else ''}.2f} points"


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
        mean=estimate(list(scores.values())) if len(scores) > 1 else None,
        parameters=first.parameters,
        macs=first.macs,
        training_speed=statistics.median(record.images_per_second for record in own.values()),
        inference_speed=inference_speed,
        peak_memory=max(memory, default=None),
    )


def _difference(
    arm: ArmResult, control: ArmResult, seeds: Sequence[int], sizes: Sequence[int]
) -> Difference | None:
    """Compare two arms by their numbers of correct images; `sizes` are those of all test splits."""
    if len(seeds) < 2:
        return None
    images = math.lcm(*sizes)  # equal sizes, unless an arm changes the split
    own, other = ([round(each.scores[seed] * images / 100) for seed in seeds] for each in (arm, control))
    return paired_difference(own, other, images)


def _contrast(
    study: Study,
    pair: tuple[str, str],
    seeds: tuple[int, ...],
    difference: Difference | None,
    p_adjusted: float | None,
) -> Contrast:
    spread = difference is not None and difference.p_value is not None
    made = Contrast(
        arm=pair[0],
        control=pair[1],
        seeds=seeds,
        difference=difference,
        p_adjusted=p_adjusted,
        seeds_needed=seeds_needed(difference.estimate.sd, WORTH_SEEING) if difference and spread else None,
        claim=None,
    )
    expected = study.claim.expected.get(pair[0]) if study.claim else None
    if expected is None or difference is None:
        return made
    agrees = (difference.estimate.mean > 0) == (expected == "better")
    decided: ClaimVerdict = "reproduced" if agrees else "contradicted"
    return dataclasses.replace(made, claim=decided if made.shown else "not shown at this scale")


def _corrected(found: Findings) -> str:
    return f" after correction for {len(found.contrasts)} comparisons" if len(found.contrasts) > 1 else ""


def _needed(contrast: Contrast) -> str:
    number = contrast.seeds_needed
    return f"more than {MOST_SEEDS:,} seeds" if number is None else f"{number} seeds"


def _ceiling(found: Findings, names: tuple[str, str]) -> str:
    arms = [found.arm(name) for name in names]
    means = {arm.name: arm.mean.mean for arm in arms if arm.mean is not None}
    high = [f"{name} {mean:.1f} %" for name, mean in means.items() if mean >= CEILING]
    if not high:
        return ""
    return f" Near the ceiling ({', '.join(high)}) this task may hide differences that a harder one shows."

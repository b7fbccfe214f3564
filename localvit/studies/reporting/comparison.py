"""From the records of a study to the numbers that are reported and the sentences that they allow."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localvit.studies.design import Run, Study
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
"""Of the metric, in per cent, from which on an arm leaves too little room for another to be better."""
WORTH_SEEING = 0.5
"""Points for which the number of seeds needed is told: about the smallest gain that papers report."""

ClaimVerdict = Literal["reproduced", "contradicted", "not shown at this scale"]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What the runs of an arm say.

    Attributes:
        name: Of the arm.
        scores: Seed -> the metric on the reported split, in per cent.
        mean: Over the seeds; ``None`` for fewer than two.
        parameters: Of its model.
        macs: Multiply-accumulates for one image.
        training_speed: Images per second: the median over the runs.
        inference_speed: Images per second, measured in turns with the other arms; ``None`` if it was not.
        peak_memory: The largest of the runs, in bytes; ``None`` where it is not known.
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
    """An arm against its control, over the seeds that both have.

    Attributes:
        arm, control: Their names.
        seeds: Of the pairs.
        difference: Arm minus control, in points; ``None`` for fewer than two pairs.
        p_adjusted: The p-value of the t-test, corrected for all contrasts of the study (Holm).
        seeds_needed: To see a difference of `WORTH_SEEING`; ``None`` if above 1,000 or there is no spread.
        claim: What that says about the paper's claim; ``None`` where it claims nothing, or for no pairs.
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
        """Whether there is a difference, at 5 % after correction."""
        return self.p_adjusted is not None and self.p_adjusted < 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study shows.

    Attributes:
        arms: Those with a record, in the study's order.
        contrasts: Of those whose both arms have a record.
        test_images: Number of pictures that each score is measured on.
    """

    arms: tuple[ArmResult, ...]
    contrasts: tuple[Contrast, ...]
    test_images: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the verdicts."""
        values = dataclasses.asdict(self)
        return {**values, "verdicts": [verdict(contrast, self) for contrast in self.contrasts]}

    def arm(self, name: str) -> ArmResult:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def findings(
    study: Study, records: Mapping[Run, Record], inference_speed: Mapping[str, float] | None = None
) -> Findings:
    """What the records of a study say, however many of its runs are there.

    Args:
        study: The study.
        records: Of its runs.
        inference_speed: Arm -> images per second.
    """
    arms = {
        arm.name: _arm_result(study, arm.name, records, (inference_speed or {}).get(arm.name))
        for arm in study.arms
        if any(run.arm == arm.name for run in records)
    }
    pairs = [(a.name, c.name) for a, c in study.contrasts() if a.name in arms and c.name in arms]
    seeds = [tuple(s for s in study.seeds if s in arms[a].scores and s in arms[c].scores) for a, c in pairs]
    differences = [
        paired_difference(*([arms[name].scores[s] for s in of] for name in pair)) if len(of) > 1 else None
        for pair, of in zip(pairs, seeds, strict=True)
    ]
    adjusted = holm([d.p_value if d else None for d in differences])
    contrasts = [
        _contrast(study, *values) for values in zip(pairs, seeds, differences, adjusted, strict=True)
    ]
    images = next((record.test.images for record in records.values()), None)
    return Findings(arms=tuple(arms.values()), contrasts=tuple(contrasts), test_images=images)


def verdict(contrast: Contrast, found: Findings) -> str:
    """What was shown and what was not, in a sentence or two."""
    name, control, difference = contrast.arm, contrast.control, contrast.difference
    seeds = f"{len(contrast.seeds)} seed{'s' if len(contrast.seeds) != 1 else ''}"
    if difference is None:
        return f"{name} against {control}: nothing to say with {seeds}; at least 2 are needed."
    mean = difference.estimate.mean
    if difference.p_value is None or contrast.p_adjusted is None:
        sentence = (
            f"{name} against {control}: undecided; with each of {seeds} it scored {points(mean, sign=True)}, "
            "and differences without any spread give no t-test."
        )
    elif contrast.shown:
        sentence = (
            f"{name} is {'better' if mean > 0 else 'worse'} than {control}: {points(mean, sign=True)} "
            f"(95 % interval {interval(difference.estimate, sign=True)}), "
            f"{p_text(contrast.p_adjusted)}{_corrected(found)}, {seeds}."
        )
    else:
        sentence = (
            f"{name} and {control} are not distinguishable with {seeds}: {points(mean, sign=True)} "
            f"(95 % interval {interval(difference.estimate, sign=True)}), "
            f"{p_text(contrast.p_adjusted)}{_corrected(found)}. "
            f"A true difference below {points(difference.detectable or 0)} would have been missed more often "
            f"than {100 * (1 - POWER):.0f} % of the time; {_needed(contrast)} would be needed to see "
            f"{WORTH_SEEING:g}."
        )
    return sentence + _ceiling(found, (name, control))


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


def _arm_result(
    study: Study, name: str, records: Mapping[Run, Record], inference_speed: float | None
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
    return (
        f" So near the ceiling ({', '.join(high)}) this task hides differences that a harder one would show."
    )

"""The tables of a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from localvit.cost import giga
from localvit.locality import LocalityConfig
from localvit.studies.design import Claim
from localvit.studies.reporting.comparison import ArmResult, Contrast, interval, p_text, points
from localvit.studies.reporting.page import Table
from localvit.studies.reporting.report import Report
from localvit.studies.reporting.statistics import Estimate


def result_table(report: Report) -> Table:
    """An arm in each line: its metric, and its difference from its control."""
    found = report.findings
    contrasts = {contrast.arm: contrast for contrast in found.contrasts}
    head = ["", f"test {report.study.metric}, % [95 % interval]", "against", "difference", "p (corrected)"]
    return Table(
        head, [[arm.name, _score(arm), *_contrast_cells(contrasts.get(arm.name))] for arm in found.arms]
    )


def result_notes(report: Report) -> str:
    """What the columns of the main table mean."""
    return (
        "Difference: mean of the paired differences, in points, with its 95 % interval. p: paired t-test, "
        f"corrected for {len(report.findings.contrasts)} comparisons (Holm)."
    )


def cost_table(report: Report) -> Table:
    """What each arm's model costs."""
    head = ["", "parameters", "MACs", "tokens", "training, images/s", "inference, images/s", "peak memory"]
    results = {arm.name: arm for arm in report.findings.arms}
    rows = []
    for name, facts in report.facts.arms.items():
        result = results.get(name)
        memory = result.peak_memory if result else None
        rows.append(
            [
                name,
                f"{result.parameters if result else facts.parameters:,}",
                giga(result.macs if result else facts.macs),
                _or_dash(facts.tokens, "{:,}"),
                _or_dash(result and result.training_speed, "{:,.0f}"),
                _or_dash(result and result.inference_speed, "{:,.0f}"),
                _or_dash(memory and memory / 1e6, "{:,.0f} MB"),
            ]
        )
    return Table(head, rows)


def cost_notes(report: Report) -> str:
    text = "Training: median over the runs, loading included, with other runs beside it."
    if report.speed_machine:
        text += f" Inference: the arms in turns, {report.speed_machine}."
    return text


def differing_fields(report: Report) -> Table:
    """The fields in which each arm's configuration differs from its control's."""
    rows = [
        [name, report.study.control_of(report.study.arm(name)), path, field_value(there), field_value(here)]
        for name, facts in report.facts.arms.items()
        for path, (there, here) in facts.differs.items()
    ]
    return Table(["arm", "against", "field", "there", "here"], rows, words=True)


def claim_table(report: Report, claim: Claim) -> Table:
    """What was claimed of each arm, and what came out."""
    contrasts = {contrast.arm: contrast for contrast in report.findings.contrasts}
    rows = []
    for arm in report.study.arms:
        expected, reported = claim.expected.get(arm.name), claim.reported.get(arm.name)
        if expected is None and reported is None:
            continue
        contrast = contrasts.get(arm.name)
        here = contrast.difference.estimate.mean if contrast and contrast.difference else None
        rows.append(
            [
                arm.name,
                f"{expected} than {report.study.control_of(arm)}" if expected else "-",
                _or_dash(reported, "{:g}"),
                _or_dash(here, "{:+.2f}"),
                (contrast.claim if contrast and contrast.claim else "not run") if expected else "-",
            ]
        )
    head = ["arm", "claimed", "published top-1, %", "difference here", "verdict"]
    return Table(head, rows, words=True)


def power_table(report: Report) -> Table:
    head = [
        "",
        "seeds",
        "sd of differences",
        "effect size",
        "p (t-test)",
        "p (sign flips)",
        "detectable",
        "seeds for 0.5",
    ]
    rows = []
    for contrast in report.findings.contrasts:
        found = contrast.difference
        cells = ["-"] * 5
        if found is not None:
            cells = [
                f"{found.estimate.sd:.2f}",
                _or_dash(found.effect_size, "{:+.2f}"),
                p_text(found.p_value),
                p_text(found.permutation_p),
                "-" if found.detectable is None else points(found.detectable),
            ]
        rows.append([contrast.arm, str(len(contrast.seeds)), *cells, _or_dash(contrast.seeds_needed, "{}")])
    return Table(head, rows)


def _score(arm: ArmResult) -> str:
    if arm.mean is None:
        return f"{statistics.fmean(arm.scores.values()):.2f} [one seed]"
    return _with_interval(arm.mean)


def _contrast_cells(contrast: Contrast | None) -> list[str]:
    if contrast is None:
        return ["-", "-", "-"]
    if contrast.difference is None:
        return [contrast.control, "-", "-"]
    difference = _with_interval(contrast.difference.estimate, sign=True)
    return [contrast.control, difference, p_text(contrast.p_adjusted)]


def _with_interval(value: Estimate, *, sign: bool = False) -> str:
    return f"{value.mean:{'+.2f' if sign else '.2f'}} [{interval(value, sign=sign)}]"


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def field_value(value: Any) -> str:
    """A field's value as a reader understands it; `{}` says little about locality."""
    if isinstance(value, Mapping) and not value:
        chosen = LocalityConfig().resolve().to_dict()
        return "the paper's: " + ", ".join(f"{name} {v}" for name, v in chosen.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {v}" for name, v in value.items())
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

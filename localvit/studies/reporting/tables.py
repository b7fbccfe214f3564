"""Tables of a report, and the sentences that belong to them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import table as rich_table
from rich.text import Text

from localvit.config import TrainConfig
from localvit.cost import giga
from localvit.errors import printable
from localvit.locality import LocalityConfig
from localvit.studies.design import Claim, Metric, Study
from localvit.studies.execution import Tuning
from localvit.studies.reporting.comparison import WORTH_SEEING, ArmResult, Contrast, interval, p_text
from localvit.studies.reporting.report import StudyReport
from localvit.studies.reporting.statistics import Estimate

METRICS: dict[Metric, str] = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}


@dataclass(frozen=True)
class Table:
    """A table; `words` is true if its cells contain words, which may wrap."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        lines = (self.head, ["---"] * len(self.head), *self.rows)
        return "\n".join(
            "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
        )

    def rich(self, title: str) -> rich_table.Table:
        """Return the table for a terminal."""
        made = rich_table.Table(title=Text(printable(title)), title_justify="left", title_style="bold")
        for i, name in enumerate(self.head):
            made.add_column(name, justify="right" if i and not self.words else "left")
        for row in self.rows:
            made.add_row(*map(Text, row))  # as Text, so that brackets are not markup
        return made


def result_table(report: StudyReport) -> Table:
    """Return the main table: the score of each arm, and its difference from its control."""
    found = report.findings
    contrasts = {contrast.arm: contrast for contrast in found.contrasts}
    rows = [[arm.name, _score(arm), *_contrast_cells(contrasts.get(arm.name))] for arm in found.arms]
    score = f"test {METRICS[report.study.metric]}, % [95 % interval]"
    return Table(["arm", score, "control", "difference, points", "p"], rows)


def result_notes(report: StudyReport) -> str:
    """Explain the columns of the main table."""
    number = len(report.findings.contrasts)
    corrected = f", corrected for {number} comparisons (Holm)" if number > 1 else ""
    return f"Difference: mean of the paired differences with its 95 % interval. p: paired t-test{corrected}."


def cost_table(report: StudyReport) -> Table:
    """Return the table of the cost of each arm's model."""
    results = {arm.name: arm for arm in report.findings.arms}
    rows = []
    for name, summary in report.summary.arms.items():
        result = results.get(name)
        parameters, macs = (result or summary).parameters, (result or summary).macs
        memory = result.peak_memory if result else None
        speeds = (result.training_speed, result.inference_speed) if result else (None, None)
        cells = [f"{parameters:,}", giga(macs), _or_dash(summary.tokens, "{:,}")]
        cells += [_or_dash(speed, "{:,.0f}") for speed in speeds]
        rows.append([name, *cells, _or_dash(memory and memory / 1e6, "{:,.0f} MB")])
    head = ["arm", "parameters", "MACs per image", "tokens"]
    return Table([*head, "training, images/s", "inference, images/s", "peak memory"], rows)


def differing_fields(report: StudyReport) -> Table:
    """List the fields in which each arm's configuration differs from its control's."""
    rows = [
        [name, report.study.control_of(report.study.arm(name)), path, field_value(there), field_value(here)]
        for name, summary in report.summary.arms.items()
        for path, (there, here) in summary.differs.items()
    ]
    return Table(["arm", "control", "field", "in the control", "in the arm"], rows, words=True)


def confounders(report: StudyReport) -> dict[str, list[str]]:
    """Group the sentences about other differences by the arms that they apply to: names -> sentences."""
    arms: dict[str, list[str]] = {}
    for name, summary in report.summary.arms.items():
        for sentence in summary.confounders:
            arms.setdefault(sentence, []).append(name)
    groups: dict[str, list[str]] = {}
    for sentence, names in arms.items():
        groups.setdefault(", ".join(names), []).append(sentence)
    return groups


def claim_table(report: StudyReport, claim: Claim) -> Table:
    """Compare the claim about each arm with its result."""
    contrasts = {contrast.arm: contrast for contrast in report.findings.contrasts}
    rows = []
    for arm in report.study.arms:
        expected, reported = claim.expected.get(arm.name), claim.reported.get(arm.name)
        if expected is None and reported is None:
            continue
        contrast = contrasts.get(arm.name)
        here = contrast.difference.estimate.mean if contrast and contrast.difference else None
        judged = (contrast.claim if contrast and contrast.claim else "not run") if expected else "-"
        claimed = f"{expected} than {report.study.control_of(arm)}" if expected else "-"
        rows.append([arm.name, claimed, _or_dash(reported, "{:g}"), _or_dash(here, "{:+.2f}"), judged])
    head = ["arm", "claim", "published top-1, %", "difference here, points", "verdict"]
    return Table(head, rows, words=True)


def power_table(report: StudyReport) -> Table:
    """Return the table of the differences that each comparison could have found with its seeds."""
    rows = []
    for contrast in report.findings.contrasts:
        cells, found = ["-"] * 5, contrast.difference
        if found is not None:
            tests = [_p_cell(found.p_value), _p_cell(found.permutation_p)]
            cells = [f"{found.estimate.sd:.2f}", _or_dash(found.effect_size, "{:+.2f}"), *tests]
            cells.append(_or_dash(found.detectable, "{:.2f}"))
        rows.append([contrast.arm, str(len(contrast.seeds)), *cells, _or_dash(contrast.seeds_needed, "{}")])
    head = ["arm", "seeds", "sd of differences, points", "effect size", "p, t-test", "p, sign flips"]
    return Table([*head, "smallest detectable, points", f"seeds for {WORTH_SEEING:g} points"], rows)


def tuning_table(tuning: Tuning) -> Table:
    """Return the table of validation accuracy by learning rate and arm; `*` marks the chosen rates."""
    rows = []
    for i, rate in enumerate(tuning.grid):
        cells = [
            _mean_and_each(by_rate[i]) + (" *" if tuning.chosen[name] == rate else "")
            for name, by_rate in tuning.validation_top1.items()
        ]
        rows.append([f"{rate:g}", *cells])
    return Table(["learning rate", *tuning.validation_top1], rows)


def tuning_text(tuning: Tuning, base: TrainConfig) -> str:
    """Say how the learning rates were chosen, and whether `base` is the setting that they were chosen for."""
    text = (
        "Each arm's learning rate was chosen from one grid by the mean validation top-1 accuracy (%) of the "
        f"best epoch, with seeds {', '.join(map(str, tuning.seeds))}. The test split was not used. Command: "
        f"{tuning.command}. An asterisk marks the chosen rate; the value of each seed is in parentheses."
    )
    if tuning.at_border:
        text += f" The best rate is at the end of the grid for {', '.join(tuning.at_border)}."
    departures = tuning.departures(base)
    if departures:
        listed = "; ".join(
            f"{path} {field_value(old)}, here {field_value(new)}" for path, (old, new) in departures.items()
        )
        text += f" They were tuned for another setting: {listed}."
    return text


def untuned_text(study: Study) -> str:
    """Say which learning rates a study without tuning uses."""
    rates = {arm.name: study.config(arm, study.seeds[0]).optim.lr for arm in study.arms}
    if len(set(rates.values())) > 1:
        return "Not tuned here: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()) + "."
    return (
        f"Not tuned: every arm trains with learning rate {next(iter(rates.values())):g}, which may suit some "
        "arms better than others."
    )


def field_value(value: Any) -> str:
    """Write a field's value for readers: `{}` is the paper's locality; `None` is not the value `"none"`."""
    if isinstance(value, Mapping) and not value:
        chosen = LocalityConfig().resolve().to_dict()
        return "the paper's: " + ", ".join(f"{name} {v}" for name, v in chosen.items())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {field_value(v)}" for name, v in value.items())
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def plain(text: str) -> str:
    """Return a text as one line of Markdown, with HTML tags escaped."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\<", " ".join(text.split()))


def plural(number: int, noun: str) -> str:
    """Write `1 seed`, `2 seeds`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
    return [contrast.control, difference, _p_cell(contrast.p_adjusted)]


def _p_cell(p_value: float | None) -> str:
    return p_text(p_value).removeprefix("p ").removeprefix("= ")


def _mean_and_each(scores: Sequence[float | None]) -> str:
    numbers = [score for score in scores if score is not None]
    if len(numbers) < len(scores):
        return "failed"
    return f"{statistics.fmean(numbers):.2f} ({', '.join(f'{score:.1f}' for score in numbers)})"


def _with_interval(value: Estimate, *, sign: bool = False) -> str:
    return f"{value.mean:{'+.2f' if sign else '.2f'}} [{interval(value, sign=sign)}]"


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)

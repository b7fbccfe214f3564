"""A comparison as text for the terminal, Markdown, and a page that needs no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from localvit.locality.config import LocalityConfig
from localvit.studies import figures
from localvit.studies.comparison import Comparison, interval, p_text, points, verdict
from localvit.studies.records import Record
from localvit.studies.statistics import Estimate
from localvit.studies.study import Study
from localvit.studies.tuning import Tuning, tuning_table
from localvit.training import to_dict
from localvit.training.identity import differences
from localvit.training.output import versions, write_atomically

Rows = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison with all that a reader needs to judge it.

    Attributes:
        study: What was compared.
        comparison: What came out.
        records: Arm -> its records, in the order of the seeds.
        treatment: The trained treatment of the first seed, for pictures of its kernels.
        confounders: Sentences (`confounders.confounders`).
        dead: Paths of feed-forward networks of the treatment that no output depends on.
        tuning: Of the learning rates; ``None`` if they were not tuned.
        command: That repeats it.
        machine: On which throughput was measured, in words.
    """

    study: Study
    comparison: Comparison
    records: Mapping[str, Sequence[Record]]
    treatment: nn.Module
    confounders: Sequence[str]
    dead: Sequence[str]
    tuning: Tuning | None
    command: str
    machine: str

    def setting(self) -> str:
        """What was trained on what, in a line."""
        base, seeds = self.study.base, len(self.study.seeds)
        sizes = ", ".join(f"{name} {value}" for name, value in base.model.args.items())
        return (
            f"{base.model.name} ({sizes}) on {base.data.train}; {base.epochs} epochs; {seeds} paired seeds, "
            "each fixing split, order and the initial values of shared weights; "
            f"{self.comparison.test_images:,} test images."
        )

    def result(self) -> tuple[list[str], Rows]:
        """Head and rows of the main table."""
        control, treatment = self.comparison.control, self.comparison.treatment
        head = ["", "test top-1, % [95 % interval]", "parameters", "MACs", "images/s"]
        rows = [
            [
                arm.name,
                _with_interval(arm.top1),
                f"{arm.parameters:,}",
                _giga(arm.macs),
                f"{arm.images_per_second:,.0f}",
            ]
            for arm in (control, treatment)
        ]
        ratios = [
            f"{getattr(treatment, name) / getattr(control, name) - 1:+.1%}"
            for name in ("parameters", "macs", "images_per_second")
        ]
        change = _with_interval(self.comparison.difference.estimate, sign=True)
        return head, [*rows, ["difference", change, *ratios]]

    def result_notes(self) -> str:
        """What belongs to the main table: test, power, machine."""
        found = self.comparison.difference
        detectable = "undefined" if found.detectable is None else points(found.detectable)
        return (
            f"Paired t-test: {p_text(found.p_value)}. Smallest difference that these seeds could have shown "
            f"(5 % level, power 80 %): {detectable}. Throughput: inference, arms in turns, {self.machine}."
        )

    def differing_fields(self) -> tuple[list[str], Rows]:
        """Head and rows of the fields in which the arms' configurations differ."""
        configs = [to_dict(self.study.config(arm, self.study.seeds[0])) for arm in self.study.arms]
        rows = [[path, *map(_value, values)] for path, values in differences(*configs).items()]
        return ["field", *(arm.name for arm in self.study.arms)], rows

    def tuning_text(self) -> str:
        """Where the learning rates are from, and how far that carries."""
        if self.tuning is None:
            rate = self.study.base.optim.lr
            return f"Not tuned: both arms train with {rate:g}, which may suit one of them better."
        text = (
            "Each arm's was chosen by mean validation top-1 (the test split was not used) from one grid, "
            f"with seeds {', '.join(map(str, self.tuning.seeds))}: {self.tuning.command}. Chosen rates are "
            "marked with *; in brackets each seed's value."
        )
        if self.tuning.at_border:
            text += f" The grid ended at the best value of {', '.join(self.tuning.at_border)}."
        departures = self.tuning.departures(self.study.base)
        if departures:
            listed = "; ".join(
                f"{path} {_value(old)}, here {_value(new)}" for path, (old, new) in departures.items()
            )
            text += f" They were tuned for another setting: {listed}."
        return text

    def versions_text(self) -> str:
        """Versions and machines that the runs were made with; more than one is said so."""
        runs = [record for of_arm in self.records.values() for record in of_arm]
        made = {", ".join(f"{name} {v}" for name, v in run.versions.items()) for run in runs}
        made |= {", ".join(f"{name} {v}" for name, v in versions().items())}
        mixed = "Mixed versions: " if len(made) > 1 else ""
        machines = "; ".join(sorted({run.machine for run in runs}))
        return f"{mixed}{' / '.join(sorted(made))}. Trained on: {machines}."

    def data_notes(self) -> str:
        """What was held out of what, as the first run has it."""
        first = next(iter(self.records.values()))[0]
        return f"Splits of seed {self.study.seeds[0]}: {'; '.join(first.notes) or 'as the data brings them'}."


def as_rich(report: Report) -> Table:
    """The main table for a terminal."""
    head, rows = report.result()
    table = Table(title=report.study.question, title_justify="left", title_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row), end_section=row is rows[-2])  # Text: brackets are no markup here
    return table


def write_report(report: Report, folder: Path) -> None:
    """Write `report.html`, `report.md` and `summary.json`."""
    summary: dict[str, Any] = {
        **report.comparison.to_dict(),
        "study": report.study.to_dict(),
        "confounders": list(report.confounders),
        "command": report.command,
        "machine": report.machine,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(folder / "report.md", as_markdown(report))
    write_atomically(folder / "report.html", as_html(report))


def as_markdown(report: Report) -> str:
    """The report without its pictures."""
    parts = [
        f"# {report.study.question}",
        report.setting(),
        f"**{verdict(report.comparison)}**",
        _markdown_table(*report.result()),
        report.result_notes(),
        "## How the arms differ",
        _markdown_table(*report.differing_fields()),
        "\n".join(f"- {sentence}" for sentence in report.confounders),
        "## Learning rates",
        report.tuning_text(),
        _markdown_table(*tuning_table(report.tuning)) if report.tuning else "",
        "## To repeat it",
        f"    {report.command}",
        report.versions_text(),
        report.data_notes(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_html(report: Report) -> str:
    """One page with everything in it; it loads nothing."""
    text = {
        "title": report.study.question,
        "question": report.study.question,
        "setting": report.setting(),
        "verdict": verdict(report.comparison),
        "result_notes": report.result_notes(),
        "curves_caption": "Validation top-1 by epoch: mean over the seeds; the band is lowest to highest.",
        "pairs_caption": "Test top-1 of each seed, pairs joined; diamonds are means with 95 % intervals.",
        "tuning_text": report.tuning_text(),
        "command": report.command,
        "versions": report.versions_text(),
        "data_notes": report.data_notes(),
    }
    markup = {
        "result": _html_table(*report.result()),
        "curves": figures.learning_curves(report.records),
        "pairs": figures.paired_scores(report.comparison),
        "kernels": _kernels(report),
        "differences": _html_table(*report.differing_fields()),
        "confounders": "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in report.confounders) + "</ul>",
        "tuning": _html_table(*tuning_table(report.tuning)) if report.tuning else "",
    }
    page = Template(resources.files("localvit.studies").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute({name: html.escape(value) for name, value in text.items()} | markup)


def _kernels(report: Report) -> str:
    drawn = figures.kernels(report.treatment, skip=report.dead)
    if not drawn:
        return ""
    left_out = f" {', '.join(report.dead)} is left out: no output depends on it." if report.dead else ""
    words = (
        f"Depth-wise kernels learned with seed {report.study.seeds[0]}: the 48 of largest norm, each scaled "
        f"to its largest weight (red positive, blue negative).{left_out}"
    )
    pictures = [
        f'<figure role="img" aria-label="Learned kernels of {html.escape(path)}">{picture}'
        f"<figcaption>{html.escape(path)}</figcaption></figure>"
        for path, picture in drawn.items()
    ]
    return f'<p class="small">{html.escape(words)}</p><div class="figures">{"".join(pictures)}</div>'


def _with_interval(value: Estimate, *, sign: bool = False) -> str:
    return f"{value.mean:{'+.2f' if sign else '.2f'}} [{interval(value, sign=sign)}]"


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.3g} G" if macs >= 1e8 else f"{macs / 1e6:.3g} M"


def _value(value: Any) -> str:
    """A field's value as a reader understands it; `{}` says little about locality."""
    if isinstance(value, Mapping) and not value:
        chosen = LocalityConfig().resolve().to_dict()
        return "the paper's: " + ", ".join(f"{name} {v}" for name, v in chosen.items())
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _markdown_table(head: Sequence[str], rows: Rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _html_table(head: Sequence[str], rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"

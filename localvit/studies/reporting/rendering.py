"""Rendering of a report to a self-contained page, Markdown and JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup, escape

from localvit.atomic import write_atomically, writing
from localvit.structure import plain, to_json, to_yaml
from localvit.studies.execution import Record
from localvit.studies.reporting import tables
from localvit.studies.reporting.comparison import verdict
from localvit.studies.reporting.figures import Figure, figures
from localvit.studies.reporting.report import StudyReport

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, changes of direction, and bytes of file names that are not UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Texts of one report."""

    html: str
    markdown: str
    summary: str

    @property
    def files(self) -> dict[str, str]:
        """File name -> text, as a study's folder has them."""
        return {"summary.json": self.summary, "report.md": self.markdown, "report.html": self.html}


def write_report(report: StudyReport) -> None:
    """Write `summary.json`, `report.md` and `report.html` into the study's folder, once all are rendered.

    Raises:
        WriteFailed: if a file cannot be written; the old one stays.
    """
    for name, text in render(report).files.items():
        path = report.folder / name
        with writing(path):
            write_atomically(path, text)


def render(report: StudyReport) -> Rendered:
    """Render a report in all its forms."""
    summary = {
        **plain(report.findings),
        "verdicts": verdicts(report),
        "study": report.study.to_dict(),
        "confounders": {name: list(arm.confounders) for name, arm in report.summary.arms.items()},
        "warnings": list(report.warnings),
        "command": report.command,
    }
    return Rendered(
        html=_render(report, "html", figures(report)),
        markdown=re.sub(r"\n{3,}", "\n\n", _render(report, "markdown", [])).strip() + "\n",
        summary=to_json(summary),
    )


def verdicts(report: StudyReport) -> list[str]:
    """Describe the result of every comparison in a sentence or two."""
    return [verdict(contrast, report.findings) for contrast in report.findings.contrasts]


def _render(report: StudyReport, form: str, drawn: Sequence[Figure]) -> str:
    environment = _environment(form)
    values = plain(report.study.base)
    shared = to_yaml({k: v for k, v in values.items() if k not in ("seed", "output")})
    text = environment.get_template("report.jinja").render(
        report=report,
        form=f"{form}.jinja",
        css=environment.get_template("page.css").render() if form == "html" else "",
        figures=drawn,
        origin=_origin(list(report.records.values())),
        shared=shared,
        tables=tables,
        verdicts=verdicts(report),
    )
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _environment(form: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("localvit.studies.reporting"),
        autoescape=form == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "unbroken": _unbroken, "plain": tables.plain}
    environment.globals["plural"] = tables.plural
    return environment


def _breakable(text: str) -> Markup:
    """Let a path wrap after its dots and underscores, and nowhere inside a word."""
    return Markup(re.sub(r"(?<=[._])(?=[a-z])", "<wbr>", str(escape(text))))


def _unbroken(text: str) -> str:
    """Keep a number on the line of its sign and unit: `p < 0.001`, `95 %`; escaped text stays so."""
    return type(text)(re.sub(r"(?<=\d) (?=%)|(?<=\bp) (?=[<=])|(?<=[<=]) (?=\d)", "\N{NO-BREAK SPACE}", text))


def _origin(records: Sequence[Record]) -> dict[str, str] | None:
    """Describe the versions and machines of the runs."""
    if not records:
        return None
    return {
        "versions": " / ".join(sorted({_made_with(record) for record in records})),
        "machines": "; ".join(sorted({record.machine for record in records})),
        "hours": f"{sum(record.seconds for record in records) / 3600:.2f}",
        "splits": "; ".join(records[0].notes) or "as the data has them",
    }


def _made_with(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"{versions}, commit {record.commit[:12]}" if record.commit else versions

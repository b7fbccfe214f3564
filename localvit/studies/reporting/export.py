"""Results of a study for other programs and papers, and two studies side by side."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

from localvit.config import differences, identity_fields
from localvit.structure import plain
from localvit.studies.reporting.comparison import interval
from localvit.studies.reporting.report import StudyReport, read_report
from localvit.studies.reporting.statistics import unpaired_difference
from localvit.studies.reporting.tables import Table, result_table

_COLUMNS = (
    *("arm", "seed", "test_top1", "test_top5", "test_loss", "validation_top1", "best_epoch", "parameters"),
    *("macs", "seconds", "images_per_second", "peak_memory", "commit", "machine", "key"),
)


def export_study(folder: Path, form: Literal["csv", "latex", "markdown"]) -> str:
    """Write the results as text: `"csv"` has a line for each run, the other forms one for each arm.

    Raises:
        ConfigError: if the folder holds no study.
    """
    report = read_report(folder)
    if form == "csv":
        return _csv(report)
    table = result_table(report)
    return table.markdown() + "\n" if form == "markdown" else _latex(table)


def compare_studies(first: Path, second: Path) -> str:
    """Compare two studies: the fields in which their bases differ, and every arm that both have.

    Seeds are not paired between studies, so the intervals are Welch's.

    Raises:
        ConfigError: if a folder holds no study.
    """
    one, two = read_report(first), read_report(second)
    lines = [f"A: {first}: {one.study.question}", f"B: {second}: {two.study.question}"]
    lines += [f"warning ({name}): {w}" for name, r in (("A", one), ("B", two)) for w in r.warnings]
    differ = differences(identity_fields(one.study.base), identity_fields(two.study.base))
    lines += [f"base: {path}: {a!r} in A, {b!r} in B" for path, (a, b) in differ.items() if path != "seed"]
    rows = []
    for arm in one.findings.arms:
        other = next((each for each in two.findings.arms if each.name == arm.name), None)
        if other is None or arm.mean is None or other.mean is None:
            continue
        change = unpaired_difference(list(arm.scores.values()), list(other.scores.values()))
        words = "no spread" if change is None else f"{change.mean:+.2f} [{interval(change, sign=True)}]"
        rows.append([arm.name, f"{arm.mean.mean:.2f}", f"{other.mean.mean:.2f}", words])
    table = Table(["", f"A, {one.study.metric} %", f"B, {two.study.metric} %", "B - A [95 % interval]"], rows)
    return "\n".join([*lines, "", table.markdown() if rows else "no arm has two seeds in both"])


def _csv(report: StudyReport) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run, record in report.records.items():
        test = {f"test_{name}": getattr(record.test, name) for name in ("top1", "top5", "loss")}
        own = {"arm": run.arm, "seed": run.seed, "validation_top1": record.validation.top1}
        writer.writerow(plain(record) | test | own)
    return file.getvalue()


def _latex(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join(cell.replace("%", r"\%").replace("_", r"\_") for cell in cells) + r" \\"

    columns = "l" + "r" * (len(table.head) - 1)
    body = [line(list(row)) for row in table.rows]
    inner = [r"\toprule", line(list(table.head)), r"\midrule", *body, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *inner, r"\end{tabular}"]) + "\n"

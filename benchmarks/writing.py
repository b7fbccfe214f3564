"""Helpers of the benchmarks: a result written as a table and as JSON."""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def write(
    folder: Path,
    name: str,
    hardware: str,
    about: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[dict[str, object]],
    **facts: object,
) -> Path:
    """Show a table, and write it to FOLDER/NAME_HARDWARE_DATE.md and the numbers to the same .json.

    Args:
        folder: Where to.
        name: Of the benchmark.
        hardware: In words.
        about: Title and setting in Markdown.
        header: Of the table.
        cells: Its rows, as text.
        rows: The same as numbers.
        facts: Further ones for the .json.

    Returns:
        The path without its suffix.
    """
    table = Table(*header)
    lines = [about, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in cells:
        table.add_row(*map(escape, row))
        lines.append(f"| {' | '.join(row)} |")
    Console().print(table)
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    path = folder / f"{name}_{slug}_{datetime.date.today()}"
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    numbers = {"machine": about.splitlines()[2], **facts, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    return path

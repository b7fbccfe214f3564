"""What benchmarks share: two things timed in turn, and a result written as a table and as JSON."""

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Work = Callable[[], object]


def interleaved(
    a: Work, b: Work, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Quartiles of time(a) / time(b) over ``rounds`` alternations, and the median seconds of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):  # warm up
        a(), b()
    for _ in range(rounds):
        for work, times in zip((a, b), seconds, strict=True):
            start = clock()
            work()
            times.append(clock() - start)
    low, middle, high = statistics.quantiles([x / y for x, y in zip(*seconds, strict=True)], n=4)
    median_a, median_b = map(statistics.median, seconds)
    return {"ratio": middle, "low": low, "high": high, "seconds": median_a, "against_seconds": median_b}


def write(
    folder: Path,
    name: str,
    hardware: str,
    about: str,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[dict[str, object]],
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

    Returns:
        The path without its suffix.
    """
    table = Table(*header)
    lines = [about, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in cells:
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    Console().print(table)
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    path = folder / f"{name}_{slug}_{datetime.date.today()}"
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    setting = about.splitlines()[2]
    path.with_suffix(".json").write_text(json.dumps({"machine": setting, "rows": rows}, indent=2) + "\n")
    return path

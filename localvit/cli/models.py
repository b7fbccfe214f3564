"""``localvit models``: the names, what they cost, and what their authors report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """List the models with locality and their baselines."""

    json: bool = False
    """print JSON instead of a table"""


def run(options: Options) -> int:
    """Print the table; 0 when done."""
    import dataclasses
    import json

    from rich.console import Console
    from rich.table import Table

    from localvit.models import catalogue

    entries = catalogue()
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return 0
    sources = dict.fromkeys(entry.source for entry in entries if entry.source)
    table = Table(
        title="Parameters and multiply-accumulates measured, ImageNet-1k top-1 as published",
        caption=f"Accuracy from {', '.join(sources)} (GitHub)",
    )
    table.add_column("name", no_wrap=True)
    for column in ("params (M)", "GMACs", "top-1 (%)"):
        table.add_column(column, justify="right")
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e6:.2f}",
            f"{entry.gmacs:.3f}",
            "-" if entry.top1 is None else f"{entry.top1:.2f}",
        )
    Console().print(table)
    return 0

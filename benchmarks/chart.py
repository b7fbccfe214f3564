"""A result of benchmarks/speed.py as a chart: ratios as bars beside their goals, models under the roofline.

python benchmarks/chart.py benchmarks/results/speed_....json docs/performance.svg
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MARKS = ("<!-- results -->", "<!-- end of results -->")
GREY, BLUE, ORANGE = "#999999", "#1f6fb4", "#d9730d"


def renamed(text: str) -> str:
    """Return the text of an earlier result in the words of today's."""
    return text.replace("share of peak", "fraction of peak").replace("pictures", "images")


def bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Medians with quartiles; a tick where the goal is."""
    for y, row in enumerate(rows):
        value, bound = row["value"], float(row["goal"].split()[1])
        axes.barh(y, value, color=BLUE if row["met"] else ORANGE, height=0.65)
        if "low" in row:
            axes.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1)
        axes.plot([bound, bound], [y - 0.4, y + 0.4], color="black", linewidth=2)
    labels = [f"{renamed(r['title'])}, T{r['threads']} B{r['batch']}" for r in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xlabel("ratio, or fraction of peak; black tick: goal; blue: met, orange: missed")


def roof(axes: Axes, facts: dict[str, Any]) -> None:
    """The speed that arithmetic and memory allow, and that of the models."""
    peak, copy = facts["peak_gflops"], facts["copy_gb_per_second"]
    intensities = [point["flops_per_byte"] for point in facts["points"]]
    left, right = min(intensities) / 4, max(*intensities, peak / copy) * 4
    corner = min(max(peak / copy, left), right)
    axes.plot([left, corner, right], [left * copy, peak, peak], color="black")
    for point, colour in zip(facts["points"], (BLUE, ORANGE, GREY), strict=False):
        axes.plot(point["flops_per_byte"], point["gflops"], "o", color=colour, label=point["name"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte, if no cache helps")
    axes.set_ylabel("GFLOP/s, one thread")
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title(f"matrix product {peak:.0f} GFLOP/s, copy {copy:.0f} GB/s", fontsize=9)


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the chart; the same result gives the same bytes."""
    rows = [row for row in result["rows"] if "value" in row]
    plt.rcParams["svg.hashsalt"] = "localvit"
    height = 1.5 + 0.22 * len(rows)
    figure, axes = plt.subplots(1, 2, figsize=(12, height), width_ratios=(3, 2), layout="constrained")
    bars(axes[0], rows)
    roof(axes[1], result["roofline"])
    figure.suptitle(result["machine"].split(";")[0], fontsize=9)
    figure.savefig(file, metadata={"Date": None})


def fill(page: Path, table: Path, chart: Path) -> None:
    """Replace what is between the marks of `page`."""
    before, start, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        sys.exit(f"chart.py: {page} lacks {' or '.join(MARKS)}")
    body = renamed(table.read_text().partition("\n")[2].strip())  # without its title
    relative = os.path.relpath(chart, page.parent)
    page.write_text(f"{before}{start}\n{body}\n\n![Ratios and roofline]({relative})\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="the .json of benchmarks/speed.py")
    parser.add_argument("file", type=Path, help=".svg to write")
    parser.add_argument("--page", type=Path, help="Markdown whose results are replaced")
    args = parser.parse_args()
    if args.file.suffix != ".svg":
        sys.exit(f"chart.py: {args.file} must end in .svg")
    draw(json.loads(args.result.read_text()), args.file)
    if args.page:
        fill(args.page, args.result.with_suffix(".md"), args.file)


if __name__ == "__main__":
    main()

"""Figures of a report, as SVG text inside a page that takes its colours from the page."""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, MaxNLocator

from localvit.studies.execution import Record
from localvit.studies.reporting.comparison import ArmResult, Findings
from localvit.studies.reporting.report import SHOWN_KERNELS, Kernels, StudyReport
from localvit.studies.reporting.tables import METRICS

COLOURS = (
    *("#5b6b7f", "#c8551b", "#2a6f4e", "#b08900", "#6a3d9a"),
    *("#1f78b4", "#8c2d04", "#444444", "#c994c7", "#00838f"),
)
"""Colours of the arms in their order; the first two differ in lightness too, for readers who cannot tell hues
apart. In a page they are its variables `--arm-0` and so on, which differ in dark mode."""
MARKS = "DosP^v<X*p"
"""Marks of the arms in their order, for the same readers."""

_INK, _FAINT, _PAPER = "#010203", "#040506", "#070809"  # become `currentColor` and the page's variables
_WIDTH = 4.8  # inches
_KERNEL_COLUMNS = 12
_VARIABLES = {
    _INK: "currentColor",
    _FAINT: "var(--faint)",
    _PAPER: "var(--card)",
    **{colour: f"var(--arm-{i})" for i, colour in enumerate(COLOURS)},
}
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.edgecolor": _FAINT,
}


@dataclass(frozen=True)
class Figure:
    """SVG with a label for screen readers and a caption."""

    svg: str
    label: str
    caption: str


def figures(report: StudyReport) -> list[Figure]:
    """Draw all figures of a report."""
    found, metric = report.findings, METRICS[report.study.metric]
    if not found.arms:
        return []
    drawn = []
    if any(contrast.difference for contrast in found.contrasts):
        caption = (
            "Paired differences: means with 95 % intervals. A filled point is a difference that is shown "
            "after correction. Each tick is the difference of one seed."
        )
        drawn.append(Figure(forest(found, metric), "Forest plot of the differences", caption))
    by_arm: dict[str, list[Record]] = {arm.name: [] for arm in found.arms}
    for run, record in report.records.items():
        by_arm[run.arm].append(record)
    caption = (
        "Validation accuracy by epoch: mean over the seeds; the band is from the lowest to the highest seed."
    )
    drawn.append(Figure(learning_curves(by_arm), "Learning curves", caption))
    for cost, label in _COSTS.items():
        if all(getattr(arm, cost) is not None for arm in found.arms):
            caption = f"Test {metric} against {label}: means with 95 % intervals."
            drawn.append(Figure(against_cost(found, cost, metric), f"Accuracy against {label}", caption))
    return drawn + [_kernel_figure(each) for each in report.kernels]


def learning_curves(records: Mapping[str, Sequence[Record]]) -> str:
    """Draw validation accuracy by epoch: the mean over the seeds of each arm, and a band around it.

    Args:
        records: Arm -> its records, at least one.
    """
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(3.2 + 0.2 * (len(records) // 3))
        for (name, runs), colour in zip(records.items(), itertools.cycle(COLOURS), strict=False):
            curves = np.array([[epoch["validation_top1"] for epoch in run.history] for run in runs])
            epochs = np.arange(1, curves.shape[1] + 1)
            mark = "o" if len(epochs) == 1 else None  # a single epoch gives no line
            axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(epochs, curves.mean(0), color=colour, label=name, marker=mark)
        axes.set(xlabel="epoch", ylabel="top-1 accuracy on the\nvalidation split (%)")
        axes.margins(x=0.05 if axes.dataLim.width else 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        canvas.legend(frameon=False, loc="outside upper left", ncols=min(3, len(records)))
        return _svg(canvas, "curves")


def forest(found: Findings, metric: str) -> str:
    """Draw the differences of all contrasts with their intervals, and each seed's difference as a tick.

    Contrasts without a difference are left out; filled marks are those that are shown after correction.
    """
    contrasts = [(each, each.difference.estimate) for each in found.contrasts if each.difference]
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(1.2 + 0.5 * len(contrasts))
        axes.axvline(0, color=_FAINT, linewidth=1)
        for i, (contrast, mean) in enumerate(contrasts):
            colour = COLOURS[1 if contrast.shown else 0]
            arm, control = (found.arm(name).scores for name in (contrast.arm, contrast.control))
            each = [arm[seed] - control[seed] for seed in contrast.seeds]
            axes.plot(
                each, [i + 0.3] * len(each), "|", color=colour, markersize=9, markeredgewidth=1.6, alpha=0.7
            )
            if mean.low is not None and mean.high is not None:
                axes.plot((mean.low, mean.high), (i, i), color=colour, linewidth=2)
            fill = colour if contrast.shown else _PAPER
            axes.plot(mean.mean, i, "o", color=colour, markerfacecolor=fill, markersize=6)
        names = [f"{contrast.arm}\nagainst {contrast.control}" for contrast, _ in contrasts]
        axes.set_yticks(range(len(contrasts)), names, fontsize=9)
        label = f"difference in {metric}\non the test split (percentage points)"
        axes.set(ylim=(len(contrasts) - 0.3, -0.5), xlabel=label)
        return _svg(canvas, "forest")


_COSTS = {
    "macs": "multiply-accumulates per image",
    "parameters": "number of parameters",
    "inference_speed": "inference speed (images/s)",
}


def against_cost(found: Findings, cost: str, metric: str) -> str:
    """Draw the accuracy of each arm against its cost, with its interval."""
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(3.2 + 0.2 * (len(found.arms) // 3))
        for i, arm in enumerate(found.arms):
            mean, spread = _score(arm)
            look: Any = {"fmt": MARKS[i % len(MARKS)], "color": COLOURS[i % len(COLOURS)], "markersize": 6}
            axes.errorbar(getattr(arm, cost), mean, yerr=spread, capsize=3, label=arm.name, **look)
        axes.set(xlabel=_COSTS[cost], ylabel=f"{metric} on the\ntest split (%)")
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        canvas.legend(frameon=False, loc="outside upper left", ncols=min(3, len(found.arms)))
        return _svg(canvas, cost)


def _score(arm: ArmResult) -> tuple[float, list[list[float]] | None]:
    if arm.mean is None or arm.mean.low is None or arm.mean.high is None:
        return statistics.fmean(arm.scores.values()), None
    return arm.mean.mean, [[arm.mean.mean - arm.mean.low], [arm.mean.high - arm.mean.mean]]


def _kernel_figure(kernels: Kernels) -> Figure:
    count = len(kernels.weights)
    chosen = f"the {count} of largest norm" if count == SHOWN_KERNELS else f"all {count}"
    caption = (
        f"Depth-wise kernels of {kernels.site}, learned by {kernels.arm} with seed {kernels.seed}: {chosen}, "
        "each scaled to its largest weight (red positive, blue negative)."
    )
    if kernels.left_out:
        caption += f" Not drawn, because no output depends on it: {', '.join(kernels.left_out)}."
    mosaic = _mosaic(kernels.weights)
    rows, columns = mosaic.shape
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(_WIDTH, _WIDTH * rows / columns))
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.pcolormesh(mosaic, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.invert_yaxis()
        axes.set_axis_off()
        return Figure(_svg(canvas, kernels.site), f"Kernels of {kernels.site}", caption)


def _mosaic(weights: np.ndarray) -> np.ndarray:
    """Set (n, k, k) kernels side by side with gaps of NaN."""
    side, step = weights.shape[1], weights.shape[1] + 1
    rows = -(-len(weights) // _KERNEL_COLUMNS)
    mosaic = np.full((rows * step - 1, min(_KERNEL_COLUMNS, len(weights)) * step - 1), np.nan)
    for i, kernel in enumerate(weights):
        top, left = i // _KERNEL_COLUMNS * step, i % _KERNEL_COLUMNS * step
        mosaic[top : top + side, left : left + side] = kernel / max(np.abs(kernel).max(), 1e-12)
    return mosaic


def _canvas(height: float) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
    return canvas, canvas.subplots()


def _svg(canvas: Canvas, name: str) -> str:
    """Write a figure as SVG: equal text for equal figures of one name, no common id for different names."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]  # the XML declaration before it is for separate files
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to them, and they repeat in each figure
    return re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], text)

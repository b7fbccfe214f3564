"""Pictures of a comparison, as SVG text that can stand inside a page."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import nn

from localvit.locality import LocalityFeedForward
from localvit.studies.execution import Record
from localvit.studies.reporting.comparison import Findings

COLOURS = ("#5b6b7f", "#c8551b", "#2a6f4e", "#b08900", "#6a3d9a", "#1f78b4", "#8c2d04", "#444444", "#c994c7")
"""Of the arms in their order; the first two differ in lightness too, for readers who do not see the hue."""
_SHOWN_KERNELS = 48
_COLUMNS = 12
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "localvit",  # equal pictures are equal text
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def learning_curves(records: Mapping[str, Sequence[Record]]) -> str:
    """Validation top-1 by epoch: the mean over the seeds of each arm, and a band from lowest to highest.

    Args:
        records: Arm -> its records, at least one.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.1 + 0.2 * (len(records) // 3))
        for (name, runs), colour in zip(records.items(), itertools.cycle(COLOURS), strict=False):
            curves = np.array([[epoch["validation_top1"] for epoch in run.history] for run in runs])
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(epochs, curves.mean(0), color=colour, label=name)
        axes.set(xlabel="epoch", ylabel="validation top-1, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(frameon=False, loc="outside upper left", ncols=min(3, len(records)))
        return _svg(figure)


def forest(found: Findings) -> str:
    """The differences of all contrasts with their intervals, and each seed's difference as a tick.

    Contrasts without a difference are left out; filled marks are those that are shown after correction.
    """
    contrasts = [contrast for contrast in found.contrasts if contrast.difference is not None]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 1.1 + 0.42 * len(contrasts))
        axes.axvline(0, color="0.6", linewidth=1)
        for i, contrast in enumerate(contrasts):
            assert contrast.difference is not None
            mean, colour = contrast.difference.estimate, COLOURS[1 if contrast.shown else 0]
            arm, control = (found.arm(name).scores for name in (contrast.arm, contrast.control))
            each = [arm[seed] - control[seed] for seed in contrast.seeds]
            axes.plot(each, [i + 0.22] * len(each), "|", color="0.55", markersize=5)
            if mean.low is not None and mean.high is not None:
                axes.plot((mean.low, mean.high), (i, i), color=colour, linewidth=2)
            fill = colour if contrast.shown else "white"
            axes.plot(mean.mean, i, "o", color=colour, markerfacecolor=fill, markersize=6)
        names = [f"{contrast.arm}\nagainst {contrast.control}" for contrast in contrasts]
        axes.set_yticks(range(len(contrasts)), names, fontsize=8)
        axes.set(ylim=(len(contrasts) - 0.4, -0.6), xlabel="difference of the test metric, points")
        return _svg(figure)


def against_cost(found: Findings, cost: Literal["macs", "parameters", "inference_speed"], label: str) -> str:
    """The metric of each arm against what it costs, with its interval.

    Args:
        found: What was found.
        cost: Attribute of `ArmResult`; arms without it are left out.
        label: Of the axis.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.1)
        for arm, colour in zip(found.arms, itertools.cycle(COLOURS), strict=False):
            at, mean = getattr(arm, cost), statistics.fmean(arm.scores.values())
            if at is None:
                continue
            low, high = (arm.mean.low, arm.mean.high) if arm.mean else (None, None)
            spread = None if low is None or high is None else [[mean - low], [high - mean]]
            axes.errorbar(at, mean, yerr=spread, fmt="D", color=colour, capsize=3, markersize=4)
            axes.annotate(arm.name, (at, mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel=label, ylabel="test metric, %")
        axes.margins(x=0.18)
        axes.xaxis.set_major_formatter(EngFormatter())
        return _svg(figure)


def kernels(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, str]:
    """Learned depth-wise kernels of up to three blocks (first, middle, last): the 48 of largest norm each.

    Every kernel is scaled to its own largest weight.

    Args:
        model: A localized model.
        skip: Paths of feed-forward networks that are left out, e.g. because no output depends on them.

    Returns:
        Path of the feed-forward network -> picture; empty if there is no such convolution.
    """
    found = {
        name: module.conv.weight.detach().cpu().numpy()[:, 0]
        for name, module in model.named_modules()
        if isinstance(module, LocalityFeedForward) and isinstance(module.conv, nn.Conv2d) and name not in skip
    }
    paths = list(found)
    shown = dict.fromkeys(paths[i] for i in (0, len(paths) // 2, -1)) if paths else {}
    return {path: _kernel_picture(found[path]) for path in shown}


def _kernel_picture(weights: np.ndarray) -> str:
    mosaic = _mosaic(weights)
    rows, columns = mosaic.shape
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 4.4 * rows / columns))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.pcolormesh(mosaic, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.invert_yaxis()
        axes.set_axis_off()
        return _svg(figure)


def _mosaic(weights: np.ndarray) -> np.ndarray:
    """(C, k, k) kernels side by side with gaps of NaN, the strongest first."""
    norms = np.sqrt((weights**2).sum((1, 2)))
    strongest = weights[np.argsort(-norms, kind="stable")[:_SHOWN_KERNELS]]
    side, step = weights.shape[1], weights.shape[1] + 1
    rows = -(-len(strongest) // _COLUMNS)
    mosaic = np.full((rows * step - 1, min(_COLUMNS, len(strongest)) * step - 1), np.nan)
    for i, kernel in enumerate(strongest):
        top, left = i // _COLUMNS * step, i % _COLUMNS * step
        mosaic[top : top + side, left : left + side] = kernel / max(np.abs(kernel).max(), 1e-12)
    return mosaic


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]  # what stands before it belongs to a file of its own

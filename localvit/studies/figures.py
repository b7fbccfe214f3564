"""Pictures of a comparison, as SVG text that can stand inside a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from localvit.locality import LocalityFeedForward
from localvit.studies.comparison import Comparison
from localvit.studies.records import Record

COLOURS = ("#5b6b7f", "#c8551b")
"""Of control and treatment; they differ in lightness too, for readers who do not see the hue."""
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
        records: Arm -> its records, control first, of runs of one length.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.1)
        for (name, runs), colour in zip(records.items(), COLOURS, strict=True):
            curves = np.array([[epoch["validation_top1"] for epoch in run.history] for run in runs])
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(epochs, curves.mean(0), color=colour, label=name)
        axes.set(xlabel="epoch", ylabel="validation top-1, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(frameon=False, loc="outside upper left", ncols=len(records))
        return _svg(figure)


def paired_scores(comparison: Comparison) -> str:
    """Test top-1 of each seed, the two arms of a pair joined by a line, and the means with intervals."""
    arms = (comparison.control, comparison.treatment)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.1)
        for pair in zip(*(arm.scores for arm in arms), strict=True):
            axes.plot((0, 1), pair, color="0.6", linewidth=1, marker="o", markersize=3)
        for i, (arm, colour) in enumerate(zip(arms, COLOURS, strict=True)):
            low, high = arm.top1.low, arm.top1.high
            spread = None if low is None or high is None else [[arm.top1.mean - low], [high - arm.top1.mean]]
            axes.errorbar(
                i + (0.14 if i else -0.14), arm.top1.mean, yerr=spread, color=colour, fmt="D", capsize=4
            )
        axes.set(xlim=(-0.5, 1.5), ylabel="test top-1, %")
        axes.set_xticks((0, 1), [arm.name for arm in arms])
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

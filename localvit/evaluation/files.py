"""Files of an evaluation: JSON, CSV of its classes, drawing of its confusion matrix."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from localvit.errors import ConfigError
from localvit.evaluation.evaluation import Evaluation
from localvit.evaluation.top_k import ClassResult
from localvit.inference import to_csv

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

DRAWN_CLASSES = 1000
"""Most rows that can be told apart on a screen."""
_NAMED_CLASSES = 40


def as_json(evaluation: Evaluation) -> str:
    """Write all fields of `Evaluation`; NaN and infinite numbers are null."""
    return json.dumps(_finite(dataclasses.asdict(evaluation)), indent=2, allow_nan=False) + "\n"


def as_csv(evaluation: Evaluation) -> str:
    """Write one line per class: the fields of `ClassResult`."""
    names = [field.name for field in dataclasses.fields(ClassResult)]
    return to_csv([names, *map(dataclasses.astuple, evaluation.classes)])


def check_drawing() -> None:
    """Refuse to draw where matplotlib is missing.

    Raises:
        ConfigError: naming the package to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is missing; run pip install 'localvit[study]'")


def confusion_matrix(evaluation: Evaluation) -> tuple[list[str], Float[np.ndarray, "K columns"]]:
    """Return the classes that have images, and the proportion of each that was taken for each class.

    Returns:
        K labels, and (K, K + 1) per cent; the last column is all other outputs of the model. K is at most
        `DRAWN_CLASSES`: the first ones.
    """
    classes = evaluation.classes[:DRAWN_CLASSES]
    position = {row.label: i for i, row in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes) + 1))
    for i, row in enumerate(classes):
        matrix[i, i] = row.right
    for one in evaluation.confusions:
        if one.label in position:
            matrix[position[one.label], position.get(one.guess, len(classes))] += one.images
    return list(position), 100 * matrix / np.array([[row.images] for row in classes])


def draw_confusion(evaluation: Evaluation) -> bytes:
    """Draw the confusion matrix as a PNG, each row in per cent of the images of its class.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    check_drawing()
    from matplotlib.figure import Figure

    labels, matrix = confusion_matrix(evaluation)
    if not matrix[:, -1].any():
        matrix = matrix[:, :-1]
    side = min(4 + 0.22 * len(labels), 14.0)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="magma_r", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    _name_classes(axes, labels, others=matrix.shape[1] > len(labels))
    drawn, all_classes = len(labels), len(evaluation.classes)
    part = f", first {drawn:,} of {all_classes:,} classes" if drawn < all_classes else ""
    axes.set(xlabel="top-1 prediction", ylabel="class")
    axes.set_title(f"top-1 {evaluation.metrics.top1:.2f} %, {evaluation.metrics.images:,} images{part}")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _name_classes(axes: Axes, labels: list[str], others: bool) -> None:
    """Write names beside rows and columns where there is room for them."""
    if len(labels) > _NAMED_CLASSES:
        return
    short = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
    short = [label.replace("$", r"\$") for label in short]  # not the start of a formula
    columns = [*short, "(other)"] if others else short
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(short)), short)


def _finite(value: Any) -> Any:
    """Return a copy with `None` for NaN and infinity, because JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

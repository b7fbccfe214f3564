"""Metrics of a model on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from localvit.data import (
    Batch,
    DataConfig,
    Part,
    Preprocessing,
    eval_loader,
    readable,
)
from localvit.engines import EngineKind, pick_engine
from localvit.errors import check_at_least, unknown
from localvit.evaluation.calibration import (
    Bin,
    Interval,
    calibration,
    expected_calibration_error,
    wilson_interval,
)
from localvit.evaluation.labels import read_real_labels
from localvit.evaluation.metrics import Metrics, Tally
from localvit.evaluation.reported import reported_images
from localvit.evaluation.top_k import ClassResult, Confusion, TopKPredictions, by_class
from localvit.inference import OpenModel, open_model
from localvit.models import preprocessing_for
from localvit.runtime import World, open_world


def measure(
    model: nn.Module, loader: Iterable[Batch], device: torch.device, *, distributed: bool = False
) -> Metrics:
    """Measure a model; its mode (training or evaluation) stays.

    Args:
        model: Model that returns logits (B, classes).
        loader: From `eval_loader`.
        device: Where the model is.
        distributed: Add up the counts of all processes.

    Raises:
        UnreadableImage: if an image cannot be decoded.
    """
    tally = Tally(device)
    for batch, logits in run_batches(model, loader, device):
        tally.add(logits, batch.targets.to(device, non_blocking=True))
    if distributed:
        tally.merge()
    return tally.result()


@torch.inference_mode()
def run_batches(
    model: nn.Module, loader: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield each batch with the model's logits (B, classes); arguments and errors as `measure`."""
    training = model.training
    model.eval()
    try:
        for batch in map(readable, loader):
            yield batch, model(batch.images.to(device, non_blocking=True))
    finally:
        model.train(training)


@dataclass(frozen=True, kw_only=True)
class RealLabels:
    """Accuracy on reassessed labels (see `read_real_labels`).

    Attributes:
        top1: Per cent of images whose top-1 prediction is one of the right classes.
        top5: Per cent with a right class among the first five.
        images: Images that have a right class.
    """

    top1: float
    top5: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        checkpoint: The model.
        form: Form of the model that computed (see `OpenModel`).
        data: The source of the images.
        metrics: Loss, accuracy, throughput.
        top1: 95 % interval of top-1 (see `wilson_interval`). It covers the chance of drawing images, not of
            training.
        top5: 95 % interval of top-5.
        calibration_error: Expected calibration error of the top-1 prediction, in points.
        calibration: Bins of the calibration error.
        classes: One row for each class that has images.
        confusions: Wrong top-1 predictions, the most frequent first; with `classes`, the confusion matrix.
        real: Accuracy on reassessed labels, if they were asked for.
        restricted: Only classes that have images could be predicted.
        preprocessing: Preparation of the images.
        notes: Sentences about the images: what was allowed, what could not be compared.
    """

    checkpoint: str
    form: str
    data: str
    metrics: Metrics
    top1: Interval
    top5: Interval
    calibration_error: float
    calibration: tuple[Bin, ...]
    classes: tuple[ClassResult, ...]
    confusions: tuple[Confusion, ...]
    real: RealLabels | None
    restricted: bool
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def evaluate(
    checkpoint: str,
    data: str | None = None,
    *,
    config: DataConfig | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "auto",
    class_map: str | None = None,
    restrict: bool = False,
    real_labels: str | None = None,
    engine: EngineKind | None = None,
    fuse: bool = False,
    allow_change: Collection[str] = (),
) -> Evaluation:
    """Measure a model on the test images of a source.

    Under `torchrun` the processes share the images, and each returns the result of all.

    Args:
        checkpoint: As `open_model`.
        data: A source (see `DataConfig`): its test split, else its validation split, else all of it.
            `None` takes the test split of the run that trained the checkpoint.
        config: `root`, split names and `allow_overlap` for `data`, and values that replace the model's own
            `mean`, `std`, `interpolation` and `crop_pct`.
        batch_size: Images at a time, in each process.
        workers: Data workers of each process that computes.
        device: As in `TrainConfig`.
        class_map: File with the name of the class of each output (see `read_class_map`), where the names
            that the checkpoint knows are not those of the source.
        restrict: Predict only classes that have images, for data sets with only some of the model's classes.
            Loss and calibration are computed over these outputs too.
        real_labels: Also count against reassessed ImageNet labels: `"default"`, or a file (see
            `read_real_labels`).
        engine: As `open_model`.
        fuse: As `open_model`. Off by default: published numbers are those of the plain model.
        allow_change: `["data"]` accepts a test split that has changed since training.

    Raises:
        ConfigError: if the checkpoint or a file cannot be used, a number is not positive, or `data` is
            missing, has changed since training, or has images that the checkpoint was trained on.
        DataError: if the source cannot be used or its classes are not the model's.
        UnreadableImage: if an image cannot be decoded.
    """
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, workers=workers)
    if wrong := set(allow_change) - {"data"}:
        raise unknown("allow_change", min(wrong), ["data"])
    config = config or DataConfig()
    if device == "auto" and (engine or pick_engine(checkpoint)):
        device = "cpu"  # exported files run there
    with open_world(device) as world:
        model = open_model(checkpoint, world.device, engine=engine, fuse=fuse)
        source, images, notes = reported_images(
            model, data, config, class_map, world=world, allow_change=allow_change
        )
        real = read_real_labels(real_labels, images, model) if real_labels is not None else None
        prepared = preprocessing_for(model.model, config)
        loader = eval_loader(
            images,
            prepared,
            batch_size=batch_size,
            workers=workers,
            pin_memory=world.device.type == "cuda",
            rank=world.rank,
            world_size=world.size,
        )
        allowed = np.unique(images.labels) if restrict else None
        metrics, predictions = _count(model.model, loader, world, len(images), allowed)
    return Evaluation(
        checkpoint=checkpoint,
        form=model.form,
        data=source,
        metrics=metrics,
        real=_count_real(predictions.guesses, real) if real is not None else None,
        restricted=restrict,
        preprocessing=prepared,
        notes=notes,
        **_conclusions(metrics, predictions, images, model),
    )


def _conclusions(
    metrics: Metrics, predictions: TopKPredictions, images: Part, model: OpenModel
) -> dict[str, Any]:
    """Compute the fields of `Evaluation` that follow from the predictions."""
    guesses = predictions.guesses[:, 0]
    right = guesses == images.labels
    bins = calibration(predictions.confidences, right)
    outputs = model.num_classes
    labels = [*images.class_names, *map(str, range(len(images.class_names), outputs))]
    descriptions = model.descriptions if images.class_names == model.labels else None
    classes, confusions = by_class(images.labels, guesses, labels, descriptions or labels)
    return {
        "top1": wilson_interval(int(right.sum()), len(images)),
        "top5": wilson_interval(round(metrics.top5 * len(images) / 100), len(images)),
        "calibration_error": expected_calibration_error(bins),
        "calibration": bins,
        "classes": classes,
        "confusions": confusions,
    }


def _count(
    model: nn.Module, loader: Iterable[Batch], world: World, images: int, allowed: np.ndarray | None
) -> tuple[Metrics, TopKPredictions]:
    """Count and predict in all processes; outputs that are not `allowed` cannot be predicted."""
    tally, predictions = Tally(world.device), TopKPredictions(images, world.device)
    for batch, logits in run_batches(model, loader, world.device):
        if allowed is not None:
            hidden = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            hidden[torch.from_numpy(allowed)] = False
            logits = logits.masked_fill(hidden, float("-inf"))
        tally.add(logits, batch.targets.to(world.device, non_blocking=True))
        predictions.add(batch.indices, logits)
    tally.merge()
    predictions.merge()
    return tally.result(), predictions


def _count_real(guesses: np.ndarray, right: np.ndarray) -> RealLabels:
    """Compare predictions (N, 5) with the correct classes (N, most), both padded with -1."""
    hits = ((guesses[:, :, None] == right[:, None, :]) & (right >= 0)[:, None, :]).any(-1)[right[:, 0] >= 0]
    images = max(len(hits), 1)
    return RealLabels(
        top1=100 * float(hits[:, 0].sum()) / images,
        top5=100 * float(hits.any(1).sum()) / images,
        images=len(hits),
    )

"""How good a model is on pictures that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from localvit.data import Batch, DataConfig, Part, eval_loader, open_reported, open_splits
from localvit.data.loading import readable
from localvit.data.sources import find_splits, same_source
from localvit.training.build import pick_device, preprocessing
from localvit.training.checkpoint import Checkpoint, load_checkpoint
from localvit.training.config import ConfigError
from localvit.training.tally import Metrics, Tally


@torch.inference_mode()
def measure(model: nn.Module, loader: DataLoader[Batch], device: torch.device) -> Metrics:
    """Evaluate a model; it is left in the mode (training or not) in which it was.

    Args:
        model: Returns logits (B, classes).
        loader: From `eval_loader`.
        device: Where the model is.

    Raises:
        UnreadableImage: if a picture cannot be decoded.
    """
    tally = Tally(device)
    training = model.training
    model.eval()
    try:
        for batch in map(readable, loader):
            logits = model(batch.images.to(device, non_blocking=True))
            tally.add(logits, batch.targets.to(device, non_blocking=True))
    finally:
        model.train(training)
    return tally.result()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        checkpoint: The model.
        data: The source of the pictures.
        metrics: What was measured.
    """

    checkpoint: str
    data: str
    metrics: Metrics


def evaluate(
    checkpoint: str,
    data: str | None = None,
    *,
    config: DataConfig | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "auto",
) -> Evaluation:
    """Measure a checkpoint on the pictures of a source that are there to be reported.

    Args:
        checkpoint: As `load_checkpoint`.
        data: A source (see `DataConfig`): its test split, else its validation split, else all of it.
            ``None`` takes the test split of the run that trained the checkpoint.
        config: `root` and split names for `data`, and departures from the model's own `mean`, `std`,
            `interpolation` and `crop_pct`.
        batch_size: Pictures at a time.
        workers: Processes that load pictures.
        device: As in `TrainConfig`.

    Raises:
        ConfigError: if the checkpoint cannot be loaded, or `data` is missing or is what it was trained on.
        DataError: if the source cannot be used or its classes are not the model's.
        UnreadableImage: if a picture cannot be decoded.
    """
    chosen = pick_device(device)
    loaded = load_checkpoint(checkpoint, chosen)
    config = config or DataConfig()
    images = _reported_images(loaded, data, config)
    data_config = preprocessing(loaded.model, config)
    loader = eval_loader(
        images, data_config, batch_size=batch_size, workers=workers, pin_memory=chosen.type == "cuda"
    )
    run = loaded.run.data if loaded.run else config
    return Evaluation(
        checkpoint=checkpoint,
        data=data or run.test or run.train,
        metrics=measure(loaded.model, loader, chosen),
    )


def _reported_images(loaded: Checkpoint, data: str | None, config: DataConfig) -> Part:
    if data is None:
        if loaded.run is None:
            raise ConfigError(f"data=None: {loaded.source!r} is not a run's folder, so name a data source")
        return open_splits(loaded.run.data, seed=loaded.run.seed).test
    learned = loaded.run is not None and same_source(data, loaded.run.data.train)
    if learned and "all" in find_splits(data, config):
        raise ConfigError(
            f"data={data!r} is what {loaded.source!r} was trained on; "
            "leave it out to use the test split of that run"
        )
    images = open_reported(data, config, loaded.labels)
    if len(images.class_names) != loaded.model.num_classes:
        raise ConfigError(
            f"data={data!r} has {len(images.class_names)} classes, {loaded.source!r} has "
            f"{loaded.model.num_classes} outputs without names"
        )
    return images

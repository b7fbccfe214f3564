"""Predictions for any number of images, read and classified batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from localvit.data import Sample, check_regular, decode, eval_loader, list_files
from localvit.engines import EngineKind
from localvit.errors import ConfigError, check_at_least
from localvit.inference.model import OpenModel, open_model


@dataclass(frozen=True, kw_only=True)
class ClassProbability:
    """Class and its probability.

    Attributes:
        label: Name of the class, or its index if names are unknown.
        probability: 0 to 1.
    """

    label: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Result for one image.

    Attributes:
        path: The file.
        guesses: Most probable classes, best first; empty if there is an error.
        error: Reason for no prediction: an unreadable file, or NaN from the model; else `None`.
    """

    path: str
    guesses: tuple[ClassProbability, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Block of the images, for one of several machines.

    Blocks are contiguous and differ in size by one image at most. The results of all shards, one after the
    other, are in the order of the whole list.

    Attributes:
        index: 0 to `count` - 1.
        count: Number of blocks.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            last = max(self.count - 1, 0)
            raise ConfigError(
                f"shard {self.index}/{self.count} is not accepted; use 0/{self.count} to {last}/{self.count}"
            )

    def take(self, files: Sequence[str]) -> Sequence[str]:
        """Return the files of this block."""
        edges = [len(files) * i // self.count for i in (self.index, self.index + 1)]
        return files[edges[0] : edges[1]]


WHOLE = Shard()
"""All images."""


def process_shard(device: str) -> tuple[Shard, str]:
    """Return the shard and the device of this process, one of several under `torchrun`.

    The processes do not communicate: each has its own images, and its own file.

    Args:
        device: As in `TrainConfig`; `"auto"` and `"cuda"` give each process a GPU of its machine.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, size, local = (int(os.environ.get(name, value)) for name, value in defaults.items())
    if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    return Shard(index=rank, count=size), device


class _Files(Dataset[Sample]):
    """Images without labels."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode(self.paths[index], self.paths[index]), -1


def predict(
    model: str | OpenModel,
    paths: str | Sequence[str],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    shard: Shard = WHOLE,
    engine: EngineKind | None = None,
    fuse: bool = True,
) -> Iterator[Prediction]:
    """Classify images, one prediction per file, in order.

    Results come while images are being read: at most one batch, and two for each worker, are in memory.
    An unreadable file gets a prediction with `error`; the others are classified.

    Args:
        model: An opened model, or a source as `open_model` takes.
        paths: Files, and folders that are searched for images; one path may be a string.
        top_k: Number of classes; fewer if the model has fewer.
        batch_size: Images in a batch.
        workers: Data workers.
        device: As in `TrainConfig`; ignored for an opened model, as are `engine` and `fuse`.
        shard: Block of the images to take.
        engine: As `open_model`.
        fuse: As `open_model`.

    Raises:
        ConfigError: if the model cannot be opened, a path does not exist, or there are no images.
    """
    check_settings(top_k, batch_size, workers)
    files = shard.take(find_files(paths).files)
    if not isinstance(model, OpenModel):
        model = open_model(model, device, engine=engine, fuse=fuse)
    batches = classify(model, files, top_k=top_k, batch_size=batch_size, workers=workers)
    return (prediction for batch in batches for prediction in batch)


def check_settings(top_k: int, batch_size: int, workers: int) -> None:
    """Refuse numbers that are too small.

    Raises:
        ConfigError: naming the first.
    """
    check_at_least(1, top_k=top_k, batch_size=batch_size)
    check_at_least(0, workers=workers)


@torch.inference_mode()
def classify(
    model: OpenModel, files: Sequence[str], *, top_k: int, batch_size: int, workers: int
) -> Iterator[list[Prediction]]:
    """Yield the predictions for `files`, in order, a batch at a time; other arguments as `predict`."""
    device = model.device
    loader = eval_loader(
        _Files(files),
        model.preprocessing,
        batch_size=batch_size,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    names = model.descriptions or tuple(map(str, range(model.num_classes)))
    if not names:
        raise ConfigError(f"model {model.source!r} has no classes; use a model with a classifier")
    for batch in loader:
        results = {i: Prediction(path=files[i], error=error.reason) for i, error in batch.unreadable.items()}
        if batch.indices:
            logits = model.model(batch.images.to(device, non_blocking=True))
            for index, guesses in zip(batch.indices, _most_probable(logits, names, top_k), strict=True):
                error = None if guesses else "the model returns NaN"
                results[index] = Prediction(path=files[index], guesses=guesses, error=error)
        yield [results[index] for index in sorted(results)]


def _most_probable(
    logits: torch.Tensor, names: Sequence[str], top_k: int
) -> list[tuple[ClassProbability, ...]]:
    """Return the best classes of each row of logits (B, classes); none where the row has NaN."""
    best = logits.float().softmax(-1).topk(min(top_k, len(names)))
    answered = ~logits.isnan().any(-1) & best.values.isfinite().all(-1)
    rows = zip(best.values.tolist(), best.indices.tolist(), answered.tolist(), strict=True)
    return [
        tuple(ClassProbability(label=names[c], probability=p) for p, c in zip(*row, strict=True))
        if good
        else ()
        for *row, good in rows
    ]


class FoundFiles(NamedTuple):
    """Files to classify, and notes about those that were left out."""

    files: list[str]
    notes: tuple[str, ...]


def find_files(paths: str | Sequence[str]) -> FoundFiles:
    """Return the files among `paths` (one path, or several) and the images below its folders, each once.

    The order is that of `paths`, and natural within a folder; it is the same on every machine.

    Raises:
        ConfigError: if a path does not exist or nothing was found.
        DataError: if a path is not a regular file, or as `list_files`.
    """
    found: dict[str, None] = {}
    notes: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if os.path.isdir(path):
            images, about = list_files(path)
            found |= dict.fromkeys(images)
            notes += about
        elif os.path.exists(path):
            check_regular(path, os.stat(path).st_mode)
            found[path] = None
        else:
            raise ConfigError(f"path {path!r} does not exist; check its name")
    if not found:
        raise ConfigError(f"paths={list(paths)!r}: there are no images; name image files or folders")
    return FoundFiles(list(found), tuple(notes))

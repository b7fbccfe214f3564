"""What a model sees in pictures, however many: they are read, classified and handed on batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset

from localvit.data import Sample, decode, eval_loader, name_order
from localvit.engines import EngineKind
from localvit.errors import ConfigError, check_at_least
from localvit.inference.checkpoint import Checkpoint
from localvit.inference.exported import open_checkpoint

_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What it says in the environment, and what is so without it."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """One class and how likely the model finds it.

    Attributes:
        label: Name of the class, or its index where names are not known.
        probability: 0 to 1.
    """

    label: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result for one file.

    Attributes:
        path: The file.
        guesses: The likeliest classes, best first; empty if the file could not be read.
        error: Why it could not be read, or ``None``.
    """

    path: str
    guesses: tuple[Guess, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of several blocks of the pictures, for machines that share them.

    Blocks are contiguous and differ in size by one picture at most, so the results of all shards, one after
    the other, are in the order of the whole list.

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
                f"shard {self.index}/{self.count} is none of 0/{self.count} to {last}/{self.count}"
            )

    def take(self, files: Sequence[str]) -> Sequence[str]:
        """The files of this block."""
        edges = [len(files) * i // self.count for i in (self.index, self.index + 1)]
        return files[edges[0] : edges[1]]


WHOLE = Shard()
"""All pictures."""


def process_share(device: str) -> tuple[Shard, str]:
    """The shard and the device of this process, among those that ``torchrun`` started if it did.

    The processes need not know of each other: each has its own pictures, and its own file.

    Args:
        device: As in `TrainConfig`; ``"auto"`` and ``"cuda"`` give each process a GPU of its machine.
    """
    rank, size, local = (int(os.environ.get(n, d)) for n, d in _TORCHRUN.items())
    if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    return Shard(index=rank, count=size), device


class _Files(Dataset[Sample]):
    """Pictures without labels."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode(self.paths[index], self.paths[index]), -1


def predict(
    checkpoint: str,
    paths: Sequence[str],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    shard: Shard = WHOLE,
    engine: EngineKind | None = None,
) -> Iterator[Prediction]:
    """Classify pictures, one prediction per file, in order.

    Results come while pictures are being read: no more than a batch, and two for each worker, are in memory.
    A file that cannot be read gets a prediction with `error`; the others are done all the same.

    Args:
        checkpoint: As `open_checkpoint`.
        paths: Files, and folders that are searched for pictures.
        top_k: How many classes to name; fewer if the model has fewer.
        batch_size: Pictures at a time.
        workers: Processes that load pictures.
        device: As in `TrainConfig`.
        shard: Which of the pictures.
        engine: As `open_checkpoint`.

    Raises:
        ConfigError: if the checkpoint cannot be loaded, a path does not exist, or there are no pictures.
    """
    check_at_least(1, top_k=top_k, batch_size=batch_size)
    check_at_least(0, workers=workers)
    files = shard.take(find_files(paths))
    model = open_checkpoint(checkpoint, device, engine)
    batches = classify(model, files, top_k=top_k, batch_size=batch_size, workers=workers)
    return (prediction for batch in batches for prediction in batch)


@torch.inference_mode()
def classify(
    model: Checkpoint, files: Sequence[str], *, top_k: int, batch_size: int, workers: int
) -> Iterator[list[Prediction]]:
    """Predictions for `files`, in order, a batch at a time; other arguments as `predict`."""
    device = next(iter(model.model.state_dict().values())).device
    loader = eval_loader(
        _Files(files),
        model.preprocessing,
        batch_size=batch_size,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    names = model.descriptions or [str(i) for i in range(model.model.num_classes)]  # type: ignore[arg-type]
    top_k = min(top_k, len(names))
    for batch in loader:
        results = {i: Prediction(path=files[i], error=error.reason) for i, error in batch.unreadable.items()}
        if batch.indices:
            best = model.model(batch.images.to(device, non_blocking=True)).softmax(-1).topk(top_k)
            rows = zip(batch.indices, best.values.tolist(), best.indices.tolist(), strict=True)
            for index, probabilities, classes in rows:
                pairs = zip(classes, probabilities, strict=True)
                guesses = tuple(Guess(label=names[c], probability=p) for c, p in pairs)
                results[index] = Prediction(path=files[index], guesses=guesses)
        yield [results[index] for index in sorted(results)]


def find_files(paths: Sequence[str]) -> list[str]:
    """The files among `paths` and the pictures below its folders, each once.

    The order is that of `paths`, and natural within a folder; it is the same on every machine.

    Raises:
        ConfigError: if a path does not exist or nothing was found.
    """
    extensions = get_img_extensions(as_set=True)
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
            pictures = [f for f in below if os.path.splitext(f)[1].lower() in extensions]
            found |= dict.fromkeys(sorted(pictures, key=name_order))
        elif os.path.isfile(path):
            found[path] = None
        else:
            raise ConfigError(f"path {path!r} does not exist")
    if not found:
        raise ConfigError(f"no pictures in {', '.join(map(repr, paths)) or 'an empty list of paths'}")
    return list(found)

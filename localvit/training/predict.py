"""What a model sees in pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset

from localvit.data import Batch, eval_loader
from localvit.data.images import Sample, decode
from localvit.training.build import pick_device
from localvit.training.checkpoint import Checkpoint, load_checkpoint
from localvit.training.config import ConfigError


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
) -> Iterator[Prediction]:
    """Classify pictures, one prediction per file, in order.

    A file that cannot be read gets a prediction with `error`; the others are done all the same.

    Args:
        checkpoint: As `load_checkpoint`.
        paths: Files, and folders that are searched for pictures.
        top_k: How many classes to name; fewer if the model has fewer.
        batch_size: Pictures at a time.
        workers: Processes that load pictures.
        device: As in `TrainConfig`.

    Raises:
        ConfigError: if the checkpoint cannot be loaded, a path does not exist, or there are no pictures.
    """
    if top_k < 1 or batch_size < 1:
        name, value = ("top_k", top_k) if top_k < 1 else ("batch_size", batch_size)
        raise ConfigError(f"{name}={value!r} must be at least 1")
    files = find_files(paths)
    chosen = pick_device(device)
    loaded = load_checkpoint(checkpoint, chosen)
    pin = chosen.type == "cuda"
    loader = eval_loader(
        _Files(files), loaded.data_config, batch_size=batch_size, workers=workers, pin_memory=pin
    )
    names = loaded.descriptions or [str(i) for i in range(loaded.model.num_classes)]  # type: ignore[arg-type]

    return _classify(loaded, loader, files, names, min(top_k, len(names)))


@torch.inference_mode()
def _classify(
    loaded: Checkpoint, loader: DataLoader[Batch], files: Sequence[str], names: Sequence[str], top_k: int
) -> Iterator[Prediction]:
    device = next(loaded.model.parameters()).device
    for batch in loader:
        results = {i: Prediction(path=files[i], error=error.reason) for i, error in batch.unreadable.items()}
        if batch.indices:
            best = loaded.model(batch.images.to(device)).softmax(-1).topk(top_k)
            rows = zip(batch.indices, best.values.tolist(), best.indices.tolist(), strict=True)
            for index, probabilities, classes in rows:
                pairs = zip(classes, probabilities, strict=True)
                guesses = tuple(Guess(label=names[c], probability=p) for c, p in pairs)
                results[index] = Prediction(path=files[index], guesses=guesses)
        yield from (results[index] for index in sorted(results))


def find_files(paths: Sequence[str]) -> list[str]:
    """The files among `paths` and the pictures below its folders, in natural order, each once.

    Raises:
        ConfigError: if a path does not exist or nothing was found.
    """
    extensions = get_img_extensions(as_set=True)
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            below = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
            pictures = [f for f in below if os.path.splitext(f)[1].lower() in extensions]
            found |= dict.fromkeys(sorted(pictures, key=natural_key))
        elif os.path.isfile(path):
            found[path] = None
        else:
            raise ConfigError(f"path {path!r} does not exist")
    if not found:
        raise ConfigError(f"no pictures in {', '.join(map(repr, paths)) or 'an empty list of paths'}")
    return list(found)

"""Training, validation and test splits of the configured sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from localvit.data.config import DataConfig, DataError
from localvit.data.identity import file_reader
from localvit.data.images import Images, Part
from localvit.data.overlap import check_disjoint, everything, shared
from localvit.data.sources import (
    FIXED_SEED,
    Opener,
    find_splits,
    nested_subset,
    stratified_holdout,
)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Disjoint sets of labelled images over the same classes.

    Attributes:
        train: Training images.
        validation: Images for choices: best epoch, learning rates.
        test: Images for the reported results; no choice uses them.
        class_names: Name of each label.
        notes: Sentences for reports about the images that were held out.
    """

    train: Part
    validation: Part
    test: Part
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def open_splits(config: DataConfig, *, seed: int = 0) -> Splits:
    """Open the sources of `config` and hold out missing splits.

    No image of a source is in two splits, and `test` is the same for every seed.

    Args:
        config: The sources.
        seed: Seed of a held-out validation split.

    Raises:
        DataError: if a source does not exist, has no images, has a class that the training images lack, or
            shares images with another source; if there are fewer than two classes.
    """
    available = find_splits(config.train, config)
    train = _open(available, ("train", "all"), config.train)
    names = train.class_names
    if len(names) < 2:
        raise DataError(f"{config.train!r} has {len(names)} class; use a source with at least 2")
    remaining = np.arange(len(train))
    notes: list[str] = []

    if config.test is not None:
        test = open_test_split(config.test, config, names)
    elif own := _first(available, ("test", "validation")):
        test = everything(own(), names, config.train)
    else:
        remaining, test = _hold_out(train, remaining, names, config.holdout, FIXED_SEED)
        notes.append(_note("test", test, config.train, "the same for every seed"))

    if config.validation is not None:
        validation = open_test_split(config.validation, config, names)
    elif (own_validation := _own_validation(available, config, test)) is not None:
        validation = everything(own_validation, names, config.train)
    else:
        remaining, validation = _hold_out(train, remaining, names, config.holdout, seed)
        notes.append(_note("validation", validation, config.train, f"chosen by seed {seed}"))
    notes += check_disjoint(config, {"train": everything(train), "test": test, "validation": validation})
    notes += _classes_without_images({"validation": validation, "test": test})
    readers = map(file_reader, (train, test.images, validation.images))
    notes += dict.fromkeys(note for reader in readers for note in getattr(reader, "notes", ()))
    if config.fraction < 1.0:
        total = len(remaining)
        remaining = nested_subset(np.asarray(train.labels), remaining, config.fraction)
        notes.append(
            f"train: {len(remaining)} of {total} images of {config.train!r}, the same for every seed"
        )
    return Splits(
        train=Part(train, remaining, names),
        validation=validation,
        test=test,
        class_names=names,
        notes=tuple(notes),
    )


def open_test_split(source: str, config: DataConfig, class_names: Sequence[str] | None = None) -> Part:
    """Open the test split of a source: `test`, else `validation`, else all images of a source without splits.

    Args:
        source: The source.
        config: Settings for `root` and the names of splits.
        class_names: Classes that the labels index; `None`: those of the source.

    Raises:
        DataError: as for `open_splits`.
    """
    images = _open(find_splits(source, config), ("test", "validation", "all"), source)
    return everything(images, class_names, source)


def _own_validation(available: dict[str, Opener], config: DataConfig, test: Part) -> Images | None:
    """Open the validation split of the training source, unless `config.test` has images of it."""
    if "validation" not in available or (config.test is None and "test" not in available):
        return None
    images = available["validation"]()
    if config.test is not None and len(shared(test, everything(images))):
        return None
    return images


def _first(available: dict[str, Opener], keys: Sequence[str]) -> Opener | None:
    return next((available[key] for key in keys if key in available), None)


def _open(available: dict[str, Opener], keys: Sequence[str], source: str) -> Images:
    opener = _first(available, keys)
    if opener is None:
        raise DataError(
            f"{source!r} has the splits {', '.join(available)}; it needs one of {', '.join(keys)}"
        )
    return opener()


def _hold_out(
    images: Images, candidates: np.ndarray, names: Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, Part]:
    """Return the candidates that are left, and the split held out from them."""
    labels = np.asarray(images.labels)[candidates]
    remaining, held_out = stratified_holdout(labels, max(1, round(fraction * len(labels))), seed)
    if len(held_out) == 0:
        raise DataError(
            f"{len(labels)} training images are too few to hold some out; name a source for each split"
        )
    return candidates[remaining], Part(images, candidates[held_out], names)


def _classes_without_images(parts: Mapping[str, Part]) -> Iterator[str]:
    for split, part in parts.items():
        absent = np.setdiff1d(np.arange(len(part.class_names)), part.labels)
        if len(absent):
            yield (
                f"{split}: no images of {len(absent)} of {len(part.class_names)} classes, such as "
                f"{part.class_names[absent[0]]!r}"
            )


def _note(split: str, part: Part, source: str, how: str) -> str:
    return f"{split}: {len(part)} images held out from {source!r} ({how})"

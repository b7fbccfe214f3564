"""Data sources by name, and the splits of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from timm.data import create_dataset

from localvit.data.config import DataConfig, DataError
from localvit.data.images import ArrayImages, Images, ReaderImages, TorchvisionImages
from localvit.data.listing import Tree, class_images, entries, is_image, sub_folders, walk
from localvit.data.order import name_order
from localvit.data.split_names import split_folders, split_of
from localvit.data.tar import open_shards, read_tar
from localvit.errors import first_line

if TYPE_CHECKING:
    from jaxtyping import Int

ACCEPTED = (
    "'digits', an image folder with one folder per class, a .tar of one, or a name for "
    "timm.data.create_dataset (torch/..., hfds/..., wds/...)"
)
DIGITS_TEST = 500
"""Number of test images of `digits`: 28 %, for a standard error below one point at 95 % accuracy."""
FIXED_SEED = 20240
"""Seed of the splits that are the same in every run."""

Opener = Callable[[], Images]


def find_splits(source: str, config: DataConfig) -> dict[str, Opener]:
    """Return the splits of a source, each as a function that opens it.

    Keys are `"train"`, `"validation"` and `"test"`, as far as the source has them, or the single key `"all"`
    for a source without splits (a plain folder or tar). A tar is listed here, a folder when it is opened.

    Raises:
        DataError: if there is no such source.
    """
    prefix, slash, _ = source.partition("/")
    if source == "digits":
        return {split: partial(open_digits, split) for split in ("train", "test")}
    if os.path.isdir(source):
        return _folder_splits(source, config)
    if os.path.isfile(source) and source.lower().endswith(".tar"):
        return _tar_splits(source, config)
    openers = {"torch": _open_torchvision, "hfds": _open_hub, "wds": _open_shards}
    if slash and prefix in openers and source not in ("torch/folder", "torch/image_folder"):
        own = {"train": config.train_split, "validation": config.validation_split, "test": config.test_split}
        splits = {"train": "train", "test": "validation"} if prefix == "torch" else own
        return {key: partial(openers[prefix], source, name, config) for key, name in splits.items() if name}
    raise DataError(f"data source {source!r} does not exist; accepted: {ACCEPTED}")


def open_digits(split: str) -> ArrayImages:
    """Open a split of scikit-learn's 1,797 handwritten digits (8x8, gray).

    The test images are the same in every run, with the same fraction of each digit.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # an extra, and slow to import
    except ImportError as error:
        raise DataError(
            "data source 'digits' needs scikit-learn; run: pip install 'localvit[study]'"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    kept, held = stratified_holdout(digits.target, DIGITS_TEST, seed=FIXED_SEED)
    indices = held if split == "test" else kept
    names = [str(name) for name in digits.target_names]
    return ArrayImages(pixels[indices], digits.target[indices].tolist(), names)


def stratified_holdout(
    labels: Int[np.ndarray, " N"], count: int, seed: int
) -> tuple[Int[np.ndarray, " rest"], Int[np.ndarray, " held"]]:
    """Hold out `count` items, from each class in proportion to its size.

    Args:
        labels: (N,) class of each item.
        count: Number of items to hold out. One item of each class is always kept, so it may be fewer.
        seed: Seed of the choice.

    Returns:
        Indices kept and indices held out: disjoint, sorted, together 0..N-1.
    """
    position = _class_positions(labels, seed)
    order = np.argsort(position, kind="stable")
    held = order[: min(count, int(np.isfinite(position).sum()))]
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def nested_subset(
    labels: Int[np.ndarray, " N"], candidates: Int[np.ndarray, " M"], fraction: float
) -> Int[np.ndarray, " kept"]:
    """Choose the same fraction of each class; a smaller subset is part of every larger one.

    Args:
        labels: (N,) class of each item.
        candidates: Indices to choose from. The order of preference is one of all N items, so it does not
            depend on the items held out before.
        fraction: Fraction of the candidates to keep; at least one item of each of their classes is kept.

    Returns:
        Sorted indices, a subset of `candidates`.
    """
    preferred = candidates[np.argsort(_class_positions(labels, FIXED_SEED)[candidates], kind="stable")]
    own = np.asarray(labels)[preferred]
    position = np.empty(len(own))
    for label in np.unique(own):
        members = np.flatnonzero(own == label)
        position[members] = np.arange(len(members)) / len(members)  # 0 for the first: every class has one
    order = np.argsort(position, kind="stable")
    count = max(int((position == 0).sum()), round(fraction * len(candidates)))
    return np.sort(preferred[order[:count]])


def _class_positions(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the position of each item in its shuffled class, (N,), in 0..1; infinite for the last item.

    The items of lowest position are the same fraction of every class. The remainder is spread over the
    classes instead of being rounded away in each.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
        position[members[-1]] = np.inf
    return position


def _folder_splits(folder: str, config: DataConfig) -> dict[str, Opener]:
    names = sub_folders(folder)
    # Folders are searched twice only if one has the name of a split.
    inner = {
        name: sub_folders(os.path.join(folder, name)) if any(map(split_of, names)) else () for name in names
    }
    found, notes = split_folders(folder, inner)
    if not found:
        return {"all": partial(_open_tree, partial(walk, folder), config)}
    if beside := sum(is_image(entry.name) for entry in entries(folder)):
        notes.append(f"{folder!r}: images outside its splits are left out ({beside})")
    return {
        split: partial(_open_tree, partial(walk, os.path.join(folder, name)), config, notes)
        for split, name in found.items()
    }


def _tar_splits(path: str, config: DataConfig) -> dict[str, Opener]:
    tree = read_tar(path)
    inner: dict[str, set[str]] = {}
    for name in sorted(tree.folders, key=name_order):
        top, _, rest = name.partition("/")
        inner.setdefault(top, set()).update([rest.partition("/")[0]] if rest else [])
    found, notes = split_folders(path, inner)
    if not found:
        return {"all": partial(_open_tree, lambda: tree, config)}
    if beside := sum("/" not in item.name for item in tree.items):
        notes.append(f"{path!r}: images outside its splits are left out ({beside})")
    return {
        split: partial(_open_tree, partial(tree.below, name), config, notes) for split, name in found.items()
    }


def _open_tree(read: Callable[[], Tree], config: DataConfig, notes: Sequence[str] = ()) -> ReaderImages:
    return class_images(read(), allow_links=config.allow_overlap, notes=notes)


def _open_torchvision(source: str, split: str, config: DataConfig) -> Images:
    if config.root is None:
        raise DataError(f"data.root=None is not accepted for {source!r}; use the folder that has its files")
    try:
        dataset = create_dataset(source, root=config.root, split=split, download=config.download)
    except (AssertionError, RuntimeError, OSError) as error:
        hint = "" if config.download else "; data.download=true downloads it"
        raise DataError(f"data source {source!r} in {config.root!r}: {first_line(error)}{hint}") from error
    return TorchvisionImages(dataset, source, split)


def _open_hub(source: str, split: str, config: DataConfig) -> ReaderImages:
    try:
        reader = create_dataset(source, root=config.root, split=split).reader
    except ImportError as error:
        raise DataError(
            f"data source {source!r} needs the package datasets; run: pip install datasets"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"data source {source!r}, split {split!r}: {first_line(error)}") from error
    labels = [int(label) for label in reader.iter_targets()]
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    return ReaderImages(reader, names, labels, f"{source}:{split}")


def _open_shards(source: str, split: str, config: DataConfig) -> ReaderImages:
    if config.root is None or not os.path.isdir(config.root):
        raise DataError(
            f"data.root={config.root!r} is not accepted for {source!r}; use the folder that has its shards"
        )
    return open_shards(config.root, split, f"{source}:{split}")

"""Images in two splits: the same file in both is refused; different files with equal contents are counted."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from localvit.data.config import DataConfig, DataError
from localvit.data.identity import file_reader, image_name
from localvit.data.images import Images, Part

_FLAGS = {"train": " (--data)", "test": " (--val-data)", "validation": ""}
_MOST_DIGESTS = 100_000
_PROBE = 4096
"""Number of bytes from the middle of each file that are compared before whole files."""


def places(part: Part) -> np.ndarray:
    """Return the place of each image, (N,); two images with equal places are the same image.

    A place is the device and inode of the image's file and the offset of the image in it. For images without
    files, it is the data set and the index.
    """
    reader = file_reader(part.images)
    if reader is not None:
        rows = reader.places[part.indices]
    else:
        rows = np.empty((len(part), 3), dtype=np.uint64)
        origin = hashlib.blake2b(part.images.origin.encode(errors="replace"), digest_size=8).digest()
        rows[:, 0], rows[:, 1] = np.iinfo(np.uint64).max, int.from_bytes(origin, "big")
        rows[:, 2] = part.indices
    return np.ascontiguousarray(rows).view("S24").ravel()  # strings of equal length sort fast


def shared(part: Part, other: Part) -> np.ndarray:
    """Return the positions in `part` of images that are in `other` too."""
    return np.flatnonzero(np.isin(places(part), places(other)))


def everything(images: Images, class_names: Sequence[str] | None = None, source: str | None = None) -> Part:
    """Return all images of a set, by default with the classes of the set; other arguments as `Part`."""
    return Part(images, np.arange(len(images)), class_names or images.class_names, source)


def check_disjoint(config: DataConfig, splits: Mapping[str, Part]) -> list[str]:
    """Refuse splits that share images.

    Args:
        config: The sources, for the message.
        splits: Images of `train` (before any are held out), `test` and `validation`, in this order.

    Returns:
        Notes for the result, if `config.allow_overlap`.

    Raises:
        DataError: if two splits share images; the message has counts, an example and a remedy.
    """
    notes = []
    for other, name in combinations(splits, 2):
        one, two = splits[name], splits[other]
        if one.images is two.images:  # `one` was held out from `two`
            two = Part(two.images, np.setdiff1d(two.indices, one.indices), two.class_names)
        common = shared(one, two)
        if not len(common):
            continue
        count = "all of" if len(common) == len(one) else f"{len(common)} of"
        what = (
            f"{_shown(config, name)} shares {count} its {len(one)} images with {_shown(config, other)}, "
            f"such as {image_name(one, int(common[0]))!r}"
        )
        if not config.allow_overlap:
            remedy = "name sources that do not overlap"
            if getattr(config, name) is not None:
                remedy += f", or leave data.{name}{_FLAGS[name]} out"
            raise DataError(f"{what}; {remedy}, or allow it with --allow-overlap (data.allow_overlap)")
        notes.append(f"overlap allowed: {what}")
    return notes


def _shown(config: DataConfig, name: str) -> str:
    source = getattr(config, name)
    if source is None:
        return f"the {name} split of data.train={config.train!r}"
    return f"data.{name}={source!r}{_FLAGS[name]}"


def equal_contents(splits: Mapping[str, Part], most: int | None = _MOST_DIGESTS) -> list[str]:
    """Return notes about images of two splits whose files have equal contents, such as copies.

    Args:
        splits: The splits. Images without files are not compared.
        most: Limit on the number of files with the same size as a file in the other split; above it, no file
            is read. `None`: no limit.
    """
    parts = {name: part for name, part in splits.items() if file_reader(part.images) is not None}
    notes = []
    for other, name in combinations(parts, 2):
        pairs = _equal_pairs(parts[name], parts[other], most)
        if pairs is None:
            notes.append(
                f"{name} and {other}: more than {most:,} files have the same size as a file in the other "
                "split, so contents were not compared; run `localvit data check` to compare them"
            )
        elif pairs:
            i, j = pairs[0]
            mine, theirs = image_name(parts[name], i), image_name(parts[other], j)
            notes.append(
                f"warning: {len(pairs)} of {len(parts[name])} {name} images have the same content as {other} "
                f"images, such as {mine!r} and {theirs!r}; remove the copies"
            )
    return notes


def _equal_pairs(part: Part, other: Part, most: int | None) -> list[tuple[int, int]] | None:
    """Return pairs of positions, in `part` and in `other`, of different files with equal content."""
    sizes = [file_reader(p.images).sizes[p.indices] for p in (part, other)]  # type: ignore[union-attr]
    mine, theirs = (np.flatnonzero(np.isin(a, b)).tolist() for a, b in (sizes, sizes[::-1]))
    mine = np.setdiff1d(mine, shared(part, other)).tolist()  # without links
    if most is not None and len(mine) + len(theirs) > most:
        return None
    pairs: list[tuple[int, int]] = []
    for length in (_PROBE, None):  # whole files only where the middles are equal
        first, second = _by_digest(part, mine, length), _by_digest(other, theirs, length)
        equal = first.keys() & second.keys()
        mine, theirs = ([i for digest in equal for i in found[digest]] for found in (first, second))
        pairs = sorted((i, second[digest][0]) for digest in equal for i in first[digest])
    return pairs


def _by_digest(part: Part, positions: Sequence[int], length: int | None) -> dict[bytes, list[int]]:
    """Map each digest of size and content to positions; with `length`, digest that many middle bytes only."""
    reader, found = file_reader(part.images), defaultdict(list)
    assert reader is not None
    for position in positions:
        index = int(part.indices[position])
        size = int(reader.sizes[index])
        part_size = size if length is None else min(length, size)
        try:
            content = reader.read(index, (size - part_size) // 2, part_size)
        except OSError:
            continue  # reported with its name when it is loaded as an image
        found[hashlib.sha256(size.to_bytes(8, "big") + content).digest()].append(position)
    return found

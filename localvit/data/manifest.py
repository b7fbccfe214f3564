"""Manifest of a run: the images of each split, so that a later evaluation can tell that they are the same."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from dataclasses import dataclass, replace

import numpy as np

from localvit.data.config import DataConfig
from localvit.data.identity import file_reader
from localvit.data.images import Part
from localvit.data.listing import label_text, some
from localvit.data.splits import Splits

_MOST_NAMES = 200_000
"""Number of images above which a manifest has no names; the names of so many take 2 MB."""
_MOST_BYTES = 1 << 28
"""Maximum size of a manifest's names, in bytes."""


@dataclass(frozen=True, kw_only=True)
class ClassRecord:
    """Images of a class: their number, and a digest of their names and sizes."""

    count: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """Images of a split.

    Attributes:
        place: Where the images are; names of two splits can be compared if it is the same.
        classes: Record of each class that has images.
        names: Names and sizes, compressed; `None` for large sets.
    """

    place: str
    classes: dict[str, ClassRecord]
    names: str | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(record.count for record in self.classes.values())

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and classes.

        Names are those within the source, so a copy elsewhere has the same fingerprint.
        """
        classes = {label: record.digest for label, record in self.classes.items()}
        return hashlib.sha256(repr(classes).encode()).hexdigest()[:16]

    def entries(self) -> set[str] | None:
        """Return name and size of each image, as one text per image; `None` if they are not known.

        Raises:
            ValueError: if the names are damaged.
        """
        if self.names is None:
            return None
        inflate = zlib.decompressobj()
        try:
            text = inflate.decompress(base64.b64decode(self.names, validate=True), _MOST_BYTES)
        except zlib.error as error:
            raise ValueError(f"names: {error}") from error
        if not inflate.eof:
            raise ValueError(f"names: truncated, or more than {_MOST_BYTES >> 20} MB")
        return set(text.decode(errors="surrogateescape").split("\0")) - {""}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Images of a run.

    Attributes:
        class_names: Name of each output of the model.
        splits: `train`, `validation` and `test`.
        paths: Field of `DataConfig` -> absolute path, for sources that are files.
        earlier: Training splits of the run before its data changed.
    """

    class_names: tuple[str, ...]
    splits: dict[str, SplitRecord]
    paths: dict[str, str]
    earlier: tuple[SplitRecord, ...] = ()

    def __post_init__(self) -> None:
        if set(self.splits) != {"train", "validation", "test"}:
            raise ValueError("splits: train, validation and test are needed")

    def fingerprint(self) -> str:
        """Return the sizes of the splits, and a digest of all images (see `SplitRecord`)."""
        splits = self.splits.values()
        whole = repr((self.class_names, [split.fingerprint() for split in splits]))
        sizes = "+".join(str(split.count) for split in splits)
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        return f"{sizes} images, {len(self.class_names)} classes, {digest}"

    def source(self, config: DataConfig) -> DataConfig:
        """Return the configuration with sources that are no longer found replaced by their absolute paths."""
        found = {
            name: path
            for name, path in self.paths.items()
            if not os.path.exists(getattr(config, name)) and os.path.exists(path)
        }
        return replace(config, **found)  # type: ignore[arg-type]

    def changes(self, now: Manifest) -> list[str]:
        """Return sentences about the differences of the test split; no sentence if it is the same."""
        before, after = self.splits["test"], now.splits["test"]
        gone, new = before.classes.keys() - after.classes.keys(), after.classes.keys() - before.classes.keys()
        notes = [f"classes {some(sorted(gone))} are gone"] if gone else []
        notes += [f"classes {some(sorted(new))} are new"] if new else []
        both = before.classes.keys() & after.classes.keys()
        if changed := {label for label in both if before.classes[label] != after.classes[label]}:
            notes.append(f"classes {some(sorted(changed))} changed")
        if before.count != after.count:
            notes.append(f"{before.count} images are now {after.count}")
        old, now_there = before.entries(), after.entries()
        if notes and old is not None and now_there is not None:
            differ = old ^ now_there
            notes.append(f"{len(differ)} images changed, such as {some(sorted(map(_name, differ)))}")
        return notes

    def trained(self, now: Manifest, split: str = "test") -> list[str]:
        """Return the names of images of a present split that the run trained on, as far as known."""
        if now.splits["train"].place != now.splits[split].place:
            return []
        known = [record.entries() or set() for record in (self.splits["train"], *self.earlier)]
        return sorted(map(_name, set().union(*known) & (now.splits[split].entries() or set())))

    def continuing(self, before: Manifest) -> Manifest:
        """Return the manifest of a run that began with the images of `before`."""
        changed = self.splits["train"].classes != before.splits["train"].classes
        return replace(self, earlier=(*before.earlier, *([before.splits["train"]] if changed else [])))


def make_manifest(splits: Splits, config: DataConfig) -> Manifest:
    """Return the manifest of the splits of a run, which were opened from `config`."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    named = sum(map(len, parts.values())) <= _MOST_NAMES
    sources = {name: getattr(config, name) for name in ("train", "test", "validation", "root")}
    return Manifest(
        class_names=splits.class_names,
        splits={name: split_record(part, named=named) for name, part in parts.items()},
        paths={
            name: path
            for name, source in sources.items()
            if source and os.path.exists(source) and label_text(path := os.path.abspath(source)) == path
        },
    )


def split_record(part: Part, *, named: bool) -> SplitRecord:
    """Return the record of a split, with names if `named`."""
    reader, labels = file_reader(part.images), part.labels
    # A slash and no name: the number of an image without a file.
    entries = [f"{reader.names[i]}/{reader.sizes[i]}" if reader else f"{i}/" for i in part.indices.tolist()]
    classes: dict[str, ClassRecord] = {}
    for label in np.unique(labels):
        own = "\0".join(entries[i] for i in np.flatnonzero(labels == label)).encode(errors="surrogateescape")
        classes[part.class_names[label]] = ClassRecord(
            count=int((labels == label).sum()), digest=hashlib.sha256(own).hexdigest()[:16]
        )
    text = "\0".join(entries).encode(errors="surrogateescape")
    return SplitRecord(
        place=label_text(os.path.abspath(reader.base) if reader else part.images.origin),
        classes=classes,
        names=base64.b64encode(zlib.compress(text, 9)).decode() if named else None,
    )


def _name(entry: str) -> str:
    return entry.rpartition("/")[0]

"""Names of images, and a fingerprint of a data set that needs no pixels."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from localvit.data.images import Part
from localvit.data.splits import Splits


def image_name(part: Part, index: int) -> str:
    """Return the file of the image `part[index]`, or its number in the source."""
    position = int(part.indices[index])
    reader = getattr(part.images, "reader", None)
    name = reader.filename(position, absolute=True) if reader is not None else None
    return name or f"number {position}"


def fingerprint(splits: Splits) -> str:
    """Return the sizes of the splits, and a hash of image names, labels and class names.

    Files count by their path within the source, so a copy elsewhere has the same fingerprint. Pixels are
    hashed only if they are in memory (`digits`): a changed file with the same name is not noticed.
    """
    digest = hashlib.sha256(repr(splits.class_names).encode())
    parts = (splits.train, splits.validation, splits.test)
    contents = {id(images): _contents(images) for images in {id(p.images): p.images for p in parts}.values()}
    for part in parts:
        digest.update(np.asarray(part.indices, dtype=np.int64).tobytes())
        digest.update(repr(part.relabel).encode())
        digest.update(contents[id(part.images)])
    sizes = "+".join(str(len(part)) for part in parts)
    return f"{sizes} images, {splits.num_classes} classes, {digest.hexdigest()[:16]}"


def _contents(images: Any) -> bytes:
    digest = hashlib.sha256(np.asarray(images.labels, dtype=np.int64).tobytes())
    reader: Any = getattr(images, "reader", None)
    if hasattr(reader, "samples") or hasattr(reader, "members"):
        digest.update("\0".join(map(str, reader.filenames())).encode())
    elif hasattr(reader, "dataset"):  # from the hub: it has its own hash, and no names without pixels
        digest.update(str(getattr(reader.dataset, "_fingerprint", "")).encode())
    elif hasattr(images, "pixels"):
        digest.update(np.ascontiguousarray(images.pixels).tobytes())
    return digest.digest()

"""Images that are in two splits, found by the folders and tar files that hold them.

A folder that is read is read whole, so two splits that read one folder share its images. A link to a single
file is not followed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from localvit.data.config import DataConfig, DataError
from localvit.data.images import Images

_FLAGS = {"train": " (--data)", "test": " (--val-data)", "validation": ""}
_Identity = tuple[int, int]


def common_place(first: Images, second: Images) -> str | None:
    """Find a folder or tar file whose images are in both sets; `None` if there is none."""
    there = _places(second)
    return next((path for identity, path in _places(first).items() if identity in there), None)


def check_disjoint(config: DataConfig, splits: Mapping[str, Images]) -> None:
    """Refuse sources that share images.

    Args:
        config: The sources, for the message.
        splits: The images of `train`, `test` and `validation`, in this order. Splits that are held out of
            one set are not compared.

    Raises:
        DataError: naming both sources and what to do.
    """
    names = list(splits)
    for i, name in enumerate(names):
        for other in names[:i]:
            if splits[name] is splits[other]:
                continue
            place = common_place(splits[name], splits[other])
            if place is not None:
                raise DataError(overlap_message(config, name, other, f"the images in {place!r}"))


def overlap_message(config: DataConfig, name: str, other: str, common: str) -> str:
    """Say that two splits share images, and what to do."""
    remedy = "name sources that do not contain each other"
    if getattr(config, name) is not None:
        remedy += f", or leave data.{name}{_FLAGS[name]} out"
    return f"{_shown(config, name)} and {_shown(config, other)} have {common} in common; {remedy}"


def _shown(config: DataConfig, name: str) -> str:
    source = getattr(config, name)
    if source is None:
        return f"the {name} split of data.train={config.train!r}"
    return f"data.{name}={source!r}{_FLAGS[name]}"


def _places(images: Any) -> dict[_Identity, str]:
    """Identity on the disk -> path of each folder or tar file that holds images of this set."""
    reader: Any = getattr(images, "reader", None)
    if hasattr(reader, "samples"):
        paths = {os.path.dirname(file) for file, _ in reader.samples}
    else:
        paths = {member.tar for member in getattr(reader, "members", ())}
    status = {path: os.stat(path) for path in sorted(paths)}
    return {(one.st_dev, one.st_ino): path for path, one in status.items()}

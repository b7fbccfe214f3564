"""Check for images that are in two splits, by the folders and tar files that hold them.

A source takes all images of a folder, so two splits with one folder share its images. Links to single files
are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from localvit.data.config import DataConfig, DataError
from localvit.data.images import Images

_FLAGS = {"train": " (--data)", "test": " (--val-data)", "validation": ""}
_Inode = tuple[int, int]


def common_place(first: Images, second: Images) -> str | None:
    """Return a folder or tar file with images of both sets, or `None`."""
    there = _places(second)
    return next((path for inode, path in _places(first).items() if inode in there), None)


def check_disjoint(config: DataConfig, splits: Mapping[str, Images]) -> None:
    """Refuse sources that share images.

    Args:
        config: The sources, for the message.
        splits: Images of `train`, `test` and `validation`, in this order. Splits held out of one set are not
            compared.

    Raises:
        DataError: if two sources share images; the message names both.
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
    """Return the message for two splits that share images."""
    remedy = "name sources that do not contain each other"
    if getattr(config, name) is not None:
        remedy += f", or leave data.{name}{_FLAGS[name]} out"
    return f"{_shown(config, name)} and {_shown(config, other)} have {common} in common; {remedy}"


def _shown(config: DataConfig, name: str) -> str:
    source = getattr(config, name)
    if source is None:
        return f"the {name} split of data.train={config.train!r}"
    return f"data.{name}={source!r}{_FLAGS[name]}"


def _places(images: Any) -> dict[_Inode, str]:
    """Return (device, inode) -> path of each folder or tar file with images of this set."""
    reader: Any = getattr(images, "reader", None)
    if hasattr(reader, "samples"):
        paths = {os.path.dirname(file) for file, _ in reader.samples}
    else:
        paths = {member.tar for member in getattr(reader, "members", ())}
    status = {path: os.stat(path) for path in sorted(paths)}
    return {(one.st_dev, one.st_ino): path for path, one in status.items()}

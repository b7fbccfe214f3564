"""Images in tar files, read by index from any process.

timm's tar reader keeps one file open: data workers forked after its first read share one file position and
return each other's images. timm's stream of WebDataset shards has an order that depends on the number of
workers, skips unreadable images, and has no subsets. Here the members are listed once and each read opens the
file again (about 20 microseconds), so processes share nothing.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader

from localvit.data.config import DataError
from localvit.data.images import ReaderImages
from localvit.data.order import name_order


class Member(NamedTuple):
    """Position of a file in a tar."""

    tar: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the content."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_members(path: str) -> list[Member]:
    """List the files in an uncompressed tar, in its order.

    Raises:
        DataError: if it is not an uncompressed tar.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            return [
                Member(path, m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()
            ]
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{path!r} is not an uncompressed tar file ({error}); repack it without compression"
        ) from error


class TarReader(Reader):
    """Reader in timm's form, for members of any number of tar files.

    Args:
        members: The images.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.members = members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[BinaryIO, None]:
        return io.BytesIO(self.members[index].read()), None

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        member = self.members[index]
        if basename:
            return os.path.basename(member.name)
        return f"{member.tar}:{member.name}" if absolute else member.name


def open_tar(path: str) -> ReaderImages:
    """Open the images in a tar of `.../class_name/file`, in natural order of their names.

    Raises:
        DataError: if it is not an uncompressed tar or has no images.
    """
    found = [member for member in list_members(path) if _is_image(member.name)]
    images = sorted(found, key=lambda member: name_order(member.name))
    if not images:
        raise DataError(f"{path!r}: 0 images in it; accepted files: {_accepted_names()}")
    folders = [os.path.basename(os.path.dirname(member.name)) for member in images]
    names = sorted(set(folders), key=name_order)
    index = {name: i for i, name in enumerate(names)}
    return ReaderImages(TarReader(images), names, [index[folder] for folder in folders])


def open_shards(root: str, split: str) -> ReaderImages:
    """Open the images in local WebDataset shards: `KEY.jpg` (or another format) beside `KEY.cls`.

    Args:
        root: Folder of the shards.
        split: timm's name of a split: `"train-{0000..0012}.tar"` (a `"|COUNT"` after it is ignored), or the
            name of a split in `_info.json` or `info.json`.

    Raises:
        DataError: if there are no such shards, or an image has no `.cls` file with an integer.
    """
    images: list[Member] = []
    labels: list[int] = []
    for shard in _shards(root, split):
        members = list_members(shard)
        classes = {m.name.removesuffix(".cls"): m for m in members if m.name.endswith(".cls")}
        for member in members:
            if _is_image(member.name):
                key = os.path.splitext(member.name)[0]
                images.append(member)
                labels.append(_label(classes.get(key), member))
    if not images:
        raise DataError(
            f"split {split!r} in {root!r}: 0 images in its shards; accepted files: {_accepted_names()}"
        )
    return ReaderImages(TarReader(images), [str(i) for i in range(max(labels) + 1)], labels)


def _accepted_names() -> str:
    return ", ".join(get_img_extensions())


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in get_img_extensions(as_set=True)


def _label(cls: Member | None, image: Member) -> int:
    text = cls.read().decode(errors="replace").strip() if cls else None
    if text is None or not text.isdecimal():
        found = "no .cls file" if text is None else f"a .cls file with {text[:20]!r}"
        raise DataError(
            f"{image.name!r} in {image.tar!r} has {found}; each image needs one with its class number"
        )
    return int(text)


def _shards(root: str, split: str) -> list[str]:
    """Return the paths of the shards of a split."""
    pattern = split.partition("|")[0]
    if pattern.endswith(".tar"):
        span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        first, last = span.groups() if span else ("0", "0")
        numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        names = [pattern[: span.start()] + n + pattern[span.end() :] for n in numbers] if span else [pattern]
    else:
        names = _from_info(root, split)
    return [os.path.join(root, name) for name in names]


def _from_info(root: str, split: str) -> list[str]:
    for name in ("_info.json", "info.json"):
        path = os.path.join(root, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                splits = json.load(file).get("splits", {})
            if split in splits:
                return list(splits[split]["filenames"])
            raise DataError(f"{path!r} has the splits {', '.join(splits)}, not {split!r}")
    raise DataError(
        f"split {split!r} is not in {root!r}; name shards ('train-{{0000..0012}}.tar') or add _info.json"
    )

"""Pictures in tar files, read by index and right in any process.

timm's reader of tar files keeps one file open: worker processes forked after its first read share one file
position and return each other's pictures. timm's stream of WebDataset shards has an order that depends on the
number of workers, leaves out what it cannot decode, and cannot give a part of itself away. Here members are
listed once and each read opens the file anew (some 20 microseconds), so that nothing is shared.
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
    """A file in a tar: where its bytes are."""

    tar: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_members(path: str) -> list[Member]:
    """The files in an uncompressed tar, in its order.

    Raises:
        DataError: if it is none.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            return [
                Member(path, m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()
            ]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path!r} is not an uncompressed tar file: {error}") from error


class TarReader(Reader):
    """A reader in timm's form over members of any number of tar files.

    Args:
        members: The pictures.
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
    """The pictures in a tar of `.../class_name/file`, in natural order of their names.

    Raises:
        DataError: if it is no plain tar or holds no pictures.
    """
    found = [member for member in list_members(path) if _is_picture(member.name)]
    pictures = sorted(found, key=lambda member: name_order(member.name))
    if not pictures:
        raise DataError(f"{path!r} holds no pictures ({', '.join(get_img_extensions())})")
    folders = [os.path.basename(os.path.dirname(member.name)) for member in pictures]
    names = sorted(set(folders), key=name_order)
    index = {name: i for i, name in enumerate(names)}
    return ReaderImages(TarReader(pictures), names, [index[folder] for folder in folders])


def open_shards(root: str, split: str) -> ReaderImages:
    """The pictures in local WebDataset shards: `KEY.jpg` (or another format) beside `KEY.cls`.

    Args:
        root: Folder of the shards.
        split: As timm names it: `"train-{0000..0012}.tar"` (`"|COUNT"` behind it is ignored), or the
            name of a split in `_info.json` or `info.json`.

    Raises:
        DataError: if there are no such shards, or a picture has no `.cls` with an integer.
    """
    pictures: list[Member] = []
    labels: list[int] = []
    for shard in _shards(root, split):
        members = list_members(shard)
        classes = {m.name.removesuffix(".cls"): m for m in members if m.name.endswith(".cls")}
        for member in members:
            if _is_picture(member.name):
                key = os.path.splitext(member.name)[0]
                pictures.append(member)
                labels.append(_label(classes.get(key), member))
    if not pictures:
        raise DataError(f"split {split!r} in {root!r} holds no pictures")
    return ReaderImages(TarReader(pictures), [str(i) for i in range(max(labels) + 1)], labels)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in get_img_extensions(as_set=True)


def _label(cls: Member | None, picture: Member) -> int:
    text = cls.read().decode(errors="replace").strip() if cls else None
    if text is None or not text.isdecimal():
        found = "no .cls file" if text is None else f"a .cls file with {text[:20]!r}"
        raise DataError(f"{picture.name!r} in {picture.tar!r} has {found}; it must hold the class number")
    return int(text)


def _shards(root: str, split: str) -> list[str]:
    """Paths of the shards of a split."""
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
        f"split {split!r} in {root!r}: name shards ('train-{{0000..0012}}.tar') or add _info.json"
    )

"""Images in tar files: read completely, or refused by name.

Python's `tarfile` ends without an error at a damaged header and at the end of the first of several archives;
here the rest of the file must be what an archive ends with. timm's stream of WebDataset shards has an order
that depends on the number of workers, skips unreadable images, and has no subsets.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from localvit.data.config import DataError
from localvit.data.images import ReaderImages
from localvit.data.listing import FileReader, Item, Tree, accepted_names, is_hidden, is_image
from localvit.data.split_names import split_of
from localvit.structure import read_json

_BLOCK = tarfile.BLOCKSIZE
_MOST_LINKS = 40
"""Maximum number of symbolic links to follow in a row, as on Linux."""
MOST_SHARDS = 100_000
_DAMAGED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError)
"""Errors of `tarfile` for damaged headers."""


def read_tar(path: str) -> Tree:
    """List an uncompressed tar. The last of several members with one name counts, as for `tar` itself.

    Folders around all content are left out of the names: `data/cats/1.jpg` is `cats/1.jpg`.

    Raises:
        DataError: if it is not an uncompressed tar, is damaged or truncated, or has an image that is not
            stored as plain bytes in it.
    """
    return _unwrapped(_content(path)[0])


def _content(path: str) -> tuple[Tree, dict[str, tarfile.TarInfo]]:
    """Return the content of an archive, and its members by their plain names."""
    members = {name: m for m in _members(path) if (name := _visible(m.name)) is not None}
    status = os.stat(path)
    tree = Tree(source=path, base=f"{path}:")
    for name, member in members.items():
        tree.folders.update(_parents(name), [name] if member.isdir() else ())
    for name, member in members.items():
        if member.isdir():
            continue
        found = _follow(path, name, members, tree.folders)
        if found.isreg() and not found.issparse():
            place = status.st_dev, status.st_ino, found.offset_data
            tree.add(Item(name, path, place, found.size))
        elif is_image(name):
            kind = "a sparse file" if found.issparse() else "not a regular file"
            raise DataError(f"{path!r}: {name!r} is {kind}; repack the archive from regular files")
    return tree, members


def _visible(name: str) -> str | None:
    """Return the plain form of a member's name; `None` if it is the top, hidden or in a hidden folder."""
    plain = posixpath.normpath(name.lstrip("/"))
    parts = [part for part in plain.split("/") if part != ".."]
    return None if plain == "." or any(map(is_hidden, parts)) else "/".join(parts)


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _follow(path: str, name: str, members: dict[str, tarfile.TarInfo], folders: set[str]) -> tarfile.TarInfo:
    """Return the member that a link means, or the member itself.

    Raises:
        DataError: if it means a folder, or nothing in this archive.
    """
    member, at = members[name], name
    for _ in range(_MOST_LINKS):
        if not (member.issym() or member.islnk()):
            return member
        target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(at), member.linkname)
        at = posixpath.normpath(target.lstrip("/") if member.islnk() else target)
        if at in folders or at not in members:
            break
        member = members[at]
    what = "a folder" if at in folders else "nothing in this archive"
    raise DataError(
        f"{path!r}: {name!r} is a link to {what} ({member.linkname!r}); repack it with tar --dereference"
    )


def _unwrapped(tree: Tree) -> Tree:
    """Return the content of the folders around all of it, unless such a folder is a split or a class."""
    while True:
        tops = {name.partition("/")[0] for name in tree.folders}
        if len(tops) != 1 or any("/" not in item.name for item in tree.items):
            return tree
        (top,) = tops
        inner = any(name.startswith(f"{top}/") for name in tree.folders)
        if not inner or split_of(top):
            return tree
        others, tree = tree.others, tree.below(top)
        tree.others.update(others)


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, and of archives that were appended to it as files."""
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path!r} is not a regular file; name an archive")
            start: int | None = 0
            while start is not None:
                file.seek(start)
                end = start
                try:
                    with tarfile.open(fileobj=file, mode="r:") as tar:
                        yield from _one_by_one(tar)
                        end = tar.offset
                except _DAMAGED as error:
                    where = f"at or after byte {start}" if start else f"({error})"
                    raise DataError(
                        f"{path!r} is not an uncompressed tar file {where}, or it is damaged; repack it "
                        "without compression"
                    ) from error
                start = _next_archive(file, end, path)
    except OSError as error:
        raise DataError(f"{path!r} cannot be read: {error.strerror or error}; check the file") from error


def _one_by_one(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= member.offset:  # it would be read forever
            raise tarfile.ReadError(f"size {member.size} of {member.name!r}")
        tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each
        yield member


def _next_archive(file: BinaryIO, end: int, path: str) -> int | None:
    """Return where another archive begins after the end of one; `None` if the file ends there.

    Raises:
        DataError: if there is no end mark at `end`.
    """
    file.seek(end)
    zeros = 0
    while block := file.read(_BLOCK):
        if any(block):
            if zeros >= 2:
                return end + zeros * _BLOCK
            raise DataError(f"{path!r} is damaged at byte {end + zeros * _BLOCK}; restore it or repack it")
        zeros += 1
    if zeros == 0:
        raise DataError(f"{path!r} has no end mark at byte {end}, so it may be cut off; repack it")
    return None


def open_shards(root: str, split: str, origin: str) -> ReaderImages:
    """Open the images in local WebDataset shards: `KEY.jpg` (or another format) beside `KEY.cls`.

    Args:
        root: Folder of the shards.
        split: timm's name of a split: `"train-{0000..0012}.tar"` (a `"|COUNT"` after it is ignored), or the
            name of a split in `_info.json` or `info.json`.
        origin: Name of the split, for its manifest.

    Raises:
        DataError: if there are no such shards, or an image has no `.cls` file with an integer.
    """
    images: list[Item] = []
    labels: list[int] = []
    for shard in _shards(root, split):
        path = os.path.join(root, shard)
        tree, members = _content(path)
        with open(path, "rb") as file:
            for item in tree.items:
                cls = members.get(f"{os.path.splitext(item.name)[0]}.cls")
                labels.append(_label(file, cls, item.name, path))
                images.append(item._replace(name=f"{shard}:{item.name}"))
    if not images:
        raise DataError(
            f"split {split!r} in {root!r}: its shards contain 0 images; accepted files: {accepted_names()}"
        )
    return ReaderImages(FileReader(os.path.join(root, ""), images), (), labels, origin)


def _label(file: BinaryIO, cls: tarfile.TarInfo | None, image: str, path: str) -> int:
    text = None
    if cls is not None and cls.isreg():
        file.seek(cls.offset_data)
        text = file.read(min(cls.size, 100)).decode(errors="replace").strip()
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 10):
        found = "no .cls file" if text is None else f"a .cls file with {text[:20]!r}"
        raise DataError(f"{image!r} in {path!r} has {found}; each image needs one with its class number")
    return int(text)


def _shards(root: str, split: str) -> list[str]:
    """Return the names of the shards of a split."""
    pattern = split.partition("|")[0]
    if not pattern.endswith(".tar"):
        return _from_info(root, split)
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        return [pattern]
    first, last = span.groups()
    count = int(last) - int(first) + 1 if len(last) < 20 else MOST_SHARDS + 1
    if count > MOST_SHARDS:
        raise DataError(f"split {split!r} names more than {MOST_SHARDS:,} shards; use fewer")
    numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(first) + count)]
    return [pattern[: span.start()] + number + pattern[span.end() :] for number in numbers]


def _from_info(root: str, split: str) -> list[str]:
    for name in ("_info.json", "info.json"):
        path = os.path.join(root, name)
        if os.path.isfile(path):
            splits = read_json(dict[str, Any], path).get("splits", {})
            try:
                if split in splits:
                    return list(map(str, splits[split]["filenames"]))
                raise DataError(f"{path!r} has no split {split!r}; use one of {', '.join(splits)}")
            except (TypeError, KeyError) as error:
                raise DataError(
                    f"{path!r}: splits has no list of filenames for each split; name shards instead"
                ) from error
    raise DataError(
        f"split {split!r} is not in {root!r}; name shards ('train-{{0000..0012}}.tar') or add _info.json"
    )

"""Listing of the images of a folder or archive: order, splits, overlap and manifest follow from it."""

from __future__ import annotations

import io
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers import img_extensions

from localvit.data.config import DataError
from localvit.data.images import MAX_BYTES, ReaderImages, accepted_formats
from localvit.data.order import name_order

_IGNORED = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"}
"""Folders that operating systems and network storage create."""


class Item(NamedTuple):
    """One image file of a source.

    Attributes:
        name: Path below the source, with `/` as separator.
        path: Path of the file that contains its bytes: the image file itself, or an archive.
        place: Device, inode and offset of its bytes: the same under every name, link and working directory.
        size: Size in bytes.
    """

    name: str
    path: str
    place: tuple[int, int, int]
    size: int


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Content of a folder or archive, or of one folder in it.

    Attributes:
        source: Its path, for messages.
        base: Prefix that makes the name of an image a full path: `FOLDER/` or `ARCHIVE:FOLDER/`.
        items: Its images.
        folders: Paths of the folders in it, including empty ones.
        others: Suffix -> number of files that are not images.
    """

    source: str
    base: str
    items: list[Item] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item) -> None:
        """Add a file to the images or, if its suffix is not that of an image, to the count of other files."""
        if is_image(item.name):
            self.items.append(item)
        else:
            self.others[os.path.splitext(item.name)[1].lower()] += 1

    def below(self, folder: str) -> Tree:
        """Return the content of one folder."""
        start = len(folder) + 1
        own = [item for item in self.items if item.name.startswith(f"{folder}/")]
        return Tree(
            source=f"{self.base}{folder}",
            base=f"{self.base}{folder}/",
            items=[item._replace(name=item.name[start:]) for item in own],
            folders={name[start:] for name in self.folders if name.startswith(f"{folder}/")},
        )


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an accepted format or of timm's list."""
    return os.path.splitext(name)[1].lower() in _suffixes(img_extensions.IMG_EXTENSIONS)


@lru_cache
def _suffixes(timms: tuple[str, ...]) -> dict[str, None]:
    formats = accepted_formats()
    own = (suffix for suffix, name in Image.registered_extensions().items() if name in formats)
    return dict.fromkeys((*timms, *own))


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is left out: it begins with a dot, or the system made it."""
    return name.startswith(".") or name in _IGNORED


def accepted_names() -> str:
    """Return the accepted suffixes, for a message."""
    return ", ".join(_suffixes(img_extensions.IMG_EXTENSIONS))


def sub_folders(folder: str) -> list[str]:
    """Return the names of the visible folders in a folder, in natural order; errors as `entries`."""
    return sorted((entry.name for entry in entries(folder) if entry.is_dir()), key=name_order)


def walk(folder: str) -> Tree:
    """List a folder to any depth. Symbolic links are followed, but not to a folder above themselves.

    Raises:
        DataError: if a folder cannot be read, a link is broken, or an image is not a regular file.
    """
    tree = Tree(source=folder, base=os.path.join(folder, ""))
    top = os.stat(folder)
    waiting = [("", frozenset({(top.st_dev, top.st_ino)}))]
    while waiting:
        prefix, above = waiting.pop()
        for entry in entries(os.path.join(folder, prefix)):
            name = f"{prefix}{entry.name}"
            try:
                status = entry.stat()
            except OSError as error:
                raise DataError(f"{entry.path!r} is a broken link ({error.strerror}); remove it") from error
            inode = status.st_dev, status.st_ino
            if not stat.S_ISDIR(status.st_mode):
                if not stat.S_ISREG(status.st_mode) and is_image(name):
                    check_regular(entry.path, status.st_mode)
                tree.add(Item(name, entry.path, (*inode, 0), status.st_size))
            elif inode not in above:
                tree.folders.add(name)
                waiting.append((f"{name}/", above | {inode}))
    return tree


def list_files(folder: str) -> tuple[list[str], list[str]]:
    """Return the paths of the images below a folder, in natural order, and notes about other files; errors as
    `walk`.
    """
    tree = walk(folder)
    return sorted((item.path for item in tree.items), key=name_order), [*_notes(tree, links=0)]


def check_regular(path: str, mode: int) -> None:
    """Refuse pipes, devices and sockets, by `stat`: opening one could wait or never end.

    Raises:
        DataError: naming it.
    """
    if not stat.S_ISREG(mode):
        raise DataError(f"{path!r} is not a regular file; remove it or name a file")


def entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield the visible files and folders in a folder.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            yield from (entry for entry in found if not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"folder {folder!r} cannot be read: {error.strerror}; check it") from error


class FileReader:
    """Reader of image files as `ReaderImages` uses timm's readers, for any process.

    It stores arrays, not one object per file, because there may be millions of files. timm's readers keep one
    file open, which forked data workers share. Here each read opens the file again (about 20 microseconds).

    Args:
        base: As in `Tree`.
        items: The images, in order.

    Attributes:
        names: Names of the images.
        places: (N, 3) uint64: device, inode and offset of each image.
        sizes: (N,) sizes in bytes.
        notes: Sentences about files that are left out.
    """

    def __init__(self, base: str, items: Sequence[Item], notes: Sequence[str] = ()) -> None:
        self.base, self.notes = base, tuple(notes)
        self.names = [item.name for item in items]
        self.places = np.array([item.place for item in items], dtype=np.uint64).reshape(-1, 3)
        self.sizes = np.array([item.size for item in items], dtype=np.int64)
        self._paths = list(dict.fromkeys(item.path for item in items if item.path != base + item.name))
        number = {path: i for i, path in enumerate(self._paths)}
        self._archive = np.array([number.get(item.path, -1) for item in items], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, None]:
        # At most one byte more than is accepted, so that whoever decodes it can refuse it.
        return io.BytesIO(self.read(index, 0, min(int(self.sizes[index]), MAX_BYTES + 1))), None

    def read(self, index: int, start: int, length: int) -> bytes:
        """Read a part of a file."""
        number = self._archive[index]
        with open(self._paths[number] if number >= 0 else self.filename(index), "rb") as file:
            file.seek(int(self.places[index, 2]) + start)
            return file.read(length)

    def filename(self, index: int, absolute: bool = True) -> str:
        """Return the name of a file, with the path of its source if `absolute`."""
        return self.base + self.names[index] if absolute else self.names[index]


def class_images(tree: Tree, *, allow_links: bool, notes: Sequence[str]) -> ReaderImages:
    """Return the images of class folders.

    The order is the natural one of names, so it does not depend on the file system. A file that has two
    names in one class is one image.

    Args:
        tree: The content of the source.
        allow_links: Accept a file in two classes, as two images.
        notes: Sentences about what else was left out.

    Raises:
        DataError: if there are no images, an image is not directly in a class folder, a class folder has no
            images, or a file is in two classes.
    """
    _check_depth(tree)
    items = sorted(tree.items, key=lambda item: name_order(item.name))
    kept = items if allow_links else list(_once(tree.source, items))
    folders = [item.name.partition("/")[0] for item in kept]
    texts = {folder: label_text(folder) for folder in set(folders)}
    names = sorted(set(texts.values()), key=name_order)
    index = {name: i for i, name in enumerate(names)}
    labels = [index[texts[folder]] for folder in folders]
    reader = FileReader(tree.base, kept, [*notes, *_notes(tree, links=len(items) - len(kept))])
    return ReaderImages(reader, names, labels, origin=tree.base)


def label_text(folder: str) -> str:
    """Return the class name of a folder: bytes that are not UTF-8 are escaped, for all formats."""
    return folder.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _check_depth(tree: Tree) -> None:
    classes = {name.partition("/")[0] for name in tree.folders}
    if not tree.items:
        raise DataError(f"{tree.source!r} contains 0 images; accepted files: {accepted_names()}")
    beside = [item.name for item in tree.items if "/" not in item.name]
    if beside:
        where = "outside its class folders" if classes else "but no class folders"
        raise DataError(
            f"{tree.source!r} has images {where} ({len(beside)}), such as {beside[0]!r}; "
            "move each image into the folder of its class"
        )
    deep = sorted({item.name.rpartition("/")[0] for item in tree.items if item.name.count("/") > 1})
    if deep:
        raise DataError(_deep_message(tree, deep))
    if empty := sorted(classes - {item.name.partition("/")[0] for item in tree.items}, key=name_order):
        raise DataError(
            f"{tree.source!r}: no images in the class folder{'s' * (len(empty) > 1)} {some(empty)}; add "
            f"images, or remove what is empty; accepted files: {accepted_names()}"
        )


def _deep_message(tree: Tree, deep: Sequence[str]) -> str:
    """Return the message for images below class folders: perhaps splits, or classes one folder deeper."""
    inside: dict[str, set[str]] = defaultdict(set)
    for folder in deep:
        top, _, rest = folder.partition("/")
        inside[top].add(rest.partition("/")[0])
    tops = sorted(inside, key=name_order)
    common = set.intersection(*inside.values()) if len(tops) > 1 else set()
    if common:
        return (
            f"{tree.source!r}: the folders {some(tops)} repeat the class {min(common)!r}, so they look like "
            "splits; name them train, val and test"
        )
    return (
        f"{tree.source!r} has images in {deep[0]!r}, below the class folder {tops[0]!r}; each class needs "
        f"one folder, directly in the source (perhaps {tree.base + tops[0]!r} is the source)"
    )


def _once(source: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield each file once.

    Raises:
        DataError: if one is in two classes.
    """
    first: dict[tuple[int, int, int], Item] = {}
    twice: list[tuple[str, str]] = []
    for item in items:
        known = first.setdefault(item.place, item)
        if known is item:
            yield item
        elif known.name.partition("/")[0] != item.name.partition("/")[0]:
            twice.append((known.name, item.name))
    if twice:
        one, other = twice[0]
        raise DataError(
            f"{source!r} has images in two classes ({len(twice)}): {one!r} and {other!r} are the same file "
            "(a link); remove one of the names, or allow it with --allow-overlap (data.allow_overlap)"
        )


def _notes(tree: Tree, links: int) -> Iterator[str]:
    if tree.others:
        kinds = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in tree.others.most_common(5)
        )
        yield f"{tree.source!r}: left out because their suffix is not that of an image: {kinds}"
    if links:
        yield f"{tree.source!r}: left out because they are links to other images of their class: {links}"


def some(names: Collection[str]) -> str:
    """Return up to three names for a message."""
    shown = ", ".join(map(repr, list(names)[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

"""Splits by the names of folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from localvit.data.config import DataError
from localvit.data.listing import some

_SPLIT_WORDS = {
    "train": {"train", "training", "trainset", "traindata"},
    "validation": {"validation", "val", "valid", "validate", "dev", "eval", "evaluation", "valset"},
    "test": {"test", "testing", "testset", "testdata"},
}
_FILLERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img", "folder"}


def split_of(folder: str) -> str | None:
    """Return the split that a folder's name means: `Training`, `test_set`, `val2017`; else `None`."""
    words = "".join(c if c.isalpha() else " " for c in folder.lower()).split()
    rest = [word for word in words if word not in _FILLERS]
    return next((s for s, known in _SPLIT_WORDS.items() if len(rest) == 1 and rest[0] in known), None)


def split_folders(source: str, folders: Mapping[str, Collection[str]]) -> tuple[dict[str, str], list[str]]:
    """Find the splits among the folders of a source.

    A folder is a split if its name is that of one and it has class folders itself: `train/` with images
    directly in it is a class of trains.

    Args:
        source: Its path, for messages.
        folders: Folder -> folders in it.

    Returns:
        Split -> folder, empty if the folders are classes; and notes about folders that are neither.

    Raises:
        DataError: if two folders name one split, or another one repeats the classes of a split.
    """
    meaning = {name: split_of(name) for name in folders}
    if not any(folders[name] for name, split in meaning.items() if split):
        return {}, []
    found: dict[str, str] = {}
    for name, split in meaning.items():
        if split in found:
            raise DataError(
                f"{source!r} has {found[split]!r} and {name!r}, which name the same split; rename one of them"
            )
        if split:
            found[split] = name
    found = {split: found[split] for split in _SPLIT_WORDS if split in found}
    classes = set().union(*(folders[name] for name in found.values()))
    rest = [name for name in folders if name not in found.values()]
    for name in rest:
        if common := classes & set(folders[name]):
            raise DataError(
                f"{source!r}: {name!r} repeats the class {min(common)!r} of {some(found.values())}, so it "
                "looks like a split; name it train, val or test, or move it elsewhere"
            )
    return found, [f"{source!r}: folders that are not splits are left out ({some(rest)})"] if rest else []

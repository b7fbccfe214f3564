"""Names of images."""

from __future__ import annotations

from localvit.data.images import Images, Part
from localvit.data.listing import FileReader


def file_reader(images: Images) -> FileReader | None:
    """Return the reader of a set that consists of files; `None` for other sets."""
    reader = getattr(images, "reader", None)
    return reader if isinstance(reader, FileReader) else None


def image_name(part: Part, index: int) -> str:
    """Return the file of the image `part[index]`, or its number in the source."""
    position = int(part.indices[index])
    reader = getattr(part.images, "reader", None)
    name = reader.filename(position, absolute=True) if reader is not None else None
    return name or f"number {position}"

"""Names of pictures."""

from __future__ import annotations

from localvit.data.images import Part


def picture_name(part: Part, index: int) -> str:
    """What a person finds the picture `part[index]` by: its file, or its number in the source."""
    position = int(part.indices[index])
    reader = getattr(part.images, "reader", None)
    name = reader.filename(position, absolute=True) if reader is not None else None
    return name or f"number {position}"

"""Order of file and class names, the same in every process."""

from __future__ import annotations

import re


def name_order(name: str) -> tuple[list[str | int], str]:
    """Return a sort key for natural order: `class9` before `class10`, upper and lower case alike.

    timm's `natural_key` is equal for `A` and `a` and for `1` and `01`, so their order would be that of a set
    or of the file system; this key then compares the names themselves. timm's key also fails on digits that
    `int` does not accept, such as `①`; this key treats them as letters.
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name

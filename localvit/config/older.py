"""Values of fields that version 0.3 wrote differently: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localvit.locality import OLDER_VALUES

Table = Mapping[str, Mapping[str, str]]

OLDER: Table = {f"model.locality.{name}": values for name, values in OLDER_VALUES.items()}
"""Dotted field -> value in 0.3 -> value now."""

_NEWER: Table = {path: {now: then for then, now in values.items()} for path, values in OLDER.items()}


def from_older(values: Any, table: Table = OLDER) -> Any:
    """Return a configuration, or dotted changes of one, with the values of this version.

    Args:
        values: Nested mappings; keys may be dotted, as in the arms of a study.
        table: Replacements, by dotted field.
    """
    for path, replaced in table.items():
        values = _translate(values, path, replaced)
    return values


def to_older(values: Any) -> Any:
    """Return a configuration with the values of 0.3, whose digest is the name of a run in a study."""
    return from_older(values, _NEWER)


def _translate(values: Any, path: str, replaced: Mapping[str, str]) -> Any:
    if not isinstance(values, Mapping):
        return values  # damaged; the reader reports it
    made = dict(values)
    for key, value in values.items():
        if key == path and isinstance(value, str):
            made[key] = replaced.get(value, value)
        elif path.startswith(f"{key}."):
            made[key] = _translate(value, path.removeprefix(f"{key}."), replaced)
    return made

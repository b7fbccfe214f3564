"""Fields of configurations that version 0.3 wrote under other names or with other values: one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """A field of 0.3.

    Attributes:
        name: Its last name now; `None`: it is left out.
        values: Value in 0.3 -> value now; others stay.
    """

    name: str | None
    values: Mapping[Any, Any] = field(default_factory=dict)


OLDER: Mapping[str, Renamed] = {}
"""Dotted field in 0.3 -> what became of it. So far all fields of 0.3 have their names."""


def from_older(values: Any, table: Mapping[str, Renamed] = OLDER) -> Any:
    """Return a configuration, or dotted changes of one, with the names of this version.

    Args:
        values: Nested mappings; keys may be dotted, as in the arms of a study.
        table: What changed.
    """
    for path, renamed in table.items():
        values = _translated(values, path, renamed)
    return values


def _translated(values: Any, path: str, renamed: Renamed) -> Any:
    if not isinstance(values, Mapping):
        return values  # damaged, which whoever reads it will say
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key == path:
            before, dot, _ = key.rpartition(".")
            if renamed.name is not None:
                new = renamed.values.get(value, value) if isinstance(value, (str, int, float)) else value
                made[f"{before}{dot}{renamed.name}"] = new
        elif path.startswith(f"{key}."):
            made[key] = _translated(value, path.removeprefix(f"{key}."), renamed)
        else:
            made[key] = value
    return made

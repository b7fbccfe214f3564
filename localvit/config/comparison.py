"""Comparison of two configurations, so that no run is resumed as another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from localvit.config.schema import TrainConfig
from localvit.errors import ConfigError, unknown
from localvit.structure import plain

UNCOMPARED = ("output", "workers", "device", "save_seconds", "max_bad_images")
"""Fields that may change when a run is resumed.

They do not change results: batches do not depend on `workers`, nor on `max_bad_images` unless the run stops.
`device` differs between machines that take turns (`cuda:0`, `cuda:1`); results are bit for bit equal on one
kind of device only.
"""

_BESIDES = ("data", "versions", "world_size")

ConfigDiff = dict[str, tuple[Any, ...]]
"""Field -> its old and its new value."""


def identity_fields(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of a configuration that decide the results, as a nested mapping."""
    return {name: value for name, value in plain(config).items() if name not in UNCOMPARED}


def check_allowed(allow_change: Collection[str]) -> None:
    """Refuse names that are not fields.

    Raises:
        ConfigError: with the nearest fields.
    """
    fields = {name: {} for name in _BESIDES} | plain(TrainConfig())
    for name in allow_change:
        place: Any = fields
        for part in name.split("."):
            if not isinstance(place, Mapping) or not place:
                break  # a field below one without known fields
            if part not in place:
                raise unknown("allow_change", name, _paths(fields))
            place = place[part]


def refuse_changes(
    folder: str, changes: ConfigDiff, allow_change: Collection[str], finished: bool = False
) -> None:
    """Refuse changes of a run that are not allowed, by their own names or those of a whole section.

    Args:
        folder: Folder of the run.
        changes: Differences from the existing run.
        allow_change: Fields or sections.
        finished: The run is finished, so nothing can be resumed.

    Raises:
        ConfigError: with the old and the new value of each.
    """
    wrong = {path: pair for path, pair in changes.items() if not _covered(path, allow_change)}
    if wrong:
        listed = "; ".join(f"{path}: {old!r} -> {new!r}" for path, (old, new) in wrong.items())
        flags = " ".join(f"--allow-change {path}" for path in wrong)
        what = "already holds a finished run" if finished else "already holds a run"
        way = "" if finished else f", or add {flags} to resume that run"
        raise ConfigError(
            f"output={folder!r} {what}, which differs from this one ({listed}); choose another folder{way}"
        )


def differences(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the fields in which nested mappings differ: dotted path -> value in each, or `None`.

    `model.locality` is compared as a whole, because its defaults are left out of it.
    """
    flat = [_flatten(mapping) for mapping in (first, *others)]
    paths = dict.fromkeys(path for one in flat for path in one)
    values = {path: tuple(one.get(path) for one in flat) for path in paths}
    return {path: each for path, each in values.items() if any(value != each[0] for value in each)}


def _paths(mapping: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of fields and sections."""
    inner = [(prefix + name, value) for name, value in mapping.items()]
    below = [_paths(value, f"{path}.") for path, value in inner if isinstance(value, Mapping)]
    return [path for path, _ in inner] + [path for paths in below for path in paths]


def _covered(path: str, allowed: Collection[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in allowed)


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        path = prefix + name
        if isinstance(value, Mapping) and path != "model.locality":
            flat |= _flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat

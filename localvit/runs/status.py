"""`status.json` of a run: progress, results, versions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from localvit.errors import ConfigError, one_line
from localvit.structure import build, plain, read_json, to_json

STATUS = "status.json"
RunState = Literal["running", "interrupted", "failed", "finished"]
Numbers = dict[str, int | float | None]
"""Fields of `evaluation.Metrics`; `None` stands for NaN and infinity, which JSON does not have."""


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """Best epoch on the validation split, and its metrics there."""

    epoch: int
    validation: Numbers


@dataclass(frozen=True, kw_only=True)
class Change:
    """Field that was allowed to change within a run."""

    field: str
    old: Any
    new: Any


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Status of a run. A file of an older version may lack any field but `state`.

    Attributes:
        state: State that the last process left.
        epochs: Planned epochs.
        epochs_done: Finished epochs.
        best: Best epoch so far.
        test: Metrics of the test split, once the run is finished.
        notes: Sentences about the splits.
        data: Fingerprint of the data.
        versions: Package -> version.
        world_size: Number of processes that train.
        commit: Commit of localvit, where it runs from a checkout.
        bad_images: Training images that could not be read.
        changes: Fields that changed within the run.
        error: Reason of its end, if it was interrupted or failed; left out of the file otherwise.
        failed_batch: Images of the batch that it failed at; left out of the file if there are none.
    """

    state: RunState
    epochs: int = 0
    epochs_done: int = 0
    best: BestEpoch | None = None
    test: Numbers | None = None
    notes: tuple[str, ...] = ()
    data: str | None = None
    versions: dict[str, str] | None = None
    world_size: int | None = None
    commit: str | None = None
    bad_images: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    error: str | None = None
    failed_batch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.state == "finished" and (self.best is None or self.test is None):
            raise ConfigError("state='finished', but best or test is missing; restore them")

    @classmethod
    def read(cls, folder: Path) -> RunStatus | None:
        """Read the status in a run's folder; `None` if the run was killed before it was written.

        Raises:
            ConfigError: if it is damaged.
        """
        if not (folder / STATUS).exists():
            return None
        with whole(folder / STATUS) as path:
            values = read_json(dict[str, Any], path)
            if "pictures" in values:  # its name in 0.3
                values["failed_batch"] = values.pop("pictures")
            return build(cls, values)

    def to_json(self) -> str:
        """Return what `read` reads."""
        optional = {"error": self.error, "failed_batch": self.failed_batch}
        values = {name: value for name, value in plain(self).items() if optional.get(name, True)}
        return to_json(values, indent=2)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Turn any error in reading a file into an error that names it.

    Raises:
        ConfigError: if the file cannot be read or is damaged.
    """
    try:
        yield path
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise ConfigError(
            f"{str(path)!r} is damaged: {one_line(error)}; restore it, or choose another folder"
        ) from error


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics for JSON, with `None` for NaN and infinity."""
    infinite = {name for name, value in metrics.items() if not math.isfinite(value)}
    return {name: None if name in infinite else value for name, value in metrics.items()}

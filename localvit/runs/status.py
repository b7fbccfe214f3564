"""`status.json` of a run: how far it is, what it reports, and with what it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localvit.structure import read_json, to_json

STATUS = "status.json"
RunState = Literal["running", "interrupted", "failed", "finished"]
Numbers = dict[str, int | float]
"""Fields of `evaluation.Metrics`."""


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """Epoch that the validation split chose, and its metrics there."""

    epoch: int
    validation: Numbers


@dataclass(frozen=True, kw_only=True)
class Change:
    """Field that somebody allowed to change within a run."""

    field: str
    old: Any
    new: Any


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Status of a run. Only `state` is in all files; a file of an older version may lack the others.

    Attributes:
        state: How the last process left it.
        epochs: Planned.
        epochs_done: Finished.
        best: Best epoch so far.
        test: Metrics of the reported split, once it is finished.
        notes: Sentences about the splits.
        data: Fingerprint of the data.
        versions: Package -> version.
        world_size: Processes that train.
        commit: Of git, where the package is in a checkout.
        bad_images: Training images that could not be read.
        changes: Fields that changed within the run.
        error: Why it ended, if it was interrupted or failed.
        pictures: Images of the batch that it failed at.
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
    pictures: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> RunStatus | None:
        """Read it from a run's folder; `None` if the run ended before it was written.

        Raises:
            ConfigError: if it is damaged.
        """
        return read_json(cls, folder / STATUS) if (folder / STATUS).exists() else None

    def to_json(self) -> str:
        """Return what `read` reads."""
        return to_json(self, indent=2)

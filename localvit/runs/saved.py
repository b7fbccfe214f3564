"""Run as read from its files, for inference, displays and reports."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from localvit.config import TrainConfig, read_config
from localvit.data import Manifest
from localvit.errors import ConfigError
from localvit.runs.status import Numbers, RunStatus, whole
from localvit.structure import build, parse_json, read_json

MANIFEST = "manifest.json"

_ALWAYS = ("epoch", "seconds", "images_per_second")
"""Numbers that each epoch has, and that are never `null`."""


@dataclass(frozen=True)
class SavedRun:
    """Files of a run, each read once, at its first use; a damaged one is a `ConfigError`.

    Attributes:
        path: The run's folder.
    """

    path: Path

    @cached_property
    def status(self) -> RunStatus | None:
        """Content of `status.json`; `None` if it is not there."""
        return RunStatus.read(self.path)

    @cached_property
    def config(self) -> TrainConfig:
        """Content of `config.yaml`."""
        with whole(self.path / "config.yaml") as path:
            config = read_config(path)
            if config.output is None:  # a run has one; a truncated file has none
                raise ConfigError("output is missing")
        return config

    @cached_property
    def manifest(self) -> Manifest | None:
        """Content of `manifest.json`; `None` if it is not there, as in runs of 0.3."""
        if not (self.path / MANIFEST).exists():
            return None
        with whole(self.path / MANIFEST) as path:
            manifest = read_json(Manifest, path)
            for split in manifest.splits.values():
                split.entries()  # a damaged text of names is an error here
        return manifest

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Content of `metrics.jsonl`: one mapping per epoch."""
        with whole(self.path / "metrics.jsonl") as path:
            found = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
            lines = build(list[Numbers], found)
            for line in lines:
                if wrong := [name for name in _ALWAYS if line.get(name) is None]:
                    raise ConfigError(f"an epoch has no {wrong[0]}")
            epochs = [line["epoch"] for line in lines]
            done = self.status.epochs_done if self.status else len(epochs)
            if epochs != list(range(1, done + 1)):
                raise ConfigError(f"epochs {epochs} of {done}")
        return lines

    @cached_property
    def best(self) -> Path:
        """Folder of the best model, whose files can be opened."""
        with whole(self.path / "best" / "config.json") as path:
            if not isinstance(parse_json(path.read_text(encoding="utf-8")), dict):
                raise ConfigError("not a mapping")
        with whole(self.path / "best" / "model.safetensors") as path, safe_open(path, "pt"):
            return path.parent


def read_run(path: str | Path) -> SavedRun:
    """Return the run in a folder, for reading. It is not locked, and files are read at their first use."""
    return SavedRun(Path(path))

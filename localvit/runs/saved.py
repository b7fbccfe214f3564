"""A run as its files tell it, for whoever only reads: inference, displays, reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from localvit.config import TrainConfig, from_dict, load_yaml
from localvit.errors import ConfigError, one_line
from localvit.runs.status import RunStatus


@dataclass(frozen=True)
class SavedRun:
    """Files of a run. Each is read when first asked for, and once.

    A damaged file raises a `ConfigError` that names it.

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
        path = self.path / "config.yaml"
        values = load_yaml(path)
        try:
            if "output" not in values:  # a run has one; a file that was cut off has none
                raise ConfigError("output is missing")
            config: TrainConfig = from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{str(path)!r} is not the configuration of a run: {error}") from error
        return config

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Content of `metrics.jsonl`: one mapping per epoch."""
        path = self.path / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            epochs = [line["epoch"] for line in lines]
        except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
            raise ConfigError(f"{str(path)!r} is damaged: {one_line(error)}; restore it") from error
        done = self.status.epochs_done if self.status else len(epochs)
        if epochs != list(range(1, done + 1)):
            raise ConfigError(f"{str(path)!r} is damaged: it has epochs {epochs} of {done}; restore it")
        return lines

    @cached_property
    def best(self) -> Path:
        """Folder of the best model, whose files can be opened."""
        path = self.path / "best" / "config.json"
        try:
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError("not a mapping")
            path = self.path / "best" / "model.safetensors"
            with safe_open(path, "pt"):
                pass
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise ConfigError(f"{str(path)!r} is damaged: {one_line(error)}; restore it") from error
        return path.parent


def read_run(path: str | Path) -> SavedRun:
    """Return the run in a folder, for reading. Nothing is locked, and no file is read before it is needed."""
    return SavedRun(Path(path))

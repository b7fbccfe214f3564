"""The folder of a run: written so that whatever interrupts it leaves whole files, and never over another run.

```
config.yaml      the resolved configuration
status.json      state, epochs done, best epoch, reported metrics, versions, notes
metrics.jsonl    one object per epoch
last/  best/     model.safetensors + config.json: timm.create_model("local-dir:FOLDER/best", pretrained=True)
```
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import save_for_hf
from torch import nn

import localvit
from localvit.training.config import ConfigError, TrainConfig
from localvit.training.files import dump

State = Literal["running", "finished", "failed", "interrupted"]
_FILES = ("config.yaml", "status.json", "metrics.jsonl", "last", "best")


def check_output(folder: str) -> None:
    """Refuse a folder that cannot take a new run. Writes nothing.

    Raises:
        ConfigError: if it holds a run, is no folder, or cannot be written to.
    """
    path = Path(folder)
    held = [name for name in _FILES if os.path.lexists(path / name)]
    if held:
        raise ConfigError(f"output={folder!r} already holds a run ({held[0]}); choose another folder")
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output={folder!r} cannot be written: {str(existing)!r} is no writable folder")


class RunFolder:
    """Writes the results of one run.

    Args:
        config: The resolved configuration; `config.output` is the folder, made if it is not there.
        notes: Sentences for the reader of the results.

    Raises:
        ConfigError: as `check_output`.
    """

    def __init__(self, config: TrainConfig, notes: tuple[str, ...]) -> None:
        assert config.output is not None
        check_output(config.output)
        self.path = Path(config.output)
        self.path.mkdir(parents=True, exist_ok=True)
        self._status: dict[str, Any] = {
            "state": "running",
            "epochs": config.epochs,
            "epochs_done": 0,
            "best": None,
            "test": None,
            "notes": list(notes),
            "versions": versions(),
        }
        write_atomically(self.path / "config.yaml", dump(config))
        self.update()

    def update(self, **status: Any) -> None:
        """Change fields of `status.json`."""
        self._status |= status
        write_atomically(self.path / "status.json", json.dumps(self._status, indent=2) + "\n")

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.update(epochs_done=metrics["epoch"])

    def save_model(
        self,
        name: Literal["last", "best"],
        model: nn.Module,
        data_config: dict[str, Any],
        class_names: list[str],
    ) -> None:
        """Save weights and everything needed to use them, in the place of what was there.

        Args:
            name: Which of the two folders.
            model: Its current weights are saved.
            data_config: As `preprocessing` returns it.
            class_names: Name of each label.
        """
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.path))
        try:
            save_for_hf(
                model,
                str(temporary),
                model_config={"label_names": class_names},
                safe_serialization=True,
                data_config=data_config,
            )
            # What is made under a temporary name is for its owner alone.
            os.chmod(temporary, 0o777 & ~_umask())
            for file in temporary.iterdir():
                os.chmod(file, 0o666 & ~_umask())
                _sync(file)
            move_into_place(temporary, self.path / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def versions() -> dict[str, str]:
    """Package -> version of what a result depends on."""
    return {
        "localvit": localvit.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, now or after a crash, sees all of the old one or all of the new one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def move_into_place(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`; where `place` exists, its files are replaced one by one.

    At every instant `place` holds whole files. Two saves of one run differ in their weights only, so a
    mixture of old and new files is a valid model too.
    """
    _sync(new)
    if place.exists():
        for file in new.iterdir():
            os.replace(file, place / file.name)
        _sync(place)
    else:
        os.rename(new, place)
        _sync(place.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

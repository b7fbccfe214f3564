"""The folder of a run: written so that whatever interrupts it leaves whole files, and never over another run.

```
config.yaml      the resolved configuration
status.json      state, epochs done, best epoch, reported metrics, versions, data, notes
metrics.jsonl    one object per epoch
last/  best/     model.safetensors + config.json: timm.create_model("local-dir:FOLDER/best", pretrained=True)
state/           what a run that has not finished goes on from
```
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from localvit.atomic import move_into_place, sync, temporary_prefix, umask, write_atomically
from localvit.config import (
    Changes,
    TrainConfig,
    comparable,
    differences,
    dump,
    read_config,
    refuse_changes,
)
from localvit.data import Preprocessing
from localvit.errors import ConfigError, TrainingFailed
from localvit.runs.lock import has_lock_file, locked
from localvit.runs.state import State, drop_damaged, newest_name, read_newest, read_state, write_state
from localvit.runtime import commit, versions

Progress = Literal["new", "begun", "finished"]
_FILES = ("config.yaml", "status.json", "metrics.jsonl", "last", "best", "state")


def check_output(config: TrainConfig, allow_change: Collection[str] = ()) -> Progress:
    """How far the run of `config` is in its folder. Writes nothing, and does not need the data.

    Args:
        config: Its `output` is the folder.
        allow_change: As in `train`.

    Raises:
        ConfigError: if it holds another run, is in use, is no folder, or cannot be written to.
    """
    assert config.output is not None
    path = Path(config.output)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"output={config.output!r} cannot be written: {str(existing)!r} is no writable folder"
        )
    held = [name for name in _FILES if os.path.lexists(path / name)]
    if not held:
        return "new"
    if "config.yaml" not in held or ("status.json" not in held and len(held) > 1):
        raise ConfigError(f"output={config.output!r} already holds a run ({held[0]}); choose another folder")
    if has_lock_file(path):
        with locked(path):
            pass
    finished = read_status(path).get("state") == "finished"
    refuse_changes(config.output, _config_changes(path, config), () if finished else allow_change, finished)
    return "finished" if finished else "begun"


def read_status(path: Path) -> dict[str, Any]:
    """What `status.json` in a run's folder says; empty if the run was killed before it was written.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path / 'status.json')!r} cannot be read: {error}") from error
    return dict(status)


class RunFolder:
    """The folder of one run. Get one by `open_folder`.

    Attributes:
        path: Where it is.
        changes: In what the run differs from what the folder holds, all of it allowed.
        state: What it goes on from, or ``None`` at the start.
        warnings: What is wrong with newer states that could not be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        notes: tuple[str, ...],
        data: str,
        world_size: int,
        allowed: Collection[str],
    ) -> None:
        assert config.output is not None
        self.path, self.config = Path(config.output), config
        facts = {"data": data, "versions": versions(), "world_size": world_size}
        self.changes = self._differences(facts)
        refuse_changes(config.output, self.changes, allowed)
        self.state, self.warnings = read_newest(self.path / "state")
        before = read_status(self.path)
        if before.get("state") == "finished":
            raise ConfigError(f"output={config.output!r}: another process has just finished this run")
        listed = [{"field": path, "old": pair[0], "new": pair[1]} for path, pair in self.changes.items()]
        self._status: dict[str, Any] = {
            "state": "running",
            "epochs": config.epochs,
            "epochs_done": 0,
            "best": None,
            "test": None,
            "notes": list(notes),
            **facts,
            "commit": commit(),
            "bad_images": [],
            "changes": before.get("changes", []) + listed,
        }
        self._verified = False

    def _differences(self, facts: dict[str, Any]) -> Changes:
        if not (self.path / "config.yaml").exists():
            return {}
        status = read_status(self.path)
        known = [name for name in facts if name in status]
        old, new = ({name: source[name] for name in known} for source in (status, facts))
        besides = differences(old, new)
        besides.pop("versions.python", None)  # it does not compute
        return _config_changes(self.path, self.config) | besides

    def begin(self, history: list[dict[str, Any]], **status: Any) -> None:
        """Write what the run is, and make the files agree with what it goes on from."""
        if self.warnings:
            drop_damaged(self.path / "state")
        self._remove_unfinished()
        with self._writing():
            write_atomically(self.path / "config.yaml", dump(self.config))
        self.update(epochs_done=len(history), **status)
        if history or (self.path / "metrics.jsonl").exists():
            with self._writing():
                lines = (json.dumps(metrics) + "\n" for metrics in history)
                write_atomically(self.path / "metrics.jsonl", *lines)

    def update(self, **status: Any) -> None:
        """Change fields of `status.json`."""
        self._status |= status
        with self._writing():
            write_atomically(self.path / "status.json", json.dumps(self._status, indent=2) + "\n")

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with self._writing(), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.update(epochs_done=metrics["epoch"])

    def save_state(self, update: int, state: State) -> None:
        """Save what the run can go on from; the first one is read back, so that none is saved in vain."""
        with self._writing():
            path = write_state(self.path / "state", update, state)
            if not self._verified:
                read_state(path)
                self._verified = True

    def last_state(self) -> str:
        """In words, what a later call would go on from."""
        return newest_name(self.path / "state")

    def finish(self, **status: Any) -> None:
        """Write the result; then the state is not needed any more."""
        self.update(state="finished", **status)
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def save_model(
        self,
        name: Literal["last", "best"],
        model: nn.Module,
        preprocessing: Preprocessing,
        class_names: list[str],
    ) -> None:
        """Save weights and everything needed to use them, in the place of what was there.

        Args:
            name: Which of the two folders.
            model: Its current weights are saved.
            preprocessing: How it wants its images.
            class_names: Name of each label.
        """
        with self._writing():
            temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(name), dir=self.path))
            try:
                save_for_hf(
                    model,
                    str(temporary),
                    model_config={"label_names": class_names},
                    safe_serialization=True,
                    data_config=dataclasses.asdict(preprocessing),
                )
                # What is made under a temporary name is for its owner alone.
                os.chmod(temporary, 0o777 & ~umask())
                for file in temporary.iterdir():
                    os.chmod(file, 0o666 & ~umask())
                    sync(file)
                move_into_place(temporary, self.path / name)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise TrainingFailed(
                f"output={str(self.path)!r} cannot be written: {reason}; what was there before is as it was, "
                f"and {self.last_state()}"
            ) from error

    def _remove_unfinished(self) -> None:
        """Remove what a killed process left half written."""
        places = [(self.path, name) for name in _FILES] + [(self.path / "state", "update")]
        for folder, name in places:
            for rest in folder.glob(f"{temporary_prefix(name)}*"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


@contextmanager
def open_folder(
    config: TrainConfig,
    notes: tuple[str, ...],
    *,
    data: str,
    world_size: int = 1,
    allow_change: Collection[str] = (),
) -> Iterator[RunFolder]:
    """Within, this process alone works in the folder of a run; it is made if it is not there.

    Args:
        config: The resolved configuration; `config.output` is the folder.
        notes: Sentences for the reader of the results.
        data: `fingerprint` of the data.
        world_size: Processes that train.
        allow_change: As in `train`.

    Raises:
        ConfigError: as `check_output`, or if data, versions or processes are not those of the run there.
        DamagedState: if the run has states and none can be used.
    """
    check_output(config, allow_change)
    assert config.output is not None
    path = Path(config.output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={config.output!r} cannot be made: {error.strerror}") from error
    with locked(path):
        yield RunFolder(config, notes, data, world_size, allow_change)


def _config_changes(path: Path, config: TrainConfig) -> Changes:
    return differences(comparable(read_config(path / "config.yaml")), comparable(config))

"""Directory of a run: written so that whatever interrupts it leaves whole files, and never over another run.

```
config.yaml      the resolved configuration
status.json      state, epochs done, best epoch, reported metrics, versions, data, notes
metrics.jsonl    one object per epoch
last/  best/     model.safetensors + config.json: timm.create_model("local-dir:FOLDER/best", pretrained=True)
                 best/locality.safetensors: delta file of pretrained weights that were frozen
state/           what a run that has not finished resumes from
```
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from localvit.atomic import move_into_place, sync, temporary_prefix, umask, write_atomically
from localvit.config import Changes, TrainConfig, comparable, differences, refuse_changes
from localvit.data import Preprocessing
from localvit.errors import ConfigError, TrainingFailed
from localvit.models import save_locality
from localvit.runs.lock import has_lock_file, locked
from localvit.runs.saved import read_run
from localvit.runs.state import State, drop_damaged, newest_name, read_newest, read_state, write_state
from localvit.runs.status import BestEpoch, Change, RunStatus, numbers
from localvit.runtime import commit, versions
from localvit.structure import to_json, to_yaml

_FILES = ("config.yaml", "status.json", "metrics.jsonl", "last", "best", "state")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Decision about a run, after a look at its directory; a refusal is an error instead.

    Attributes:
        kind: Start it, resume it, or return what it found because it is finished.
        changes: Differences from the run that is there, all of them allowed.
        state: State to resume from; `None` if none was saved yet.
        warnings: Newer states that are damaged.
    """

    kind: Literal["new", "resume", "finished"]
    changes: Changes = field(default_factory=dict)
    state: State | None = None
    warnings: tuple[str, ...] = ()


class RunDirectory:
    """Directory of one run. Get one by `open`.

    Attributes:
        path: Its path.
        saved: The run that was found there.
        decision: Decision about it.
        status: The status that this process wrote last; `None` before `begin`.
    """

    def __init__(
        self, config: TrainConfig, world_size: int, allowed: Collection[str], stack: ExitStack
    ) -> None:
        assert config.output is not None
        self.path, self.config = Path(config.output), config
        self.status: RunStatus | None = None
        self._facts: dict[str, Any] = {"versions": versions(), "world_size": world_size}
        self._allowed, self._stack, self._verified = allowed, stack, False
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not config.output or not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(
                f"output={config.output!r} cannot be written: {str(existing)!r} is no writable folder"
            )
        self._locked = has_lock_file(self.path)
        if self._locked:
            stack.enter_context(locked(self.path))
        self.saved, self._found = read_run(self.path), self._list()
        self.decision = self._decide()

    @classmethod
    @contextmanager
    def open(
        cls, config: TrainConfig, *, world_size: int = 1, allow_change: Collection[str] = ()
    ) -> Iterator[RunDirectory]:
        """Lock, read and judge the directory `config.output`. Nothing is written, no data is needed.

        A directory that no run ever locked is locked by `claim`, because locking it writes a file.

        Args:
            config: The resolved configuration.
            world_size: Processes that train.
            allow_change: As in `train`.

        Raises:
            ConfigError: if it holds another run or one of an older version, has a damaged file, is in use,
                is no directory, or cannot be written.
            DamagedState: if the run has states and none can be used.
        """
        with ExitStack() as stack:
            yield cls(config, world_size, allow_change, stack)

    def _decide(self) -> Decision:
        held, output = list(self._found), str(self.config.output)
        if not held:
            return Decision(kind="new")
        if "config.yaml" not in held or ("status.json" not in held and len(held) > 1):
            raise ConfigError(f"output={output!r} already holds a run ({held[0]}); choose another folder")
        status = self.saved.status
        changes = differences(comparable(self.saved.config), comparable(self.config))
        if status is not None and status.state == "finished":
            refuse_changes(output, changes, (), finished=True)
            return Decision(kind="finished")
        self._refuse_version()
        changes |= self._changed(self._facts)
        refuse_changes(output, changes, self._allowed)
        state, warnings = read_newest(self.path / "state")
        if state is None and status is not None and status.epochs_done > 1:
            raise ConfigError(
                f"output={output!r}: {status.epochs_done} epochs are done, but {str(self.path / 'state')!r} "
                "has no state to resume from; restore it, or choose another folder"
            )
        return Decision(kind="resume", changes=changes, state=state, warnings=tuple(warnings))

    def _refuse_version(self) -> None:
        """Refuse to resume what another series of versions left: its states may mean something else."""
        status, ours = self.saved.status, self._facts["versions"]["localvit"]
        output = str(self.config.output)
        known = status.versions if status is not None and status.versions else {}
        theirs = known.get("localvit", ours)
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise ConfigError(
                f"output={output!r} holds an unfinished run of localvit {theirs}, which {ours} "
                f"cannot resume; finish it with localvit {theirs}, or choose another folder"
            )

    def _changed(self, facts: dict[str, Any]) -> Changes:
        """Return the facts that differ from those of the run that was found, where they are known."""
        old = {name: getattr(self.saved.status, name, None) for name in facts}
        old = {name: value for name, value in old.items() if value is not None}
        found = differences(old, {name: facts[name] for name in old})
        found.pop("versions.python", None)  # it does not compute
        return found

    def _list(self) -> dict[str, int]:
        """Return the names of what belongs to a run, each with the time of its last change."""
        held = [name for name in _FILES if os.path.lexists(self.path / name)]
        return {name: (self.path / name).lstat().st_mtime_ns for name in held}

    def claim(self, data: str) -> None:
        """Compare the data, and make and lock the directory if that was not done when it was opened.

        Args:
            data: `fingerprint` of the data.

        Raises:
            ConfigError: if the data are not those of the run, or another process was faster.
        """
        output = str(self.config.output)
        changed = self._changed({"data": data})
        refuse_changes(output, changed, self._allowed)
        self.decision.changes.update(changed)
        self._facts["data"] = data
        if self._locked:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output={output!r} cannot be made: {error.strerror}") from error
        self._stack.enter_context(locked(self.path))
        self._locked = True
        if self._list() != self._found:
            raise ConfigError(
                f"output={output!r}: another process has just trained there; run the same command again"
            )

    def begin(
        self,
        *,
        notes: Collection[str] = (),
        history: list[dict[str, Any]],
        best: BestEpoch | None = None,
        bad_images: Collection[str] = (),
    ) -> None:
        """Write what the run is, and make the files agree with the state that it resumes from.

        Args:
            notes: Sentences for the reader of the results.
            history: Metrics of the epochs that are done.
            best: Best of them.
            bad_images: Training images that could not be read.
        """
        if self.decision.warnings:
            drop_damaged(self.path / "state")
        self._remove_unfinished()
        before = self.saved.status.changes if self.saved.status else ()
        pairs = self.decision.changes.items()
        self.status = RunStatus(
            state="running",
            epochs=self.config.epochs,
            epochs_done=len(history),
            best=best,
            notes=tuple(notes),
            commit=commit(),
            bad_images=tuple(bad_images),
            changes=(*before, *(Change(field=path, old=old, new=new) for path, (old, new) in pairs)),
            **self._facts,
        )
        with self._writing():
            write_atomically(self.path / "config.yaml", to_yaml(self.config))
        self.update()
        if history or (self.path / "metrics.jsonl").exists():
            with self._writing():
                write_atomically(self.path / "metrics.jsonl", *map(_line, history))

    def update(self, **fields: Any) -> None:
        """Change fields of `status.json`."""
        assert self.status is not None
        self.status = dataclasses.replace(self.status, **fields)
        with self._writing():
            write_atomically(self.path / "status.json", self.status.to_json())

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with self._writing(), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_line(metrics))
            file.flush()
            os.fsync(file.fileno())
        self.update(epochs_done=metrics["epoch"])

    def save_state(self, step: int, state: State) -> None:
        """Save the state to resume from; the first one is read back, so that none is saved in vain."""
        with self._writing():
            path = write_state(self.path / "state", step, state)
            if not self._verified:
                read_state(path)
                self._verified = True

    def last_state(self) -> str:
        """Return, in words, what a later call would resume from."""
        return newest_name(self.path / "state")

    def finish(self, test: dict[str, Any]) -> None:
        """Write the metrics of the reported split; then the state is not needed any more."""
        self.update(state="finished", test=test)
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def save_model(
        self,
        name: Literal["last", "best"],
        model: nn.Module,
        preprocessing: Preprocessing,
        class_names: list[str],
    ) -> None:
        """Save weights and everything needed to use them, in place of what was there.

        Args:
            name: One of the two folders.
            model: Its current weights are saved.
            preprocessing: Preparation of its images.
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

    def save_delta(self, model: nn.Module) -> Path:
        """Save locality and classifier of the best model as a delta file (`localvit.save_locality`)."""
        file = self.path / "best" / "locality.safetensors"
        with self._writing():
            save_locality(model, file, head=True, overwrite=True)
        return file

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


def _line(metrics: dict[str, Any]) -> str:
    return to_json(numbers(metrics), indent=None) + "\n"

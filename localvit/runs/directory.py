"""Directory of a run. Any interruption leaves whole files, and no other run is overwritten.

```
config.yaml      the resolved configuration
status.json      state, epochs done, best epoch, reported metrics, versions, data, notes
metrics.jsonl    one object per epoch
manifest.json    images of each split, for later evaluations
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
from localvit.config import ConfigDiff, TrainConfig, differences, identity_fields, refuse_changes
from localvit.data import Manifest, Preprocessing
from localvit.errors import ConfigError, TrainingFailed
from localvit.models import save_locality
from localvit.runs.lock import has_lock_file, locked
from localvit.runs.saved import MANIFEST, read_run
from localvit.runs.state import SavedState, drop_damaged, newest_name, read_newest, read_state, write_state
from localvit.runs.status import BestEpoch, Change, RunStatus, numbers
from localvit.runtime import commit, versions
from localvit.structure import to_json, to_yaml

_FILES = ("config.yaml", "status.json", "metrics.jsonl", MANIFEST, "last", "best", "state")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Decision about a run, after a look at its directory; a refusal is an error instead.

    Attributes:
        kind: Start the run, resume it, or return the result of a finished one.
        changes: Differences from the existing run, all of them allowed.
        state: State to resume from; `None` if none was saved yet.
        warnings: Newer states that are damaged.
    """

    kind: Literal["new", "resume", "finished"]
    changes: ConfigDiff = field(default_factory=dict)
    state: SavedState | None = None
    warnings: tuple[str, ...] = ()


class RunDirectory:
    """Directory of one run; `open` creates the object.

    Attributes:
        path: Its path.
        saved: Run that was found there.
        decision: Decision about it.
        status: Status that this process wrote last; `None` before `begin`.
    """

    def __init__(
        self, config: TrainConfig, world_size: int, allowed: Collection[str], stack: ExitStack
    ) -> None:
        assert config.output is not None
        self.path, self.config = Path(config.output), config
        self.status: RunStatus | None = None
        self._conditions: dict[str, Any] = {"versions": versions(), "world_size": world_size}
        self._allowed, self._stack, self._verified = allowed, stack, False
        _check_place(config)
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
        """Lock, read and judge the directory `config.output`. It writes nothing and needs no data.

        A directory that no run ever locked is locked by `claim`, because locking it writes a file.

        Args:
            config: The resolved configuration.
            world_size: Number of processes that train.
            allow_change: As in `train`.

        Raises:
            ConfigError: if it holds another run or one of an older version, has a damaged file, is in use,
                is not a directory, or cannot be written.
            DamagedState: if the run has states and none can be used.
        """
        with ExitStack() as stack:
            yield cls(config, world_size, allow_change, stack)

    def _decide(self) -> Decision:
        held, output = list(self._found), str(self.config.output)
        if not held and (self.path / "study.json").exists():
            raise ConfigError(f"output={output!r} already holds a study (study.json); choose another folder")
        if not held:
            return Decision(kind="new")
        if "config.yaml" not in held or ("status.json" not in held and len(held) > 1):
            raise ConfigError(f"output={output!r} already holds a run ({held[0]}); choose another folder")
        status = self.saved.status
        changes = differences(identity_fields(self.saved.config), identity_fields(self.config))
        if status is not None and status.state == "finished":
            refuse_changes(output, changes, (), finished=True)
            return Decision(kind="finished")
        self._refuse_version()
        changes |= self._changed(self._conditions)
        refuse_changes(output, changes, self._allowed)
        state, warnings = read_newest(self.path / "state")
        if state is None and status is not None and status.epochs_done > 1:
            raise ConfigError(
                f"output={output!r} has {status.epochs_done} epochs, but {str(self.path / 'state')!r} has no "
                "state to resume from; restore it, or choose another folder"
            )
        return Decision(kind="resume", changes=changes, state=state, warnings=tuple(warnings))

    @property
    def other_version(self) -> str | None:
        """Version of localvit that began the run, if its minor version is another one."""
        status, ours = self.saved.status, self._conditions["versions"]["localvit"]
        known = status.versions if status is not None and status.versions else {}
        theirs: str = known.get("localvit", ours)
        return theirs if theirs.split(".")[:2] != ours.split(".")[:2] else None

    def _refuse_version(self) -> None:
        """Refuse to resume a run of another minor version, whose states may mean something else."""
        if theirs := self.other_version:
            ours = self._conditions["versions"]["localvit"]
            raise ConfigError(
                f"output={self.config.output!r} holds an unfinished run of localvit {theirs}, which {ours} "
                f"cannot resume; finish it with localvit {theirs}, or choose another folder"
            )

    def _changed(self, conditions: dict[str, Any]) -> ConfigDiff:
        """Return the conditions that differ from those of the run that was found, where they are known."""
        old = {name: getattr(self.saved.status, name, None) for name in conditions}
        old = {name: value for name, value in old.items() if value is not None}
        found = differences(old, {name: conditions[name] for name in old})
        found.pop("versions.python", None)  # it does not change results
        return found

    def _list(self) -> dict[str, int]:
        """Return the names of a run's files and folders, each with the time of its last change."""
        held = [name for name in _FILES if os.path.lexists(self.path / name)]
        return {name: (self.path / name).lstat().st_mtime_ns for name in held}

    def claim(self, data: str) -> None:
        """Compare the data; create and lock the directory unless `open` did.

        Args:
            data: `fingerprint` of the data.

        Raises:
            ConfigError: if the data differs from that of the run, or another process was faster.
        """
        output = str(self.config.output)
        self.compare_data(data)
        self._conditions["data"] = data
        if self._locked:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output={output!r}: {error.strerror}; choose another folder") from error
        self._stack.enter_context(locked(self.path))
        self._locked = True
        if self._list() != self._found:
            raise ConfigError(
                f"output={output!r}: another process has just trained there; repeat the command"
            )

    def compare_data(self, data: str) -> None:
        """Refuse other data than that of the run that was found; a finished one cannot be resumed.

        Args:
            data: `fingerprint` of the data.

        Raises:
            ConfigError: if it differs and that is not allowed.
        """
        changed, finished = self._changed({"data": data}), self.decision.kind == "finished"
        allowed = () if finished else self._allowed
        refuse_changes(str(self.config.output), changed, allowed, finished=finished)
        self.decision.changes.update(changed)

    def begin(
        self,
        *,
        notes: Collection[str] = (),
        manifest: Manifest | None = None,
        history: list[dict[str, Any]],
        best: BestEpoch | None = None,
        bad_images: Collection[str] = (),
    ) -> None:
        """Write configuration and status, and make the files agree with the state to resume from.

        Args:
            notes: Sentences for the reader of the results.
            manifest: Images of each split.
            history: Metrics of the finished epochs.
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
            **self._conditions,
        )
        with self._writing():
            write_atomically(self.path / "config.yaml", to_yaml(self.config))
        self.update()
        if manifest is not None:
            with self._writing():
                write_atomically(self.path / MANIFEST, to_json(manifest))
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

    def save_state(self, step: int, state: SavedState) -> None:
        """Save the state to resume from; the first one is read back as a check."""
        with self._writing():
            path = write_state(self.path / "state", step, state)
            if not self._verified:
                read_state(path)
                self._verified = True

    def last_state(self) -> str:
        """Describe the state that a later call would resume from."""
        return newest_name(self.path / "state")

    def finish(self, test: dict[str, Any]) -> None:
        """Write the metrics of the test split and remove the state."""
        self.update(state="finished", test=test)
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def save_model(
        self,
        name: Literal["last", "best"],
        model: nn.Module,
        preprocessing: Preprocessing,
        class_names: list[str],
    ) -> None:
        """Save weights and everything needed to use them; replace an earlier model.

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
                # A temporary folder is readable by its owner only.
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
                f"output={str(self.path)!r} cannot be written: {reason}; earlier files are unchanged, "
                f"and {self.last_state()}"
            ) from error

    def _remove_unfinished(self) -> None:
        """Remove unfinished files of a killed process."""
        places = [(self.path, name) for name in _FILES] + [(self.path / "state", "step")]
        for folder, name in places:
            for rest in folder.glob(f"{temporary_prefix(name)}*"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def _check_place(config: TrainConfig) -> None:
    """Refuse a folder that cannot be written, and one among the images, of which it would be a class.

    Raises:
        ConfigError: naming it.
    """
    output, path = config.output, Path(str(config.output))
    if not output:
        raise ConfigError("output='' is not accepted; name a folder")
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output={output!r}: {str(existing)!r} is not a writable folder; choose another")
    sources = (config.data.train, config.data.validation, config.data.test)
    for source in filter(os.path.isdir, filter(None, sources)):
        if path.resolve().is_relative_to(Path(source).resolve()):
            raise ConfigError(f"output={output!r} is in the folder of images {source!r}; choose another")


def _line(metrics: dict[str, Any]) -> str:
    return to_json(numbers(metrics), indent=None) + "\n"

"""What a run leaves behind, and the folder that keeps it, so that no result is lost, doubled or mixed up.

```
study.json         the study (its configuration, without results)
runs/KEY/          the run of that configuration: as `training.train` writes it, and, last of all, record.json
results.jsonl      one line per finished run of the study, for programs
```
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from localvit.cost import count_macs
from localvit.studies.study import Run, Study, key_of
from localvit.training import ConfigError, Metrics, TrainConfig, from_dict, to_dict, train
from localvit.training.build import preprocessing
from localvit.training.identity import differences
from localvit.training.output import versions, write_atomically

_OWN = ("runs", "results.jsonl", "report.html", "report.md", "summary.json")


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of one run. All of it is JSON.

    Attributes:
        key: Names the configuration (`study.key_of`).
        config: The resolved configuration.
        history: One mapping per epoch, as in `training.RunResult`.
        best_epoch: Chosen on the validation split.
        validation: Metrics of that epoch.
        test: Metrics of its weights on the reported split.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image.
        seconds: The whole run took.
        notes: Sentences about the splits.
        versions: Package -> version.
        machine: In words.
    """

    key: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    best_epoch: int
    validation: Metrics
    test: Metrics
    parameters: int
    macs: int
    seconds: float
    notes: list[str]
    versions: dict[str, str]
    machine: str


def perform(config: TrainConfig, folder: Path) -> Record:
    """Train one configuration in `folder`, which holds no run yet, and leave its record there.

    Raises:
        ConfigError, DataError, UnreadableImage, TrainingFailed: as `training.train`.
    """
    start = time.perf_counter()
    result = train(dataclasses.replace(config, output=str(folder)))
    values = to_dict(dataclasses.replace(config, output=None))
    record = Record(
        key=key_of(values),
        config=values,
        history=result.history,
        best_epoch=result.best_epoch,
        validation=result.validation,
        test=result.test,
        parameters=result.parameters,
        macs=count_macs(result.model, preprocessing(result.model, config.data)["input_size"]),
        seconds=time.perf_counter() - start,
        notes=list(result.notes),
        versions=versions(),
        machine=machine(torch.get_num_threads()),
    )
    write_atomically(folder / "record.json", json.dumps(dataclasses.asdict(record), indent=1) + "\n")
    return record


def read_record(folder: Path) -> Record | None:
    """The record in a run's folder; ``None`` if the run has not finished.

    Raises:
        ConfigError: if it cannot be read, or does not belong to the folder (changed by hand, say).
    """
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        from_dict(values["config"])
        metrics = {name: Metrics(**values[name]) for name in ("validation", "test")}
        record = Record(**{**values, **metrics})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{str(path)!r} is no record ({error}); delete {str(folder)!r} to redo it"
        ) from error
    if not key_of(record.config) == record.key == folder.name:
        raise ConfigError(
            f"{str(path)!r} does not hold the configuration that its folder is named after; "
            f"delete {str(folder)!r} to redo it"
        )
    return record


class StudyFolder:
    """Where a study keeps its runs.

    Args:
        path: The folder; made when something is written.
        study: The study.

    Raises:
        ConfigError: if the folder holds another study or files of something else. Seeds may differ, and
            arms may be more or fewer: those that are there already keep their runs. Nothing is written.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study = path, study
        about = path / "study.json"
        if not about.exists():
            held = [name for name in _OWN if (path / name).exists()]
            if held:
                raise ConfigError(f"{str(path)!r} holds {held[0]} but no study.json; choose another folder")
            return
        try:
            there = json.loads(about.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{str(about)!r} cannot be read: {error}") from error
        here = self.study.to_dict()
        shared = there["arms"].keys() & here["arms"].keys()
        old, new = ({"base": s["base"], "arms": {n: s["arms"][n] for n in shared}} for s in (there, here))
        for field, values in differences(old, new).items():
            raise ConfigError(
                f"{str(path)!r} holds another study: {field} is {values[0]!r} there and {values[1]!r} here; "
                "choose another folder"
            )

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            ConfigError: if another process works in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.path / ".lock", timeout=0):
                write_atomically(self.path / "study.json", json.dumps(self.study.to_dict(), indent=1) + "\n")
                yield
        except filelock.Timeout as error:
            raise ConfigError(f"another process works in {str(self.path)!r}; wait for it") from error

    def of(self, run: Run) -> Path:
        """The folder of one run."""
        return self.path / "runs" / run.key

    def finished(self) -> dict[Run, Record]:
        """The records of the study's runs that are done, in the study's order."""
        found = {run: read_record(self.of(run)) for run in self.study.runs()}
        return {run: record for run, record in found.items() if record is not None}

    def write_results(self) -> None:
        """Write `results.jsonl`: each record with its arm and seed."""
        rows = [
            json.dumps({"arm": run.arm, "seed": run.seed, **dataclasses.asdict(record)})
            for run, record in self.finished().items()
        ]
        write_atomically(self.path / "results.jsonl", "".join(f"{row}\n" for row in rows))


def machine(threads: int) -> str:
    """The processor, the number of threads used on it, and the GPU if there is one, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: what the standard library knows will do
    words = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words

"""Folder of a study, in which no result is lost, duplicated or confused.

```
study.json         the study (without results), its command, the number of classes
jobs/              jobs of a cluster (`cluster`)
runs/KEY/          run of that configuration, as `training.train` writes it; its record.json is written last
results.jsonl      one line per finished run of the study, for programs; a report needs no other results
speed.json         inference throughput of the arms, measured alternately
report.html, report.md, summary.json
```
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localvit.atomic import write_atomically
from localvit.config import differences
from localvit.errors import ConfigError
from localvit.runs import locked, read_run
from localvit.structure import parse_json, plain, read_json, to_json
from localvit.studies.design import Study, StudyRun, study_from_dict
from localvit.studies.execution.records import Record, parse_record, read_record, remedy

_REPORT = ("report.html", "report.md", "summary.json", "speed.json")
_OTHER = ("runs", "results.jsonl", *_REPORT, "config.yaml", "status.json")
"""Files of another study or of a run (`localvit.runs`)."""
_FAILURE = "failure.json"
_BESIDES = ("command", "classes")  # further keys of study.json

RunState = Literal["new", "begun", "failed", "done"]


@dataclass(frozen=True)
class Outcome:
    """Progress and result of a run.

    Attributes:
        state: `"new"`, `"begun"` (running or interrupted), `"failed"` or `"done"`.
        record: Record of a finished run.
        reason: Reason of a failure.
    """

    state: RunState
    record: Record | None = None
    reason: str = ""


@dataclass(frozen=True)
class Failure:
    """Reason of a failed run."""

    reason: str


class StudyFolder:
    """Folder of a study and its runs.

    Args:
        path: The folder; created at the first write.

    Raises:
        ConfigError: if the folder holds another study or other files. Seeds and resources may differ, and
            arms may be added or removed: existing ones keep their runs. Nothing is written.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study = path, study
        self._seen = self._stamp()
        self._refuse_other()

    def _refuse_other(self) -> None:
        path = self.path
        if not (path / "study.json").exists():
            if path.exists() and not path.is_dir():
                raise ConfigError(f"output={str(path)!r} is not a folder; choose another name")
            held = [name for name in _OTHER if (path / name).exists()]
            if held:
                raise ConfigError(f"{str(path)!r} holds {held[0]} but no study.json; choose another folder")
            return
        there, here = read_study(path).to_dict(), self.study.to_dict()
        shared = there["arms"].keys() & here["arms"].keys()
        old, new = (
            {"base": s["base"], "arms": {n: s["arms"][n] | {"resources": {}} for n in shared}}
            for s in (there, here)
        )  # resources do not decide results
        for field, values in differences(old, new).items():
            raise ConfigError(
                f"{str(path)!r} holds another study: {field} is {values[0]!r} there and {values[1]!r} here; "
                "choose another folder"
            )

    @contextmanager
    def claim(self, command: str = "", classes: int | None = None) -> Iterator[None]:
        """Create the folder, write the study, and lock out other processes.

        Args:
            classes: Number of classes of its data, for reports on other machines.

        Raises:
            ConfigError: if another process works in it or has written another study.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            if self._stamp() != self._seen:  # another process has worked there since it was read
                self._refuse_other()
            values = {"command": command, "classes": classes, **self.study.to_dict()}
            write_atomically(self.path / "study.json", to_json(values))
            self._seen = self._stamp()
            yield

    def _stamp(self) -> int | None:
        """Return the time of the last change of the study; `None` if there is none."""
        path = self.path / "study.json"
        return path.stat().st_mtime_ns if path.exists() else None

    def of(self, run: StudyRun) -> Path:
        """Return the folder of one run."""
        return self.path / "runs" / run.key

    def outcome(self, run: StudyRun) -> Outcome:
        """Read the outcome of a run from its folder or, if it has none, from `results.jsonl`.

        Raises:
            ConfigError: if its record or status cannot be used.
        """
        folder = self.of(run)
        record = read_record(folder, run) or (None if folder.exists() else self._kept(run))
        if record is not None:
            return Outcome("done", record)
        if (folder / _FAILURE).exists():
            with remedy(f"delete {str(folder)!r} to redo it"):
                return Outcome("failed", reason=read_json(Failure, folder / _FAILURE).reason)
        status = read_run(folder).status
        if status is not None and status.state == "failed":
            return Outcome("failed", reason=status.error or "unknown")
        return Outcome("new" if status is None else "begun")

    def outcome_with(self, run: StudyRun, reuse: Sequence[Path]) -> Outcome:
        """Return the outcome of a run; a new run that is done in one of these folders of studies is done."""
        found = self.outcome(run)
        if found.state != "new":
            return found
        records = (read_record(other / "runs" / run.key, run) for other in reuse)
        return next((Outcome("done", record) for record in records if record), found)

    def finished(self) -> dict[StudyRun, Record]:
        """Return the records of the finished runs, in the study's order.

        Raises:
            ConfigError: as `outcome`.
        """
        found = {run: self.outcome(run).record for run in self.study.runs()}
        return {run: record for run, record in found.items() if record is not None}

    def readable(self) -> tuple[dict[StudyRun, Record], list[str]]:
        """Return the usable records, as `finished` does, and a message for each unusable one."""
        records, wrong = {}, self._garbled()
        for run in self.study.runs():
            try:
                record = self.outcome(run).record
            except ConfigError as error:
                wrong.append(f"{run} is left out: {error}")
                continue
            if record is not None:
                records[run] = record
        return records, wrong

    def note_failure(self, run: StudyRun, reason: str) -> None:
        """Write the reason of a failure, even if the run has written one."""
        note_failure(self.of(run), reason)

    def forget(self, run: StudyRun) -> None:
        """Remove the folder of a failed run."""
        shutil.rmtree(self.of(run), ignore_errors=True)

    def borrow(self, run: StudyRun, other: Path) -> bool:
        """Copy a finished run of the same configuration from another study's folder, if it has one.

        Raises:
            ConfigError: if the record there cannot be used.
        """
        source = other / "runs" / run.key
        if self.of(run).exists() or read_record(source, run) is None:
            return False
        partial = self.path / "runs" / f".{run.key}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(self.of(run))
        return True

    def write_results(self) -> None:
        """Write `results.jsonl`: each record with its arm and seed."""
        rows = [
            to_json({"arm": run.arm, "seed": run.seed, **plain(record)}, indent=None)
            for run, record in self.readable()[0].items()
        ]
        write_atomically(self.path / "results.jsonl", "".join(f"{row}\n" for row in rows))

    def _garbled(self) -> list[str]:
        if (self.path / "runs").exists():
            return []  # the file is rewritten from runs/
        wrong = []
        for where, line in self._lines():
            try:
                parse_json(line)
            except ConfigError:
                wrong.append(f"{where} is not a record")
        return wrong

    def _kept(self, run: StudyRun) -> Record | None:
        for where, line in self._lines():
            if f'"{run.key}"' not in line:
                continue
            with remedy("restore it or delete the file"):
                row = parse_json(line, where)
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is not a record; restore it or delete the file")
            if (row.pop("arm", None), row.pop("seed", None)) == (run.arm, run.seed):
                return parse_record(row, where, run)
        return None

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Yield the place and the text of each line of `results.jsonl`."""
        path = self.path / "results.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            yield f"line {number} of {str(path)!r}", line


def note_failure(folder: Path, reason: str) -> None:
    """Write the reason of a failure into a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _FAILURE, to_json(Failure(reason)))


def read_study(path: Path) -> Study:
    """Read the study in a folder.

    Raises:
        ConfigError: if it has none.
    """
    values = _read(path)
    for name in _BESIDES:
        values.pop(name, None)
    try:
        return study_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{str(path / 'study.json')!r} is not a study: {error}; restore it") from error


def check_reuse(folders: Sequence[Path]) -> None:
    """Refuse folders that hold no study.

    Raises:
        ConfigError: naming the first.
    """
    for folder in folders:
        read_study(folder)


def read_besides(path: Path) -> tuple[str, int | None]:
    """Read the command of the study in a folder, and the number of classes, if known."""
    values = _read(path)
    command, classes = (values.get(name) for name in _BESIDES)
    return str(command or ""), classes if isinstance(classes, int) else None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "study.json"
    if not path.exists():
        raise ConfigError(f"{str(path)!r} does not exist; choose the folder of a study")
    with remedy("restore it"):
        return read_json(dict[str, Any], path)

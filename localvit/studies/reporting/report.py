"""What a study's folder holds, read and compared: all that a report says is in this value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localvit.errors import ConfigError
from localvit.studies.design import Facts, Run, Study, check_study
from localvit.studies.execution import Record, StudyFolder, Tuning, load_tuning, read_besides, read_study
from localvit.studies.reporting.comparison import Findings, findings

TUNING = "tuning.json"
SPEED = "speed.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a study's folder holds, read and compared.

    Attributes:
        folder: Of the study.
        study: What was compared.
        facts: Of its arms.
        records: Of the runs that are done.
        findings: What came out.
        warnings: What makes the results doubtful.
        tuning: Of the learning rates; ``None`` if they were not tuned.
        command: That repeats it; empty if it was no command.
        speed_machine: On which inference was timed, in words; empty if it was not.
    """

    folder: Path
    study: Study
    facts: Facts
    records: dict[Run, Record]
    findings: Findings
    warnings: tuple[str, ...]
    tuning: Tuning | None
    command: str
    speed_machine: str


def read_report(folder: Path) -> Report:
    """Read a study's folder, as far as it has got; what cannot be used becomes a warning.

    Raises:
        ConfigError: if it holds no study.
    """
    study = read_study(folder)
    command, classes = read_besides(folder)
    store = StudyFolder(folder, study)
    records, wrong = store.readable()
    speed = read_speed(folder)
    return Report(
        folder=folder,
        study=study,
        facts=check_study(study, classes),
        records=records,
        findings=findings(study, records, speed.get("images_per_second")),
        warnings=(*wrong, *_mixed(records), *_missing(study, records)),
        tuning=load_tuning(folder / TUNING) if (folder / TUNING).exists() else None,
        command=command,
        speed_machine=str(speed.get("machine", "")),
    )


def read_speed(folder: Path) -> dict[str, Any]:
    """What `answer.time_arms` left in a study's folder; empty if it did not.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = folder / SPEED
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    return dict(values)


def _mixed(records: Mapping[Run, Record]) -> list[str]:
    """Warnings about results that were made under different conditions."""
    values: list[tuple[str, Callable[[Record], str]]] = [
        (
            "versions",
            lambda record: ", ".join(f"{k} {v}" for k, v in record.versions.items() if k != "python"),
        ),
        ("commits", lambda record: record.commit or "none"),
        ("machines", lambda record: record.machine),
    ]
    found = []
    for what, of in values:
        different = sorted({of(record) for record in records.values()})
        if len(different) > 1:
            found.append(f"Mixed {what}: the runs were made with {' / '.join(different)}.")
    return found


def _missing(study: Study, records: Mapping[Run, Record]) -> list[str]:
    missing = [run for run in study.runs() if run not in records]
    if not missing:
        return []
    listed = ", ".join(f"{run.arm} seed {run.seed}" for run in missing[:6])
    more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
    return [f"Not complete: {len(missing)} of {len(study.runs())} runs are missing ({listed}{more})."]

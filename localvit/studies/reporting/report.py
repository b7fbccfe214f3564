"""Contents of a study's folder, read and compared: a report is computed from this value alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from localvit.errors import ConfigError
from localvit.structure import read_json
from localvit.studies.design import Study, StudyRun, StudySummary, check_study, locality_sites
from localvit.studies.execution import Record, StudyFolder, Tuning, load_tuning, read_besides, read_study
from localvit.studies.reporting.comparison import Findings, findings

TUNING = "tuning.json"
SPEED = "speed.json"
SHOWN_KERNELS = 48
_CONV = ".conv.weight"


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Learned depth-wise kernels of one feed-forward network.

    Attributes:
        site: Path of the network in the model.
        arm, seed: Run that learned them.
        weights: (n, k, k) float array, the strongest first, at most `SHOWN_KERNELS`.
        left_out: Networks of this model that are not shown because no output depends on them.
    """

    site: str
    arm: str
    seed: int
    weights: np.ndarray = field(compare=False)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """Contents of a study's folder, read and compared.

    Attributes:
        folder: Folder of the study.
        study: Arms, seeds and question.
        summary: Summary of its models.
        records: Records of the finished runs.
        findings: Results and comparisons.
        warnings: Sentences on what makes the results doubtful, such as damaged or missing records.
        tuning: Search for the learning rates; `None` if they were not tuned.
        command: Command that repeats the study; empty if no command ran it.
        speed_machine: Machine on which inference was timed, in words; empty if it was not.
        kernels: Kernels that are drawn; empty if no weights are available.
    """

    folder: Path
    study: Study
    summary: StudySummary
    records: dict[StudyRun, Record]
    findings: Findings
    warnings: tuple[str, ...]
    tuning: Tuning | None
    command: str
    speed_machine: str
    kernels: tuple[Kernels, ...]


def read_report(folder: Path) -> StudyReport:
    """Read the folder of a study, finished or not; a file that cannot be used becomes a warning.

    Raises:
        ConfigError: if it has no study.
    """
    study = read_study(folder)
    command, classes = read_besides(folder)
    store = StudyFolder(folder, study)
    records, wrong = store.readable()
    summary = check_study(study, classes)
    rates = folder / TUNING
    speed: Speed = _or_warn(wrong, lambda: read_speed(folder), Speed())
    return StudyReport(
        folder=folder,
        study=study,
        summary=summary,
        records=records,
        findings=findings(study, records, speed.images_per_second),
        tuning=_or_warn(wrong, lambda: load_tuning(rates) if rates.exists() else None, None),
        command=command,
        speed_machine=speed.machine,
        kernels=_or_warn(wrong, lambda: read_kernels(store, records, summary.classes), ()),
        warnings=(*wrong, *_mixed(records), *_missing(study, records)),
    )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Throughput of the arms in inference, as `running.time_arms` measured it.

    Attributes:
        images_per_second: Arm -> throughput.
        machine: Description of the machine.
        keys: Keys of the runs whose models were timed.
    """

    images_per_second: dict[str, float] = field(default_factory=dict)
    machine: str = ""
    keys: tuple[str, ...] = ()


def read_speed(folder: Path) -> Speed:
    """Read the throughput of the arms; empty if it was not measured.

    Raises:
        ConfigError: if it cannot be read.
    """
    path = folder / SPEED
    if not path.exists():
        return Speed()
    try:
        return read_json(Speed, path)
    except ConfigError as error:
        raise ConfigError(f"{error}; delete it to measure again") from error


def read_kernels(store: StudyFolder, records: Mapping[StudyRun, Record], classes: int) -> tuple[Kernels, ...]:
    """Read the depth-wise kernels of up to three feed-forward networks (first, middle, last).

    They are those of the first run with locality whose weights are available. Networks that no output depends
    on are left out.

    Raises:
        ConfigError: if the weights cannot be read.
    """
    for run in records:
        path = store.of(run) / "best" / "model.safetensors"
        locality = run.config.model.locality
        if locality is None or not locality.depthwise or not path.exists():
            continue
        sites = locality_sites(run.config.model, classes)
        try:
            found = _depthwise(path, [site for site, used in sites.items() if used])
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read: {error}; no kernels are drawn") from error
        unused = tuple(site for site, used in sites.items() if not used)
        return tuple(
            Kernels(site=site, arm=run.arm, seed=run.seed, weights=weights, left_out=unused)
            for site, weights in found.items()
        )
    return ()


def _depthwise(path: Path, sites: list[str]) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="pt") as file:
        names = [name for name in list(file.keys()) if name.endswith(_CONV)]
        owned = {site: [name for name in names if name.startswith(f"{site}.")] for site in sites}
        found = {site: own[0] for site, own in owned.items() if own}
        paths = list(found)
        shown = dict.fromkeys(paths[i] for i in (0, len(paths) // 2, -1)) if paths else {}
        return {site: _strongest(file.get_tensor(found[site])[:, 0].float().numpy()) for site in shown}


def _strongest(weights: np.ndarray) -> np.ndarray:
    norms = np.sqrt((weights**2).sum((1, 2)))
    return weights[np.argsort(-norms, kind="stable")[:SHOWN_KERNELS]]


def _or_warn(warnings: list[str], read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except ConfigError as error:
        warnings.append(str(error))
        return otherwise


def _mixed(records: Mapping[StudyRun, Record]) -> list[str]:
    """Warn of results from different conditions."""
    runs = records.values()
    conditions = {
        "versions": {", ".join(f"{k} {v}" for k, v in run.versions.items() if k != "python") for run in runs},
        "commits": {(run.commit or "none")[:12] for run in runs},
        "machines": {run.machine for run in runs},
        "test splits": {f"{run.test.images:,} images" for run in runs},
    }
    return [
        f"Mixed {what}: the runs have {' / '.join(sorted(found))}."
        for what, found in conditions.items()
        if len(found) > 1
    ]


def _missing(study: Study, records: Mapping[StudyRun, Record]) -> list[str]:
    """Warn of runs without a record, by arm."""
    missing: dict[str, list[str]] = {}
    for run in study.runs():
        if run not in records:
            missing.setdefault(run.arm, []).append(str(run.seed))
    if not missing:
        return []
    listed = "; ".join(f"{a} seed{'s' if len(s) > 1 else ''} {', '.join(s)}" for a, s in missing.items())
    number = sum(map(len, missing.values()))
    return [f"Incomplete: {number} of {len(study.runs())} runs are missing ({listed})."]

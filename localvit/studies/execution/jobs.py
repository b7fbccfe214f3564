"""Jobs of a study's runs on a cluster, and their state."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localvit.atomic import write_atomically
from localvit.errors import ConfigError
from localvit.structure import read_json, to_json
from localvit.studies.design import StudyRun
from localvit.studies.execution.folder import StudyFolder

Kind = Literal["slurm", "local"]


@dataclass(frozen=True)
class Job:
    """A job, as its cluster names it."""

    kind: Kind
    id: str


def living(folder: StudyFolder) -> dict[StudyRun, Job]:
    """Return unfinished runs whose last job is queued or running.

    Raises:
        ConfigError: if their state is unknown.
    """
    known = _read_jobs(folder)
    open_jobs = {
        run: known[run.key]
        for run in folder.study.runs()
        if run.key in known and folder.outcome(run).state != "done"
    }
    alive = alive_of(open_jobs.values())
    if alive is None:
        raise ConfigError(
            f"squeue does not respond, so the state of {len(open_jobs)} jobs is unknown; try again, "
            f"or delete {str(jobs_path(folder) / 'jobs.json')!r} if that cluster is gone"
        )
    return {run: job for run, job in open_jobs.items() if job in alive}


def alive_of(jobs: Collection[Job]) -> set[Job] | None:
    """Return the jobs that are queued or running; `None` if SLURM does not respond.

    submitit would ask sacct, which needs a database that not every cluster has, lags behind the queue, and
    calls a suspended job finished. The queue itself is what decides whether a run may be submitted.
    """
    slurm = {job for job in jobs if job.kind == "slurm"}
    queued = _queue() if slurm else set()
    if queued is None:
        return None
    return {job for job in jobs if (job.id in queued if job.kind == "slurm" else _is_running(job.id))}


def _queue() -> set[str] | None:
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(done.stdout.split())


def _is_running(process: str) -> bool:
    """Return whether this is a process of submitit's local executor; a dead one has no command line."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def jobs_path(folder: StudyFolder) -> Path:
    """Return the folder of jobs."""
    return folder.path / "jobs"


def _read_jobs(folder: StudyFolder) -> dict[str, Job]:
    path = jobs_path(folder) / "jobs.json"
    return read_json(dict[str, Job], path) if path.exists() else {}


def write_jobs(folder: StudyFolder, jobs: Mapping[StudyRun, Job]) -> None:
    """Record the jobs of some runs, in place of their earlier ones."""
    jobs_path(folder).mkdir(exist_ok=True)
    values = _read_jobs(folder) | {run.key: job for run, job in jobs.items()}
    write_atomically(jobs_path(folder) / "jobs.json", to_json(values))

"""A study's runs as jobs of a cluster, through submitit: one job is one run.

What became of a run is what its folder says, never how its job ended. A job that is preempted, requeued,
out of time or killed only has to start the same run again, which then goes on from its last state. All
machines must see the study's folder, and the pictures, under the same paths.

```
jobs/jobs.json          run -> its last job
jobs/ID_0_log.err, ...  what submitit keeps: scripts, logs, pickles (only its own process loads these)
```
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from localvit.studies.display import Display
from localvit.studies.folder import StudyFolder, note_failure, reason_of
from localvit.studies.records import RECORD, perform
from localvit.studies.resources import Resources
from localvit.studies.study import Run, Study
from localvit.training import ConfigError, TrainConfig, TrainingInterrupted, stop_on_signals
from localvit.training.lock import FolderInUse
from localvit.training.output import write_atomically

Kind = Literal["slurm", "local"]
POLL = {"slurm": 15.0, "local": 0.5}
"""Seconds between two looks at the jobs."""
TIMEOUTS = 50
"""How often a job that is out of time goes back into the queue; a run that never gets anywhere must end."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the runs of a study go.

    Attributes:
        kind: ``"slurm"``, or ``"local"``: jobs on this machine, all at once, to try things out.
        resources: For each run, where its arm (`Arm.resources`) says nothing else.
        parallel: Most jobs of one array at a time; ``None``: as many as the cluster likes. Not for ``"local"``.
    """

    kind: Kind = "slurm"
    resources: Resources = Resources()
    parallel: int | None = None

    def __post_init__(self) -> None:
        if self.parallel is not None and self.parallel < 1:
            raise ConfigError(f"parallel={self.parallel}: at least 1")

    def check(self, study: Study, threads: int = 1) -> None:
        """Refuse what cannot be submitted from here.

        Args:
            study: Its arms may ask for resources of their own.
            threads: Of each run.

        Raises:
            ConfigError: saying what is missing.
        """
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("running on a cluster needs submitit: pip install 'localvit[cluster]'")
        missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if self.kind == "slurm" and missing:
            raise ConfigError(f"this is no machine of a SLURM cluster: there is no {missing[0]!r}")
        for arm in study.arms:
            if threads > (cpus := self.resources.replaced(arm.resources).cpus):
                raise ConfigError(f"arm {arm.name!r}: threads={threads} do not fit cpus={cpus}")

    def arrays(self, study: Study, runs: Iterable[Run]) -> dict[Resources, list[Run]]:
        """The runs by what they ask for: each class is one array of jobs."""
        found: dict[Resources, list[Run]] = {}
        for run in runs:
            own = study.arm(run.arm).resources
            found.setdefault(self.resources.replaced(own), []).append(run)
        return found

    def submit(self, folder: StudyFolder, runs: Iterable[Run], threads: int) -> dict[Run, Job]:
        """Hand runs to the cluster and write down which job does which.

        Raises:
            ConfigError: if the cluster refuses, with its reason.
        """
        jobs: dict[Run, Job] = {}
        for resources, members in self.arrays(folder.study, runs).items():
            tasks = [Task(run.config, folder.of(run).absolute(), threads) for run in members]
            try:
                submitted = self._executor(folder, resources).submit_array(tasks)
            except (RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"{self.kind} refuses {len(tasks)} jobs ({resources}): {reason}") from error
            jobs |= {run: Job(self.kind, job.job_id) for run, job in zip(members, submitted, strict=True)}
            _write_jobs(folder, jobs)
        return jobs

    def describe(self, folder: StudyFolder, runs: Collection[Run]) -> list[str]:
        """What `work` would do with runs that are not done, in words."""
        there = living(folder)
        lines = [
            f"{run.arm} seed {run.seed}: queued or running as job {there[run].id}"
            for run in runs
            if run in there
        ]
        limit = f", at most {self.parallel} at a time" if self.parallel else ""
        for resources, members in self.arrays(
            folder.study, [run for run in runs if run not in there]
        ).items():
            names = ", ".join(f"{run.arm} seed {run.seed}" for run in members)
            lines.append(f"{self.kind}: an array of {len(members)} jobs{limit}, each {resources}: {names}")
        return lines

    def _executor(self, folder: StudyFolder, resources: Resources) -> Any:
        import submitit

        limit = {f"{self.kind}_max_num_timeout": TIMEOUTS}
        executor = submitit.AutoExecutor(_jobs(folder).absolute(), cluster=self.kind, **limit)
        executor.update_parameters(
            name=f"localvit-{folder.study.name or 'study'}",
            timeout_min=resources.minutes,
            gpus_per_node=resources.gpus or None,
            cpus_per_task=resources.cpus,
            mem_gb=resources.memory,
            slurm_partition=resources.partition,
            slurm_account=resources.account,
            slurm_qos=resources.qos,
            slurm_constraint=resources.constraint,
            slurm_array_parallelism=self.parallel,
            slurm_additional_parameters={"requeue": True},
            # From SLURM 22.05 on, srun does not take this over from the job.
            slurm_srun_args=[f"--cpus-per-task={resources.cpus}"],
            **({f"{self.kind}_setup": list(resources.setup)} if resources.setup else {}),
        )
        return executor


@dataclass(frozen=True)
class Job:
    """A job, as its cluster names it."""

    kind: Kind
    id: str


@dataclass(frozen=True)
class Task:
    """What a job does: one run, or the rest of it. submitit calls it, and `checkpoint` to requeue it.

    SLURM announces the end of a job by SIGTERM, and submitit asks it for SIGUSR2 before a time limit or a
    preemption. Both save the state. After SIGUSR2 submitit puts the job back into the queue; after SIGTERM
    the run goes on, because what follows is SLURM's to decide: the end, a requeue, or nothing.
    """

    config: TrainConfig
    folder: Path
    threads: int

    def __call__(self) -> None:
        from submitit import JobEnvironment

        requeue = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        torch.set_num_threads(self.threads)
        while not (self.folder / RECORD).exists():
            if self._train(requeue) and not (self.folder / RECORD).exists():
                signal.raise_signal(requeue)  # now submitit's: it requeues the job and ends this process

    def checkpoint(self) -> Any:
        """The same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self, requeue: int) -> bool:
        """Train until the end or a signal; whether the job has to make room."""
        with stop_on_signals(requeue) as received:
            try:
                perform(self.config, self.folder)
            except TrainingInterrupted:
                if signal.SIGINT in received:
                    raise
            except FolderInUse:
                raise  # says nothing about the run, which another job or process does
            except Exception as error:
                note_failure(self.folder, reason_of(error))
                raise
        return requeue in received


def living(folder: StudyFolder) -> dict[Run, Job]:
    """The runs that are not done and whose last job is queued or running.

    Raises:
        ConfigError: if nobody can tell.
    """
    known = _read_jobs(folder)
    open_jobs = {
        run: known[run.key]
        for run in folder.study.runs()
        if run.key in known and folder.outcome(run).state != "done"
    }
    alive = _alive(open_jobs.values())
    if alive is None:
        raise ConfigError(
            f"squeue does not answer, so nobody can tell whether {len(open_jobs)} jobs still run; try again, "
            f"or delete {str(_jobs(folder) / 'jobs.json')!r} if that cluster is gone"
        )
    return {run: job for run, job in open_jobs.items() if job in alive}


def work(
    cluster: Cluster,
    missing: Iterable[Run],
    folder: StudyFolder,
    threads: int,
    failures: dict[Run, str],
    display: Display,
) -> None:
    """Submit the missing runs that have no job, and follow all of them to their end.

    An interrupt leaves the jobs where they are; the next call finds them.

    Args:
        cluster: Where to.
        missing: Runs that are not done.
        folder: Of the study.
        threads: Of each run.
        failures: Gets the runs that did not finish, with the reason.
        display: Told about them.

    Raises:
        ConfigError: as `Cluster.submit` and `living`.
    """
    there, missing = living(folder), list(missing)
    jobs = {run: there[run] for run in missing if run in there}
    jobs |= cluster.submit(folder, [run for run in missing if run not in there], threads)
    ended: set[Run] = set()
    while jobs:
        alive = _alive(jobs.values())  # before the outcomes: a run may finish between the two
        gone = set() if alive is None else {run for run, job in jobs.items() if job not in alive}
        for run in list(jobs):
            outcome = folder.outcome(run)
            if outcome.record is not None:
                display.finished(run, outcome.record)
            elif outcome.state == "failed":
                failures[run] = outcome.reason
            elif run in gone & ended:  # twice, because files may be seen later than the queue
                log = _jobs(folder) / f"{jobs[run].id}_0_log.err"
                failures[run] = (
                    f"its job {jobs[run].id} ended before it did (see {log}); it goes on next time"
                )
            else:
                continue
            del jobs[run]
            if run in failures:
                display.failed(run, failures[run])
        ended = gone
        display.refresh(list(jobs))
        if jobs:
            time.sleep(POLL[cluster.kind])


def _alive(jobs: Collection[Job]) -> set[Job] | None:
    """Those that are queued or running; ``None`` if SLURM does not say.

    submitit would ask sacct, which needs a data base that not every cluster has, is behind the queue, and
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
    """Whether this is a process of submitit's local executor; one that has ended has no command line."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _jobs(folder: StudyFolder) -> Path:
    return folder.path / "jobs"


def _read_jobs(folder: StudyFolder) -> dict[str, Job]:
    path = _jobs(folder) / "jobs.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {key: Job(**job) for key, job in values.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error


def _write_jobs(folder: StudyFolder, jobs: Mapping[Run, Job]) -> None:
    _jobs(folder).mkdir(exist_ok=True)
    values = _read_jobs(folder) | {run.key: job for run, job in jobs.items()}
    text = json.dumps({key: asdict(job) for key, job in values.items()}, indent=1)
    write_atomically(_jobs(folder) / "jobs.json", text + "\n")

"""Runs of a study as jobs of a cluster, through submitit: one job per run.

The outcome of a run is read from its folder, not from its job. A job that was preempted, requeued, out of
time or killed starts the same run again, which resumes from its last state. All machines must see the study's
folder and the images under the same paths.

```
jobs/jobs.json          run -> its last job
jobs/ID_0_log.err, ...  submitit's scripts, logs and pickles (only its own process loads these)
```
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any

import torch

from localvit.config import TrainConfig
from localvit.data import disable_ghostscript
from localvit.errors import ConfigError, TrainingInterrupted, at_least, one_line
from localvit.runs import FolderInUse
from localvit.runtime import stop_on_signals
from localvit.studies.design import Resources, Study, StudyRun
from localvit.studies.execution.display import Display
from localvit.studies.execution.folder import StudyFolder, note_failure
from localvit.studies.execution.jobs import Job, Kind, alive_of, jobs_path, living, write_jobs
from localvit.studies.execution.records import RECORD, perform

POLL = {"slurm": 15.0, "local": 0.5}
"""Seconds between two checks of the jobs."""
TIMEOUTS = 50
"""Maximum number of times that a job out of time is requeued, so that a run without progress ends."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Cluster for the runs of a study.

    Attributes:
        kind: `"slurm"`, or `"local"`: jobs on this machine, all at once, for trials.
        resources: Resources of each run, unless its arm (`Arm.resources`) overrides them.
        parallel: Maximum number of jobs of an array at a time; `None`: no limit. Not for `"local"`.
    """

    kind: Kind = "slurm"
    resources: Resources = field(default_factory=Resources)
    parallel: int | None = None

    def __post_init__(self) -> None:
        if self.parallel is not None:
            at_least(self, "", 1, "parallel")
            if self.kind == "local":
                raise ConfigError(f"parallel={self.parallel} is not accepted for local jobs; leave it out")

    def check(self, study: Study, threads: int = 1) -> None:
        """Refuse a study that cannot be submitted from here.

        Raises:
            ConfigError: naming the missing thing.
        """
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError("submitit is missing; run pip install 'localvit[cluster]'")
        missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if self.kind == "slurm" and missing:
            raise ConfigError(f"{missing[0]!r} is missing; run this on a machine of a SLURM cluster")
        for arm in study.arms:
            if threads > (cpus := self.resources.replaced(arm.resources).cpus):
                raise ConfigError(f"arm {arm.name!r}: threads={threads} exceed cpus={cpus}; change one")

    def arrays(self, study: Study, runs: Iterable[StudyRun]) -> dict[Resources, list[StudyRun]]:
        """Return the runs by resources: each group is one array of jobs."""
        found: dict[Resources, list[StudyRun]] = {}
        for run in runs:
            own = study.arm(run.arm).resources
            found.setdefault(self.resources.replaced(own), []).append(run)
        return found

    def submit(self, folder: StudyFolder, runs: Iterable[StudyRun], threads: int) -> dict[StudyRun, Job]:
        """Submit runs to the cluster and record the job of each.

        Raises:
            ConfigError: if the cluster refuses; the message has the reason.
        """
        jobs: dict[StudyRun, Job] = {}
        for resources, members in self.arrays(folder.study, runs).items():
            tasks = [Task(run.config, folder.of(run).absolute(), threads) for run in members]
            try:
                submitted = self._executor(folder, resources).submit_array(tasks)
            except (RuntimeError, OSError) as error:
                refused = f"{self.kind} refuses {len(tasks)} jobs ({resources})"
                raise ConfigError(f"{refused}: {one_line(error)}") from error
            jobs |= {run: Job(self.kind, job.job_id) for run, job in zip(members, submitted, strict=True)}
            write_jobs(folder, jobs)
        return jobs

    def describe(self, folder: StudyFolder, runs: Collection[StudyRun]) -> list[str]:
        """Describe the jobs of unfinished runs."""
        there = living(folder)
        lines = [f"{run}: queued or running as job {there[run].id}" for run in runs if run in there]
        limit = f", at most {self.parallel} at a time" if self.parallel else ""
        new = [run for run in runs if run not in there]
        for resources, members in self.arrays(folder.study, new).items():
            names = ", ".join(map(str, members))
            lines.append(f"{self.kind}: an array of {len(members)} jobs{limit}, each {resources}: {names}")
        return lines

    def _executor(self, folder: StudyFolder, resources: Resources) -> Any:
        import submitit

        limit = {f"{self.kind}_max_num_timeout": TIMEOUTS}
        executor = submitit.AutoExecutor(jobs_path(folder).absolute(), cluster=self.kind, **limit)
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
            # From SLURM 22.05 on, srun does not inherit this from the job.
            slurm_srun_args=[f"--cpus-per-task={resources.cpus}"],
            **({f"{self.kind}_setup": list(resources.setup)} if resources.setup else {}),
        )
        return executor


@dataclass(frozen=True)
class Task:
    """Work of a job: one run, or the rest of it. submitit calls it, and `checkpoint` to requeue it.

    SLURM announces the end of a job by SIGTERM, and submitit asks it for SIGUSR2 before a time limit or a
    preemption. Both save the state. After SIGUSR2 submitit requeues the job; after SIGTERM the run continues,
    because SLURM decides what follows: the end, a requeue, or nothing.
    """

    config: TrainConfig
    folder: Path
    threads: int

    def __call__(self) -> None:
        from submitit import JobEnvironment

        disable_ghostscript()
        requeue = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        torch.set_num_threads(self.threads)
        print(f"localvit: run {self.folder.name}", flush=True)  # identifies the log
        while not (self.folder / RECORD).exists():
            if self._train(requeue) and not (self.folder / RECORD).exists():
                signal.raise_signal(requeue)  # submitit requeues the job and ends this process

    def checkpoint(self) -> Any:
        """Return the job to requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self, requeue: int) -> bool:
        """Train until the end or a signal; return whether the job must be requeued."""
        with stop_on_signals(requeue) as received:
            try:
                perform(self.config, self.folder)
            except TrainingInterrupted:
                if signal.SIGINT in received:
                    raise
            except FolderInUse:
                raise  # another job or process does the run
            except Exception as error:
                note_failure(self.folder, one_line(error))
                raise
        return requeue in received


def work(
    cluster: Cluster,
    missing: Iterable[StudyRun],
    folder: StudyFolder,
    threads: int,
    failures: dict[StudyRun, str],
    display: Display,
) -> None:
    """Submit the missing runs without a job, and wait for all of them.

    An interrupt leaves the jobs running; the next call finds them.

    Args:
        failures: Mapping that gets the failed runs, with the reason.

    Raises:
        ConfigError: as `Cluster.submit` and `living`.
    """
    there, missing = living(folder), list(missing)
    jobs = {run: there[run] for run in missing if run in there}
    jobs |= cluster.submit(folder, [run for run in missing if run not in there], threads)
    ended: set[StudyRun] = set()
    while jobs:
        alive = alive_of(jobs.values())  # before the outcomes: a run may finish between the two
        gone = set() if alive is None else {run for run, job in jobs.items() if job not in alive}
        # Missing twice, because files may be seen later than the queue.
        _settle(jobs, gone & ended, folder, failures, display)
        ended = gone
        display.refresh(list(jobs))
        if jobs:
            sleep(POLL[cluster.kind])


def _settle(
    jobs: dict[StudyRun, Job],
    ended: Collection[StudyRun],
    folder: StudyFolder,
    failures: dict[StudyRun, str],
    display: Display,
) -> None:
    """Remove the runs that need no more waiting: finished, failed, or without a job."""
    for run, job in list(jobs.items()):
        outcome = folder.outcome(run)
        if outcome.record is not None:
            display.finished(run, outcome.record)
        elif outcome.state == "failed" or run in ended:
            log = jobs_path(folder) / f"{job.id}_0_log.err"
            short = f"its job {job.id} ended before the run did (see {log}); the next call resumes it"
            failures[run] = outcome.reason or short
            display.failed(run, failures[run])
        else:
            continue
        del jobs[run]

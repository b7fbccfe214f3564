"""Missing runs of a study, in worker processes, with a display."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

import torch
from rich.console import Console

from localvit.data import disable_ghostscript, open_splits
from localvit.errors import ConfigError, Failed, one_line
from localvit.runtime import pick_device
from localvit.studies.design import Study, StudyRun, StudySummary, check_study
from localvit.studies.execution import cluster as clusters
from localvit.studies.execution.display import Display
from localvit.studies.execution.folder import Outcome, StudyFolder, check_reuse
from localvit.studies.execution.jobs import living
from localvit.studies.execution.records import Record, perform


class StudyFailed(Failed):
    """Failure of a study; the message has the failed runs and the reasons."""


Failures = dict[StudyRun, str]
"""Failed runs, each with the reason."""


def run_missing(
    folder: StudyFolder,
    *,
    jobs: int = 2,
    threads: int = 1,
    cluster: clusters.Cluster | None = None,
    retry: bool = True,
    reuse: Sequence[Path] = (),
    command: str = "",
    console: Console | None = None,
) -> Failures:
    """Run every run of the study without a record, ordered by seed.

    An interrupted run resumes from its last state; a failed one does not stop the others. On an interrupt the
    workers end at once, finished runs stay, and a later call resumes.

    Args:
        folder: Folder of the study.
        jobs: Number of worker processes. If there are GPUs, each worker gets one; with more jobs than GPUs,
            several share one. Not used with a cluster.
        threads: Threads of each worker; small models gain nothing from more than one.
        cluster: Cluster for the runs; `None`: they run here. Jobs of an earlier call are followed, and an
            interrupt leaves them running.
        retry: Repeat failed runs; otherwise they are listed.
        reuse: Folders of other studies, from which finished runs of the same configuration are copied.
        command: Command that is saved with the study.
        console: Console for progress; `None` shows nothing.

    Raises:
        ConfigError, DataError: if an arm cannot be trained, a record or a folder to reuse cannot be read,
            another process works in the folder or nothing can be submitted from here; nothing was written.
            Or if the cluster refuses the jobs, or jobs exist and `cluster` is `None`.
    """
    check_reuse(reuse)
    if cluster is not None:
        cluster.check(folder.study, threads)
    summary = check_ready(folder.study, here=cluster is None)
    folder.finished()  # refuses damaged records
    with folder.claim(command, summary.classes):
        if cluster is None and (there := living(folder)):
            listed = ", ".join(job.id for job in there.values())
            raise ConfigError(f"{len(there)} runs have jobs ({listed}); add --cluster or cancel them")
        outcomes = _outcomes(folder, retry, reuse)
        failures = {run: o.reason for run, o in outcomes.items() if o.state == "failed"}
        missing = deque(run for run, o in outcomes.items() if o.state in ("new", "begun"))
        done = {run: o.record for run, o in outcomes.items() if o.record is not None}
        try:
            if missing:
                if cluster is not None:
                    jobs = cluster.parallel or len(missing)
                with Display(console, folder, summary, done, failures, jobs) as display:
                    if cluster is None:
                        _work(missing, folder, min(jobs, len(missing)), threads, failures, display)
                    else:
                        clusters.work(cluster, missing, folder, threads, failures, display)
        finally:
            folder.write_results()
    return failures


def check_ready(study: Study, here: bool = True) -> StudySummary:
    """Build each arm's model and open its data, so that errors come before anything is written.

    Args:
        study: The study.
        here: Check the device of this machine too.

    Raises:
        ConfigError, DataError: as `training.train`, for an arm that cannot be trained.
    """
    seen = []
    for arm in study.arms:
        config = study.config(arm, study.seeds[0])
        if here:
            pick_device(config.device)
        if (config.data, config.batch_size) not in seen:
            images = len(open_splits(config.data, seed=config.seed).train)
            if images < config.batch_size:
                raise ConfigError(
                    f"arm {arm.name!r}: batch_size={config.batch_size} exceeds the {images} training images; "
                    "lower it"
                )
            seen.append((config.data, config.batch_size))
    return check_study(study)


def _outcomes(folder: StudyFolder, retry: bool, reuse: Sequence[Path]) -> dict[StudyRun, Outcome]:
    """Return the outcome of each run, after removing failed ones (`retry`) and copying reused ones."""
    found = {run: folder.outcome(run) for run in folder.study.runs()}
    for run, outcome in found.items():
        if outcome.state == "failed" and retry:
            folder.forget(run)
            found[run] = Outcome("new")
        if outcome.state == "new" and any(folder.borrow(run, other) for other in reuse):
            found[run] = folder.outcome(run)
    return found


def _work(
    missing: deque[StudyRun],
    folder: StudyFolder,
    jobs: int,
    threads: int,
    failures: Failures,
    display: Display,
) -> None:
    """Give each worker one run after the other; the death of a worker fails one run only."""
    with _workers(jobs, threads) as workers:
        running: dict[Future[Record], tuple[int, StudyRun]] = {}
        while missing or running:
            busy = {slot for slot, _ in running.values()}
            for slot in set(range(jobs)) - busy:
                if missing:
                    run = missing.popleft()
                    running[workers[slot].submit(perform, run.config, folder.of(run))] = slot, run
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                slot, run = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    failures[run] = "its process died, perhaps for lack of memory; the next call resumes it"
                    workers[slot] = _worker(slot, threads)
                elif error is not None:
                    failures[run] = one_line(error)
                    folder.note_failure(run, failures[run])
                if error is None:
                    display.finished(run, future.result())
                else:
                    display.failed(run, failures[run])
            display.refresh([run for _, run in running.values()])


@contextmanager
def _workers(count: int, threads: int) -> Iterator[list[Executor]]:
    """Start worker processes that end with this one."""
    before = set(multiprocessing.active_children())
    workers = [_worker(slot, threads) for slot in range(count)]
    try:
        yield workers
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        for worker in workers:
            worker.shutdown(cancel_futures=True)


def _worker(slot: int, threads: int) -> Executor:
    """Start one process in a pool of its own, so that its death breaks no other."""
    # A fork of this process can hang, because its torch may have started threads. The server has imported
    # everything and started none, so its forks need neither the seconds nor the memory of an import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    start = (slot, threads, dict(os.environ))
    return ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=start)


def _start_worker(slot: int, threads: int, environment: dict[str, str]) -> None:
    os.environ.clear()  # that of the server, which may be older
    os.environ.update(environment)
    disable_ghostscript()
    gpus = torch.cuda.device_count()  # does not start CUDA
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent dies; it would train beside the next call's workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)

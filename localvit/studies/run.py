"""The missing runs of a study, in worker processes, with a line and a bar for whoever watches."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

import torch
from rich import progress
from rich.console import Console

from localvit.data import open_splits
from localvit.studies.records import Record, StudyFolder, perform
from localvit.studies.study import Run, Study
from localvit.training.build import build_model, build_optimizer, check_forward, pick_device, preprocessing


class StudyFailed(RuntimeError):
    """A study cannot be completed; the message says which runs failed and why."""


Failures = dict[Run, str]
"""Runs that did not finish, each with the reason."""


def run_missing(folder: StudyFolder, *, jobs: int = 2, console: Console | None = None) -> Failures:
    """Do every run of the study that has no record yet.

    A run that fails does not stop the others; it is tried again the next time. On an interrupt the
    workers end at once, finished runs stay, and a later call goes on.

    Args:
        folder: Of the study.
        jobs: Worker processes, each with one thread: small models gain nothing from more.
        console: Where progress is shown; ``None`` shows nothing.

    Raises:
        ConfigError, DataError: if an arm cannot be trained, a record cannot be read or another process works
            in the folder; nothing was written.
    """
    check_arms(folder.study)
    with folder.claim():
        runs = folder.study.runs()
        done = folder.finished()
        missing = [run for run in runs if run not in done]
        for run in missing:
            shutil.rmtree(folder.of(run), ignore_errors=True)  # what an interrupted try left
        failures: Failures = {}
        try:
            if missing:
                with _Display(console, folder, done) as display, _workers(min(jobs, len(missing))) as pool:
                    futures = {pool.submit(perform, run.config, folder.of(run)): run for run in missing}
                    _collect(futures, failures, display)
        finally:
            folder.write_results()
    return failures


def check_arms(study: Study) -> None:
    """Build what each arm trains, so that what cannot work fails before anything is written.

    Raises:
        ConfigError, DataError: as `training.train`, for an arm that cannot be trained.
    """
    for arm in study.arms:
        config = study.config(arm, study.seeds[0])
        pick_device(config.device)
        splits = open_splits(config.data, seed=config.seed)
        model = build_model(config.model, splits.num_classes)
        check_forward(model, config.model.name, preprocessing(model, config.data)["input_size"])
        build_optimizer(model, config.optim, config.batch_size)


def _collect(futures: dict[Future[Record], Run], failures: Failures, display: _Display) -> None:
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in finished:
            run, error = futures[future], future.exception()
            if error is None:
                display.finished(run, future.result())
            else:
                failures[run] = " ".join(str(error).split()) or type(error).__name__
                display.failed(run, failures[run])
        display.refresh([futures[future] for future in pending])


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends."""
    before = set(multiprocessing.active_children())
    # Spawned, because a fork of a process whose torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers; they would train on beside those of the next try."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class _Display:
    """A line per finished run, and a bar over all epochs with the remaining time."""

    def __init__(self, console: Console | None, folder: StudyFolder, done: dict[Run, Record]) -> None:
        self.console = console or Console(quiet=True)
        self.folder = folder
        runs = folder.study.runs()
        self.total, self.done = len(runs), len(done)
        self.epochs = sum(run.config.epochs for run in runs if run not in done)
        self.over = 0  # epochs of the runs that ended
        self.bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=console is None,
        )
        self.task = self.bar.add_task("starting", total=self.epochs)

    def __enter__(self) -> _Display:
        if self.done:
            self._print(f"{self.done} of {self.total} runs are there already, in {self.folder.path}")
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def refresh(self, pending: list[Run]) -> None:
        """Move the bar to where the pending runs are."""
        epochs = {run: _epochs_done(self.folder.of(run)) for run in pending}
        under_way = [f"{run.arm} seed {run.seed}" for run, count in epochs.items() if count is not None]
        reached = self.over + sum(count or 0 for count in epochs.values())
        text = f"{self.done}/{self.total} runs; {', '.join(under_way) or 'starting'}"
        self.bar.update(self.task, completed=reached, description=text)

    def finished(self, run: Run, record: Record) -> None:
        """Say that a run is done, and what came out."""
        self.done += 1
        self.over += run.config.epochs
        self._print(
            f"{self.done:>3}/{self.total}  {run.arm} seed {run.seed}: validation top-1 "
            f"{record.validation.top1:.2f} % (best epoch {record.best_epoch}), {record.seconds:.0f} s"
        )

    def failed(self, run: Run, reason: str) -> None:
        """Say that a run failed, and why."""
        self.over += run.config.epochs
        self._print(f"failed   {run.arm} seed {run.seed}: {reason}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _epochs_done(folder: Path) -> int | None:
    """Epochs that a run under way has behind it; ``None`` if it has not begun."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(status["epochs_done"]) if status["state"] == "running" else None

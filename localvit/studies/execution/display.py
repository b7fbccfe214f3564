"""Display of a running study: a line per finished run, and a table of the arms."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table

from localvit.runs import read_run
from localvit.studies.design import StudyRun, StudySummary
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.records import Record


class Display:
    """Context in which the table is shown.

    Args:
        console: Console; `None` shows nothing.
        summary: Summary with the cost of each arm.
        done: Finished runs.
        failures: Failed runs that are not repeated.
        jobs: Runs at a time.
    """

    def __init__(
        self,
        console: Console | None,
        folder: StudyFolder,
        summary: StudySummary,
        done: Mapping[StudyRun, Record],
        failures: Mapping[StudyRun, str],
        jobs: int,
    ) -> None:
        self.console = console or Console(quiet=True)
        self.folder, self.summary, self.jobs = folder, summary, jobs
        self.runs = folder.study.runs()
        self.records, self.failures = dict(done), set(failures)
        self.pending: dict[StudyRun, int] = {}
        self.live = Live(console=self.console, transient=True, auto_refresh=False)

    def __enter__(self) -> Display:
        if self.records:
            self._print(f"{len(self.records)} of {len(self.runs)} runs already exist, in {self.folder.path}")
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def refresh(self, pending: Sequence[StudyRun]) -> None:
        """Draw the table with the progress of pending runs."""
        statuses = {run: read_run(self.folder.of(run)).status for run in pending}
        self.pending = {run: status.epochs_done if status else 0 for run, status in statuses.items()}
        self.live.update(self._table(), refresh=True)

    def finished(self, run: StudyRun, record: Record) -> None:
        """Show a finished run and its result."""
        self.records[run] = record
        self._print(
            f"{len(self.records):>3}/{len(self.runs)}  {run}: validation top-1 "
            f"{record.validation.top1:.2f} % (best epoch {record.best_epoch}), {record.seconds:.0f} s"
        )

    def failed(self, run: StudyRun, reason: str) -> None:
        """Show a failed run and the reason."""
        self.failures.add(run)
        self._print(f"failed   {run}: {reason}")

    def _table(self) -> Table:
        metric = self.folder.study.metric
        left = self.seconds_left()
        table = Table(title=None if left is None else f"about {timedelta(seconds=round(left))} left")
        for name in ("arm", "done", "running (epoch)", "failed", f"test {metric}, %"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for arm in self.folder.study.arms:
            scores = [getattr(r.test, metric) for run, r in self.records.items() if run.arm == arm.name]
            epochs = [str(done) for run, done in self.pending.items() if run.arm == arm.name]
            failed = sum(run.arm == arm.name for run in self.failures)
            mean = f"{statistics.fmean(scores):.2f}" if scores else ""
            table.add_row(arm.name, str(len(scores)), ", ".join(epochs), str(failed or ""), mean)
        return table

    def seconds_left(self) -> float | None:
        """Remaining seconds, from the speed of finished runs; `None` without any."""
        spent = sum(self._work(run, run.config.epochs) for run in self.records)
        if not spent:
            return None
        open_runs = [run for run in self.runs if run not in self.records and run not in self.failures]
        left = sum(self._work(run, run.config.epochs - self.pending.get(run, 0)) for run in open_runs)
        return left * sum(record.seconds for record in self.records.values()) / spent / self.jobs

    def _work(self, run: StudyRun, epochs: int) -> float:
        return self.summary.arms[run.arm].macs * epochs * run.config.data.fraction

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

"""What a run keeps in its folder while it trains, and what it goes on from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from typing import Any, Literal

from localvit.data import fingerprint
from localvit.errors import TrainingFailed, TrainingInterrupted
from localvit.runs import RunFolder, open_folder
from localvit.training.progress import Progress
from localvit.training.run import Run, best_model


class Keeper:
    """Keeps a run in its folder, if it has one: the state now and then, the models, the reason of an end."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder: RunFolder | None = None  # in the first process only
        self._saved_at = time.monotonic()
        self._saved = (0, 0)
        self._began = False

    def open(self, stack: ExitStack, allow_change: Collection[str], progress: Progress) -> None:
        """Claim the folder until `stack` is closed, and go to the state in it."""
        run, at, world = self.run, self.run.reached, self.run.world
        if run.config.output is None:
            return

        def claim() -> Any:
            data = fingerprint(run.splits)
            folder = open_folder(
                run.config, run.splits.notes, data=data, world_size=world.size, allow_change=allow_change
            )
            self.folder = stack.enter_context(folder)
            return self.folder.state, self.folder.changes, self.folder.warnings

        state, changes, warnings = world.from_first(claim)
        if state is not None:
            run.restore(state, changes)
            where = f"after update {run.engine.updates}, in epoch {at.epoch + 1}"
            progress.resume(run.engine.updates * run.config.batch_size, where, warnings)
        self._saved = (at.epoch, at.batch)
        if self.folder is not None:
            self._began = True
            self.folder.begin(at.history, best=self._best(), bad_images=self._bad_images())
            if at.best:  # the model there may be newer than the state, or older
                now = best_model(run)
                self.save_model("best")
                run.engine.evaluated.load_state_dict(now)

    def due(self) -> bool:
        """Whether it is time to save the state."""
        waited = time.monotonic() - self._saved_at
        return self.run.config.output is not None and waited >= self.run.config.save_seconds

    def save(self) -> None:
        """Save the state; all processes must call it."""
        at = self.run.reached
        if self.run.config.output is None or self._saved == (at.epoch, at.batch):
            return
        state = self.run.snapshot()
        if self.folder and state is not None:
            self.folder.save_state(self.run.engine.updates, state)
            if at.bad_images:
                self.folder.update(bad_images=self._bad_images())
        self._saved, self._saved_at = (at.epoch, at.batch), time.monotonic()

    def save_epoch(self, improved: bool) -> None:
        """Save what an epoch that is over leaves for its users, then the state."""
        if self.folder:
            self.save_model("last")
            if improved:
                self.save_model("best")
                self.folder.update(best=self._best())
            self.folder.add_epoch(self.run.reached.history[-1])
        self.save()

    def save_model(self, name: Literal["last", "best"]) -> None:
        """Save the evaluated model as it is."""
        if self.folder:
            names = list(self.run.splits.class_names)
            self.folder.save_model(name, self.run.engine.evaluated, self.run.preprocessing, names)

    def stop_if_asked(self, stop: bool) -> None:
        """Save the state and end the run, if `stop`; all processes must agree on it.

        Raises:
            TrainingInterrupted: if `stop`.
        """
        if stop:
            self.save()
            at, updates = self.run.reached, self.run.engine.updates
            kept = "the same command goes on from there" if self.run.config.output else "nothing is kept"
            raise TrainingInterrupted(f"interrupted after update {updates}, in epoch {at.epoch + 1}; {kept}")

    def failed(self, error: BaseException) -> None:
        """Write down why the run ended, if it had begun and that can be written."""
        if self.folder and self._began:
            interrupted = isinstance(error, KeyboardInterrupt | TrainingInterrupted)
            facts: dict[str, Any] = {"bad_images": self._bad_images()}
            if pictures := getattr(error, "pictures", ()):
                facts["pictures"] = list(pictures)
            with suppress(TrainingFailed):
                self.folder.update(
                    state="interrupted" if interrupted else "failed", error=f"{error!r}", **facts
                )

    def last_state(self) -> str:
        """In words, what a later call would go on from."""
        return self.folder.last_state() if self.folder else "nothing was saved here"

    def _best(self) -> dict[str, Any] | None:
        at = self.run.reached
        return {"epoch": at.best_epoch, "validation": dataclasses.asdict(at.best)} if at.best else None

    def _bad_images(self) -> list[str]:
        return sorted(self.run.reached.bad_images.values())

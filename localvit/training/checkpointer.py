"""Checkpoints of a training run: saving them and resuming from one."""

from __future__ import annotations

import copy
import dataclasses
import time
from contextlib import suppress
from typing import Any, Literal

import torch

from localvit.data import Manifest
from localvit.errors import ConfigError, TrainingFailed, TrainingInterrupted
from localvit.evaluation import Metrics
from localvit.models import base_digest
from localvit.runs import BestEpoch, Decision, RunDirectory, numbers
from localvit.training.run import TrainingRun


class Checkpointer:
    """Checkpoint writer of one run. All processes call it; the main one writes.

    Args:
        run: The run.
        directory: Run directory (main process only); with `None`, nothing is written.
    """

    def __init__(self, run: TrainingRun, directory: RunDirectory | None) -> None:
        self.run, self.directory = run, directory
        self._saved_at = time.monotonic()

    def start(self, decision: Decision) -> None:
        """Claim the directory, restore the state that was found, and make the files agree with it.

        Raises:
            ConfigError: if the data or the state does not fit the run, or images that it trained on are in
                another split now; nothing has been written in that case.
        """
        run, directory = self.run, self.directory

        def claim() -> tuple[str, ...]:
            if directory is None:
                return ()
            directory.claim(run.manifest.fingerprint())
            return self._compare_images(directory.saved.manifest)

        notes = run.world.broadcast_from_main(claim)
        run.splits = dataclasses.replace(run.splits, notes=(*run.splits.notes, *notes))
        if decision.state is not None:
            run.restore(decision.state, decision.changes)
            decision.state.clear()  # frees the memory of its tensors
        if directory:
            directory.begin(
                notes=run.notes,
                manifest=run.manifest,
                history=run.state.history,
                best=self._best(),
                bad_images=self._bad_images(),
            )
            if run.state.best:  # `best/` may be newer or older than the best model in the state: rewrite it
                now = run.load_best()
                self._save_model("best")
                run.engine.evaluated.load_state_dict(now)

    def _compare_images(self, before: Manifest | None) -> tuple[str, ...]:
        """Refuse images that the run has trained on in other splits, where they would flatter its results.

        Images that are added, removed or renamed change which others are held out. Names are compared, as
        far as the manifests have them.

        Returns:
            Notes on images that `data.allow_overlap` accepts.
        """
        run, notes = self.run, []
        if before is None:
            return ()
        run.manifest = run.manifest.continuing(before)
        for split in ("validation", "test"):
            if trained := before.trained(run.manifest, split):
                number = run.manifest.splits[split].count
                text = (
                    f"{len(trained)} of {number} {split} images were training images of this run before its "
                    f"data changed, such as {trained[0]!r}"
                )
                if not run.config.data.allow_overlap:
                    raise ConfigError(
                        f"output={run.config.output!r}: {text}; choose another folder, or accept them with "
                        "--allow-overlap"
                    )
                notes.append(f"overlap allowed: {text}")
        return tuple(notes)

    def due(self) -> bool:
        """Return whether it is time to save the state."""
        config = self.run.config
        return config.output is not None and time.monotonic() - self._saved_at >= config.save_seconds

    def save(self) -> None:
        """Save the state to resume from."""
        if self.run.config.output is None:
            return
        state = self.run.snapshot()
        if self.directory and state is not None:
            self.directory.save_state(self.run.state.step, state)
            if self.run.state.bad_images:
                self.directory.update(bad_images=self._bad_images())
        self._saved_at = time.monotonic()

    def save_best(self) -> None:
        """Save the evaluated model as the best one so far."""
        if self.directory:
            self._save_model("best")
            self.directory.update(best=self._best())

    def save_epoch(self) -> None:
        """Save the model and the metrics of a finished epoch, then the state."""
        if self.directory:
            self._save_model("last")
            self.directory.add_epoch(self.run.state.history[-1])
        self.save()

    def save_delta(self) -> str | None:
        """Save locality and classifier weights of the best epoch as a delta file if the base is unchanged.

        The base is the pretrained weights, without those of locality, LoRA and classifier.

        Returns:
            A sentence about the file, or about why there is none; `None` without a directory, or if the run
            did not add locality to a pretrained model.
        """
        model = self.run.engine.evaluated
        if not self.directory or self.run.base is None:
            return None
        if base_digest(model) != self.run.base:
            return (
                "no delta file: the pretrained weights were trained too; train_only=locality keeps them "
                "unchanged, and best/locality.safetensors then holds everything that was learned"
            )
        file = self.directory.save_delta(model)
        return f"{file} holds only locality and classifier weights; load it with localvit.load_locality"

    def finish(self, test: Metrics) -> None:
        """Write the result."""
        if self.directory:
            self.directory.finish(numbers(dataclasses.asdict(test)))

    def failed(self, error: BaseException) -> None:
        """Record in `status.json` why the run ended, unless it never began or the file cannot be written."""
        if self.directory and self.directory.status:
            interrupted = isinstance(error, KeyboardInterrupt | TrainingInterrupted)
            images: dict[str, Any] = {"bad_images": self._bad_images()}
            if failed := getattr(error, "images", ()):
                images["failed_batch"] = tuple(failed)
            with suppress(TrainingFailed):
                state = "interrupted" if interrupted else "failed"
                self.directory.update(state=state, error=f"{error!r}", **images)

    def last_state(self) -> str:
        """Describe the state that a later call would resume from."""
        return self.directory.last_state() if self.directory else "nothing was saved here"

    def _save_model(self, name: Literal["last", "best"]) -> None:
        assert self.directory is not None
        model, names = self.run.engine.evaluated, list(self.run.splits.class_names)
        if self.run.config.engine.channels_last:  # safetensors stores contiguous tensors only
            model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.directory.save_model(name, model, self.run.preprocessing, names)

    def _best(self) -> BestEpoch | None:
        at = self.run.state
        validation = numbers(dataclasses.asdict(at.best)) if at.best else {}
        return BestEpoch(epoch=at.best_epoch, validation=validation) if at.best else None

    def _bad_images(self) -> tuple[str, ...]:
        return tuple(sorted(self.run.state.bad_images.values()))

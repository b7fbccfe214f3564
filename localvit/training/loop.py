"""Training loop: `train` and its epochs."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from torch import distributed as dist, nn
from torch.utils.data import DataLoader

from localvit.config import TrainConfig, check_allowed
from localvit.cost import count_parameters
from localvit.data import Batch, DataError, UnreadableImage, make_manifest, open_splits
from localvit.errors import ConfigError, TrainingFailed, TrainingInterrupted
from localvit.evaluation import Metrics, measure
from localvit.inference import open_model
from localvit.runs import Decision, RunDirectory, whole
from localvit.runtime import World, open_world, stop_requested
from localvit.training.callbacks import Callback
from localvit.training.checkpointer import Checkpointer
from localvit.training.engine import LossWatch, deterministic
from localvit.training.progress import TrainingProgress
from localvit.training.result import RunResult
from localvit.training.run import TrainingRun, TrainState, prepare


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    allow_change: Collection[str] = (),
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train a model, choose the best epoch on the validation split, and measure it on the test split.

    The same configuration gives the same weights and metrics (bit for bit on the same CPU with the same
    number of threads). An interrupted run resumes from its last state when it is called again, with the same
    results. A finished run is returned, if its data has not changed. Under `torchrun` all processes train one
    model. torch's global random state is seeded.

    Args:
        config: The run. `config.output=None` writes nothing.
        console: Console for progress; `None` shows nothing.
        allow_change: Differences accepted in a resumed run: dotted fields or sections of the configuration,
            `"data"` (its images too), `"versions"`, `"world_size"`. With a different number of processes,
            batches stay the same, while drop-path, dropout and statistics of batch norm do not.
        callbacks: Called in the main process.

    Raises:
        ConfigError: if the configuration is invalid, or the folder has another run, is in use or has
            damaged files; nothing was written.
        DataError: if the data cannot be used; nothing was written.
        UnreadableImage: if an image cannot be decoded.
        TrainingFailed: if the loss or a weight is NaN or infinite, a data worker or another process died, or
            the disk is full.
        TrainingInterrupted: if a signal requested it (see `stop_on_signals`); the state is saved.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"config={config!r} is not accepted; use a localvit.TrainConfig, such as "
            "localvit.config.resolve('digits', ['epochs=3'])"
        )
    check_allowed(allow_change)
    with open_world(config.device) as world, deterministic(config.engine), ExitStack() as stack:
        directory: RunDirectory | None = None  # in the main process only

        def open_directory() -> Decision:
            nonlocal directory
            if config.output is None:
                return Decision(kind="new")
            opening = RunDirectory.open(config, world_size=world.size, allow_change=allow_change)
            directory = stack.enter_context(opening)
            return directory.decision

        decision = world.broadcast_from_main(open_directory)
        if decision.kind == "finished":
            return world.broadcast_from_main(lambda: _finished(directory, console))
        run = prepare(config, world)
        stack.callback(run.close)
        checkpointer = Checkpointer(run, directory)
        progress = TrainingProgress(console if world.is_main_process else None, run)
        try:
            with progress:
                checkpointer.start(decision)
                if run.state.step:
                    progress.resume(decision.warnings)
                return _fit(run, checkpointer, progress, callbacks if world.is_main_process else ())
        except BaseException as error:
            short = _explained(_closed(run, error), checkpointer)
            checkpointer.failed(short or error)
            if short:
                raise short from error
            raise


def _fit(
    run: TrainingRun, checkpointer: Checkpointer, progress: TrainingProgress, callbacks: Sequence[Callback]
) -> RunResult:
    at, directory = run.state, checkpointer.directory
    for callback in callbacks:
        callback.on_start(run.config, directory.path if directory else None)
    while at.epoch < run.config.epochs:
        trained = train_epoch(run, checkpointer, progress)
        validation = _measure(run, run.validation, checkpointer)
        measured = {f"validation_{name}": getattr(validation, name) for name in ("loss", "top1", "top5")}
        improved = at.best is None or _rank(validation) > _rank(at.best)
        if improved:
            at.best, at.best_epoch = validation, at.epoch + 1
            at.best_weights = copy.deepcopy(run.engine.evaluated.state_dict())
            checkpointer.save_best()
        at.close_epoch({"epoch": at.epoch + 1, **trained, **measured})
        checkpointer.save_epoch()
        progress.epoch(at.history[-1], improved)
        for callback in callbacks:
            callback.on_epoch(at.history[-1])

    assert at.best is not None
    run.load_best()
    test = _measure(run, run.test, checkpointer)
    delta = checkpointer.save_delta()
    checkpointer.finish(test)
    progress.finish(at.best_epoch, test)
    if delta:
        progress.note(delta)
    result = _result(
        run.config.output, at.history, (at.best_epoch, at.best, test), run.notes, run.engine.evaluated
    )
    for callback in callbacks:
        callback.on_end(result)
    return result


def train_epoch(run: TrainingRun, checkpointer: Checkpointer, progress: TrainingProgress) -> dict[str, float]:
    """Train one epoch, or the rest of one.

    Returns:
        `lr`, `train_loss`, `seconds`, `images_per_second`, `data_wait`.
    """
    engine, at, world, watch = run.engine, run.state, run.world, LossWatch()
    engine.train()
    run.train.batch_sampler.set_epoch(at.epoch, at.batch)  # type: ignore[union-attr]
    start = time.perf_counter() - at.seconds
    for batch in _timed(run.train, at):
        _note_unreadable(run, batch, progress)
        loss = engine.backward(*run.inputs(batch))
        bad = watch.look(loss, at.batch)
        *bad_batch, due, stop = world.all_reduce_max(
            *_place(world, bad), checkpointer.due(), stop_requested()
        )
        _refuse(run, checkpointer, bad, bad_batch)
        engine.step(at.step + 1)
        at.batch += 1
        at.loss_sum += loss.double() * len(batch.indices)
        at.images += len(batch.indices)
        at.seconds = time.perf_counter() - start
        progress.advance(run.config.batch_size, at.waited / at.seconds)
        if due or stop or at.batch == len(run.train):
            bad = watch.flush()
            _refuse(run, checkpointer, bad, world.all_reduce_max(*_place(world, bad)))
        if due or stop:
            checkpointer.save()
        if stop:
            raise _interrupted(run)
    sums = torch.stack([at.loss_sum, *at.loss_sum.new_tensor([at.images, at.waited])])
    loss_sum, images, waited = world.total(sums).tolist()
    return {
        "lr": engine.lr,
        "train_loss": loss_sum / images,
        "seconds": at.seconds,
        "images_per_second": images / at.seconds,
        "data_wait": min(waited / world.size / at.seconds, 1.0),
    }


def _interrupted(run: TrainingRun) -> TrainingInterrupted:
    saved = "the same command resumes from there" if run.config.output else "nothing was saved"
    return TrainingInterrupted(f"interrupted {run.state.place}; {saved}")


def _timed(loader: Iterable[Batch], at: TrainState) -> Iterator[Batch]:
    """Yield the batches; add the time until each is there to `at.waited`."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        if (batch := next(batches, None)) is None:
            return
        at.waited += time.perf_counter() - start
        yield batch


def _place(world: World, bad: tuple[float, int] | None) -> tuple[int, int]:
    """Return process and batch of a NaN or infinite loss, both counted from 1; or zeros."""
    return (0, 0) if bad is None else (world.rank + 1, bad[1] + 1)


def _refuse(
    run: TrainingRun, checkpointer: Checkpointer, bad: tuple[float, int] | None, place: Sequence[float]
) -> None:
    """Stop the run in all processes if the loss is NaN or infinite in one of them.

    Raises:
        TrainingFailed: naming the step, the learning rate, the images and the last good state.
    """
    rank, batch = (int(value) - 1 for value in place)
    if rank < 0:
        return
    names = run.image_names(batch, rank)
    step = run.state.epoch * len(run.train) + batch + 1
    more = f" and {len(names) - 3} more (in status.json)" if len(names) > 3 else ""
    raise TrainingFailed(
        f"the loss became {bad[0] if bad else 'NaN or infinite'} in epoch {run.state.epoch + 1}, step "
        f"{step}, at learning rate {run.engine.lr:.3g}, on the images "
        f"{', '.join(names[:3])}{more}; {checkpointer.last_state()}; try a lower optim.lr",
        names,
    )


def _note_unreadable(run: TrainingRun, batch: Batch, progress: TrainingProgress) -> None:
    """Count images that could not be read.

    Raises:
        UnreadableImage: for the first of them, if none is allowed, or no other image could replace it.
        TrainingFailed: if more than `max_bad_images` images are unreadable.
    """
    known, limit = run.state.bad_images, run.config.max_bad_images
    for index, error in batch.unreadable.items():
        if limit == 0 or len(batch.indices) < run.config.batch_size // run.world.size:
            raise error
        if index not in known:
            known[index] = error.name
            progress.note(f"replaced by another image: {error}")
        if len(known) > limit:
            raise TrainingFailed(f"more than max_bad_images={limit} training images are unreadable; {error}")


def _measure(run: TrainingRun, loader: DataLoader[Batch], checkpointer: Checkpointer) -> Metrics:
    """Measure the evaluated model on all processes.

    Raises:
        TrainingInterrupted: if a signal requested the end.
        UnreadableImage: for an image that cannot be decoded; none is left out of a result.
    """
    run.engine.share_statistics()
    model, device = run.engine.evaluated, run.world.device
    try:
        with run.engine.autocast():
            metrics = measure(model, _until_stop(loader), device, distributed=run.world.size > 1)
    except UnreadableImage as error:
        split = "validation" if loader is run.validation else "test"
        raise UnreadableImage(
            error.name,
            f"{error.reason}. It is a {split} image: put a whole one in its place, and the same command with "
            "--allow-change data resumes",
        ) from error
    (stop,) = run.world.all_reduce_max(stop_requested())
    if stop:
        checkpointer.save()
        raise _interrupted(run)
    return metrics


def _until_stop(loader: Iterable[Batch]) -> Iterator[Batch]:
    for batch in loader:
        if stop_requested():
            return
        yield batch


def _closed(run: TrainingRun, error: BaseException) -> BaseException:
    """End the data workers; return the error of one that died, which PyTorch raises from a signal handler at
    any instant, in place of what it caused (`EOFError` where an image was being received).
    """
    try:
        run.close()
    except RuntimeError as died:
        return died
    return error


def _explained(error: BaseException, checkpointer: Checkpointer) -> TrainingFailed | None:
    """Return a one-line error for a known failure of PyTorch, else `None`."""
    text = " ".join(str(error).split())
    died = isinstance(error, RuntimeError) and text.startswith("DataLoader worker")
    if died or isinstance(error, EOFError | ConnectionResetError):
        reason = f" ({text.partition('. ')[0]})" if died else ""
        return TrainingFailed(
            f"a data worker died{reason}, perhaps for lack of memory; {checkpointer.last_state()}"
        )
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return TrainingFailed(f"another process of this run ended; {checkpointer.last_state()}")
    return None


def _finished(directory: RunDirectory | None, console: Console | None) -> RunResult:
    """Return the result of a run that is finished.

    Raises:
        ConfigError: if its data has changed since.
    """
    assert directory is not None
    saved, status = directory.saved, directory.saved.status
    uncompared = _compare_data(directory)
    assert status is not None
    assert status.best is not None
    with whole(saved.path / "status.json"):
        validation, test = (
            Metrics(**{name: math.nan if value is None else value for name, value in found.items()})  # type: ignore[arg-type]
            for found in (status.best.validation, status.test or {})
        )
    model = open_model(f"local-dir:{saved.best}", "cpu").model
    best = status.best.epoch, validation, test
    result = _result(directory.config.output, saved.history, best, status.notes, model)
    if console:
        console.print(
            f"{result.output} already holds this run, finished: best epoch {result.best_epoch}, test top-1 "
            f"{result.test.top1:.2f} %{uncompared}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return result


def _compare_data(directory: RunDirectory) -> str:
    """Refuse other data than that of a finished run; return the reason if they could not be compared."""
    config = directory.config
    if directory.other_version is not None:
        return f"; its data could not be compared: the run is of localvit {directory.other_version}"
    try:
        splits = open_splits(config.data, seed=config.seed)
    except DataError as error:
        return f"; its data could not be compared: {error}"
    directory.compare_data(make_manifest(splits, config.data).fingerprint())
    return ""


def _result(
    output: str | None,
    history: list[dict[str, Any]],
    best: tuple[int, Metrics, Metrics],
    notes: tuple[str, ...],
    model: nn.Module,
) -> RunResult:
    return RunResult(
        output=output,
        history=history,
        best_epoch=best[0],
        validation=best[1],
        test=best[2],
        images_per_second=statistics.median(h["images_per_second"] for h in history),
        parameters=count_parameters(model),
        notes=notes,
        model=model.eval(),
    )


def _rank(validation: Metrics) -> tuple[float, float]:
    return validation.top1, -validation.loss

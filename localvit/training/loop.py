"""Training: one function, `train`, and what it does epoch by epoch."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import distributed as dist, nn
from torch.utils.data import DataLoader

from localvit.config import TrainConfig, check_allowed
from localvit.cost import count_parameters
from localvit.data import Batch
from localvit.errors import TrainingFailed
from localvit.evaluation import Metrics, measure
from localvit.inference import open_model
from localvit.runs import check_output, read_status
from localvit.runtime import World, open_world, stop_requested
from localvit.training.callbacks import Callback
from localvit.training.engine import LossWatch, deterministic
from localvit.training.keeper import Keeper
from localvit.training.progress import Progress
from localvit.training.result import RunResult
from localvit.training.run import Reached, Run, best_model, prepare


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    allow_change: Collection[str] = (),
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train a model; choose the epoch on the validation split; report it on the test split.

    The same configuration gives the same weights and metrics again (on a CPU to the last bit, on the same
    machine with the same number of threads), and so does a run that was ended in whatever way and called
    again, any number of times: it goes on from its last state. A finished run is returned as it is. Under
    ``torchrun`` all processes train one model. torch's global random state is seeded.

    Args:
        config: What to do. `config.output=None` writes nothing.
        console: Where progress is shown; ``None`` shows nothing.
        allow_change: In what a run that goes on may differ from its first part: dotted fields of the
            configuration or whole sections of it, ``"data"`` (its pictures too), ``"versions"``,
            ``"world_size"``. With another number of processes, batches stay the same, while drop-path,
            dropout and statistics of batch norm do not.
        callbacks: Told about the epochs, in the first process.

    Raises:
        ConfigError: if the configuration cannot work, or the folder holds another run, is in use or has
            damaged states only; nothing was written.
        DataError: if the data cannot be used; nothing was written.
        UnreadableImage: if a picture cannot be decoded.
        TrainingFailed: if training cannot go on: the loss or a weight is no number, a data worker or another
            process died, the disk is full.
        TrainingInterrupted: if a signal asked for it (see `stop_on_signals`); the state is saved.
    """
    check_allowed(allow_change)
    with open_world(config.device) as world, deterministic(config.engine), ExitStack() as stack:
        if config.output is not None:
            held = world.from_first(lambda: check_output(config, allow_change))
            if held == "finished":
                return world.from_first(lambda: _finished(config, console))
        run = prepare(config, world)
        stack.callback(run.close)
        keeper = Keeper(run)
        progress = Progress(
            console if world.first else None,
            config,
            run.splits,
            count_parameters(run.engine.evaluated),
            gpu=world.device.type != "cpu",
        )
        try:
            with progress:
                keeper.open(stack, allow_change, progress)
                return _fit(run, keeper, progress, callbacks if world.first else ())
        except BaseException as error:
            short = _explained(error, keeper)
            keeper.failed(short or error)
            if short:
                raise short from error
            raise


def _fit(run: Run, keeper: Keeper, progress: Progress, callbacks: Sequence[Callback]) -> RunResult:
    at = run.reached
    for callback in callbacks:
        callback.on_start(run.config, keeper.folder.path if keeper.folder else None)
    while at.epoch < run.config.epochs:
        trained = train_epoch(run, keeper, progress)
        validation = _measure(run, run.validation, keeper)
        measured = {f"validation_{name}": getattr(validation, name) for name in ("loss", "top1", "top5")}
        improved = at.best is None or _rank(validation) > _rank(at.best)
        if improved:
            at.best, at.best_epoch = validation, at.epoch + 1
            at.best_weights = copy.deepcopy(run.engine.evaluated.state_dict())
        at.close_epoch({"epoch": at.epoch + 1, **trained, **measured})
        keeper.save_epoch(improved)
        progress.epoch(at.history[-1], improved)
        for callback in callbacks:
            callback.on_epoch(at.history[-1])

    assert at.best is not None
    best_model(run)
    test = _measure(run, run.test, keeper)
    if keeper.folder:
        keeper.folder.finish(test=dataclasses.asdict(test))
    progress.finish(at.best_epoch, test)
    best = at.best_epoch, at.best, test
    result = _result(run.config, at.history, best, run.splits.notes, run.engine.evaluated)
    for callback in callbacks:
        callback.on_end(result)
    return result


def train_epoch(run: Run, keeper: Keeper, progress: Progress) -> dict[str, float]:
    """One pass over the training pictures, or the rest of one.

    Returns:
        `lr`, `train_loss`, `seconds`, `images_per_second`, `data_wait`.
    """
    engine, at, world, watch = run.engine, run.reached, run.world, LossWatch()
    engine.train()
    run.train.batch_sampler.set_epoch(at.epoch, at.batch)  # type: ignore[union-attr]
    start = time.perf_counter() - at.seconds
    for batch in _timed(run.train, at):
        _note_unreadable(run, batch, progress)
        loss = engine.backward(*run.inputs(batch))
        bad = watch.look(loss, at.batch)
        *bad_batch, due, stop = world.agree(*_place(world, bad), keeper.due(), stop_requested())
        _refuse(run, keeper, bad, bad_batch)
        engine.step()
        at.batch += 1
        at.loss_sum += loss.double() * len(batch.indices)
        at.images += len(batch.indices)
        at.seconds = time.perf_counter() - start
        progress.advance(run.config.batch_size, at.waited / at.seconds)
        if due or stop or at.batch == len(run.train):
            bad = watch.flush()
            _refuse(run, keeper, bad, world.agree(*_place(world, bad)))
        if due:
            keeper.save()
        keeper.stop_if_asked(bool(stop))
    sums = torch.stack([at.loss_sum, *at.loss_sum.new_tensor([at.images, at.waited])])
    loss_sum, images, waited = world.total(sums).tolist()
    return {
        "lr": engine.lr,
        "train_loss": loss_sum / images,
        "seconds": at.seconds,
        "images_per_second": images / at.seconds,
        "data_wait": min(waited / world.size / at.seconds, 1.0),
    }


def _timed(loader: Iterable[Batch], at: Reached) -> Iterator[Batch]:
    """The batches; the time until each is there is added to `at.waited`."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        if (batch := next(batches, None)) is None:
            return
        at.waited += time.perf_counter() - start
        yield batch


def _place(world: World, bad: tuple[float, int] | None) -> tuple[int, int]:
    """Which process found a loss that is no number, and in which batch, both counted from 1; or zeros."""
    return (0, 0) if bad is None else (world.rank + 1, bad[1] + 1)


def _refuse(run: Run, keeper: Keeper, bad: tuple[float, int] | None, place: Sequence[float]) -> None:
    """End the run in all processes if the loss is no number in one of them.

    Raises:
        TrainingFailed: with the place, the learning rate, the pictures and the last good state.
    """
    rank, batch = (int(value) - 1 for value in place)
    if rank < 0:
        return
    names = run.pictures(batch, rank)
    update = run.reached.epoch * len(run.train) + batch + 1
    more = f" and {len(names) - 3} more (in status.json)" if len(names) > 3 else ""
    raise TrainingFailed(
        f"the loss became {bad[0] if bad else 'no finite number'} in epoch {run.reached.epoch + 1}, update "
        f"{update}, at learning rate {run.engine.lr:.3g}, on the pictures "
        f"{', '.join(names[:3])}{more}; {keeper.last_state()}; try a lower optim.lr",
        names,
    )


def _note_unreadable(run: Run, batch: Batch, progress: Progress) -> None:
    """Count pictures that could not be read.

    Raises:
        UnreadableImage: the first of them, if none is allowed or there was none to take its place.
        TrainingFailed: if there are more than `max_bad_images`.
    """
    known, limit = run.reached.bad_images, run.config.max_bad_images
    for index, error in batch.unreadable.items():
        if limit == 0 or len(batch.indices) < run.config.batch_size // run.world.size:
            raise error
        if index not in known:
            known[index] = error.name
            progress.note(f"another picture in its place: {error}")
        if len(known) > limit:
            raise TrainingFailed(
                f"more than max_bad_images={limit} training pictures are unreadable; {error}"
            )


def _measure(run: Run, loader: DataLoader[Batch], keeper: Keeper) -> Metrics:
    """Measure the evaluated model on all processes.

    Raises:
        TrainingInterrupted: if a signal asked for the end meanwhile.
    """
    run.engine.share_statistics()
    with run.engine.autocast():
        metrics = measure(
            run.engine.evaluated, _until_stop(loader), run.world.device, distributed=run.world.size > 1
        )
    (stop,) = run.world.agree(stop_requested())
    keeper.stop_if_asked(bool(stop))
    return metrics


def _until_stop(loader: Iterable[Batch]) -> Iterator[Batch]:
    for batch in loader:
        if stop_requested():
            return
        yield batch


def _explained(error: BaseException, keeper: Keeper) -> TrainingFailed | None:
    """In one line what PyTorch says in many, if it is known what that means."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        reason = " ".join(text.split()).partition(". ")[0]
        return TrainingFailed(
            f"a process that loads pictures died ({reason}), perhaps for want of memory; "
            f"{keeper.last_state()}"
        )
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return TrainingFailed(f"another process of this run ended; {keeper.last_state()}")
    return None


def _finished(config: TrainConfig, console: Console | None) -> RunResult:
    """The result of a run that is done."""
    assert config.output is not None
    path = Path(config.output)
    status = read_status(path)
    history = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    best_epoch = int(status["best"]["epoch"])
    validation, test = Metrics(**status["best"]["validation"]), Metrics(**status["test"])
    model = open_model(config.output, "cpu").model
    if console:
        console.print(
            f"{config.output} holds this run already, finished: best epoch {best_epoch}, test top-1 "
            f"{test.top1:.2f} %",
            highlight=False,
            soft_wrap=True,
        )
    return _result(config, history, (best_epoch, validation, test), tuple(status["notes"]), model)


def _result(
    config: TrainConfig,
    history: list[dict[str, Any]],
    best: tuple[int, Metrics, Metrics],
    notes: tuple[str, ...],
    model: nn.Module,
) -> RunResult:
    return RunResult(
        output=config.output,
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

"""Training: one function, `train`, and one epoch of it on a screen."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import DataLoader

from localvit.cost import count_parameters
from localvit.data import Batch, Splits, eval_loader, open_splits, train_loader
from localvit.data.loading import derive_seed, random_scope, readable, seed_all
from localvit.training.build import (
    build_model,
    build_optimizer,
    build_scheduler,
    check_forward,
    freeze,
    pick_device,
    preprocessing,
)
from localvit.training.config import TrainConfig
from localvit.training.evaluate import Metrics, measure
from localvit.training.output import RunFolder, check_output
from localvit.training.progress import Progress
from localvit.training.task import build_task


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run produced.

    Attributes:
        output: Its folder, if it has one.
        history: One mapping per epoch, as in `metrics.jsonl`: `epoch` (from 1), `lr` (at its end),
            `train_loss`, `validation_loss`, `validation_top1`, `validation_top5`, `seconds`,
            `images_per_second` (training only, loading included).
        best_epoch: The epoch with the highest validation top-1; the lower loss, then the earlier epoch,
            decides between equals.
        validation: Metrics of that epoch. It was chosen on them, so they flatter it.
        test: Metrics of that epoch's weights on the reported split, measured once.
        images_per_second: Median over the epochs.
        parameters: Number of parameters.
        notes: Sentences about the splits.
        model: The model with the weights of `best_epoch`, in evaluation mode.
    """

    output: str | None
    history: list[dict[str, Any]]
    best_epoch: int
    validation: Metrics
    test: Metrics
    images_per_second: float
    parameters: int
    notes: tuple[str, ...]
    model: nn.Module


@dataclass(kw_only=True)
class _Run:
    """Everything that a run works with, ready before anything is written."""

    config: TrainConfig
    splits: Splits
    device: torch.device
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    mixup: Mixup | None
    data_config: dict[str, Any]
    train: DataLoader[Batch]
    validation: DataLoader[Batch]
    test: DataLoader[Batch]
    updates: int = 0

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated, saved and reported: the averaged one where there is one."""
        averaged = self.task.get_trainable_module(ema=True)
        model = self.task.get_trainable_module() if averaged is None else averaged.module
        assert isinstance(model, nn.Module)
        return model


def train(config: TrainConfig, *, console: Console | None = None) -> RunResult:
    """Train a model; choose the epoch on the validation split; report it on the test split.

    The same configuration gives the same weights and metrics again (on a CPU to the last bit, on the same
    machine with the same number of threads). torch's global random state is seeded.

    Args:
        config: What to do. `config.output=None` writes nothing.
        console: Where progress is shown; ``None`` shows nothing.

    Raises:
        ConfigError: if the configuration cannot work; nothing was written.
        DataError: if the data cannot be used; nothing was written.
        UnreadableImage: if a picture cannot be decoded.
        TrainingFailed: if the loss is no longer a number.
    """
    if config.output is not None:
        check_output(config.output)  # first, because it is quick; again when the folder is made
    run = _prepare(config)
    folder = RunFolder(config, run.splits.notes) if config.output is not None else None
    progress = Progress(console, config, run.splits, count_parameters(run.evaluated))
    try:
        with progress:
            result = _fit(run, folder, progress)
    except BaseException as error:
        if folder:
            interrupted = isinstance(error, KeyboardInterrupt)
            folder.update(state="interrupted" if interrupted else "failed", error=f"{error!r}")
        raise
    return result


def _prepare(config: TrainConfig) -> _Run:
    device = pick_device(config.device)
    splits = open_splits(config.data, seed=config.seed)
    torch.manual_seed(config.seed)
    model = build_model(config.model, splits.num_classes)
    data_config = preprocessing(model, config.data)
    check_forward(model, config.model.name, data_config["input_size"])
    loading: dict[str, Any] = {
        "batch_size": config.batch_size,
        "workers": config.workers,
        "pin_memory": device.type == "cuda",
    }
    loader = train_loader(splits.train, config.augment, data_config, seed=config.seed, **loading)
    model.to(device)
    freeze(model, config.train_only)
    optimizer = build_optimizer(model, config.optim, config.batch_size)
    task = build_task(model, config, data_config, splits.class_names, device=device)
    if config.ema_decay is not None:
        task.setup_ema(decay=config.ema_decay)
    return _Run(
        config=config,
        splits=splits,
        device=device,
        task=task,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config, len(loader)),
        mixup=_build_mixup(config, splits.num_classes),
        data_config=data_config,
        train=loader,
        validation=eval_loader(splits.validation, data_config, **loading),
        test=eval_loader(splits.test, data_config, **loading),
    )


def _fit(run: _Run, folder: RunFolder | None, progress: Progress) -> RunResult:
    history: list[dict[str, Any]] = []
    best: tuple[int, Metrics] | None = None
    best_weights: dict[str, torch.Tensor] = {}
    names = list(run.splits.class_names)
    for epoch in range(run.config.epochs):
        trained = train_epoch(run, epoch, progress.advance)
        validation = measure(run.evaluated, run.validation, run.device)
        measured = {f"validation_{name}": getattr(validation, name) for name in ("loss", "top1", "top5")}
        history.append({"epoch": epoch + 1, **trained, **measured})
        improved = best is None or _rank(validation) > _rank(best[1])
        if improved:
            best = epoch + 1, validation
            best_weights = copy.deepcopy(run.evaluated.state_dict())
        if folder:
            folder.save_model("last", run.evaluated, run.data_config, names)
            if improved:
                folder.save_model("best", run.evaluated, run.data_config, names)
                folder.update(best={"epoch": epoch + 1, "validation": dataclasses.asdict(validation)})
            folder.add_epoch(history[-1])
        progress.epoch(history[-1], improved)

    assert best is not None
    model = run.evaluated
    model.load_state_dict(best_weights)
    test = measure(model, run.test, run.device)
    if folder:
        folder.update(state="finished", test=dataclasses.asdict(test))
    progress.finish(best[0], test)
    return RunResult(
        output=run.config.output,
        history=history,
        best_epoch=best[0],
        validation=best[1],
        test=test,
        images_per_second=statistics.median(h["images_per_second"] for h in history),
        parameters=count_parameters(model),
        notes=run.splits.notes,
        model=model.eval(),
    )


def train_epoch(run: _Run, epoch: int, advance: Callable[[int], None]) -> dict[str, float]:
    """One pass over the training pictures; returns `lr`, `train_loss`, `seconds`, `images_per_second`."""
    task, optimizer = run.task, run.optimizer
    task.train()
    run.train.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    total, images = torch.zeros((), dtype=torch.float64, device=run.device), 0
    start = time.perf_counter()
    for step, batch in enumerate(map(readable, run.train)):
        inputs = batch.images.to(run.device, non_blocking=True)
        targets = batch.targets.to(run.device, non_blocking=True)
        if run.mixup is not None:
            with random_scope():  # mixup draws from NumPy's global state
                seed_all(derive_seed(run.config.seed, "mixup", epoch, step))
                inputs, targets = run.mixup(inputs, targets)
        optimizer.zero_grad()
        loss = task(inputs, targets)["loss"]
        loss.backward()
        optimizer.step()
        run.updates += 1
        run.scheduler.step_update(run.updates)
        task.update_ema(step=run.updates)
        total += loss.detach().double() * len(inputs)
        images += len(inputs)
        advance(len(inputs))
    train_loss = total.item() / images  # waits for the device
    seconds = time.perf_counter() - start
    if not math.isfinite(train_loss):
        raise TrainingFailed(
            f"the training loss became {train_loss} in epoch {epoch + 1}; try a lower optim.lr"
        )
    return {
        "lr": max(group["lr"] for group in optimizer.param_groups),  # layer decay lowers some
        "train_loss": train_loss,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }


def _rank(validation: Metrics) -> tuple[float, float]:
    return validation.top1, -validation.loss


def _build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    augment = config.augment
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=config.model.args.get("num_classes", num_classes),
    )

"""Objects of a training run, its progress, and the saved state of both to resume from."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from localvit.config import ConfigDiff, TrainConfig
from localvit.data import (
    AugmentConfig,
    Batch,
    Manifest,
    Preprocessing,
    Splits,
    derive_seed,
    eval_loader,
    image_name,
    random_scope,
    seed_all,
    share,
    train_loader,
)
from localvit.errors import ConfigError, TrainingFailed
from localvit.evaluation import Metrics, open_equal_splits
from localvit.models import base_digest, build_model, check_forward, preprocessing_for
from localvit.runs import SavedState, random_states, set_random_states
from localvit.runtime import World
from localvit.surgery import locality_parameters
from localvit.training.engine import TrainingEngine, check_device, place_model
from localvit.training.optim import build_optimizer, build_scheduler, freeze
from localvit.training.task import TrainingTask, build_task


@dataclass(kw_only=True)
class TrainState:
    """Position of a run, and its measurements.

    Attributes:
        steps_per_epoch: Number of batches in an epoch.
        epoch: Current epoch, from 0.
        batch: Number of finished batches in the current epoch.
        loss_sum: Sum of the losses of the current epoch over this process's images, float64 on the device.
        images: Number of images in `loss_sum`.
        seconds: Time spent on the current epoch so far.
        waited: Part of `seconds` that was spent waiting for images.
        history: Metrics of the finished epochs, as in `RunResult`.
        best_epoch: Number of the best epoch, from 1; 0 if no epoch has finished.
        best: Metrics of the best epoch on the validation split.
        best_weights: Weights of the best epoch.
        bad_images: Training images that could not be read: index -> name.
    """

    steps_per_epoch: int
    epoch: int = 0
    batch: int = 0
    loss_sum: torch.Tensor
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: Metrics | None = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    bad_images: dict[int, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def place(self) -> str:
        """Position in words."""
        return f"after step {self.step}, in epoch {self.epoch + 1}"

    def close_epoch(self, metrics: dict[str, Any]) -> None:
        """Go to the beginning of the next epoch."""
        self.history.append(metrics)
        self.epoch, self.batch, self.images = self.epoch + 1, 0, 0
        self.seconds = self.waited = 0.0
        self.loss_sum = torch.zeros_like(self.loss_sum)


@dataclass(kw_only=True)
class TrainingRun:
    """Objects of a run, built before anything is written.

    `base` is the digest of the pretrained weights that locality was added to, if there are any.
    """

    config: TrainConfig
    world: World
    splits: Splits
    manifest: Manifest
    engine: TrainingEngine
    mixup: Mixup | None
    preprocessing: Preprocessing
    train: DataLoader[Batch]
    validation: DataLoader[Batch]
    test: DataLoader[Batch]
    state: TrainState
    base: str | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the reader of the results: on the splits, and on the initial weights."""
        config, notes = self.config, list(self.splits.notes)
        random = not (config.model.pretrained or config.model.args.get("checkpoint_path"))
        if random and ":" in config.model.name:
            notes.append(
                f"model: random weights in the architecture of {config.model.name!r}; "
                "model.pretrained=true (--pretrained) starts from its weights"
            )
        if random and config.train_only != "all":
            notes.append(
                f"warning: train_only={config.train_only!r} freezes random weights; model.pretrained=true "
                "(--pretrained) starts from published ones"
            )
        steps = config.epochs * self.state.steps_per_epoch
        if config.ema_decay and (share := config.ema_decay**steps) > 0.5:
            notes.append(
                f"warning: ema_decay={config.ema_decay:g}: after all {steps} steps, {share:.0%} of the "
                f"averaged weights are still the initial ones; with {0.01 ** (1 / steps):.4g} it is 1 %"
            )
        return tuple(notes)

    def close(self) -> None:
        """End the data workers at once: a traceback may refer to them until the program ends."""
        for loader in (self.train, self.validation, self.test):
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
                loader._iterator = None

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and targets of a batch on the device, after mixup or cutmix if the run uses them."""
        images = batch.images.to(self.world.device, non_blocking=True)
        targets = batch.targets.to(self.world.device, non_blocking=True)
        if self.mixup is None:
            return images, targets
        with random_scope():  # mixup draws from NumPy's global state
            seed_all(derive_seed(self.config.seed, "mixup", self.state.epoch, self.state.batch))
            mixed: tuple[torch.Tensor, torch.Tensor] = self.mixup(images, targets)
        return mixed

    def image_names(self, batch: int, rank: int) -> tuple[str, ...]:
        """Return the names of the images in one process's shard of a batch of the current epoch."""
        draws = self.train.batch_sampler.batch(batch)  # type: ignore[union-attr]
        own = share(draws, rank, self.world.size)
        return tuple(image_name(self.splits.train, draw.image_index) for draw in own)

    def snapshot(self) -> SavedState | None:
        """Return the state in the main process, `None` in the others; all must call it.

        Schedule and batches follow from the position, so they are not in it.

        Raises:
            TrainingFailed: if a weight is NaN or infinite.
        """
        engine, at = self.engine, self.state
        if not all(weight.isfinite().all() for weight in engine.model.parameters()):
            raise TrainingFailed(
                f"a weight is NaN or infinite after step {at.step} (epoch {at.epoch + 1}), so that "
                "state is not saved; try a lower optim.lr"
            )
        own: dict[str, Any] = {
            "random": random_states(self.world.device),
            "loss_sum": at.loss_sum.item(),
            "images": at.images,
            "bad_images": at.bad_images,
            "statistics": self._statistics() if self.world.size > 1 else {},
        }
        processes = self.world.gather(own)
        if not processes:
            return None
        for process in processes:
            at.bad_images |= process["bad_images"]
        return {
            "epoch": at.epoch,
            "samples": at.batch * self.config.batch_size,
            "seconds": at.seconds,
            "waited": at.waited,
            "history": at.history,
            "best_epoch": at.best_epoch,
            "best": dataclasses.asdict(at.best) if at.best else None,
            "best_weights": at.best_weights,
            "task": engine.task.get_checkpoint_state(),
            "average": engine.task.get_checkpoint_state(ema=True),
            "optimizer": engine.optimizer.state_dict(),
            "scaler": engine.scaler.state_dict(),
            "processes": processes,
        }

    def restore(self, state: SavedState, changes: ConfigDiff) -> None:
        """Restore `state`; all processes must call it with the same one.

        Args:
            state: State from `snapshot`.
            changes: Differences from the configuration that wrote the state. If none of them is in `optim`,
                the settings of the optimizer are those in the state.

        Raises:
            ConfigError: if the state does not fit the model or the optimizer.
        """
        if "optim.name" in changes:
            raise ConfigError(
                "optim.name: {!r} cannot resume the state of {!r}; choose another folder".format(
                    *reversed(changes["optim.name"])
                )
            )
        try:
            self._restore_engine(state, any(path.startswith("optim") for path in changes))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"the saved state does not fit the model: {reason}; start over") from error
        at, processes = self.state, state["processes"]
        at.epoch, at.batch = state["epoch"], state["samples"] // self.config.batch_size
        at.seconds, at.waited, at.history = state["seconds"], state["waited"], state["history"]
        at.best_epoch, at.best_weights = state["best_epoch"], state["best_weights"]
        at.best = Metrics(**state["best"]) if state["best"] else None
        for process in processes:
            at.bad_images |= process["bad_images"]
        if len(processes) == self.world.size:
            own = [processes[self.world.rank]]
            self._load_statistics(own[0]["statistics"])
        else:  # the number of processes changed: the main process takes over all sums
            own = processes if self.world.is_main_process else []
        at.loss_sum += sum(process["loss_sum"] for process in own)
        at.images = sum(process["images"] for process in own)
        if self.world.rank < len(processes):
            set_random_states(processes[self.world.rank]["random"], self.world.device)
        self.engine.set_step(at.step)

    def load_best(self) -> dict[str, torch.Tensor]:
        """Load the best weights into the evaluated model; return the weights that they replace."""
        model = self.engine.evaluated
        before = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.state.best_weights)
        return before

    def _restore_engine(self, state: SavedState, new_settings: bool) -> None:
        engine = self.engine
        engine.task.load_checkpoint_state(state["task"]["state_dict"], state["task"].get("task_state"))
        if engine.average is not None:
            saved = state["average"] or {f"{key}_ema": value for key, value in state["task"].items()}
            engine.task.load_checkpoint_state(saved["state_dict_ema"], saved.get("task_state_ema"), ema=True)
        optimizer = dict(state["optimizer"])
        if new_settings:  # LAMB and Adan also count their steps among the settings
            pairs = zip(optimizer["param_groups"], engine.optimizer.state_dict()["param_groups"], strict=True)
            optimizer["param_groups"] = [{**old, **new} for old, new in pairs]
        engine.optimizer.load_state_dict(optimizer)
        if state["scaler"] and engine.scaler.is_enabled():
            engine.scaler.load_state_dict(state["scaler"])

    def _statistics(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the running statistics of batch norm, which differ between processes."""
        models = {"model": self.engine.model, "average": self.engine.average}
        return {
            which: {
                f"{name}.{key}": value.cpu()
                for name, module in model.named_modules()
                if isinstance(module, _BatchNorm)
                for key, value in module.named_buffers()
            }
            for which, model in models.items()
            if model is not None
        }

    def _load_statistics(self, statistics: dict[str, dict[str, torch.Tensor]]) -> None:
        for which, model in (("model", self.engine.model), ("average", self.engine.average)):
            if model is not None and which in statistics:
                model.load_state_dict(statistics[which], strict=False)


def prepare(config: TrainConfig, world: World) -> TrainingRun:
    """Open the data and build everything.

    Raises:
        ConfigError, DataError: as `train`.
    """
    _check_shares(config.batch_size, config.engine.grad_accum, config.augment.mixes, world.size)
    check_device(config.engine, world)
    splits, manifest = open_equal_splits(config.data, config.seed, world)
    torch.manual_seed(config.seed)
    model = build_model(config.model, splits.num_classes)
    preprocessing = preprocessing_for(model, config.data)
    check_forward(model, config.model.name, preprocessing.input_size)
    loading: dict[str, Any] = {
        "workers": config.workers,
        "pin_memory": world.device.type == "cuda",
        "rank": world.rank,
        "world_size": world.size,
    }
    train = train_loader(
        splits.train, config.augment, preprocessing, batch_size=config.batch_size, seed=config.seed, **loading
    )
    freeze(model, config.train_only)
    base = base_digest(model) if config.model.pretrained and locality_parameters(model) else None
    model = place_model(model, config.engine, world)
    task = build_task(
        model, config.augment, config.distill, preprocessing, splits.class_names, device=world.device
    )
    engine = _build_engine(config, task, len(train), world)
    # From here on, random numbers are for drop-path and dropout, which differ between processes.
    if world.rank > 0:
        torch.manual_seed(derive_seed(config.seed, "process", world.rank))
    batch_size = config.batch_size // world.size
    return TrainingRun(
        config=config,
        world=world,
        splits=splits,
        manifest=manifest,
        engine=engine,
        mixup=_build_mixup(config.augment, config.model.args.get("num_classes", splits.num_classes)),
        preprocessing=preprocessing,
        train=train,
        validation=eval_loader(
            splits.validation, preprocessing, batch_size=batch_size, persistent_workers=True, **loading
        ),
        test=eval_loader(splits.test, preprocessing, batch_size=batch_size, **loading),
        state=TrainState(
            steps_per_epoch=len(train),
            loss_sum=torch.zeros((), dtype=torch.float64, device=world.device),
        ),
        base=base,
    )


def _build_engine(
    config: TrainConfig, task: TrainingTask, steps_per_epoch: int, world: World
) -> TrainingEngine:
    learner = task.get_trainable_module()
    assert learner is not None
    optimizer = build_optimizer(learner, config.optim, config.batch_size)
    scheduler = build_scheduler(optimizer, config.schedule, config.epochs, steps_per_epoch)
    return TrainingEngine(task, optimizer, scheduler, config.engine, world, ema_decay=config.ema_decay)


def _check_shares(batch_size: int, accum: int, mixes: bool, world_size: int) -> None:
    if batch_size % (world_size * accum):
        raise ConfigError(
            f"batch_size={batch_size} is not accepted; use a multiple of {world_size} "
            f"{'processes' if world_size > 1 else 'process'} x engine.grad_accum={accum}"
        )
    if mixes and batch_size // world_size % 2:
        raise ConfigError(
            f"batch_size={batch_size} is not accepted with augment.mixup or augment.cutmix; use an even "
            f"number for each of {world_size} processes"
        )


def _build_mixup(augment: AugmentConfig, num_classes: int) -> Mixup | None:
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )

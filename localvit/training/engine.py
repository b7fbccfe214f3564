"""One training step: forward, backward, optimizer step, in a given precision and in microbatches."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from timm.task.task import TrainingTask
from timm.utils.distributed import distribute_bn
from timm.utils.model import unwrap_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from localvit.acceleration import set_selective_checkpointing
from localvit.config import EngineConfig
from localvit.errors import ConfigError
from localvit.runtime import World, autocast


class TrainingEngine:
    """Model with its loss, optimizer, schedule and average, on all processes.

    Args:
        task: Model with its loss; the model was placed by `place_model`.
        optimizer: Optimizer of its parameters.
        scheduler: Schedule of the optimizer.
        config: Settings of a step.
        world: The processes.
        ema_decay: Decay of the averaged model; `None` for no such model.
    """

    def __init__(
        self,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        config: EngineConfig,
        world: World,
        *,
        ema_decay: float | None = None,
    ) -> None:
        self.task, self.optimizer, self.scheduler = task, optimizer, scheduler
        self.config, self.world = config, world
        self.scaler = torch.amp.GradScaler("cuda", enabled=config.precision == "fp16")
        if ema_decay is not None:
            task.setup_ema(decay=ema_decay)
        if config.compile:
            task.compile()
        if world.size > 1:
            _distribute(task, world)

    @property
    def model(self) -> nn.Module:
        """The model that learns, without wrappers."""
        return _unwrapped(self.task, ema=False)

    @property
    def average(self) -> nn.Module | None:
        """The averaged model, if there is one."""
        return _unwrapped(self.task, ema=True) if self.task.has_ema() else None

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated, saved and reported: the averaged one where there is one."""
        return self.average or self.model

    @property
    def lr(self) -> float:
        """The learning rate of the next step; the highest one if layers have their own."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def train(self) -> None:
        """Enter training mode; frozen batch norm stays as in evaluation."""
        self.task.train()
        if self.config.batch_norm == "frozen":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def backward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of one batch; return its mean loss, on the device.

        Args:
            images: (B, C, H, W), this process's shard.
            targets: (B,) classes or (B, classes) probabilities.
        """
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        count = self.config.grad_accum
        microbatches = zip(images.chunk(count), targets.chunk(count), strict=True)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=images.device)
        for number, (inputs, labels) in enumerate(microbatches, start=1):
            # Processes exchange gradients once, with the last microbatch.
            with self.task.no_sync() if number < count else nullcontext():
                with self.autocast():
                    loss = self.task(inputs, labels)["loss"] / count
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        return total

    def step(self, number: int) -> None:
        """Apply the gradients of step `number`, from 1."""
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.set_step(number)
        self.task.update_ema(step=number)

    def set_step(self, step: int) -> None:
        """Set the learning rate that follows `step` steps."""
        if step:
            self.scheduler.step_update(step)

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass in the precision asked for."""
        return autocast(self.config.precision, self.world.device)

    def share_statistics(self) -> None:
        """Give all processes the same running statistics of batch norm, ready for evaluation."""
        if self.world.size > 1:
            for model in filter(None, (self.model, self.average)):
                distribute_bn(model, self.world.size, reduce=self.config.batch_norm == "average")


class LossWatch:
    """Detector of a NaN or infinite loss. On a GPU it looks one step later, without a synchronization."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event, Any] | None = None

    def look(self, loss: torch.Tensor, about: Any) -> Any | None:
        """Record a loss; return the newest checked one and its `about` if it is NaN or infinite."""
        if loss.device.type != "cuda":
            return None if loss.isfinite() else (loss.item(), about)
        found = self.flush()
        event = torch.cuda.Event()
        copy = loss.to("cpu", non_blocking=True)
        event.record()
        self._pending = copy, event, about
        return found

    def flush(self) -> Any | None:
        """Check the pending loss."""
        if self._pending is None:
            return None
        (loss, event, about), self._pending = self._pending, None
        event.synchronize()
        return None if loss.isfinite() else (loss.item(), about)


@contextmanager
def deterministic(config: EngineConfig) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only, if `config` asks for it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def check_device(config: EngineConfig, world: World) -> None:
    """Refuse options that the device does not support, before data is opened.

    Raises:
        ConfigError: if there is one.
    """
    if world.device.type == "cuda":
        return
    if config.precision == "fp16":
        raise ConfigError("engine.precision='fp16' is not accepted on a CPU; use 'bf16'")
    if config.batch_norm == "sync" and world.size > 1:
        raise ConfigError("engine.batch_norm='sync' is not accepted on CPUs; use 'average' or 'frozen'")


def place_model(model: nn.Module, config: EngineConfig, world: World) -> nn.Module:
    """Put the model on its device, as the options ask.

    Raises:
        ConfigError: if the options do not fit the model, the device or each other.
    """
    check_device(config, world)
    if config.batch_norm == "sync" and world.size > 1:
        model = convert_sync_batchnorm(model)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, TypeError, AssertionError) as error:
            raise ConfigError(
                "engine.grad_checkpointing: the model does not support it; leave it out"
            ) from error
    if config.selective_checkpointing and not set_selective_checkpointing(model):
        raise ConfigError("engine.selective_checkpointing: the model has no locality; leave it out")
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(world.device)


def _distribute(task: TrainingTask, world: World) -> None:
    """Average the gradients over the processes."""
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Each process has its own running statistics until `share_statistics`. The option is renamed in newer
    # releases of PyTorch.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    task.prepare_distributed(device_ids=devices, **{name: False})
    # The warning is about 1x1 convolutions: strides of a side of length 1 can be written in two ways.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


def _unwrapped(task: TrainingTask, ema: bool) -> nn.Module:
    model = unwrap_model(task.get_eval_model(ema=ema))
    assert isinstance(model, nn.Module)
    return model

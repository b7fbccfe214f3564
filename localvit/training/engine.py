"""One update of a model: forward, backward, step, in the precision and the microbatches asked for."""

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
    """A model with its loss, optimizer, schedule and average, spread over the processes.

    Args:
        task: Model with its loss; the model was placed by `place_model`.
        optimizer: Optimizer of its parameters.
        scheduler: Schedule of the optimizer.
        config: How an update is computed.
        world: The processes.
        ema_decay: Decay of the averaged model; `None`: there is none.
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
        """The learning rate of the next update; where layers have rates of their own, the highest."""
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
            images: (B, C, H, W), this process's share.
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
        """Apply the gradients as update `number`, from 1."""
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.set_step(number)
        self.task.update_ema(step=number)

    def set_step(self, step: int) -> None:
        """Set the learning rate that follows `step` updates."""
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
    """Detector of a NaN or infinite loss. On a GPU it looks one update later, so that nothing has to wait."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event, Any] | None = None

    def look(self, loss: torch.Tensor, about: Any) -> Any | None:
        """Note a loss; return the newest looked-at one and `about` if it is NaN or infinite."""
        if loss.device.type != "cuda":
            return None if loss.isfinite() else (loss.item(), about)
        found = self.flush()
        event = torch.cuda.Event()
        copy = loss.to("cpu", non_blocking=True)
        event.record()
        self._pending = copy, event, about
        return found

    def flush(self) -> Any | None:
        """Look at the loss that is pending."""
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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it so
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def place_model(model: nn.Module, config: EngineConfig, world: World) -> nn.Module:
    """Put the model on its device, as the options ask.

    Raises:
        ConfigError: if they do not fit the model, the device or each other.
    """
    on_gpu = world.device.type == "cuda"
    if config.precision == "fp16" and not on_gpu:
        raise ConfigError("engine.precision='fp16' needs a GPU; 'bf16' works on CPUs too")
    if config.batch_norm == "sync" and world.size > 1:
        if not on_gpu:
            raise ConfigError("engine.batch_norm='sync' needs GPUs; 'average' and 'frozen' work on CPUs too")
        model = convert_sync_batchnorm(model)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, TypeError, AssertionError) as error:
            raise ConfigError("engine.grad_checkpointing: this model does not offer it") from error
    if config.selective_checkpointing and not set_selective_checkpointing(model):
        raise ConfigError("engine.selective_checkpointing: this model has no locality; leave the option out")
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(world.device)


def _distribute(task: TrainingTask, world: World) -> None:
    """Average the gradients over the processes."""
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Each process keeps the running statistics of its share until `share_statistics`. The option for it
    # has another name in newer releases of PyTorch.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    task.prepare_distributed(device_ids=devices, **{name: False})
    # About 1x1 convolutions, where two ways to write the strides of one side of length 1 are compared.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


def _unwrapped(task: TrainingTask, ema: bool) -> nn.Module:
    model = unwrap_model(task.get_eval_model(ema=ema))
    assert isinstance(model, nn.Module)
    return model

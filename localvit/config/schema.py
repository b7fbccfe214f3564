"""Configuration of a training run: frozen dataclasses with JSON fields, and a reason for each default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from localvit.data import AugmentConfig, DataConfig
from localvit.errors import ConfigError, at_least
from localvit.models import ModelConfig

Precision = Literal["fp32", "bf16", "fp16"]
TrainOnly = Literal["all", "locality", "head", "locality-alone"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer settings. Biases, one-dimensional parameters and those of `no_decay` have no weight decay.

    Attributes:
        name: Any name of `timm.optim.list_optimizers()`.
        lr: Peak learning rate. DeiT has 5e-4 at batch size 512.
        lr_batch: Batch size of `lr`: the peak is `lr * batch_size / lr_batch`, as in DeiT (main.py), where it
            is 512. Warm-up start and minimum are not scaled, as in DeiT. `None`: the peak is `lr`.
        layer_decay: Ratio of the learning rates of a layer and the layer above it (Clark et al., ELECTRA,
            arXiv 2003.10555), for fine-tuning; the head has the full rate. `None`: one rate for all.
        weight_decay: Weight decay; DeiT has 0.05.
        no_decay: Names of parameters without weight decay, `*` for any characters; `[]` for none. `None`: the
            model's own `no_weight_decay()`, which for some families differs from the authors' code (timm
            excludes Swin's bias tables and DeiT's distillation token).
        momentum: Momentum, for optimizers that have one.
        args: Further arguments of `timm.optim.create_optimizer_v2` (`betas`, `eps`, ...).
    """

    name: str = "adamw"
    lr: float = 5e-4
    lr_batch: int | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] | None = None
    momentum: float = 0.9
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, "optim", 0.0, "weight_decay", "momentum")
        if not 0.0 < self.lr < float("inf"):
            raise ConfigError(f"optim.lr={self.lr!r} is not accepted; use a positive number")
        if self.lr_batch is not None:
            at_least(self, "optim", 1, "lr_batch")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ConfigError(f"optim.layer_decay={self.layer_decay!r} is not accepted; use (0, 1] or null")

    def effective_lr(self, batch_size: int) -> float:
        """Return the peak learning rate at `batch_size` images per step."""
        return self.lr if self.lr_batch is None else self.lr * batch_size / self.lr_batch


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule, which sets the rate at each step within `epochs`.

    As in DeiT's recipe, the warm-up replaces the start of the schedule: after it, the rate is that of the
    schedule without a warm-up.

    Attributes:
        name: Name of a schedule of timm.
        warmup_epochs: Length of the linear warm-up; DeiT has 5.
        warmup_lr: Learning rate at the start of the warm-up; DeiT has 1e-6.
        min_lr: Learning rate at the end of the decay; DeiT has 1e-5.
    """

    name: Literal["cosine", "tanh", "poly", "wsd", "constant"] = "cosine"
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, "schedule", 0.0, "warmup_epochs", "warmup_lr", "min_lr")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation from a teacher, in addition to the labels (Touvron et al., arXiv 2012.12877, section 4).

    The loss is `(1 - alpha) * loss(labels) + alpha * loss(teacher)`. The teacher gets the same augmented
    images, with its own normalisation.

    Attributes:
        teacher: A name with published weights, a run's folder, or a `local-dir:` or `hf-hub:` reference. It
            must have the classes of the data and accept the student's image size.
        kind: `"hard"`: cross-entropy with the teacher's prediction, the better kind in the paper (table 3).
            `"soft"`: Kullback-Leibler divergence from its probabilities at `temperature`, times
            `temperature ** 2`, averaged over the batch.
        alpha: Weight of the teacher's loss. DeiT has 0.5 (main.py); the paper's soft distillation has 0.1.
        temperature: Temperature of the soft kind. DeiT has 1 (main.py); the paper's soft distillation has 3.
        token: Distil through a separate head on the distillation token; the model must have one
            (`deit_*_distilled_*`). `False`: distil through the classifier, with any model.
    """

    teacher: str
    kind: Literal["soft", "hard"] = "hard"
    alpha: float = 0.5
    temperature: float = 1.0
    token: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"distill.alpha={self.alpha!r} is not accepted; use a number in (0, 1]")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"distill.temperature={self.temperature!r} is not accepted; use more than 0")
        if self.kind == "hard" and self.temperature != 1.0:
            raise ConfigError(
                f"distill.temperature={self.temperature:g} has no effect with distill.kind='hard'; use 'soft'"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Computation of a step: precision, memory, batch norm, reproducibility.

    Attributes:
        precision: Precision of the forward pass, by autocast; weights and optimizer stay float32. `"fp16"`
            scales the loss and needs a GPU; `"bf16"` needs no scaling.
        grad_accum: Number of microbatches per step and process, to save memory. The gradients are the same,
            except that batch norm uses the statistics of a microbatch.
        clip_grad: Maximum norm of the gradient of all weights; `None`: no clipping.
        channels_last: Store images and maps channels last, which is faster on GPUs with tensor cores.
        compile: Compile the model with `torch.compile`.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        selective_checkpointing: Recompute only norms, activations and gates of feed-forward networks with
            locality, where the native kernels do not apply (`localvit.set_selective_checkpointing`).
        batch_norm: Batch norm with several processes; each has a shard of every batch.
            `"local"`: each process uses the statistics of its shard; the running statistics of the main
            process are evaluated and saved. `"average"`: the same, with the running statistics averaged over
            the processes before each evaluation; the default, as in timm's script, because it uses all
            images. `"sync"`: statistics of the whole batch, on GPUs only (PyTorch has no CPU version).
            `"frozen"`: training uses the running statistics too and does not change them (with any number of
            processes); scale and shift are still trained, so the parameters are those of the other modes.
        deterministic: Use only algorithms with reproducible bits; an operation without one is an error. CPUs
            do not need this option.
    """

    precision: Precision = "fp32"
    grad_accum: int = 1
    clip_grad: float | None = None
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    selective_checkpointing: bool = False
    batch_norm: Literal["local", "sync", "average", "frozen"] = "average"
    deterministic: bool = False

    def __post_init__(self) -> None:
        at_least(self, "engine", 1, "grad_accum")
        if self.clip_grad is not None and not 0.0 < self.clip_grad < float("inf"):
            raise ConfigError(f"engine.clip_grad={self.clip_grad!r} is not accepted; use more than 0 or null")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of a training run.

    Attributes:
        model: The model.
        data: Data sources and preprocessing.
        optim: The optimizer.
        schedule: The learning-rate schedule.
        augment: Augmentation of training images and labels.
        distill: Distillation from a teacher, or `None`.
        train_only: `"all"` parameters; `"locality"`: the parameters that locality added, and the classifier,
            which is new if the classes are; `"head"`: the classifier; `"locality-alone"`: the parameters that
            locality added, which needs a classifier that is not zero. All others keep their initial values.
        engine: Computation of a step.
        ema_decay: Decay per step of an exponential moving average of the weights and of batch norm's running
            statistics. If set, the averaged model is validated, saved and reported. `None`: off.
        epochs: Number of epochs.
        batch_size: Images per step, over all processes. With 128, tiny models at ImageNet's size need a few
            gigabytes.
        seed: Seed of splits, initial weights, and order and augmentation of the images.
        workers: Number of data workers; 0 loads in the training process. Results do not depend on it.
        device: `"auto"` (a GPU if there is one, else the CPU) or a torch device.
        output: Folder for the results; `None` keeps them in memory only.
        save_seconds: Seconds between two checkpoints within an epoch: the most training time that a killed
            run loses. Each epoch also ends with a checkpoint.
        max_bad_images: Maximum number of unreadable training images. Each is reported and replaced by
            another image, chosen by the sample's seed, so that batches stay full. 0: the first one stops the
            run. All images for evaluation must be readable, because scores on fewer are not comparable.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig | None = None
    train_only: TrainOnly = "all"
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema_decay: float | None = None
    epochs: int = 100
    batch_size: int = 128
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    output: str | None = None
    save_seconds: float = 60.0
    max_bad_images: int = 0

    def __post_init__(self) -> None:
        at_least(self, "", 1, "epochs", "batch_size")
        at_least(self, "", 0, "seed", "workers", "save_seconds", "max_bad_images")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay={self.ema_decay!r} is not accepted; use a number in (0, 1) or null")
        if self.schedule.name != "constant" and self.schedule.warmup_epochs >= self.epochs:
            warmup = self.schedule.warmup_epochs
            raise ConfigError(
                f"schedule.warmup_epochs={warmup:g} is not accepted; use less than epochs={self.epochs} "
                "(--set schedule.warmup_epochs=0)"
            )
        if self.schedule.name != "constant" and self.schedule.min_lr > self.effective_lr:
            low, scaled = self.schedule.min_lr, ""
            if self.optim.lr_batch is not None:
                factor = f"{self.batch_size} / {self.optim.lr_batch}"
                scaled = f" x batch_size / optim.lr_batch = {factor}, which is {self.effective_lr:g}"
            raise ConfigError(
                f"schedule.min_lr={low:g} is not accepted; use at most optim.lr={self.optim.lr:g}{scaled}"
            )
        if self.augment.repeats > self.batch_size:
            raise ConfigError(
                f"augment.repeats={self.augment.repeats} is not accepted; use at most "
                f"batch_size={self.batch_size}"
            )
        if self.augment.mixes and self.batch_size % 2:
            raise ConfigError(
                f"batch_size={self.batch_size} is odd, but augment.mixup and cutmix mix pairs; make it even"
            )

    @property
    def effective_lr(self) -> float:
        """Peak learning rate, scaled to `batch_size` if `optim.lr_batch` is set."""
        return self.optim.effective_lr(self.batch_size)

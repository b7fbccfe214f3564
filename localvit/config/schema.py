"""A training run as one frozen value: every field a JSON value, every default with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from localvit.data import AugmentConfig, DataConfig
from localvit.errors import ConfigError, at_least
from localvit.models import ModelConfig

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Biases, one-dimensional parameters and what `no_decay` names are not decayed.

    Attributes:
        name: Any of `timm.optim.list_optimizers()`.
        lr: Peak learning rate. 5e-4 at batch 512 is DeiT's.
        lr_batch: The batch size that `lr` is meant for: the peak is then `lr * batch_size / lr_batch`, as
            in DeiT (main.py), where it is 512. Warm-up start and minimum stay as they are, as there.
            `None`: `lr` as it is.
        layer_decay: The rate of each layer is this times that of the layer above it (Clark et al., ELECTRA,
            arXiv 2003.10555), for fine-tuning; the head has the full rate. `None`: one rate for all.
        weight_decay: DeiT's 0.05.
        no_decay: Names of parameters that are not decayed, `*` for any characters; `[]` for none.
            `None`: what the model's own `no_weight_decay()` names, which is not for every family what
            its authors do (timm excludes Swin's bias tables and DeiT's distillation token).
        momentum: For optimizers that have one.
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
        at_least(self, "optim", 0.0, "weight_decay")
        if not 0.0 < self.lr < float("inf"):
            raise ConfigError(f"optim.lr={self.lr!r} must be positive")
        if self.lr_batch is not None:
            at_least(self, "optim", 1, "lr_batch")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ConfigError(
                f"optim.layer_decay={self.layer_decay!r} is not above 0 and up to 1 (off: null)"
            )

    def effective_lr(self, batch_size: int) -> float:
        """The peak learning rate at `batch_size` pictures per update."""
        return self.lr if self.lr_batch is None else self.lr * batch_size / self.lr_batch


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves, update by update, within `epochs`.

    As in DeiT's recipe, the warm-up lies over the start of the schedule: after it, the rate is where the
    schedule without a warm-up would be.

    Attributes:
        name: A schedule of timm.
        warmup_epochs: Length of the linear warm-up; 5 is DeiT's.
        warmup_lr: Where the warm-up starts; DeiT's.
        min_lr: Where the decay ends; DeiT's.
    """

    name: Literal["cosine", "tanh", "poly", "wsd", "constant"] = "cosine"
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, "schedule", 0.0, "warmup_epochs", "warmup_lr", "min_lr")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a teacher's answers beside the labels (Touvron et al., arXiv 2012.12877, section 4).

    The loss is `(1 - alpha) * loss(labels) + alpha * loss(teacher)`. The teacher sees the same augmented
    pictures, normalised as it wants them.

    Attributes:
        teacher: A name with published weights, a run's folder, or a `local-dir:` or `hf-hub:`
            reference. It must have the classes of the data and take the student's image size.
        kind: `"hard"`: cross-entropy with the teacher's choice, the better one in the paper (table 3).
            `"soft"`: Kullback-Leibler divergence from its probabilities at `temperature`, times
            `temperature ** 2`, averaged over the batch.
        alpha: Weight of the teacher. DeiT's 0.5 (main.py); the paper's soft distillation has 0.1.
        temperature: Of the soft kind. DeiT's 1 (main.py); the paper's soft distillation has 3.
        token: The teacher is heard at a head of its own, on the distillation token of a model that has one
            (`deit_*_distilled_*`). `False`: at the classifier, with any model.
    """

    teacher: str
    kind: Literal["soft", "hard"] = "hard"
    alpha: float = 0.5
    temperature: float = 1.0
    token: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"distill.alpha={self.alpha!r} is not a share above 0 and up to 1")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"distill.temperature={self.temperature!r} must be positive")
        if self.kind == "hard" and self.temperature != 1.0:
            raise ConfigError(
                f"distill.temperature={self.temperature:g} has no effect with distill.kind='hard'"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an update is computed: precision, memory, batch norm, reproducibility.

    Attributes:
        precision: Of the forward pass, by autocast; weights and optimizer stay float32. `"fp16"` scales
            the loss and needs a GPU; `"bf16"` needs no scaling.
        grad_accum: Pieces that a process cuts its share of a batch into, one after the other, to save
            memory. Same gradients, except that batch norm sees a piece where it would see a share.
        clip_grad: Largest norm of the gradient of all weights; `None`: not clipped.
        channels_last: Store images and maps channels last, which GPUs with tensor cores prefer.
        compile: `torch.compile` the model.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        selective_checkpointing: Recompute only norms, activations and gates of feed-forward networks with
            locality, where the native kernels do not apply (`localvit.set_selective_checkpointing`).
        batch_norm: What batch norm does where several processes train, each on its share of a batch.
            `"local"`: every process normalises by its share; the running statistics of the first are
            evaluated and saved. `"average"`: the same, with the running statistics averaged over the
            processes before each evaluation; the default because it uses all pictures, as timm's script
            does. `"sync"`: statistics of the whole batch, on GPUs only (PyTorch has no other).
            `"frozen"`: running statistics normalise in training too and never change (with any number
            of processes); scale and shift still learn, so the parameters are those of the other modes.
        deterministic: Only algorithms that give the same bits every time; an operation without one is an
            error. CPUs need no such option.
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
            raise ConfigError(f"engine.clip_grad={self.clip_grad!r} must be positive (off: null)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: Which model.
        data: Which pictures.
        optim: The optimizer.
        schedule: The learning rate over time.
        augment: What is done to training pictures and labels.
        distill: A teacher to learn from as well, or `None`.
        train_only: `"all"` parameters, or `"locality"`: those that locality added, and the classifier,
            which is new wherever the classes are. All others stay as they start.
        engine: How an update is computed.
        ema_decay: Decay per update of an exponential moving average of the weights and of batch norm's
            statistics. Where it is on, the averaged model is validated, saved and reported. `None`: off.
        epochs: Passes over the training pictures.
        batch_size: Pictures per update, over all processes. 128 fits ImageNet-size tiny models into a few
            gigabytes.
        seed: Decides the split, the initial weights, and order and augmentation of the pictures.
        workers: Processes that load pictures; 0 loads in the training process. Results do not depend on it.
        device: `"auto"` takes a GPU where there is one; otherwise a torch device.
        output: Folder for the results, or `None` to keep them in memory only.
        save_seconds: Time between two saves of the state that a killed run goes on from: what a kill
            may cost, besides the start. Saves at the end of each epoch come on top.
        max_bad_images: Training pictures that may be unreadable; each is named, counted and replaced by
            another one that is drawn by its seed, so that batches stay full. 0: the first one stops the
            run. Pictures to evaluate on must all be readable, as scores on fewer could not be compared.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig | None = None
    train_only: Literal["all", "locality"] = "all"
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
            raise ConfigError(f"ema_decay={self.ema_decay!r} is not between 0 and 1 (off: null)")
        if self.schedule.name != "constant" and self.schedule.warmup_epochs >= self.epochs:
            warmup = self.schedule.warmup_epochs
            raise ConfigError(f"schedule.warmup_epochs={warmup:g} must be less than epochs={self.epochs}")
        if self.schedule.name != "constant" and self.schedule.min_lr > self.effective_lr:
            low, scaled = self.schedule.min_lr, ""
            if self.optim.lr_batch is not None:
                factor = f"{self.batch_size} / {self.optim.lr_batch}"
                scaled = f" x batch_size / optim.lr_batch = {factor}, which is {self.effective_lr:g}"
            raise ConfigError(f"schedule.min_lr={low:g} must not be above optim.lr={self.optim.lr:g}{scaled}")
        if self.augment.repeats > self.batch_size:
            raise ConfigError(
                f"augment.repeats={self.augment.repeats} must not be above batch_size={self.batch_size}: "
                "a batch would hold one picture many times"
            )
        if self.augment.mixes and self.batch_size % 2:
            raise ConfigError(
                f"batch_size={self.batch_size} must be even for augment.mixup and augment.cutmix"
            )

    @property
    def effective_lr(self) -> float:
        """The peak learning rate, scaled to `batch_size` where `optim.lr_batch` says so."""
        return self.optim.effective_lr(self.batch_size)

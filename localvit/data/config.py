"""Which pictures, and how they are prepared: two frozen values with JSON fields only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preparation of an image for a model, from the loader to the exported file; timm's terms.

    Attributes:
        input_size: (C, H, W) that the model takes.
        mean: Per channel, of pixels in 0..1; subtracted.
        std: Per channel; what is left is divided by it.
        interpolation: `"nearest"`, `"bilinear"`, `"bicubic"`, ... of the resizing.
        crop_pct: Share of the resized image that the evaluation crop keeps.
        crop_mode: `"center"`, `"squash"` or `"border"`, as timm means them.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "random"]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]


class DataError(ValueError):
    """Data that cannot be used as asked; the message names the source and what is accepted."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures come from, and how any model sees them when it is evaluated.

    A *source* is ``"digits"`` (embedded, no download), an image folder with one folder per class
    (optionally below ``train/``, ``val/``, ``test/``), a ``.tar`` of such a folder, or any name that
    ``timm.data.create_dataset`` knows (``torch/cifar10``, ``hfds/NAME``, ``wds/NAME``, ...).

    Three splits are made of it. ``train`` is learned from, ``validation`` chooses (the best epoch, a
    learning rate), ``test`` is reported and never chosen on. What is not given is held out.

    Attributes:
        train: Source that is learned from.
        test: Source that is reported. ``None``: the test (or else validation) split that ``train`` brings
            along; failing that, a part held out of ``train``, the same for every seed.
        validation: Source for choices. ``None``: the validation split that ``train`` brings along, unless
            it is the one reported; failing that, a part held out of ``train`` that depends on the seed.
        root: Folder in which timm's named data sets keep their files.
        download: Let a ``torch/`` data set download what is missing in ``root``.
        train_split: Name of the training split of a ``hfds/`` or ``wds/`` set.
        test_split: Name of its reported split. timm's default name.
        validation_split: Name of its split for choices, if it has a third one.
        holdout: Share of the images, per class, that each held-out part takes. 0.1 keeps nine tenths
            for learning and is still about 500 images where data sets start to be useful (5,000).
        fraction: Share of the training pictures, of each class alike, that is learned from. The picture that
            is in a share is in every larger one too, and which ones it takes does not depend on the seed.
            What is held out is held out before, so it is the same for every share.
        mean: Per-channel mean of the pixels in 0..1. ``None``: the model's own.
        std: Per-channel standard deviation of the pixels. ``None``: the model's own.
        interpolation: How pictures are resized. ``None``: the model's own.
        crop_pct: Share of the resized picture that the evaluation crop keeps. ``None``: the model's own;
            1.0 suits pictures that already have the model's size.
    """

    train: str = "digits"
    test: str | None = None
    validation: str | None = None
    root: str | None = None
    download: bool = False
    train_split: str = "train"
    test_split: str = "validation"
    validation_split: str | None = None
    holdout: float = 0.1
    fraction: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.holdout < 0.5:
            raise DataError(f"data.holdout={self.holdout!r} is not a share between 0 and 0.5")
        if not 0.0 < self.fraction <= 1.0:
            raise DataError(f"data.fraction={self.fraction!r} is not a share above 0 and up to 1")
        if self.crop_pct is not None and not 0.0 < self.crop_pct <= 1.0:
            raise DataError(f"data.crop_pct={self.crop_pct!r} is not a share above 0 and up to 1")
        if self.std is not None and min(self.std, default=0.0) <= 0.0:
            raise DataError(f"data.std={self.std!r} must be positive")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to training pictures; the defaults are those of timm's own training script.

    Attributes:
        crop: ``"rrc"`` random resized crop, ``"rkrc"``/``"rkrr"`` resize keeping the aspect ratio, then a
            centre/random crop with reflected borders, ``"none"`` no change to the pictures at all: the
            fields from `scale` to `erase` are then without effect.
        scale: Area of the crop as a share of the picture (``rrc``), or zoom (``rkrc``, ``rkrr``).
        ratio: Aspect ratio of the crop.
        hflip: Probability of a horizontal flip. Not for digits or letters.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of brightness, contrast and saturation changes; ``None`` for none. timm
            leaves it out where ``auto_augment`` is given.
        auto_augment: timm's policy string, e.g. ``"rand-m9-mstd0.5-inc1"``.
        erase: Probability of random erasing, filled with noise.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        mix_prob: Probability that a batch is mixed at all.
        mix_switch_prob: Probability of cutmix where both are on.
        smoothing: Label smoothing.
        repeats: Repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT's is 3): each picture of an
            epoch comes this many times in a row, augmented differently each time. An epoch keeps its
            length, so it holds a share ``1 / repeats`` of the pictures, another one each time.
    """

    crop: Literal["rrc", "rkrc", "rkrr", "none"] = "rrc"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | None = 0.4
    auto_augment: str | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    smoothing: float = 0.1
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "erase", "mix_prob", "mix_switch_prob", "smoothing"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise DataError(f"augment.{name}={value!r} is not a probability (0 to 1)")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0.0:
                raise DataError(f"augment.{name}={getattr(self, name)!r} must not be negative (0 is off)")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise DataError(f"augment.{name}={[low, high]} is not a pair 0 < low <= high")
        if self.repeats < 1:
            raise DataError(f"augment.repeats={self.repeats!r} must be at least 1 (off)")
        if self.repeats > 1 and self.crop == "none":
            raise DataError(f"augment.repeats={self.repeats} repeats equal pictures with augment.crop='none'")

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on, so that targets are soft and batches must be even."""
        return self.mixup > 0.0 or self.cutmix > 0.0

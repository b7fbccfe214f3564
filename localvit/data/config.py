"""Data and augmentation settings: frozen dataclasses with JSON fields only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from localvit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preparation of an image for a model, from the loader to the exported file; timm's terms.

    Attributes:
        input_size: (C, H, W) of the model's input.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel.
        interpolation: Interpolation of the resizing: `"nearest"`, `"bilinear"`, `"bicubic"`, ...
        crop_pct: Fraction of the resized image that the evaluation crop keeps.
        crop_mode: `"center"`, `"squash"` or `"border"`, as in timm.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "random"]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        accepted = {
            "input_size": (all(0 < side < 2**16 for side in self.input_size), "sides from 1 to 65535"),
            "mean": (
                len(self.mean) == channels and all(abs(value) <= 1e6 for value in self.mean),
                f"{channels} values from -1e6 to 1e6",
            ),
            "std": (
                len(self.std) == channels and all(1e-6 <= value <= 1e6 for value in self.std),
                f"{channels} values from 1e-6 to 1e6",
            ),
            # A smaller one enlarges the image more than tenfold before the crop.
            "crop_pct": (0.1 <= self.crop_pct <= 2, "a value from 0.1 to 2"),
        }
        for name, (is_accepted, remedy) in accepted.items():
            if not is_accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not accepted; use {remedy}")


class DataError(ValueError):
    """Data that cannot be used; the message names the source and what is accepted."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources of the images, and their preprocessing.

    A *source* is `"digits"` (built in, no download), an image folder with one folder per class (optionally
    below `train/`, `val/`, `test/`), a `.tar` of such a folder, or any name that `timm.data.create_dataset`
    knows (`torch/cifar10`, `hfds/NAME`, `wds/NAME`, ...).

    It gives three splits: the model trains on `train`; choices (best epoch, learning rate) are made on
    `validation`; results are reported on `test`, which no choice uses. Missing splits are held out from
    `train`.

    Attributes:
        train: Source of the training images.
        test: Source of the test images. `None`: the test (or else validation) split of `train`; if it has
            neither, images held out from `train`, the same for every seed.
        validation: Source of the validation images. `None`: the validation split of `train`, unless it
            serves as `test`; if there is none, images held out from `train`, which depend on the seed.
        root: Folder with the files of timm's named data sets.
        download: Let a `torch/` data set download missing files to `root`.
        train_split: Name of the training split of a `hfds/` or `wds/` set.
        test_split: Name of its test split. Default: timm's.
        validation_split: Name of its validation split, if it has a third split.
        holdout: Fraction of the images of each class in each held-out split. 0.1 keeps nine tenths for
            training, and is about 500 images of a data set of 5,000.
        fraction: Fraction of the training images of each class to train on. Subsets are nested: a smaller
            one is part of every larger one. They do not depend on the seed. Splits are held out before, so
            they are the same for every fraction.
        mean, std, interpolation, crop_pct: As in `Preprocessing`; `None`: the model's own. A `crop_pct` of
            1.0 suits images that already have the model's size.
        allow_overlap: Accept images that are in two splits, or in two classes. They are counted in the notes
            of the result, because its accuracy is then partly that of images trained on.
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
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    crop_pct: float | None = None
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.holdout < 0.5:
            raise DataError(
                f"data.holdout={self.holdout!r} is not accepted; use a fraction between 0 and 0.5"
            )
        if not 0.0 < self.fraction <= 1.0:
            raise DataError(
                f"data.fraction={self.fraction!r} is not accepted; use a fraction above 0 and up to 1"
            )
        if self.crop_pct is not None and not 0.1 <= self.crop_pct <= 1.0:
            raise DataError(f"data.crop_pct={self.crop_pct!r} is not accepted; use a fraction from 0.1 to 1")
        if self.std is not None and min(self.std, default=0.0) <= 0.0:
            raise DataError(f"data.std={self.std!r} is not accepted; use positive numbers, one per channel")


# timm ignores parts of a policy that it cannot read, and asserts that it knows the policy.
_NUMBER = r"\d+(\.\d+)?"
_POLICY = re.compile(
    rf"rand(-(m|n|p|mstd|mmax|inc){_NUMBER}|-t\w+)*|augmix(-(m|w|d|a|b|mstd){_NUMBER})*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images; the defaults are those of timm's training script.

    Attributes:
        crop: `"rrc"`: random resized crop. `"rkrc"`, `"rkrr"`: resize with the aspect ratio kept, then a
            centre or random crop with reflected borders. `"none"`: no augmentation of single images; the
            fields from `scale` to `erase` have no effect.
        scale: Range of the crop's area as a fraction of the image (`rrc`), or of the zoom (`rkrc`, `rkrr`).
        ratio: Range of the crop's aspect ratio.
        hflip: Probability of a horizontal flip. Not for digits or letters.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of brightness, contrast and saturation changes; `None` for none. timm
            ignores it if `auto_augment` is given.
        auto_augment: timm's policy string, e.g. `"rand-m9-mstd0.5-inc1"`.
        erase: Probability of random erasing, filled with noise.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off.
        mix_prob: Probability that a batch is mixed.
        mix_switch_prob: Probability of cutmix, if both are on.
        smoothing: Label smoothing.
        repeats: Repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT has 3): each image of an epoch
            occurs this many times in a row, augmented differently each time. The length of an epoch stays
            the same, so each epoch has another random subset of `1 / repeats` of the images.
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
                raise DataError(f"augment.{name}={value!r} is not accepted; use a probability from 0 to 1")
        for name in ("mixup", "cutmix", "color_jitter"):
            if (getattr(self, name) or 0.0) < 0.0:
                raise DataError(
                    f"augment.{name}={getattr(self, name)!r} is not accepted; use 0 (off) or more"
                )
        if self.auto_augment is not None and not _POLICY.fullmatch(self.auto_augment):
            raise DataError(
                f"augment.auto_augment={self.auto_augment!r} is not accepted; use a policy of timm, such as "
                "rand-m9-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5 or v0"
            )
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise DataError(
                    f"augment.{name}={[low, high]} is not accepted; use [low, high] with 0 < low <= high"
                )
        if self.repeats < 1:
            raise DataError(f"augment.repeats={self.repeats!r} is not accepted; use 1 (off) or more")
        if self.repeats > 1 and self.crop == "none":
            raise DataError(
                f"augment.repeats={self.repeats} repeats equal images with augment.crop='none'; "
                "use another crop or repeats=1"
            )

    @property
    def mixes(self) -> bool:
        """True if mixup or cutmix is on: targets are then soft, and batch sizes must be even."""
        return self.mixup > 0.0 or self.cutmix > 0.0

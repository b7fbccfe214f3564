"""Augmentation of training images: timm's transforms, on tensors where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.transforms import (
    MaybePILToTensor,
    MaybeToTensor,
    RandomResizedCropAndInterpolation,
    interp_mode_to_str,
)
from torchvision.transforms import (
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)
from torchvision.transforms.functional import to_pil_image
from torchvision.transforms.v2.functional import resized_crop

from localvit.data.config import AugmentConfig, Preprocessing

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_FLIPS = (RandomHorizontalFlip, RandomVerticalFlip)
_ON_TENSORS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
"""Interpolations that PyTorch computes on 8-bit images as Pillow does."""


class TrainTransform:
    """Transform of a training image, (C, H, W) uint8 to (C, H, W) float32, normalised.

    It follows `timm.data.create_transform`: the same steps with the same random numbers. Two slow steps are
    replaced. The normalisation gives the same bits; `TensorCrop` differs by the rounding of pixels.

    Args:
        augment: Augmentation settings.
        preprocessing: The model's preprocessing.
    """

    def __init__(self, augment: AugmentConfig, preprocessing: Preprocessing) -> None:
        steps = _timms_steps(augment, preprocessing)
        _keep_a_bit(steps)
        end = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
        self.before, self.after = list(_from_tensors(steps[:end])), steps[end + 1 :]
        self.mean, self.std = (
            torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (steps[end].mean, steps[end].std)
        )

    def __call__(self, image: UInt8[torch.Tensor, "C H W"], out: Float[torch.Tensor, "C h w"]) -> None:
        """Transform an image and write the result to `out`, its slot in the batch."""
        for step in self.before:
            image = step(image)
        # As torchvision's ToTensor and Normalize compute it; those copy the image several times.
        out.copy_(image).div_(255).sub_(self.mean).div_(self.std)
        for step in self.after:
            step(out)  # random erasing, in place


def _timms_steps(augment: AugmentConfig, preprocessing: Preprocessing) -> list[Any]:
    transform = create_transform(
        preprocessing.input_size,
        is_training=True,
        no_aug=augment.crop == "none",
        train_crop_mode=None if augment.crop == "none" else augment.crop,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,  # type: ignore[arg-type]  # timm takes None too
        auto_augment=augment.auto_augment,
        re_prob=augment.erase,
        re_mode="pixel",
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    steps: list[Any] = transform.transforms
    return steps


class TensorCrop(RandomResizedCropAndInterpolation):
    """Random resized crop of timm, for 8-bit tensors.

    PyTorch's kernel takes half the time of Pillow's for bilinear and a third for bicubic interpolation. It
    rounds its weights more coarsely: pixels differ by at most one level, except where bicubic interpolation
    overshoots at hard edges.
    """

    def __call__(self, image: UInt8[torch.Tensor, "C H W"]) -> UInt8[torch.Tensor, "C h w"]:
        """Crop and resize, (C, H, W) uint8 to (C, *size) uint8."""
        box = self.get_params(image, self.scale, self.ratio)
        cropped: torch.Tensor = resized_crop(image, *box, list(self.size), self.interpolation)
        return cropped


def _from_tensors(steps: Sequence[Any]) -> Iterator[Any]:
    """Yield the same steps for a tensor input; convert to a Pillow image only where a step needs one."""
    tensor = True
    for step in steps:
        if isinstance(step, MaybeToTensor):
            yield MaybePILToTensor()
            tensor = True
        elif isinstance(step, RandomResizedCropAndInterpolation) and step.interpolation in _ON_TENSORS:
            yield TensorCrop(step.size, step.scale, step.ratio, interp_mode_to_str(step.interpolation))
        elif tensor and isinstance(step, _FLIPS):
            yield step
        else:
            if tensor:
                yield to_pil_image
            yield step
            tensor = False


def _keep_a_bit(steps: Sequence[Any]) -> None:
    """Make timm's automatic augmentations posterize to at least one bit.

    timm 1.0.31 asks for 0 bits at the ends of its range of strengths. Older versions of Pillow then returned
    a black image; Pillow 13 and later raise an error, which would end the training.
    """
    for step in steps:
        rules = [rule for pair in getattr(step, "policy", ()) for rule in pair]  # AutoAugment
        for rule in [*getattr(step, "ops", ()), *rules]:  # RandAugment, AugMix
            if rule.name.startswith("Posterize"):
                rule.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))

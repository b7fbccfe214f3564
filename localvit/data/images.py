"""Sets of labelled pictures, read by index, safe in any process, naming what they cannot read.

timm's readers and torchvision's data sets do the reading wherever they are right; `localvit.data.tar` does
the rest. timm's `ImageDataset` puts the next picture in the place of one that it cannot read; here that is an
error with the file's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from localvit.data.config import DataError

Sample = tuple[Image.Image, int]


class UnreadableImage(RuntimeError):
    """A picture that cannot be decoded.

    Attributes:
        name: The file.
        reason: What the decoder said.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both are arguments, so that it survives pickling by a worker
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


class Images(Protocol):
    """Labelled pictures by index; `labels[i]` indexes `class_names` and is known without decoding."""

    class_names: tuple[str, ...]
    labels: Sequence[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def decode(file: BinaryIO | str, name: str) -> Image.Image:
    """The decoded picture in `file`, in its own mode.

    Raises:
        UnreadableImage: whatever the decoder stumbled over.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return image
    # Pillow's plugins raise SyntaxError and ValueError too for damaged headers.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(name, str(error)) from error


class ReaderImages:
    """Pictures behind a timm reader."""

    def __init__(self, reader: Any, class_names: Sequence[str], labels: Sequence[int]) -> None:
        self.reader, self.class_names, self.labels = reader, tuple(class_names), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        name = self.reader.filename(index, absolute=True) or f"number {index}"
        try:
            file = self.reader[index][0]
        except OSError as error:
            raise UnreadableImage(name, str(error)) from error
        with file:
            return decode(file, name), int(self.labels[index])


class TorchvisionImages:
    """Pictures of a torchvision data set, which decodes by itself."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        labels = getattr(dataset, "targets", None)
        if labels is None:  # some sets keep (file, label) pairs under one of these names
            pairs = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None) or dataset.index
            labels = [pair[-2] if isinstance(pair[-1], str) else pair[-1] for pair in pairs]
        self.labels: Sequence[int] = [int(label) for label in labels]
        names = getattr(dataset, "classes", None) or range(max(self.labels) + 1)
        # torchvision's ImageNet has a tuple of synonyms for each class.
        self.class_names = tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        try:
            return self.dataset[index][0], self.labels[index]
        except OSError as error:
            raise UnreadableImage(f"number {index} of {self.name}", str(error)) from error


class ArrayImages:
    """Gray pictures held in memory.

    Args:
        pixels: (N, H, W) uint8.
        labels: N class indices.
        class_names: A name per class.
    """

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> None:
        self.pixels, self.labels, self.class_names = pixels, labels, tuple(class_names)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


class Part(Dataset[Sample]):
    """Some of the pictures of a set, with labels counted in another order of classes.

    Args:
        images: The set.
        indices: (N,) which of them, in this order.
        class_names: The classes that labels index; every class of `images` must be among them.

    Raises:
        DataError: if `images` has a class that `class_names` lacks.
    """

    def __init__(self, images: Images, indices: np.ndarray, class_names: Sequence[str]) -> None:
        unknown = [name for name in images.class_names if name not in class_names]
        if unknown:
            raise DataError(
                f"class {unknown[0]!r} is not among the {len(class_names)} known classes "
                f"({', '.join(class_names[:5])}, ...); {len(unknown)} such classes"
            )
        self.images, self.indices, self.class_names = images, indices, tuple(class_names)
        self.relabel = [list(class_names).index(name) for name in images.class_names]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.images[int(self.indices[index])]
        return image, self.relabel[label]

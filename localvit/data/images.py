"""Sets of labelled pictures, read by index, safe in any process, naming what they cannot read.

timm's readers and torchvision's data sets do the reading wherever they are right; `localvit.data.tar` does
the rest. timm's `ImageDataset` puts the next picture in the place of one that it cannot read; here that is an
error with the file's name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from localvit.data.config import DataError

Sample = tuple[Image.Image, int]
Mode = Literal["L", "RGB"]
"""Gray or colour, as Pillow names them."""
MAX_ASPECT = 100
"""Longest side over shortest that is kept; panoramas stay below 10."""
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000"),
    *("QOI", "ICO", "PCX", "SGI", "TGA"),  # the last one has no signature, so it is tried last
)
"""Image formats that are read, by Pillow's names. PostScript is not one: Pillow starts a program for it."""
_CHANNELS = {"L": 1, "RGB": 3}
# The operator, because `torchvision.io.decode_jpeg` around it warns since 0.29 that both will go one day;
# Pillow then decodes to the same bits.
_torch_decode = getattr(torch.ops.image, "decode_jpeg", None)


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
    """Labelled pictures by index; `labels[i]` indexes `class_names` and is known without decoding.

    `read_pixels` gives `self[index][0].convert(mode)` as (C, H, W) uint8, to the bit but perhaps faster.
    """

    class_names: tuple[str, ...]
    labels: Sequence[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def read_pixels(self, index: int, mode: Mode) -> tuple[torch.Tensor, int]: ...


def disable_ghostscript() -> None:
    """Keep Pillow from starting Ghostscript in this process, whoever opens the image.

    `FORMATS` protects what this package opens. Data sets of torchvision and of the Hugging Face hub open
    images themselves, with every format that Pillow has.
    """
    EpsImagePlugin.gs_binary = False


@lru_cache(maxsize=1)
def accepted_formats() -> tuple[str, ...]:
    """`FORMATS` without those that this Pillow does not have, such as AVIF in an older one."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: BinaryIO | str, name: str) -> Image.Image:
    """The picture in `file` as `plain` makes it; of an animation, the first frame.

    Raises:
        UnreadableImage: whatever the decoder stumbled over.
    """
    with _naming(name), Image.open(file, formats=accepted_formats()) as image:
        image.load()
        return plain(image)


def decode_pixels(data: bytes, name: str, mode: Mode) -> torch.Tensor:
    """(C, H, W) uint8: what `decode` makes of a file with this content, converted to `mode`, bit for bit.

    Most JPEGs go through torchvision, which has the same decoder (libjpeg-turbo) and takes two thirds of
    Pillow's time, because Pillow keeps pictures in memory with four bytes a pixel. What is anything else, or
    what torchvision refuses, is Pillow's, and so are the errors.

    Raises:
        UnreadableImage: as `decode`.
    """
    # Opening refuses an image with too many pixels.
    with _naming(name), Image.open(io.BytesIO(data), formats=accepted_formats()) as header:
        usual = header.format == "JPEG" and header.mode in ("L", mode) and not _is_long(header.size)
    if usual and _torch_decode is not None:
        try:
            # A copy, because torch takes no memory that is read-only.
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels: torch.Tensor = _torch_decode(content, _CHANNELS[mode])
            return pixels
        except RuntimeError:
            pass  # Pillow knows what is wrong with it
    return to_pixels(decode(io.BytesIO(data), name), mode)


def to_pixels(image: Image.Image, mode: Mode) -> torch.Tensor:
    """(C, H, W) uint8 of a picture converted to `mode`."""
    pixels: torch.Tensor = pil_to_tensor(image if image.mode == mode else image.convert(mode))
    return pixels


def plain(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel, mode `"L"` (gray) or `"RGB"`.

    It looks as Pillow's `convert` makes it, on which timm and so the published numbers rest: the alpha
    channel is dropped, whatever colour hides below it shows, and an EXIF orientation is not applied. Two
    things are done otherwise. Gray of 16 bits is divided by 257, so that 65535 becomes 255; Pillow would
    make all above 255 white. Of a picture longer than `MAX_ASPECT` times its width the middle is kept: to
    resize the short side of 1 x 5000 pixels to 248 makes 300 million of them, for a crop out of the middle.

    Raises:
        ValueError: if the pixels are floating-point numbers, which have no defined range.
    """
    image.info.pop("transparency", None)  # dropped like alpha; Pillow would warn that it is
    if image.mode == "F":
        raise ValueError("floating-point pixels (mode F) have no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        deep = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    return _middle(image)


def _middle(image: Image.Image) -> Image.Image:
    """What is kept of a picture that may be very long."""
    if not _is_long(image.size):
        return image
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def _is_long(size: tuple[int, int]) -> bool:
    return max(size) > MAX_ASPECT * min(size)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn what goes wrong inside into an `UnreadableImage` of that name."""
    try:
        yield
    except UnidentifiedImageError as error:
        formats = ", ".join(accepted_formats())
        raise UnreadableImage(name, f"it has none of the formats that are read: {formats}") from error
    # Damaged bytes make Pillow's plugins raise almost anything: OSError, SyntaxError, ValueError,
    # RuntimeError (AVIF), DecompressionBombError, MemoryError. Each means that this picture cannot be had.
    except Exception as error:
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error


class ReaderImages:
    """Pictures behind a timm reader."""

    def __init__(self, reader: Any, class_names: Sequence[str], labels: Sequence[int]) -> None:
        self.reader, self.class_names, self.labels = reader, tuple(class_names), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        file, name = self._open(index)
        with file:
            return decode(file, name), int(self.labels[index])

    def read_pixels(self, index: int, mode: Mode) -> tuple[torch.Tensor, int]:
        """As `Images`; JPEGs are decoded faster."""
        file, name = self._open(index)
        with file, _naming(name):
            data = file.read()
        return decode_pixels(data, name, mode), int(self.labels[index])

    def _open(self, index: int) -> tuple[BinaryIO, str]:
        name = self.reader.filename(index, absolute=True) or f"number {index}"
        with _naming(name):
            return self.reader[index][0], name


class _Decoded:
    """Pictures that come as Pillow's."""

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def read_pixels(self, index: int, mode: Mode) -> tuple[torch.Tensor, int]:
        """As `Images`."""
        image, label = self[index]
        return to_pixels(image, mode), label


class TorchvisionImages(_Decoded):
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
        with _naming(f"number {index} of {self.name}"):
            return plain(self.dataset[index][0]), self.labels[index]


class ArrayImages(_Decoded):
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
        position = {name: i for i, name in enumerate(class_names)}
        unknown = [name for name in images.class_names if name not in position]
        if unknown:
            raise DataError(
                f"class {unknown[0]!r} is not among the {len(class_names)} known classes "
                f"({', '.join(class_names[:5])}, ...); {len(unknown)} such classes"
            )
        self.images, self.indices, self.class_names = images, indices, tuple(class_names)
        self.relabel = [position[name] for name in images.class_names]

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: the label of each picture, known without decoding."""
        own = np.asarray(self.images.labels, dtype=np.int64)[self.indices]
        return np.asarray(self.relabel, dtype=np.int64)[own]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.images[int(self.indices[index])]
        return image, self.relabel[label]

    def read_pixels(self, index: int, mode: Mode) -> tuple[torch.Tensor, int]:
        """(C, H, W) uint8 and the label; see `Images`."""
        image, label = self.images.read_pixels(int(self.indices[index]), mode)
        return image, self.relabel[label]

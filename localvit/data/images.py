"""Sets of labelled images, read by index from any process. An unreadable image is an error with its name.

Files and archives are read by `localvit.data.listing`, other sources by torchvision's data sets and timm's
reader of the hub. timm's `ImageDataset` returns the next image in place of one that it cannot read.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from localvit.data.config import DataError
from localvit.errors import Failed

if TYPE_CHECKING:
    from jaxtyping import UInt8

Sample = tuple[Image.Image, int]
Mode = Literal["L", "RGB"]
"""Pillow's names of gray and color images."""
MAX_PIXELS = 89_478_485
"""Pixels of the largest accepted image, where Pillow begins to warn of decompression bombs: 340 MiB.

Half of that for images that are not gray, palette or RGB, which exist twice while they are converted.
"""
MAX_BYTES = 2**28
"""Size of the largest file that is read into memory before it is decoded."""
MAX_ASPECT = 100
"""Largest ratio of long to short side that is not cropped; panoramas stay below 10."""
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000"),
    *("QOI", "ICO", "PCX", "SGI", "TGA"),  # the last one has no signature, so it is tried last
)
"""Accepted image formats, by Pillow's names. PostScript is left out: Pillow starts a program for it."""
# Such images are refused here, so a warning adds nothing. Filters of the user come first.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
# The operator itself: its wrapper `torchvision.io.decode_jpeg` warns since 0.29 that both will be removed.
# Without it, Pillow decodes to the same bits.
_torch_decode = getattr(torch.ops.image, "decode_jpeg", None)


class UnreadableImage(Failed):
    """Image that cannot be decoded.

    Attributes:
        name: The file.
        reason: The decoder's message.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both are arguments, so that a data worker can pickle it
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read image {self.name!r}: {self.reason}"


class Images(Protocol):
    """Labelled images by index; `labels[i]` indexes `class_names` and needs no decoding.

    `origin` identifies the set, as far as its files do not, and is the same whenever the set is opened.
    """

    class_names: tuple[str, ...]
    labels: Sequence[int]
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample: ...

    def read_pixels(self, index: int, mode: Mode) -> tuple[UInt8[torch.Tensor, "C H W"], int]:
        """Return `self[index]` with its image converted to `mode`, as (C, H, W) uint8.

        A set may do it faster, with the same bits.
        """
        image, label = self[index]
        return to_pixels(image, mode), label


@lru_cache(maxsize=1)
def accepted_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow has; an older one lacks AVIF, for example."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: BinaryIO | str, name: str) -> Image.Image:
    """Decode an image file to 8 bits a channel (see `plain`); for an animation, its first frame.

    Raises:
        UnreadableImage: for any error of the decoder.
    """
    with _naming(name):
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("it is not a regular file")  # opening a pipe would wait
        with _open(file) as image:
            image.load()
            return plain(image)


def decode_pixels(data: bytes, name: str, mode: Mode) -> UInt8[torch.Tensor, "C H W"]:
    """Decode the content of an image file to (C, H, W) uint8: `decode` converted to `mode`, bit for bit.

    torchvision decodes most JPEGs. It has the same decoder (libjpeg-turbo) and takes two thirds of Pillow's
    time, because Pillow stores four bytes a pixel. Pillow decodes everything else, and all that torchvision
    refuses, so errors are Pillow's.

    Raises:
        UnreadableImage: as for `decode`.
    """
    with _naming(name), _open(io.BytesIO(data)) as header:
        usual = header.format == "JPEG" and header.mode in ("L", mode) and not _is_long(header.size)
    if usual and _torch_decode is not None:
        try:
            # A copy, because torch does not accept read-only memory.
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels: torch.Tensor = _torch_decode(content, Image.getmodebands(mode))
            return pixels
        except RuntimeError:
            pass  # Pillow reports what is wrong with it
    return to_pixels(decode(io.BytesIO(data), name), mode)


def _open(file: BinaryIO | str) -> Image.Image:
    """Read the header of an image; too many pixels are refused."""
    image = Image.open(file, formats=accepted_formats())
    width, height = image.size
    most = MAX_PIXELS if image.mode in ("1", "L", "P", "RGB") else MAX_PIXELS // 2
    if width * height > most:
        image.close()
        raise ValueError(
            f"{width} x {height} pixels are not accepted; save the image with at most {most:,} pixels"
        )
    return image


def to_pixels(image: Image.Image, mode: Mode) -> UInt8[torch.Tensor, "C H W"]:
    """Convert an image to `mode`, as a (C, H, W) uint8 tensor."""
    pixels: torch.Tensor = pil_to_tensor(image if image.mode == mode else image.convert(mode))
    return pixels


def plain(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits a channel, mode `"L"` (gray) or `"RGB"`.

    The result is that of Pillow's `convert`, as in timm and so in published accuracies: the alpha channel is
    dropped, not composited, and the EXIF orientation is not applied. There are two exceptions. Gray of 9 to
    16 bits is scaled by the bits of the file, so that the largest value becomes 255 (or 0, where 0 is white);
    Pillow would make every value above 255 white. An image with a side ratio above `MAX_ASPECT` is cropped to
    its middle: resizing 1 x 5000 pixels to a short side of 248 makes 300 million pixels, and the evaluation
    crop takes the middle anyway.

    Raises:
        ValueError: for floating-point, signed and 32-bit pixels, which have no defined range.
    """
    bits, inverted = _unsigned_bits(image)
    image.info.pop("transparency", None)  # dropped like alpha; Pillow would warn that it is
    if image.mode.startswith("I"):
        image = _shades(np.asarray(image), 2**bits - 1, inverted)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    return _middle(image)


def _unsigned_bits(image: Image.Image) -> tuple[int, bool]:
    """Return the bits of gray that has more than 8 (16 unless the file says fewer), and whether 0 is white.

    Raises:
        ValueError: as for `plain`.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = max(tags.get(BITSPERSAMPLE) or (16,))
    signed = 2 in (tags.get(SAMPLEFORMAT) or ())
    if image.mode == "F" or signed or bits > 16:
        kind = "floating-point" if image.mode == "F" else "signed" if signed else f"{bits}-bit"
        raise ValueError(
            f"{kind} pixels (mode {image.mode}) are not accepted, because their range is unknown; save the "
            "image with 8 or 16 bits a channel"
        )
    return bits, tags.get(PHOTOMETRIC_INTERPRETATION) == 0


def _shades(values: np.ndarray, top: int, inverted: bool) -> Image.Image:
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"values from {values.min()} to {values.max()} are not accepted; use 0 to {top}")
    scaled = ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)
    table = 255 - scaled if inverted else scaled
    return Image.fromarray(np.stack([table[row] for row in values]))  # indexing all takes 8 bytes a pixel


def _middle(image: Image.Image) -> Image.Image:
    """Crop the long side to `MAX_ASPECT` times the short side."""
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
    """Turn any exception inside into an `UnreadableImage` with that name."""
    try:
        yield
    except UnidentifiedImageError as error:
        formats = ", ".join(accepted_formats())
        raise UnreadableImage(name, f"unknown format; accepted: {formats}") from error
    # Damaged bytes make Pillow's plugins raise almost anything: OSError, SyntaxError, ValueError,
    # RuntimeError (AVIF), DecompressionBombError, MemoryError. Each means that this image cannot be read.
    except Exception as error:
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error


class ReaderImages(Images):
    """Images of a timm reader.

    Args:
        reader: The reader.
        class_names: Name of each class; none if they have numbers only.
        labels: Class of each image.
        origin: Name of this set, the same whenever it is opened.
    """

    def __init__(self, reader: Any, class_names: Sequence[str], labels: Sequence[int], origin: str) -> None:
        self.reader, self.labels, self.origin = reader, labels, origin
        self.class_names = tuple(class_names) or tuple(map(str, range(max(labels) + 1)))

    def __getitem__(self, index: int) -> Sample:
        file, name = self._open(index)
        with file:
            return decode(file, name), int(self.labels[index])

    def read_pixels(self, index: int, mode: Mode) -> tuple[UInt8[torch.Tensor, "C H W"], int]:
        """Return pixels and label (see `Images`); JPEGs are decoded faster."""
        file, name = self._open(index)
        with file, _naming(name):
            data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ValueError(f"the file is larger than {MAX_BYTES >> 20} MiB; save it as a smaller one")
        return decode_pixels(data, name, mode), int(self.labels[index])

    def _open(self, index: int) -> tuple[BinaryIO, str]:
        name = self.reader.filename(index, absolute=True) or f"number {index}"
        with _naming(name):
            if os.path.exists(name) and not os.path.isfile(name):
                raise ValueError("it is not a regular file")  # opening a pipe would wait
            return self.reader[index][0], name


class TorchvisionImages(Images):
    """Images of a torchvision data set, which does its own decoding."""

    def __init__(self, dataset: Any, name: str, split: str = "") -> None:
        self.dataset, self.name, self.origin = dataset, name, f"{name}:{split}"
        labels = getattr(dataset, "targets", None)
        if labels is None:  # some sets keep (file, label) pairs under one of these names
            pairs = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None) or dataset.index
            labels = [pair[-2] if isinstance(pair[-1], str) else pair[-1] for pair in pairs]
        self.labels = [int(label) for label in labels]
        names = getattr(dataset, "classes", None) or range(max(self.labels) + 1)
        # torchvision's ImageNet has a tuple of synonyms for each class.
        self.class_names = tuple(", ".join(n) if isinstance(n, tuple) else str(n) for n in names)

    def __getitem__(self, index: int) -> Sample:
        with _naming(f"number {index} of {self.name}"):
            return plain(self.dataset[index][0]), self.labels[index]


class ArrayImages(Images):
    """Gray images in memory.

    Args:
        pixels: (N, H, W) uint8.
        labels: N class indices.
        class_names: Name of each class.
    """

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> None:
        self.pixels, self.labels, self.class_names = pixels, labels, tuple(class_names)
        self.origin = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Sample:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


class Part(Dataset[Sample]):
    """Subset of a set of images, with labels that index `class_names`.

    Args:
        images: The set.
        indices: (N,) indices of the subset's images, in order.
        class_names: Classes that the labels index; every class of `images` must be among them.
        source: Name of the source of `images`, for the message.

    Raises:
        DataError: if `images` has a class that `class_names` lacks.
    """

    def __init__(
        self, images: Images, indices: np.ndarray, class_names: Sequence[str], source: str | None = None
    ) -> None:
        position = {name: i for i, name in enumerate(class_names)}
        unknown = [name for name in images.class_names if name not in position]
        if unknown:
            where = "" if source is None else f"{source!r}: "
            raise DataError(
                f"{where}class {unknown[0]!r} is not among the {len(class_names)} known classes "
                f"({', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}); "
                f"{len(unknown)} of its classes are unknown"
            )
        self.images, self.indices, self.class_names = images, indices, tuple(class_names)
        self.relabel = [position[name] for name in images.class_names]

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, (N,) int64; needs no decoding."""
        own = np.asarray(self.images.labels, dtype=np.int64)[self.indices]
        return np.asarray(self.relabel, dtype=np.int64)[own]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.images[int(self.indices[index])]
        return image, self.relabel[label]

    def read_pixels(self, index: int, mode: Mode) -> tuple[UInt8[torch.Tensor, "C H W"], int]:
        """Return pixels, (C, H, W) uint8, and label (see `Images`)."""
        image, label = self.images.read_pixels(int(self.indices[index]), mode)
        return image, self.relabel[label]

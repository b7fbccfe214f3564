"""Time the preparation of training images on one core, and torchvision's ImageFolder on the same JPEGs.

    python benchmarks/data.py                                  # JPEGs of its own
    python benchmarks/data.py --data FOLDER_OR_TAR ...         # class_name/image.jpg
    python benchmarks/data.py --note "other programs ran beside it"

Both sides read, decode, crop at random (RandomResizedCrop's defaults), flip and normalise the same images
in one process with one thread, in turn. Seconds are those of the processor, so that other programs on the
machine count as little as they can; files are in memory after the first round. A ratio above 1 means that
localvit is faster. Results: benchmarks/results/data_<machine>_<date>.{md,json}.
"""

import argparse
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from writing import write

import localvit
from localvit.bench.host import machine
from localvit.bench.measure import Quartiles, Work, interleaved, ratio, wall_clock
from localvit.data.config import AugmentConfig, DataConfig, Preprocessing
from localvit.data.images import Part
from localvit.data.loading import train_loader
from localvit.data.splits import open_test_split

MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
BATCH = 32


def synthetic(folder: Path, width: int, height: int, count: int = 128) -> Path:
    """Write JPEGs of coloured shapes on smooth gradients."""
    dice = np.random.default_rng(0)
    for i in range(count):
        corners = Image.fromarray(dice.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        image = corners.resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(40):
            x, y = dice.uniform(0, width), dice.uniform(0, height)
            half = dice.uniform(2, height / 6, size=2)
            box = (x - half[0], y - half[1], x + half[0], y + half[1])
            shape = draw.ellipse if dice.random() < 0.5 else draw.rectangle
            shape(box, fill=tuple(dice.integers(0, 256, 3).tolist()))
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


@contextmanager
def unpacked(source: Path) -> Iterator[Path]:
    """A folder of the images."""
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder, tarfile.open(source) as tar:
        tar.extractall(folder, filter="data")
        yield Path(folder)


def plain(folder: Path, chosen: np.ndarray, interpolation: str) -> Work:
    """torchvision and Pillow."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = Subset(ImageFolder(str(folder), transform), chosen.tolist())
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    return lambda: sum(len(images) for images, _ in loader)


def ours(folder: Path, chosen: np.ndarray, interpolation: str) -> Work:
    """The loader that `localvit train` uses, with the same changes to the images."""
    images = open_test_split(str(folder), DataConfig())
    part = Part(images.images, chosen, images.class_names)
    augment = AugmentConfig(color_jitter=None)
    size = {"input_size": (3, 224, 224), "crop_pct": 1.0, "crop_mode": "center"}
    seen = Preprocessing(**size, mean=MEAN, std=STD, interpolation=interpolation)
    loader = train_loader(part, augment, seen, batch_size=BATCH, seed=0)

    def work() -> int:
        order = loader.batch_sampler
        order.set_epoch(order.epoch + 1)
        return sum(len(batch.images) for batch in loader)

    return work


def measure(name: str, folder: Path, images: int, rounds: int) -> list[dict[str, object]]:
    """A row for each interpolation."""
    files = [path for path, _ in ImageFolder(str(folder)).samples]
    chosen = np.unique(np.linspace(0, len(files) - 1, images).astype(int))
    sizes = np.median([Image.open(files[i]).size for i in chosen], axis=0).astype(int)
    rows: list[dict[str, object]] = []
    for interpolation in ("bilinear", "bicubic"):
        sides = plain(folder, chosen, interpolation), ours(folder, chosen, interpolation)
        count = sides[1]()
        assert count == sides[0]() == len(chosen) // BATCH * BATCH
        # The CPU seconds of this process, on which other programs have little influence.
        timer = partial(wall_clock, clock=time.process_time)
        seconds = interleaved(dict(zip(("plain", "localvit"), sides, strict=True)), rounds, timer=timer)
        found = ratio(seconds["plain"], seconds["localvit"])
        speeds = {side: count / Quartiles.of(taken).median for side, taken in seconds.items()}
        about = {"images": name, "median_size": sizes.tolist(), "interpolation": interpolation}
        rows.append({**about, "images": count, **speeds, **asdict(found)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders or tars of JPEGs by class")
    parser.add_argument("--images", type=int, default=96, help="of each source")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="a sentence for the result file")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for width, height in ((500, 375), (112, 112)):
            name = f"shapes {width}x{height}"
            rows += measure(name, synthetic(Path(scratch, name), width, height), args.images, args.rounds)
        for source in args.data:
            with unpacked(source) as folder:
                name = (
                    "/".join(source.with_suffix("").parts[-2:])
                    if source.stem in ("train", "val")
                    else source.stem
                )
                rows += measure(name, folder, args.images, args.rounds)
    hardware = machine(1)
    versions = f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    setting = f"{hardware}, {versions}, timm {timm.__version__}; localvit {localvit.__version__}."
    about = (
        f"# Training images per core\n\n{setting}{' ' + args.note if args.note else ''}\n\n"
        "Random resized crop to 224, flip, normalisation; one process, one thread; images per second of "
        "processor time; medians of runs in turn, with quartiles of their ratio.\n"
    )
    cells = [
        (
            str(row["images"]),
            "x".join(map(str, row["median_size"])),
            str(row["interpolation"]),
            *("{plain:.0f}|{localvit:.0f}|{median:.2f} [{low:.2f}, {high:.2f}]".format(**row).split("|")),
        )
        for row in rows
    ]
    header = (
        "images",
        "median size",
        "interpolation",
        "ImageFolder + PIL",
        "localvit",
        "ratio [quartiles]",
    )
    path = write(args.output, "data", hardware, about, header, cells, rows)
    print(f"written: {path}.md and .json")


if __name__ == "__main__":
    main()

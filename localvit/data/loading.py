"""Batches of images. Every pixel of every batch depends on the run's seed alone.

Each sample of an epoch is a `SampleSpec`: the index of an image, and the seed of its augmentation, derived
from the run's seed, the epoch and the position in the epoch. Batches do not depend on the number of data
workers, on the model's use of random numbers, or on earlier batches; two models trained with one seed see the
same batches. (`timm.data.create_loader` shuffles and augments from the global random states, which the model
uses too.)
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

from localvit.data.augment import TrainTransform
from localvit.data.config import AugmentConfig, DataError, Preprocessing
from localvit.data.ghostscript import disable_ghostscript
from localvit.data.images import Mode, Part, Sample, UnreadableImage

_MODES: dict[int, Mode] = {1: "L", 3: "RGB"}
_REPLACEMENTS = 100
"""Number of images to try in place of an unreadable one."""


class SampleSpec(NamedTuple):
    """One sample of an epoch: index of the image, and seed of its augmentation."""

    image_index: int
    seed: int


class Batch(NamedTuple):
    """Batch of images.

    Attributes:
        images: (B, C, H, W) float32, normalised.
        targets: (B,) int64.
        indices: Index of each image in its data set.
        unreadable: Index -> error of each unreadable image of this batch. In training, another image takes
            its place; in evaluation, the batch is smaller.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: list[int]
    unreadable: dict[int, UnreadableImage]


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**32 (NumPy's limit) that depends on all of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def random_scope() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch (CPU) on exit."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_all(seed: int) -> None:
    """Seed the global random states that `random_scope` restores."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch every GPU


class EpochBatchSampler(Sampler[list[SampleSpec]]):
    """Sampler of batches: a new permutation for every epoch, full batches only.

    The remainder of an epoch is dropped, because BatchNorm needs more than one image. Each epoch drops
    different images.

    With `repeats`, every image of the permutation occurs that many times in a row, and the epoch has the same
    length, as in DeiT (samplers.py). There, too, the copies of an image are in one step (each in another
    process), unless a step ends between them. DeiT also cuts an epoch to a multiple of 256 images; this
    makes no difference with full batches if 256 is a multiple of the batch size or vice versa.

    Args:
        length: Number of images.
        batch_size, seed, rank: As `train_loader`.
        repeats: Number of times that an image occurs in a row.
        world_size: Number of processes; it divides `batch_size`.

    Raises:
        DataError: if there are fewer images than a batch has.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 1 <= batch_size <= length:
            raise DataError(
                f"batch_size={batch_size} does not fit {length} training images; use 1 to {length}"
            )
        self.length, self.batch_size, self.seed, self.repeats = length, batch_size, seed, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch (from 0) of the next iteration, and the batch that it starts with."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[SampleSpec]]:
        specs = self._sample_specs()
        for number in range(self.start, len(self)):
            batch = specs[number * self.batch_size : (number + 1) * self.batch_size]
            yield share(batch, self.rank, self.world_size)

    def batch(self, number: int) -> list[SampleSpec]:
        """Return one batch of the current epoch, over all processes."""
        return self._sample_specs()[number * self.batch_size : (number + 1) * self.batch_size]

    def _sample_specs(self) -> list[SampleSpec]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        indices = torch.randperm(self.length, generator=generator)
        order = indices.repeat_interleave(self.repeats)[: self.length].tolist()
        return [
            SampleSpec(index, derive_seed(self.seed, "augment", self.epoch, position))
            for position, index in enumerate(order)
        ]


def share(batch: list[SampleSpec], part: int, parts: int) -> list[SampleSpec]:
    """Return one of `parts` equal shards of a batch.

    Mixup and cutmix mix image i with the i-th image from the end. So each shard has half of its images from
    the front and half from the back, mirrored: both images of a pair are in one shard, and shards that are
    mixed with the same seed make up the mixed batch. (A shard of odd size cannot be mixed; it is a slice.)
    """
    size = len(batch) // parts
    if size % 2:
        return batch[part * size : (part + 1) * size]
    half, end = size // 2, len(batch)
    return batch[part * half : (part + 1) * half] + batch[end - (part + 1) * half : end - part * half]


class BatchDataset(Dataset[Any]):
    """Data set that reads, transforms and stacks a whole batch at a time.

    Args:
        read: Function from an index to an image and its target.
        length: Number of images.
        transform: Function that transforms such an image and writes it to its slot in the batch.
        size: (C, H, W) of a transformed image.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        length: int,
        transform: Callable[[Any, torch.Tensor], object],
        size: Sequence[int],
    ) -> None:
        self.read, self.length, self.transform, self.size = read, length, transform, tuple(size)

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, specs: Sequence[SampleSpec | int]) -> Batch:
        # torch's DataLoader calls this once a batch, so the random states are saved once a batch.
        images = torch.empty(len(specs), *self.size)
        good: dict[int, tuple[int, int]] = {}  # row -> index and target of its image
        unreadable: dict[int, UnreadableImage] = {}
        with random_scope():
            for row, spec in enumerate(specs):
                for index in self._candidates(spec):
                    try:
                        good[row] = index, self._prepare(index, images[row])
                        break
                    except UnreadableImage as error:
                        # Returned, not raised: an exception of a data worker arrives as a long traceback.
                        unreadable[index] = error
        return Batch(
            images=images if len(good) == len(specs) else images[list(good)],
            targets=torch.tensor([target for _, target in good.values()], dtype=torch.int64),
            indices=[index for index, _ in good.values()],
            unreadable=unreadable,
        )

    def _candidates(self, spec: SampleSpec | int) -> Iterator[int]:
        """Yield the index of the image and, in training, of those to try in its place if it is unreadable.

        The random states are seeded for each. The other images depend on the sample's seed alone, so the
        batch keeps its size, and is the same in every process and after a resume.
        """
        if not isinstance(spec, SampleSpec):  # evaluation: nothing is random
            yield spec
            return
        for _ in range(1 + _REPLACEMENTS):
            seed_all(spec.seed)
            yield spec.image_index
            spec = SampleSpec(derive_seed(spec.seed, "image") % len(self), derive_seed(spec.seed, "augment"))

    def _prepare(self, index: int, out: torch.Tensor) -> int:
        image, target = self.read(index)
        self.transform(image, out)
        return target


def train_loader(
    images: Part,
    augment: AugmentConfig,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """Return a loader of shuffled, augmented, full batches.

    Call `loader.batch_sampler.set_epoch(epoch)` before each epoch.

    Args:
        images: Labelled images.
        augment: Augmentation settings.
        preprocessing: The model's preprocessing.
        batch_size: Images in a batch, over all processes.
        seed: Seed of order and augmentation.
        workers: Number of data workers; the batches do not depend on it.
        pin_memory: Copy batches to pinned memory, for a GPU.
        rank: Index of this process, for its shard of every batch (see `share`).
        world_size: Number of training processes.
    """
    read = partial(images.read_pixels, mode=_mode(preprocessing))
    transform = TrainTransform(augment, preprocessing)
    dataset = BatchDataset(read, len(images), transform, preprocessing.input_size)
    sampler = EpochBatchSampler(
        len(dataset), batch_size, seed, augment.repeats, rank=rank, world_size=world_size
    )
    return _loader(dataset, workers, True, pin_memory, batch_sampler=sampler)


def eval_loader(
    images: Dataset[Sample],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """Return a loader of every image once, in order, with evaluation preprocessing.

    With `persistent_workers`, the data workers stay for the next pass, until the loader is deleted; otherwise
    they end with each pass. The other arguments are those of `train_loader`. With several processes, each
    gets every `world_size`-th image: the numbers of images differ by at most one, and no image is read by two
    processes.
    """
    transform = create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    prepare = partial(_convert_into, transform, _mode(preprocessing))
    length: int = len(images)  # type: ignore[arg-type]
    dataset = BatchDataset(images.__getitem__, length, prepare, preprocessing.input_size)
    own = range(rank, len(dataset), world_size)
    return _loader(dataset, workers, persistent_workers, pin_memory, batch_size=batch_size, sampler=own)


def _mode(preprocessing: Preprocessing) -> Mode:
    channels = preprocessing.input_size[0]
    if channels not in _MODES:
        raise DataError(f"in_chans={channels} is not accepted; use 1 (gray) or 3 (RGB)")
    return _MODES[channels]


def _convert_into(transform: Any, mode: Mode, image: Image.Image, out: torch.Tensor) -> None:
    out.copy_(transform(image.convert(mode)))


def _unchanged(batch: Batch) -> Batch:
    return batch


def _loader(
    dataset: Dataset[Any], workers: int, persistent: bool, pin_memory: bool, **order: Any
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # the data set returns whole batches
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # A generator of its own: without one, each iteration draws a number from torch's global state.
        generator=torch.Generator().manual_seed(0),
        **order,
    )


def _start_worker(_worker: int) -> None:
    """Set up a data worker, which leaves signals that reach a whole job to the training process.

    That process ends its data workers itself, and may still need batches to finish its step. So a data worker
    ignores Ctrl-C, and SIGTERM from all but its parent: SLURM sends it to all processes of a job. (Without
    `sigwaitinfo`, as on macOS, SIGTERM ends it.)
    """
    disable_ghostscript()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # only then does it tell the sender
        threading.Thread(target=_end_with_parents_signal, daemon=True).start()


def _end_with_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # another code would be a failure of the loader


def readable(batch: Batch) -> Batch:
    """Return the batch if every image of it is readable.

    Raises:
        UnreadableImage: for the first unreadable image.
    """
    if batch.unreadable:
        raise next(iter(batch.unreadable.values()))
    return batch

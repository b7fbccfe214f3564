"""Pictures to batches, so that a seed decides every pixel of every batch and nothing else does.

Each picture of an epoch is a `Draw`: which picture, and the seed of its augmentation, derived from the run's
seed, the epoch and the position in the epoch. So batches do not depend on the number of workers, on the model
or its use of random numbers, nor on what was loaded before; two models trained with one seed see the same
batches. (`timm.data.create_loader` shuffles and augments from global random states, which the model shares.)
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler

from localvit.data.augment import TrainTransform
from localvit.data.config import AugmentConfig, DataError, Preprocessing
from localvit.data.images import Mode, Part, Sample, UnreadableImage, disable_ghostscript

_MODES: dict[int, Mode] = {1: "L", 3: "RGB"}
_NOTICE = 30
"""Seconds that a process that loads lives on after SIGTERM."""
_REPLACEMENTS = 100
"""How many pictures are tried in the place of one that cannot be read."""


class Draw(NamedTuple):
    """One picture of an epoch: which one, and the seed of its augmentation."""

    picture: int
    seed: int


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        images: (B, C, H, W) float32, normalised.
        targets: (B,) int64.
        indices: Index of each picture in its data set.
        unreadable: Pictures that should have been in this batch, by their index; in training, others stand
            in their places.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: list[int]
    unreadable: dict[int, UnreadableImage]


class Loaded(NamedTuple):
    """One picture of a batch: its target, or the error in its place."""

    picture: int
    target: int
    error: UnreadableImage | None = None


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**32 (NumPy's limit) from any mixture of numbers and names."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def random_scope() -> Iterator[None]:
    """Leave the global random states of Python, NumPy and torch (CPU) as they were on entry."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_all(seed: int) -> None:
    """Seed the global random states that `random_scope` keeps."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch every GPU


class EpochOrder(Sampler[list[Draw]]):
    """Batches of draws: a new permutation for every epoch, whole batches only.

    A last batch of one picture would give BatchNorm nothing to average over, so the remainder is left out;
    another permutation leaves out other pictures.

    With `repeats`, every picture of the permutation comes that many times in a row, and the epoch ends at
    the same length, as in DeiT (samplers.py). There too the copies of a picture are in one update (each in
    another process) unless it ends between them. That it cuts an epoch to a multiple of 256 pictures as well
    changes nothing where whole batches are filled and 256 is a multiple of their size or the reverse.

    Args:
        length: Number of pictures.
        batch_size: Pictures in a batch.
        seed: The run's seed.
        repeats: Times that a picture comes in a row.
        rank: Which share of every batch to yield, of `world_size` equal ones (see `share`).
        world_size: Processes that share the batches; it divides `batch_size`.

    Raises:
        DataError: if not one batch can be filled.
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
            raise DataError(f"batch_size={batch_size} does not fit {length} training images (1 to {length})")
        self.length, self.batch_size, self.seed, self.repeats = length, batch_size, seed, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch (from 0) that the next iteration yields, and the batch that it begins with."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = self._draws()
        for number in range(self.start, len(self)):
            batch = draws[number * self.batch_size : (number + 1) * self.batch_size]
            yield share(batch, self.rank, self.world_size)

    def batch(self, number: int) -> list[Draw]:
        """The draws of one batch of the chosen epoch, of all processes."""
        return self._draws()[number * self.batch_size : (number + 1) * self.batch_size]

    def _draws(self) -> list[Draw]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        pictures = torch.randperm(self.length, generator=generator)
        order = pictures.repeat_interleave(self.repeats)[: self.length].tolist()
        return [
            Draw(index, derive_seed(self.seed, "augment", self.epoch, position))
            for position, index in enumerate(order)
        ]


def share(batch: list[Draw], part: int, parts: int) -> list[Draw]:
    """One of `parts` equal parts of a batch.

    A part has as much from the front as from the back, mirrored: mixup and cutmix mix picture i with the
    i-th from the end, so each pair is within one part, and parts mixed with one seed are the mixed batch.
    (A part of odd size, which cannot be mixed, is a plain slice.)
    """
    size = len(batch) // parts
    if size % 2:
        return batch[part * size : (part + 1) * size]
    half, end = size // 2, len(batch)
    return batch[part * half : (part + 1) * half] + batch[end - (part + 1) * half : end - part * half]


class Prepared(Dataset[Any]):
    """Pictures in the form that a model takes, by the batch.

    Args:
        read: From an index to a picture in the mode that the model takes, and its target.
        length: Number of pictures.
        transform: Writes what becomes of such a picture to a place in the batch.
        size: (C, H, W) of that place.
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

    def __getitems__(self, draws: Sequence[Draw | int]) -> Batch:
        # torch's DataLoader calls this with all of a batch, so the states are kept once for all of it.
        images = torch.empty(len(draws), *self.size)
        with random_scope():
            tries = [list(self._readable(*place)) for place in zip(draws, images, strict=True)]
        good = [row for row, loaded in enumerate(tries) if loaded[-1].error is None]
        found = [tries[row][-1] for row in good]
        return Batch(
            images=images if len(good) == len(draws) else images[good],
            targets=torch.tensor([loaded.target for loaded in found], dtype=torch.int64),
            indices=[loaded.picture for loaded in found],
            unreadable={t.picture: t.error for loaded in tries for t in loaded if t.error is not None},
        )

    def _readable(self, draw: Draw | int, out: torch.Tensor) -> Iterator[Loaded]:
        """The picture; if it is drawn and cannot be read, the error and then a picture in its place.

        The other picture depends on the draw's seed only, so the batch is as large as it should be, and the
        same in every process and after every resume.
        """
        loaded = self._prepare(draw, out)
        yield loaded
        for _ in range(_REPLACEMENTS):
            if loaded.error is None or not isinstance(draw, Draw):
                return
            draw = Draw(derive_seed(draw.seed, "picture") % len(self), derive_seed(draw.seed, "augment"))
            loaded = self._prepare(draw, out)
            yield loaded

    def _prepare(self, draw: Draw | int, out: torch.Tensor) -> Loaded:
        if isinstance(draw, Draw):
            picture = draw.picture
            seed_all(draw.seed)
        else:  # evaluation: nothing is random
            picture = draw
        try:
            image, target = self.read(picture)
        except UnreadableImage as error:
            # Returned, not raised: a worker's exception reaches the main process as a wall of text.
            return Loaded(picture, -1, error)
        self.transform(image, out)
        return Loaded(picture, target)


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
    """Shuffled, augmented, whole batches; `loader.batch_sampler.set_epoch(e)` before each epoch.

    Args:
        images: Labelled pictures.
        augment: What is done to them.
        preprocessing: Of the model.
        batch_size: Pictures in a batch, over all processes.
        seed: Decides order and augmentation.
        workers: Processes that load; the batches do not depend on it.
        pin_memory: For a GPU.
        rank: Which share of each batch this process takes.
        world_size: Processes that train.
    """
    read = partial(images.read_pixels, mode=_mode(preprocessing))
    transform = TrainTransform(augment, preprocessing)
    prepared = Prepared(read, len(images), transform, preprocessing.input_size)
    order = EpochOrder(len(prepared), batch_size, seed, augment.repeats, rank=rank, world_size=world_size)
    return _loader(prepared, workers, pin_memory, batch_sampler=order)


def eval_loader(
    images: Dataset[Sample],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """Every picture once, in order, as the model is meant to see it (arguments as `train_loader`).

    Of several processes each takes every `world_size`-th picture: shares may differ by one picture, and
    no picture is in two of them.
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
    read = partial(_converted, images, mode=_mode(preprocessing))
    length: int = len(images)  # type: ignore[arg-type]
    prepared = Prepared(read, length, partial(_into, transform), preprocessing.input_size)
    own = range(rank, len(prepared), world_size)
    return _loader(prepared, workers, pin_memory, batch_size=batch_size, sampler=own)


def _mode(preprocessing: Preprocessing) -> Mode:
    channels = preprocessing.input_size[0]
    if channels not in _MODES:
        raise DataError(f"in_chans={channels}; pictures are loaded with 1 or 3 channels")
    return _MODES[channels]


def _converted(images: Dataset[Sample], index: int, mode: Mode) -> Sample:
    image, target = images[index]
    return image.convert(mode), target


def _into(transform: Callable[[Any], torch.Tensor], image: Any, out: torch.Tensor) -> None:
    out.copy_(transform(image))


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _loader(dataset: Dataset[Any], workers: int, pin_memory: bool, **order: Any) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # the batch is made already
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # Its own: iterating a loader without one draws a number from torch's global state.
        generator=torch.Generator().manual_seed(0),
        **order,
    )


def _start_worker(_worker: int) -> None:
    """Prepare a process that loads images."""
    disable_ghostscript()
    _leave_the_end_to_the_parent()


def _leave_the_end_to_the_parent() -> None:
    """Let signals that reach a whole job be answered by the process that it is about, in one that loads.

    That process may still need batches to finish its update, and ends its loaders by a message as a rule.
    Ctrl-C in a terminal is ignored here. SIGTERM, which SLURM sends to all processes, is taken as notice to
    end in half a minute, so that a parent that tries to end a loader by this signal does not wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_NOTICE))


def readable(batch: Batch) -> Batch:
    """The batch, if every picture of it could be read.

    Raises:
        UnreadableImage: the first that could not.
    """
    if batch.unreadable:
        raise next(iter(batch.unreadable.values()))
    return batch

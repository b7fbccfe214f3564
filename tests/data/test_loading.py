import dataclasses
import multiprocessing
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from localvit.data.config import AugmentConfig, DataConfig, DataError, Preprocessing
from localvit.data.images import UnreadableImage
from localvit.data.loading import (
    EpochBatchSampler,
    eval_loader,
    random_scope,
    readable,
    seed_all,
    train_loader,
)
from localvit.data.splits import open_splits

PREPROCESSING = Preprocessing(
    input_size=(1, 8, 8),
    mean=(0.3,),
    std=(0.4,),
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="center",
)
HEAVY = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", erase=0.5, color_jitter=None)


def batches(epoch=0, workers=0, seed=3, disturb=False):
    splits = open_splits(DataConfig(), seed=seed)
    loader = train_loader(splits.train, HEAVY, PREPROCESSING, batch_size=256, seed=seed, workers=workers)
    loader.batch_sampler.set_epoch(epoch)
    found = []
    for batch in loader:
        if disturb:  # a model that uses random numbers, as dropout does
            torch.rand(7), np.random.rand(3), random.random()
        found.append((batch.images, batch.targets))
    return found


def equal(first, second):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else():
    reference = batches()
    assert len(reference) == 1167 // 256
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert equal(reference, batches(disturb=True))
    assert equal(reference, batches(workers=2))
    assert not equal(reference, batches(epoch=1))
    assert not equal(reference, batches(seed=4))


def test_a_data_worker_ends_by_the_signal_of_its_parent_only():
    """SLURM sends SIGTERM to all processes of a job; the training process still needs batches then."""
    others = set(multiprocessing.active_children())
    images = open_splits(DataConfig(), seed=3).train
    loader = eval_loader(images, PREPROCESSING, batch_size=64, workers=1, persistent_workers=True)
    found = iter(loader)
    next(found)
    (worker,) = set(multiprocessing.active_children()) - others
    kill = f"import os, signal; os.kill({worker.pid}, signal.SIGTERM)"
    subprocess.run([sys.executable, "-S", "-c", kill], check=True)
    assert len(list(found)) == -(-len(images) // 64) - 1
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_loading_leaves_the_random_states_of_the_model_alone():
    seed_all(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    seed_all(5)
    batches()
    found = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_random_scope_keeps_the_seed_that_surgery_reads():
    torch.manual_seed(17)
    with random_scope():
        seed_all(5)
    assert torch.initial_seed() == 17


def test_every_epoch_is_another_permutation_in_whole_batches():
    order = EpochBatchSampler(10, 4, seed=0)
    first = [draw.image_index for batch in order for draw in batch]
    order.set_epoch(1)
    second = [draw.image_index for batch in order for draw in batch]
    assert len(first) == len(set(first)) == 8 == 4 * len(order)
    assert first != second


def test_repeats_by_hand():
    plain = [
        draw.image_index for batch in EpochBatchSampler(10, 1, seed=0) for draw in batch
    ]  # the permutation
    batches = list(EpochBatchSampler(10, 4, seed=0, repeats=3))
    # Ten places: three images three times and one once, of which two whole batches take eight.
    expected = [plain[0]] * 3 + [plain[1]] * 3 + [plain[2]] * 2
    assert [[draw.image_index for draw in batch] for batch in batches] == [expected[:4], expected[4:]]
    assert len({draw.seed for batch in batches for draw in batch}) == 8  # each augmented in its own way
    order = EpochBatchSampler(10, 4, seed=0, repeats=3)
    order.set_epoch(1)
    again = list(order)
    assert again != batches
    assert again == list(order)


def test_an_epoch_with_repeats_holds_what_timms_sampler_deals_out_to_all_processes():
    ranks = [
        list(RepeatAugSampler(range(1000), num_replicas=4, rank=rank, num_repeats=3)) for rank in range(4)
    ]
    assert len(EpochBatchSampler(1000, 256, seed=0, repeats=3)) * 256 == sum(map(len, ranks)) == 768
    theirs = Counter(Counter(index for rank in ranks for index in rank).values())
    drawn = Counter(d.image_index for batch in EpochBatchSampler(1000, 256, seed=0, repeats=3) for d in batch)
    assert Counter(drawn.values()) == theirs == {3: 256}


def test_repeated_images_are_augmented_differently():
    splits = open_splits(DataConfig())
    repeated = dataclasses.replace(HEAVY, repeats=3)
    loader = train_loader(splits.train, repeated, PREPROCESSING, batch_size=9, seed=0)
    batch = next(iter(loader))
    assert [len(set(batch.indices[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_size_that_fills_no_batch_is_refused(batch_size):
    with pytest.raises(DataError, match=f"batch_size={batch_size} does not fit 10"):
        EpochBatchSampler(10, batch_size, seed=0)


def test_evaluation_sees_every_image_once_in_order():
    splits = open_splits(DataConfig(), seed=0)
    found = list(eval_loader(splits.validation, PREPROCESSING, batch_size=50))
    assert [i for batch in found for i in batch.indices] == list(range(130))
    assert found[0].images.shape == (50, 1, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_comes_back_by_name_from_any_process(make_folder, workers):
    folder = make_folder("images", {"a": 20, "b": 20})
    bad = folder / "b" / "7.png"
    bad.write_bytes(b"not an image")
    splits = open_splits(DataConfig(train=str(folder)))
    loaders = [
        train_loader(
            splits.train, HEAVY, PREPROCESSING, batch_size=len(splits.train), seed=0, workers=workers
        ),
        eval_loader(splits.validation, PREPROCESSING, batch_size=4, workers=workers),
        eval_loader(splits.test, PREPROCESSING, batch_size=4, workers=workers),
    ]
    errors = [e for loader in loaders for batch in loader for e in batch.unreadable.values()]
    assert [e.name for e in errors] == [str(bad)]
    for loader in loaders:
        for batch in loader:
            if batch.unreadable:
                with pytest.raises(UnreadableImage, match="cannot read image"):
                    readable(batch)


def test_only_gray_and_rgb():
    splits = open_splits(DataConfig())
    with pytest.raises(DataError, match="in_chans=2"):
        eval_loader(
            splits.test,
            replace(PREPROCESSING, input_size=(2, 8, 8), mean=(0.3,) * 2, std=(0.3,) * 2),
            batch_size=4,
        )

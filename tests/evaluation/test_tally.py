import numpy as np
import pytest
import torch
from torch import distributed

from localvit.evaluation.metrics import Tally

CPU = torch.device("cpu")


def logits_and_targets(count=23, classes=7):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, classes, generator=generator),
        torch.randint(classes, (count,), generator=generator),
    )


def by_hand(logits, targets):
    """Loss, top-1 and top-5, one image at a time."""
    losses, first, five = [], 0, 0
    for row, target in zip(logits.double().numpy(), targets.tolist(), strict=True):
        losses.append(np.log(np.exp(row).sum()) - row[target])
        better = int((row > row[target]).sum())
        first, five = first + (better == 0), five + (better < 5)
    return np.mean(losses), 100 * first / len(targets), 100 * five / len(targets)


@pytest.mark.parametrize("size", [1, 4, 23])
def test_a_tally_is_what_a_slow_count_finds_whatever_the_batches(size):
    logits, targets = logits_and_targets()
    tally = Tally(CPU)
    for start in range(0, len(targets), size):
        tally.add(logits[start : start + size], targets[start : start + size])
    found = tally.result()
    assert (found.loss, found.top1, found.top5) == pytest.approx(by_hand(logits, targets), rel=1e-6)
    assert found.images == 23
    assert found.images_per_second > 0


def _share(rank, size, store, results):
    """One process of `size`: count its share, merge, tell what it found."""
    logits, targets = logits_and_targets()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        tally = Tally(CPU)
        tally.add(logits[rank::size], targets[rank::size])
        tally.merge()
        found = tally.result()
        results.put((found.loss, found.top1, found.top5, found.images))
    finally:
        distributed.destroy_process_group()


def test_processes_that_share_the_images_find_what_one_finds(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_share, args=(rank, 3, tmp_path / "store", results)) for rank in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    loss, top1, top5 = by_hand(*logits_and_targets())
    assert found == [pytest.approx((loss, top1, top5, 23), rel=1e-6)] * 3


def test_without_other_processes_merging_changes_nothing():
    logits, targets = logits_and_targets()
    tally = Tally(CPU)
    tally.add(logits, targets)
    tally.merge()
    assert tally.result().images == 23


def test_no_images_are_no_division_by_zero():
    assert Tally(CPU).result().images == 0

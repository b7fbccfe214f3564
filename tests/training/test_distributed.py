"""Two processes train as one would, save what one would, and go on after one of them died."""

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from localvit.config.files import resolve
from localvit.data.loading import EpochBatchSampler, SampleSpec, share
from localvit.errors import ConfigError
from localvit.runtime.distributed import World, name_of_start, open_world
from localvit.structure import to_yaml
from localvit.training.loop import train
from localvit.training.run import prepare
from tests.training.runs import CASES, double_precision, status, story

ROOT = Path(__file__).parents[2]


def torchrun(*arguments):
    """Start two processes on this machine, anew if one of them dies; returns what they printed."""
    options = ("--nproc-per-node=2", "--standalone", "--max-restarts=3", "--monitor-interval=0.1")
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def double():
    """Train in double precision."""
    with double_precision():
        yield


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """The folder in which two processes trained every case."""
    folder = tmp_path_factory.mktemp("two")
    torchrun("tests/training/two_processes.py", "equality", str(folder))
    return folder


def distance(first, second):
    """The largest difference between two saved models of double precision."""
    one, other = (load_file(path / "last" / "model.safetensors") for path in (first, second))
    assert one.keys() == other.keys()
    assert one["head.weight"].dtype == torch.float64
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("case", ["none", "frozen"])
def test_two_processes_train_as_one(by_two, double, tmp_path, case):
    config = resolve("digits", [*CASES[case], f"output={tmp_path / case}"])
    alone = train(config)
    assert distance(by_two / case, tmp_path / case) < 1e-11
    together = story(by_two / case)
    # The evaluator takes logits in single precision.
    for name, tolerance in (("train_loss", 1e-9), ("validation_loss", 1e-6)):
        assert together["metrics"][0][name] == pytest.approx(alone.history[0][name], abs=tolerance)
    assert together["metrics"][0]["validation_top1"] == alone.history[0]["validation_top1"]
    assert together["test"]["images"] == 500
    assert together["test"]["top1"] == alone.test.top1
    # Pieces one after the other are as good as processes side by side.
    pieces = resolve("digits", [*CASES[case], "engine.grad_accum=4", f"output={tmp_path / 'pieces'}"])
    train(pieces)
    assert distance(tmp_path / "pieces", tmp_path / case) < 1e-11


def test_statistics_of_shares_make_a_difference(by_two, double, tmp_path):
    # What the two cases above must not have: the same comparison where it should fail.
    train(resolve("digits", [*CASES["average"], f"output={tmp_path / 'run'}"]))
    assert distance(by_two / "average", tmp_path / "run") > 1e-6


def test_two_processes_that_were_stopped_go_on_to_the_same_bits(by_two):
    assert story(by_two / "cut") == story(by_two / "average")
    assert status(by_two / "cut")["world_size"] == 2


def test_fewer_processes_go_on_if_that_is_allowed(by_two, double):
    config = resolve("digits", [*CASES["none"], f"output={by_two / 'fewer'}"])
    with pytest.raises(ConfigError, match=r"\(world_size: 2 -> 1\).* --allow-change world_size"):
        train(config)
    train(config, allow_change=["world_size"])
    assert distance(by_two / "fewer", by_two / "none") < 1e-11


@pytest.mark.slow
def test_after_the_death_of_a_process_torchrun_goes_on_to_the_same_bits(by_two, tmp_path):
    settings = ["output=" + str(tmp_path / "run")]
    (tmp_path / "config.yaml").write_text(to_yaml(resolve("digits", [*CASES["average"], *settings])))
    arguments = ("elastic", str(tmp_path), str(tmp_path / "config.yaml"))
    said = torchrun("tests/training/two_processes.py", *arguments)
    assert (tmp_path / "killed").exists()
    assert "resuming after step" in said
    assert story(tmp_path / "run") == story(by_two / "average")


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_start_has_a_name_of_its_own_in_a_store_that_remembers_earlier_ones(late):
    store = dist.HashStore()

    def started(late):
        """Return what the three processes of one start understood, one of them late."""

        def process(rank):
            time.sleep(0.2 * (rank == late))
            return name_of_start(store, rank, 3, timedelta(seconds=30))

        with ThreadPoolExecutor(3) as threads:
            return list(threads.map(process, range(3)))

    names = [started(late) for _ in range(3)]
    assert all(len(set(understood)) == 1 for understood in names)
    assert len({understood[0] for understood in names}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_start_in_which_a_process_is_missing_ends_with_the_timeout(rank):
    with pytest.raises(RuntimeError):
        name_of_start(dist.HashStore(), rank, 2, timedelta(seconds=0.2))


@pytest.mark.parametrize(("size", "parts"), [(8, 1), (8, 2), (8, 4), (9, 3), (12, 4), (6, 6)])
def test_shares_are_the_batch_and_keep_mixed_pairs_together(size, parts):
    batch = [SampleSpec(i, i) for i in range(size)]
    shares = [share(batch, part, parts) for part in range(parts)]
    assert sorted(itertools.chain(*shares)) == batch
    assert {len(each) for each in shares} == {size // parts}
    if size // parts % 2 == 0:
        for each in shares:
            for one, other in zip(each, reversed(each), strict=True):
                assert one.image_index + other.image_index == size - 1


def test_all_shares_of_an_epoch_are_the_epoch():
    whole = EpochBatchSampler(50, 12, seed=3)
    parts = [EpochBatchSampler(50, 12, seed=3, rank=rank, world_size=3) for rank in range(3)]
    for order in (whole, *parts):
        order.set_epoch(4, 1)
    assert len(list(whole)) == 3
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(itertools.chain(*shares))
    assert next(iter(whole)) == whole.batch(1)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (["batch_size=9"], 2, "batch_size=9 .* multiple of 2 processes x engine.grad_accum=1"),
        (["batch_size=8", "engine.grad_accum=3"], 1, "multiple of 1 process x engine.grad_accum=3"),
        (["batch_size=8", "engine.grad_accum=2"], 8, "multiple of 8 processes x engine.grad_accum=2"),
        (["batch_size=6", "augment.mixup=1"], 2, "use an even number for each of 2 processes"),
        (["batch_size=8", "engine.batch_norm=sync"], 2, "engine.batch_norm='sync' is not accepted on CPUs"),
    ],
)
def test_shares_that_do_not_work_out_are_refused(tiny, settings, size, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tiny(*settings), World(device=torch.device("cpu"), size=size))


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "tpu"])
def test_a_device_that_is_not_there_for_each_process_is_refused(monkeypatch, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ConfigError, match="device="), open_world(device):
        pass


def test_a_world_that_torchrun_did_not_make_is_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 is set, but not by torchrun"), open_world("cpu"):
        pass

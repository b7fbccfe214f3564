"""Time spent waiting for images: measured, kept, shown and complained about."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from localvit.runs.state import read_newest
from localvit.runtime.distributed import World
from localvit.training import loop
from localvit.training.loop import train
from localvit.training.progress import TrainingProgress, slow_data
from localvit.training.run import prepare
from tests.training.runs import stop_after


class Position:
    waited = 1.0


def test_only_the_time_until_a_batch_is_there_is_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def batches():
        for seconds in (2.0, 3.0):
            now[0] += seconds
            yield seconds

    at = Position()
    for _ in loop._timed(batches(), at):
        now[0] += 100.0  # the update
    assert at.waited == 1.0 + 2.0 + 3.0


def test_every_epoch_says_how_long_it_waited(tiny, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    found = train(tiny(f"output={tmp_path / 'run'}"), console=console).history
    assert all(0.0 < epoch["data_wait"] < 1.0 for epoch in found)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found
    printed = [line for line in console.file.getvalue().splitlines() if line.startswith("epoch")]
    for line, epoch in zip(printed, found, strict=True):
        assert line.endswith(f"data {100 * epoch['data_wait']:.0f} %")


def test_waiting_before_an_interruption_counts(tiny, tmp_path, monkeypatch):
    config = tiny(f"output={tmp_path / 'run'}", "epochs=1", "schedule.warmup_epochs=0")
    stop_after(monkeypatch, config, 3)
    state, _ = read_newest(tmp_path / "run" / "state")
    assert 0.0 < state["waited"] < state["seconds"]
    monkeypatch.setattr(loop, "_timed", lambda loader, at: loader)  # from here on nobody waits
    (epoch,) = train(config).history
    assert epoch["data_wait"] * epoch["seconds"] == pytest.approx(state["waited"])


@pytest.mark.parametrize(
    ("share", "seconds", "workers", "gpu", "advice"),
    [
        (0.5, 100.0, 2, True, "for 50 % of the epoch, with workers=2 on 8 cores; raise workers"),
        (0.5, 100.0, 0, True, "with workers=0 on 8 cores; raise workers"),
        (0.5, 100.0, 2, False, "raise workers"),
        (0.5, 100.0, 8, True, "all cores are used, so store smaller images"),
        (0.5, 100.0, 0, False, None),  # one process that loads and trains by turns
        (0.2, 100.0, 2, True, None),
        (0.5, 10.0, 2, True, None),  # processes that start
    ],
)
def test_advice(monkeypatch, share, seconds, workers, gpu, advice):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = slow_data({"data_wait": share, "seconds": seconds}, workers, gpu)
    assert (found is None) if advice is None else (advice in found)


def test_a_run_is_warned_once_and_the_bar_shows_the_share(tiny, monkeypatch):
    config = tiny("workers=1")
    console = Console(file=io.StringIO(), width=300, force_terminal=True)
    ticks = itertools.count()
    progress = TrainingProgress(console, prepare(config, World(device=torch.device("cpu"))))
    progress.gpu = True
    progress.bar.get_time = lambda: float(next(ticks))  # a speed needs time to pass
    metrics = {"epoch": 1, "train_loss": 1.0, "validation_loss": 1.0, "validation_top1": 50.0}
    metrics |= {"images_per_second": 10.0, "data_wait": 0.25, "seconds": 1000.0}
    with progress:
        for _ in range(4):
            progress.advance(8, 0.123)
        assert "images/s, data 12 %" in progress.bar.tasks[0].fields["speed"]
        progress.epoch(metrics, True)
        progress.epoch(metrics | {"epoch": 2}, True)
    assert console.file.getvalue().count("warning: training waited for images for 25 % of the epoch") == 1

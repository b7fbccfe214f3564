"""Images that cannot be read, processes that load them and die, and one process per folder."""

import dataclasses
import errno
import io
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from localvit.config.files import resolve
from localvit.data import loading
from localvit.data.identity import image_name
from localvit.data.images import UnreadableImage
from localvit.data.loading import train_loader
from localvit.data.splits import open_splits
from localvit.errors import ConfigError, TrainingFailed
from localvit.models.build import build_model, preprocessing_for
from localvit.runs.lock import locked
from localvit.training.loop import train
from localvit.training.run import TrainingRun
from tests.training.runs import TOUGH, start, status, stop_after, story, updates_saved


@pytest.fixture
def images(tmp_path):
    """A function that spoils some of 2 x 20 images and returns a configuration, and their names."""
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), i * 12).save(tmp_path / "data" / label / f"{i}.png")
    args = "{img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 8, depth: 1, num_heads: 1}"

    def configure(spoilt, *settings):
        config = resolve(
            settings=[
                *(f"data.train={tmp_path / 'data'}", f"model.args={args}", "batch_size=8", "epochs=3"),
                *("schedule.warmup_epochs=1", "augment.mixup=0.5", f"output={tmp_path / 'run'}", *settings),
            ]
        )
        # Held-out images must stay whole.
        train_part = open_splits(config.data, seed=config.seed).train
        names = [image_name(train_part, i) for i in range(len(train_part))]
        for name in names[:spoilt]:
            Path(name).write_bytes(b"no image")
        return config, names[:spoilt]

    return configure


def test_an_image_of_the_test_split_that_cannot_be_read_is_named_with_the_way_out(images, tmp_path):
    config, _ = images(0, "epochs=1", "schedule.warmup_epochs=0")
    part = open_splits(config.data, seed=config.seed).test
    name = Path(image_name(part, 0))
    whole = name.read_bytes()
    name.write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="It is a test image: put a whole one in its place"):
        train(config)
    name.write_bytes(whole)
    assert train(config, allow_change=["data"]).test.images == len(part)


def test_images_that_were_trained_on_are_refused_in_other_splits(images, tmp_path, monkeypatch):
    """Without one image, others are held out."""
    config, _ = images(0, "save_seconds=0")
    stop_after(monkeypatch, config, 4)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    (tmp_path / "data" / "a" / "3.png").unlink()
    said = r"[1-9] of . test images were training images of this run before its data changed, such as 'a/"
    with pytest.raises(ConfigError, match=rf"(validation|test).*{said[-20:]}"):
        train(config, allow_change=["data"])
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before
    accepted = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_overlap=True))
    with monkeypatch.context() as patch:
        patch.setattr("tests.training.runs.train", partial(train, allow_change=["data"]))
        stop_after(patch, accepted, 4)
    train(accepted)  # and the images are remembered
    notes = [note for note in status(tmp_path / "run")["notes"] if note.startswith("overlap allowed")]
    assert [re.search(said, note) is not None for note in notes] == [False, True]


def test_unreadable_images_are_replaced_named_and_counted(images, tmp_path, monkeypatch):
    config, names = images(3, "max_bad_images=3")
    sizes, real = [], TrainingRun.inputs
    monkeypatch.setattr(
        TrainingRun, "inputs", lambda run, batch: (sizes.append(len(batch.images)), real(run, batch))[1]
    )
    train(config)
    assert sizes == [8] * 12
    assert status(tmp_path / "run")["bad_images"] == sorted(names)


def test_an_unreadable_image_of_any_name_is_one_line_on_the_console(images):
    config, (name,) = images(1, "max_bad_images=1")
    os.rename(name, f"{name}\x1b[31m\n[bold].png")
    console = Console(file=io.StringIO(), width=300)
    train(config, console=console)
    (note,) = (line for line in console.file.getvalue().splitlines() if "replaced by another image" in line)
    assert "\\x1b[31m\\n[bold].png': unknown format" in note


def test_one_unreadable_image_too_many_stops_the_run(images, tmp_path):
    config, names = images(3, "max_bad_images=2")
    with pytest.raises(TrainingFailed, match=r"more than max_bad_images=2 .* cannot read image") as caught:
        train(config)
    assert any(name in str(caught.value) for name in names)
    assert status(tmp_path / "run")["bad_images"] == sorted(names)


def test_nothing_readable_is_an_error_whatever_is_allowed(images):
    config, _ = images(100, "max_bad_images=1000")
    with pytest.raises(UnreadableImage):
        train(config)


def test_the_replacement_depends_on_the_draw_alone(images):
    config, _ = images(8)
    part = open_splits(config.data).train
    preprocessing = preprocessing_for(build_model(config.model, 2), config.data)

    def batches(workers, start):
        loader = train_loader(part, config.augment, preprocessing, batch_size=8, seed=1, workers=workers)
        loader.batch_sampler.set_epoch(2, start)
        return [(b.indices, sorted(b.unreadable), b.images.sum().item()) for b in loader]

    whole = batches(0, 0)
    assert any(unreadable for _, unreadable, _ in whole)
    assert all(len(indices) == 8 for indices, _, _ in whole)
    assert batches(2, 0) == whole
    assert batches(1, 2) == whole[2:]


def test_a_process_that_loads_and_dies_is_named_in_one_line(tiny, tmp_path, monkeypatch):
    main, real = os.getpid(), loading.BatchDataset._candidates

    def deadly(self, draw):
        if os.getpid() != main and isinstance(draw, loading.SampleSpec) and draw.image_index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, draw)

    monkeypatch.setattr(loading.BatchDataset, "_candidates", deadly)
    with pytest.raises(TrainingFailed, match=r"a data worker died( \(DataLoader .*\))?, perhaps") as caught:
        train(tiny("workers=1", f"output={tmp_path / 'run'}"))
    assert "\n" not in str(caught.value)
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_console_whose_reader_has_ended_is_no_dead_worker(tiny, monkeypatch):
    def end(*_):
        raise BrokenPipeError

    monkeypatch.setattr("localvit.training.progress.TrainingProgress.epoch", end)
    with pytest.raises(BrokenPipeError):
        train(tiny())


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_second_process_is_refused_until_the_first_is_dead(tiny, tmp_path):
    folder = tmp_path / "run"
    config = tiny(*TOUGH, f"output={folder}", "workers=2", "epochs=50")
    process = start(config)
    while updates_saved(folder) < 2:
        assert process.is_alive()
        time.sleep(0.002)
    with pytest.raises(ConfigError, match="another process is working there"):
        train(config)
    workers = children(process.pid)
    try:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # so that they certainly outlive it
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(workers) == 2
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        with locked(folder):
            pass
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_one_process_cannot_use_a_folder_twice_at_once(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="another process"), locked(tmp_path):
            pass
        with pytest.raises(ConfigError, match="another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"), locked(tmp_path):
        pass


def test_a_finished_folder_needs_neither_lock_nor_data(images, tmp_path):
    config, _ = images(0)
    first = train(config)
    kept = story(tmp_path / "run")
    for image in (tmp_path / "data").rglob("*.png"):
        image.unlink()
    assert train(config).test == first.test
    assert story(tmp_path / "run") == kept

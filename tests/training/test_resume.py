"""A run that is ended in any way goes on as if nothing had happened, or says why it cannot."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from localvit.config.comparison import check_allowed
from localvit.config.files import resolve
from localvit.data.manifest import Manifest
from localvit.errors import ConfigError, TrainingFailed, TrainingInterrupted
from localvit.runs import directory as output, state
from localvit.runs.directory import RunDirectory
from localvit.runs.state import DamagedState, read_newest
from localvit.runtime import open_world
from localvit.runtime.signals import stop_on_signals
from localvit.structure import to_yaml
from localvit.training import loop
from localvit.training.callbacks import Callback
from localvit.training.engine import TrainingEngine
from localvit.training.loop import train
from localvit.training.run import TrainingRun, prepare
from tests.training.conftest import TINY
from tests.training.runs import TOUGH, kill_after, states, status, stop_after, story, updates_saved


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def tough(tiny, folder):
    """A function from settings to the tough run in `folder`: 16 updates in 2 epochs."""
    return lambda *settings: tiny(*TOUGH, f"output={folder}", *settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the results of the tough run when nothing interrupts it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "run"
    train(resolve("digits", [*TINY, *TOUGH, f"output={path}", "save_seconds=60"]))
    return story(path)


class Calls(Callback):
    """Notes what it is told."""

    def __init__(self):
        self.calls = []

    def on_start(self, config, folder):
        self.calls.append("start")

    def on_epoch(self, metrics):
        self.calls.append(metrics["epoch"])

    def on_end(self, result):
        self.calls.append("end")


@pytest.mark.slow
def test_killed_again_and_again_the_run_ends_the_same(tough, folder, uninterrupted):
    config = tough("workers=2")
    kills = [kill_after(config, folder, updates) for updates in (1, 4, 8, 11, 15)]
    assert sum(kills) >= 4  # the last one may come too late
    train(config)
    assert story(folder) == uninterrupted
    assert not (folder / "state").exists()
    assert not [path for path in folder.iterdir() if "-" in path.name]  # nothing half written


@pytest.mark.parametrize("updates", [3, 8, 16])
def test_it_goes_on_in_the_midst_of_an_epoch_and_at_its_end(
    tough, folder, uninterrupted, monkeypatch, updates
):
    stop_after(monkeypatch, tough(), updates)
    assert (status(folder)["state"], updates_saved(folder)) == ("interrupted", updates)
    assert len(states(folder)) == 2
    train(tough("workers=1", "save_seconds=9"))
    assert story(folder) == uninterrupted


def test_only_what_is_missing_is_trained_and_told(tough, monkeypatch):
    stop_after(monkeypatch, tough(), 11)
    seen, real = [], TrainingRun.inputs
    monkeypatch.setattr(TrainingRun, "inputs", lambda run, batch: (seen.append(batch), real(run, batch))[1])
    told = Calls()
    result = train(tough(), callbacks=[told])
    assert len(seen) == 16 - 11
    assert told.calls == ["start", 2, "end"]
    again = Calls()
    finished = train(tough(), callbacks=[again])
    assert again.calls == []
    assert len(seen) == 16 - 11
    assert (finished.history, finished.best_epoch) == (result.history, result.best_epoch)
    assert (finished.validation, finished.test) == (result.validation, result.test)
    assert (finished.notes, finished.parameters) == (result.notes, result.parameters)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(finished.model(images), result.model(images))


def test_what_was_written_after_the_last_state_is_put_back(tough, folder, uninterrupted, monkeypatch):
    # Killed after an epoch was written down and before its state was: the files are ahead of the state.
    real, calls = RunDirectory.save_state, []

    def killed(self, update, values):
        calls.append(update)
        if calls.count(8) == 2:  # within the epoch, then at the epoch's end
            raise KeyboardInterrupt
        real(self, update, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tough())
    assert status(folder)["epochs_done"] == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    train(tough())
    assert story(folder) == uninterrupted


def test_the_best_model_is_put_back_to_the_time_of_the_state(tough, folder, monkeypatch):
    stop_after(monkeypatch, tough(), 11)
    best = folder / "best" / "model.safetensors"
    written = best.read_bytes()
    best.write_bytes(b"of a branch that was lost")
    stop_after(monkeypatch, tough(), 2)
    assert best.read_bytes() == written


def test_sigterm_saves_and_exits_with_zero_and_one_line(tough, folder, uninterrupted, tmp_path):
    config = tough("workers=2")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "localvit", "train", "--recipe", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while updates_saved(folder) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: the processes that load get it too
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (0, 1), err
    assert "the same command resumes from there" in err
    assert status(folder)["state"] == "interrupted"
    train(config)
    assert story(folder) == uninterrupted


@pytest.mark.parametrize("measured", [259, 500])  # validation, test
def test_a_signal_while_measuring_stops_it_too(tough, folder, uninterrupted, monkeypatch, measured):
    real = loop._until_stop

    def interrupting(loader):
        if len(loader.dataset) == measured:
            os.kill(os.getpid(), signal.SIGINT)
        return real(loader)

    monkeypatch.setattr(loop, "_until_stop", interrupting)
    with stop_on_signals(), pytest.raises(TrainingInterrupted, match="resumes from there"):
        train(tough())
    monkeypatch.undo()
    assert status(folder)["epochs_done"] == (0 if measured == 259 else 2)
    train(tough())
    assert story(folder) == uninterrupted


def test_only_a_late_second_interrupt_ends_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    now = time.monotonic()
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    assert not loop.stop_requested()


def spoil(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_state_falls_back_to_the_one_before(tough, folder, uninterrupted, monkeypatch, capsys):
    from rich.console import Console

    stop_after(monkeypatch, tough(), 11)
    newest = folder / "state" / states(folder)[-1]
    spoil(newest, at=newest.stat().st_size // 2)
    train(tough(), console=Console())
    shown = capsys.readouterr().out
    assert f"warning: state '{newest}' is damaged" in shown
    assert "resuming after step 10, in epoch 2" in shown
    assert story(folder) == uninterrupted


def test_damaged_states_only_are_an_error_that_changes_nothing(tough, folder, monkeypatch):
    stop_after(monkeypatch, tough(), 5)
    first, second = sorted((folder / "state").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(DamagedState, match=r"000000005\.state' is damaged.*000000004\.state' is damaged"):
        train(tough())
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_state_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = state.write_state(tmp_path / "state", 1, {"random": Evil()})
    with pytest.raises(DamagedState, match="cannot be read"):
        state.read_state(path)
    assert not (tmp_path / "hacked").exists()


def test_another_configuration_is_refused_with_the_difference(tough, folder, monkeypatch):
    stop_after(monkeypatch, tough(), 5)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = tough("optim.lr=1e-3", "model.args.depth=1")
    with pytest.raises(ConfigError) as caught:
        train(other, allow_change=["model"])
    assert "(optim.lr: 0.004 -> 0.001); choose another folder, or add --allow-change optim.lr" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="the saved state does not fit the model"):
        train(other, allow_change=["model.args.depth", "optim.lr"])
    with pytest.raises(ConfigError, match=r"'optim\.lrr' does not exist; did you mean 'optim\.lr'"):
        train(other, allow_change=["optim.lrr"])
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_an_allowed_change_takes_effect_and_is_recorded(tough, folder, monkeypatch):
    stop_after(monkeypatch, tough(), 11)
    result = train(tough("optim.lr=1e-3", "optim.weight_decay=0.1"), allow_change=["optim"])
    fresh = train(resolve("digits", [*TINY, "optim.lr=1e-3"]))
    assert result.history[0]["lr"] == pytest.approx(0.002, rel=0.01)
    assert result.history[1]["lr"] == fresh.history[1]["lr"]
    assert status(folder)["changes"] == [
        {"field": "optim.lr", "old": 0.004, "new": 0.001},
        {"field": "optim.weight_decay", "old": 0.3, "new": 0.1},
    ]


def test_other_data_and_other_versions_are_refused(tough, folder, uninterrupted, monkeypatch):
    stop_after(monkeypatch, tough(), 5)
    versions = output.versions()
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "fingerprint", lambda manifest: "other images")
        with pytest.raises(ConfigError, match=r"\(data: '1038\+259\+500 images, .*' -> 'other images'\)"):
            train(tough())
    with monkeypatch.context() as patch:
        patch.setattr(output, "versions", lambda: {**versions, "torch": "9.9", "python": "4"})
        with pytest.raises(ConfigError, match=r"\(versions\.torch: '2\..*' -> '9\.9'\)"):
            train(tough())
        train(tough(), allow_change=["versions"])
    assert status(folder)["versions"]["torch"] == "9.9"
    assert story(folder) == uninterrupted


@pytest.mark.parametrize("file", ["status.json", "last"])
def test_a_folder_without_its_configuration_is_refused(tough, folder, file):
    folder.mkdir()
    (folder / file).write_text("{}")
    with pytest.raises(ConfigError, match=f"already holds a run .{file}"):
        train(tough())
    assert [path.name for path in folder.iterdir()] == [file]


def test_killed_before_the_first_state_it_starts_anew(tough, folder, uninterrupted):
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(tough()))
    (folder / ".status.json-x1").write_text("half")
    train(tough())
    assert story(folder) == uninterrupted
    assert not (folder / ".status.json-x1").exists()


def no_number(monkeypatch, updates):
    """Make the loss of one update NaN."""
    backward, done = TrainingEngine.backward, []

    def broken(engine, images, targets):
        done.append(1)
        loss = backward(engine, images, targets)
        return loss * float("nan") if len(done) == updates else loss

    monkeypatch.setattr(TrainingEngine, "backward", broken)


def test_a_loss_that_is_no_number_leaves_good_states_only(tough, folder, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        no_number(patch, 11)
        with pytest.raises(TrainingFailed) as caught:
            train(tough())
    message = str(caught.value)
    assert "the loss became nan in epoch 2, step 11, at learning rate 0.00" in message
    assert f"the last good state is '{folder / 'state' / 'step-000000010.state'}'" in message
    recorded = status(folder)
    assert recorded["state"] == "failed"
    assert len(recorded["failed_batch"]) == 128
    assert recorded["failed_batch"][0] in message
    train(tough())
    assert story(folder) == uninterrupted


def test_weights_that_are_no_numbers_are_never_saved(tough, folder, monkeypatch):
    step, done = TrainingEngine.step, []

    def broken(engine, number):
        step(engine, number)
        done.append(1)
        if len(done) == 5:
            with torch.no_grad():
                next(engine.model.parameters()).view(-1)[0] = float("inf")

    monkeypatch.setattr(TrainingEngine, "step", broken)
    with pytest.raises(TrainingFailed, match="a weight is NaN or infinite after step 5"):
        train(tough())
    assert updates_saved(folder) == 4


def test_a_full_disk_is_named_and_earlier_states_stay(tough, folder, uninterrupted, monkeypatch):
    stop_after(monkeypatch, tough(), 5)
    before = states(folder)
    real = os.fsync

    def full(descriptor):
        if ".state-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            TrainingFailed, match=r"No space left on device; earlier files are unchanged, .*000000005"
        ) as caught:
            train(tough())
    assert "\n" not in str(caught.value)
    assert states(folder) == before
    assert len(list((folder / "state").iterdir())) == 2  # no half-written rest
    assert status(folder)["state"] == "failed"
    train(tough())
    assert story(folder) == uninterrupted


def test_a_disk_without_any_room_ends_in_one_line(tough, folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingFailed, match="No space left on device"):
        train(tough())
    assert not (folder / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_is_refused(tough, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="is not a writable folder"):
        train(tough())
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tough, folder):
    folder.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="not a writable folder"):
        train(tough())


@pytest.mark.parametrize(
    "name",
    ["data", "versions", "versions.torch", "world_size", "optim", "model.args.depth", "model.locality"],
)
def test_fields_and_sections_can_be_allowed(name):
    check_allowed([name])


@pytest.mark.parametrize("name", ["optm", "optim.lrr", "world", "engine.precisions"])
def test_what_is_no_field_cannot_be_allowed(name):
    with pytest.raises(ConfigError, match=f"allow_change: '{name}' does not exist; did you mean"):
        check_allowed([name])


def test_a_run_that_another_process_has_just_finished_is_left_alone(tough, folder, monkeypatch):
    # It was not there when this process looked first, and is done when it takes the lock.
    config, real = tough(), loop.prepare

    def late(config, world):
        monkeypatch.setattr(loop, "prepare", real)
        train(config)
        return real(config, world)

    monkeypatch.setattr(loop, "prepare", late)
    with pytest.raises(ConfigError, match="another process has just trained there; repeat the command"):
        train(config)
    assert status(folder)["state"] == "finished"


@pytest.mark.parametrize("name", ["lamb", "adan"])
def test_an_allowed_change_keeps_the_count_of_steps_in_the_settings(tiny, tmp_path, monkeypatch, name):
    settings = (f"optim.name={name}", f"output={tmp_path / 'run'}", "model.args.depth=1")
    stop_after(monkeypatch, tiny(*settings), 3)
    config, (state, _) = tiny(*settings, "optim.weight_decay=0.01"), read_newest(tmp_path / "run/state")
    with open_world("cpu") as world:
        run = prepare(config, world)
    run.restore(state, {"optim.weight_decay": (0.05, 0.01)})
    groups = run.engine.optimizer.param_groups
    assert [int(group["step"]) for group in groups] == [3] * len(groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    with pytest.raises(ConfigError, match=f"optim.name: 'adamw' cannot resume the state of '{name}'"):
        train(tiny(*settings, "optim.name=adamw"), allow_change=["optim"])

"""`status.json`: read and written as one typed value."""

import json
from pathlib import Path

import pytest

from localvit.errors import ConfigError
from localvit.runs.status import BestEpoch, Change, RunStatus

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0_3" / "run"


def write(folder, text):
    (folder / "status.json").write_text(text)
    return folder


def test_what_0_3_wrote_by_hand():
    status = RunStatus.read(FIXTURE)
    assert (status.state, status.epochs, status.epochs_done, status.world_size) == ("finished", 2, 2, 1)
    assert status.best.epoch == 2
    assert status.best.validation["top1"] == 75.0
    assert (status.test["images"], type(status.test["images"])) == (5, int)
    assert status.versions["localvit"] == "0.3.2"
    assert (status.error, status.failed_batch, status.changes) == (None, (), ())


def test_it_is_read_as_it_was_written(tmp_path):
    written = json.loads((FIXTURE / "status.json").read_text())
    again = json.loads(RunStatus.read(FIXTURE).to_json())
    assert again == written
    status = RunStatus(
        state="failed",
        best=BestEpoch(epoch=1, validation={"loss": 0.5, "images": 4}),
        changes=(Change(field="optim.lr", old=0.1, new="x"), Change(field="data", old=None, new=[1])),
        error="TrainingFailed('loss became nan')",
        failed_batch=("a.png",),
    )
    assert RunStatus.read(write(tmp_path, status.to_json())) == status


def test_a_failed_run_of_0_3_names_its_batch(tmp_path):
    old = {"state": "failed", "error": "it broke", "pictures": ["a.png", "b.png"]}
    assert RunStatus.read(write(tmp_path, json.dumps(old))).failed_batch == ("a.png", "b.png")


def test_a_run_that_was_killed_before_it_was_written_has_none(tmp_path):
    assert RunStatus.read(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "value: [] is not accepted; use a mapping"),
        ("{}", "state is missing"),
        ('{"state": "finishd"}', "use 'running', 'interrupted', 'failed' or 'finished'"),
        ('{"state": "running", "epochs_done": "2"}', "epochs_done: '2' is not accepted; use an integer"),
        ('{"state": "running", "best": {"epoch": 1}}', "best.validation is missing"),
        ('{"state": "running", "test": {"loss": NaN}}', "NaN is not a JSON value"),
        (
            '{"state": "running", "test": {"loss": [1]}}',
            "test.loss: [1] is not accepted; use an integer or a number",
        ),
        ('{"state": "running", "epocs": 2}', "epocs: this field does not exist; did you mean 'epochs'?"),
    ],
)
def test_a_damaged_one_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        RunStatus.read(write(tmp_path, text))
    assert str(tmp_path / "status.json") in str(caught.value)
    assert message in str(caught.value)

"""Learning rates are chosen alike for all arms, on validation, and away from the border of the grid."""

import dataclasses
import json

import pytest

from localvit.config.files import list_recipes, resolve
from localvit.errors import ConfigError
from localvit.studies.demo import ARMS, demo_study
from localvit.studies.execution import tuning as module
from localvit.studies.execution.run import StudyFailed
from localvit.studies.execution.tuning import (
    FIRST_SEED,
    load_tuning,
    save_tuning,
    shipped_tuning,
    tune,
)
from localvit.studies.reporting.tables import tuning_table, tuning_text

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def scored(monkeypatch):
    """Replaces training by a curve: validation top-1 falls with the distance from an arm's best rate."""
    best = {"baseline": 0.004, "locality": 0.004}

    class Scored:
        def __init__(self, path, study):
            self.study = study

        def finished(self):
            return {run: Outcome(self.score(run)) for run in self.study.runs() if self.score(run) is not None}

        def score(self, run):
            name, _, rate = run.arm.partition("-lr-")
            return None if best[name] is None else 90.0 - abs(float(rate) - best[name]) * 100

    class Outcome:
        def __init__(self, top1):
            self.validation = self
            self.top1 = top1

    monkeypatch.setattr(module, "StudyFolder", Scored)
    monkeypatch.setattr(module, "run_missing", lambda store, **_: dict.fromkeys(store.study.runs(), "nan"))
    return best


def test_the_best_mean_is_chosen_for_each_arm(tiny, tmp_path, scored):
    scored["locality"] = 0.002
    found = tune(tiny, ARMS, tmp_path, command="c")
    assert found.grid == [0.001, 0.002, 0.004, 0.008, 0.016]
    assert found.chosen == {"baseline": 0.004, "locality": 0.002}
    assert found.at_border == []
    assert found.seeds == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    assert found.validation_top1["baseline"][2] == [90.0, 90.0, 90.0]


def test_the_grid_grows_for_both_arms_while_a_best_value_is_at_its_border(tiny, tmp_path, scored):
    scored |= {"baseline": 0.032, "locality": 0.001}
    found = tune(tiny, ARMS, tmp_path, command="c", seeds=1)
    assert found.grid == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
    assert found.chosen == scored
    assert all(len(by_rate) == 8 for by_rate in found.validation_top1.values())
    assert found.at_border == []


def test_a_grid_that_stays_too_short_is_said_to_be(tiny, tmp_path, scored):
    scored["baseline"] = 10.0
    found = tune(tiny, ARMS, tmp_path, command="c", seeds=1)
    assert found.grid[-1] == 0.016 * 2**4
    assert found.at_border == ["baseline"]
    assert "at the end of the grid for baseline." in tuning_text(found, tiny)
    assert [row[1] for row in tuning_table(found).rows][-1] == "-884.40 (-884.4) *"


def test_an_arm_that_never_finishes_fails(tiny, tmp_path, scored):
    scored["locality"] = None
    with pytest.raises(StudyFailed, match="nan"):
        tune(tiny, ARMS, tmp_path, command="c", seeds=1)


def test_rates_with_a_failed_run_are_out_and_the_lower_of_equals_wins():
    assert module._best([1.0, 2.0, 3.0], [[5.0, 5.0], [5.0, 5.0], [9.0, None]]) == 1.0
    assert module._best([1.0], [[None]]) is None


def test_a_real_tuning_is_kept_and_read_back(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_EXTENSIONS", 0)
    found = tune(tiny, ARMS, tmp_path, factors=(1.0, 2.0), seeds=1, command="the command")
    save_tuning(found, tmp_path)
    assert load_tuning(tmp_path / "tuning.json") == found
    assert "Command: the command." in tuning_text(found, tiny)
    assert found.departures(tiny) == {}
    changed = dataclasses.replace(tiny, epochs=3, seed=7, optim=dataclasses.replace(tiny.optim, lr=1.0))
    assert found.departures(changed) == {"epochs": (1, 3)}


def test_the_study_takes_the_chosen_rates(tiny, tmp_path, scored):
    scored |= {"baseline": 0.002, "locality": 0.008}
    study = demo_study(tiny, 2, tune(tiny, ARMS, tmp_path, command="c", seeds=1))
    assert [study.config(arm, 0).optim.lr for arm in study.arms] == [0.002, 0.008]


def test_a_damaged_tuning_is_named(tmp_path):
    path = tmp_path / "tuning.json"
    for text in ("", "[]", json.dumps({"grid": []})):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"tuning\.json'.*; restore the tuning"):
            load_tuning(path)


@pytest.mark.parametrize("recipe", list_recipes())
def test_shipped_tunings_fit_their_recipes(recipe):
    found = shipped_tuning(recipe)
    if found is not None:
        assert found.changes == {arm.name: arm.changes for arm in ARMS}
        assert set(found.departures(resolve(recipe))) <= {"data.train", "data.test"}
        assert found.at_border == []


def test_digits_are_tuned():
    assert shipped_tuning("digits") is not None

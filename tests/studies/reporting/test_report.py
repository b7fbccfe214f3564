"""The report stands alone, says the same in all its forms, and says what is wrong."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from localvit.config.files import resolve
from localvit.models.build import build_model
from localvit.studies.demo import ARMS, demo_study
from localvit.studies.design.study import Study
from localvit.studies.execution import run as run_module, tuning as tuning_module
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.throughput import images_per_second
from localvit.studies.execution.tuning import tune
from localvit.studies.reporting import figures
from localvit.studies.reporting.page import as_rich
from localvit.studies.reporting.report import read_report
from localvit.studies.reporting.sections import sections, tuning_text, verdicts, write_report
from localvit.studies.reporting.tables import differing_fields, result_table
from localvit.studies.running import run_study
from tests.studies.tiny import SETTINGS, worker_here


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    VOID = ("meta", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.loaded, self.open, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tiny(pictures):
    return resolve("digits", (*SETTINGS, f"data.train={pictures}"))


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_worker", worker_here)
        patch.setattr(tuning_module, "MOST_EXTENSIONS", 0)
        tuning = tune(tiny, ARMS, folder / "tuning", factors=(1.0, 2.0), seeds=1, command="tuned <so>")
        study = demo_study(tiny, 2, tuning)
        return run_study(study, folder, tuning=tuning, command="demo <so> & so", jobs=1)


@pytest.fixture
def copy(report, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(report.folder, tmp_path / "copy")


def page_of(report):
    return (report.folder / "report.html").read_text()


def test_files(report):
    summary = json.loads((report.folder / "summary.json").read_text())
    assert summary["verdicts"] == verdicts(report)
    assert summary["arms"][0]["scores"] == {str(k): v for k, v in report.findings.arms[0].scores.items()}
    assert len((report.folder / "results.jsonl").read_text().splitlines()) == 4
    assert {arm.inference_speed > 0 for arm in report.findings.arms} == {True}
    assert report.warnings == ()


def test_the_page_loads_nothing_and_is_well_formed(report):
    text = page_of(report)
    page = Page(text)
    assert all(target.startswith("#") for target in page.loaded)
    assert "url(http" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    assert page.tags.count("svg") == 6  # forest, curves, three costs, kernels of the one block that matters
    assert "demo &lt;so&gt; &amp; so" in text


def test_page_markdown_and_terminal_hold_the_same_numbers(report):
    console = Console(width=200)
    with console.capture() as terminal:
        console.print(as_rich("?", result_table(report)))
    markdown = (report.folder / "report.md").read_text()
    for cell in [cell for row in result_table(report).rows for cell in row]:
        assert all(cell in text for text in (page_of(report), markdown, terminal.get())), cell
    for sentence in (*verdicts(report), *report.facts.arms["locality"].confounders):
        assert sentence in markdown


def test_it_can_be_made_again_from_the_results_alone(report, copy):
    for name in ("runs", "tuning", "summary.json", "report.html", "report.md"):
        (shutil.rmtree if (copy / name).is_dir() else (lambda path: path.unlink()))(copy / name)
    again = read_report(copy)
    assert again.findings == report.findings
    write_report(again)
    assert (copy / "report.md").read_text() == (report.folder / "report.md").read_text()


def test_a_record_changed_by_hand_is_left_out_and_said_so(report, copy):
    run = report.study.runs()[3]
    path = StudyFolder(copy, report.study).of(run) / "record.json"
    values = json.loads(path.read_text())
    values["test"]["top1"] = 100.0
    path.write_text(json.dumps(values))
    changed = read_report(copy)
    assert run not in changed.records
    assert "locality seed 1 is left out" in changed.warnings[0]
    assert "was changed after it was written" in changed.warnings[0]
    assert "1 of 4 runs are missing" in changed.warnings[1]
    write_report(changed)
    assert "was changed after it was written" in (copy / "report.html").read_text()


def test_a_line_that_is_no_record_is_said_so(report, copy):
    shutil.rmtree(copy / "runs")
    path = copy / "results.jsonl"
    path.write_text(path.read_text() + "{half a line\n")
    assert [w for w in read_report(copy).warnings if "line 5" in w]


def test_how_arms_differ_is_the_difference_of_their_configurations(report):
    fields = {row[2]: (row[0], row[1], row[3]) for row in differing_fields(report).rows}
    assert fields.pop("model.locality") == ("locality", "baseline", "none")
    assert set(fields) <= {"optim.lr"}


def test_tuning_of_another_setting_is_said_so(report, tiny):
    assert "tuned for another setting" not in tuning_text(report.tuning, report.study)
    base = dataclasses.replace(tiny, epochs=4)
    study = Study(question="?", base=base, arms=report.study.arms, seeds=(0, 1))
    assert "tuned for another setting: epochs 1, here 4" in tuning_text(report.tuning, study)


def test_mixed_versions_are_said_so(report, monkeypatch, copy):
    folder = StudyFolder(copy, report.study)
    run, record = next(iter(report.records.items()))
    old = dataclasses.replace(record, versions={"localvit": "0.0.1"}, commit="abc").sealed()
    (folder.of(run) / "record.json").write_text(json.dumps(old.to_dict()))
    found = read_report(copy).warnings
    assert [warning.partition(":")[0] for warning in found] == ["Mixed versions", "Mixed commits"]


def test_a_study_without_a_run_has_a_report(tiny, tmp_path):
    folder = StudyFolder(tmp_path, demo_study(tiny, 2, None))
    with folder.claim():
        pass
    empty = read_report(tmp_path)
    assert "4 of 4 runs are missing" in empty.warnings[0]
    write_report(empty)
    assert "No comparison has a run yet" in (tmp_path / "report.md").read_text()


def test_dead_kernels_are_not_shown(report):
    labels = [block.label for part in sections(report) for block in part.blocks if hasattr(block, "label")]
    assert [label for label in labels if label.startswith("Kernels")] == ["Kernels of blocks.0.mlp"]


def test_models_without_locality_have_no_kernels(tiny):
    assert figures.kernels(build_model(tiny.model, 2)) == {}


def test_equal_pictures_are_equal_text(report):
    assert figures.forest(report.findings) == figures.forest(report.findings)
    ids = re.findall(r'id="([^"]+)"', figures.forest(report.findings))
    assert len(ids) == len(set(ids))


def test_a_slower_model_has_lower_throughput():
    small, large = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, n)) for n in (8, 20_000))
    torch.set_num_threads(2)
    found = images_per_second(
        {"small": small, "large": large},
        {"small": (1, 8, 8), "large": (1, 8, 8)},
        rounds=3,
        device=torch.device("cpu"),
    )
    assert found["small"] > 2 * found["large"] > 0
    assert torch.get_num_threads() == 2
    assert not small.training

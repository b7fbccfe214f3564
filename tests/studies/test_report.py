"""The report stands alone and says the same in all its forms."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from localvit.studies import figures
from localvit.studies import run as run_module
from localvit.studies import tuning as tuning_module
from localvit.studies.comparison import verdict
from localvit.studies.demo import ARMS, answer, demo_study
from localvit.studies.report import as_html, as_markdown, as_rich
from localvit.studies.study import Study
from localvit.studies.throughput import images_per_second
from localvit.studies.tuning import tune
from localvit.training import resolve
from localvit.training.build import build_model
from tests.studies.tiny import SETTINGS, workers_here


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
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def tiny(pictures):
    return resolve("digits", (*SETTINGS, f"data.train={pictures}"))


@pytest.fixture(scope="module")
def report(tiny, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_workers", workers_here)
        patch.setattr(tuning_module, "MOST_EXTENSIONS", 0)
        tuning = tune(tiny, ARMS, folder / "tuning", factors=(1.0, 2.0), seeds=1, command="tuned <so>")
        study = demo_study(tiny, 2, tuning)
        return answer(study, folder, tuning=tuning, command="demo <so> & so", jobs=1, console=None)


def test_files(report, folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["verdict"] == verdict(report.comparison)
    assert summary["control"]["scores"] == list(report.comparison.control.scores)
    assert len((folder / "results.jsonl").read_text().splitlines()) == 4
    assert (folder / "report.md").read_text() == as_markdown(report)
    assert (folder / "report.html").read_text() == as_html(report)


def test_the_page_loads_nothing_and_is_well_formed(report):
    text = as_html(report)
    page = Page(text)
    assert all(target.startswith("#") for target in page.loaded)
    assert "url(http" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3  # curves, pairs, kernels of the one block that matters
    assert "demo &lt;so&gt; &amp; so" in text


def test_page_markdown_and_terminal_hold_the_same_numbers(report):
    console = Console(width=200)
    with console.capture() as terminal:
        console.print(as_rich(report))
    texts = (as_html(report), as_markdown(report), terminal.get())
    for row in report.result()[1]:
        for cell in row:
            assert all(cell in text for text in texts), cell
    for sentence in (verdict(report.comparison), *report.confounders):
        assert sentence in as_markdown(report)


def test_how_arms_differ_is_the_difference_of_their_configurations(report):
    fields = {row[0]: row[1:] for row in report.differing_fields()[1]}
    assert fields.pop("model.locality")[0] == "none"
    assert set(fields) <= {"optim.lr"}


def test_tuning_of_another_setting_is_said_so(report, tiny):
    assert "tuned for another setting" not in report.tuning_text()
    base = dataclasses.replace(tiny, epochs=4)
    study = Study(question="?", base=base, arms=report.study.arms, seeds=(0, 1))
    text = dataclasses.replace(report, study=study).tuning_text()
    assert "tuned for another setting: epochs 1, here 4" in text
    assert "Not tuned" in dataclasses.replace(report, tuning=None).tuning_text()


def test_mixed_versions_are_said_so(report):
    assert "Mixed versions" not in report.versions_text()
    records = dict(report.records)
    old = dataclasses.replace(records["baseline"][0], versions={"localvit": "0.0.1"})
    records["baseline"] = [old, records["baseline"][1]]
    assert "Mixed versions" in dataclasses.replace(report, records=records).versions_text()


def test_dead_kernels_are_not_shown(report):
    shown = figures.kernels(report.treatment, skip=report.dead)
    assert list(shown) == ["blocks.0.mlp"]
    assert report.dead == ("blocks.1.mlp",)
    assert list(figures.kernels(report.treatment)) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_models_without_locality_have_no_kernels(tiny):
    assert figures.kernels(build_model(tiny.model, 2)) == {}


def test_equal_pictures_are_equal_text(report):
    assert figures.paired_scores(report.comparison) == figures.paired_scores(report.comparison)
    ids = re.findall(r'id="([^"]+)"', figures.learning_curves(report.records))
    assert len(ids) == len(set(ids))


def test_a_slower_model_has_lower_throughput():
    small, large = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, n)) for n in (8, 20_000))
    torch.set_num_threads(2)
    found = images_per_second(
        {"small": small, "large": large}, (1, 8, 8), rounds=3, device=torch.device("cpu")
    )
    assert found["small"] > 2 * found["large"] > 0
    assert torch.get_num_threads() == 2
    assert not small.training

"""The report stands alone, says the same in all its forms, and says what is wrong."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from localvit.atomic import WriteFailed
from localvit.cli.study import print_report
from localvit.config.files import resolve
from localvit.structure import to_json
from localvit.studies.demo import ARMS, demo_study
from localvit.studies.design.study import Claim
from localvit.studies.execution import run as run_module, tuning as tuning_module
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.throughput import images_per_second
from localvit.studies.execution.tuning import tune
from localvit.studies.reporting.figures import COLOURS, figures, forest
from localvit.studies.reporting.rendering import render, verdicts, write_report
from localvit.studies.reporting.report import read_report
from localvit.studies.reporting.tables import confounders, differing_fields, result_table, tuning_text
from localvit.studies.running import run_study
from tests.studies.tiny import SETTINGS, worker_here


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    VOID = ("meta", "br", "img", "wbr")

    def __init__(self, text):
        super().__init__()
        self.loaded, self.open, self.tags, self.ids = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [v for k, v in attributes if k == "id"]
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tiny(images):
    return resolve("digits", (*SETTINGS, f"data.train={images}"))


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


def remove(folder, *names):
    for name in names:
        (shutil.rmtree if (folder / name).is_dir() else (lambda path: path.unlink()))(folder / name)


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
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 6  # forest, curves, three costs, kernels of the one block that matters
    assert "demo &lt;so&gt; &amp; so" in text


def test_page_markdown_and_terminal_hold_the_same_numbers(report):
    console = Console(width=200)
    with console.capture() as terminal:
        console.print(result_table(report).rich("?"))
    markdown = (report.folder / "report.md").read_text()
    for cell in [cell for row in result_table(report).rows for cell in row]:
        assert all(cell in text for text in (page_of(report), markdown, terminal.get())), cell
    for sentence in (*verdicts(report), *report.summary.arms["locality"].confounders):
        assert sentence in markdown


def test_it_can_be_made_again_from_the_results_alone(report, copy):
    remove(copy, "runs", "tuning", "summary.json", "report.html", "report.md")
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
    assert fields.pop("model.locality") == ("locality", "baseline", "not set")
    assert set(fields) <= {"optim.lr"}


def test_tuning_of_another_setting_is_said_so(report, tiny):
    assert "tuned for another setting" not in tuning_text(report.tuning, report.study.base)
    other = dataclasses.replace(tiny, epochs=4)
    assert "tuned for another setting: epochs 1, here 4" in tuning_text(report.tuning, other)


def test_mixed_versions_are_said_so(report, monkeypatch, copy):
    folder = StudyFolder(copy, report.study)
    run, record = next(iter(report.records.items()))
    old = dataclasses.replace(record, versions={"localvit": "0.0.1"}, commit="abc").sealed()
    (folder.of(run) / "record.json").write_text(to_json(old))
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


def test_kernels_that_no_output_depends_on_are_not_shown(report):
    (kernels,) = report.kernels
    assert (kernels.site, kernels.arm, kernels.seed) == ("blocks.0.mlp", "locality", 0)
    assert kernels.left_out == ("blocks.1.mlp",)
    norms = [float((kernel**2).sum()) for kernel in kernels.weights]
    assert len(norms) == 32  # 8 channels, expansion 4
    assert norms == sorted(norms, reverse=True)
    assert "because no output depends on it: blocks.1.mlp." in figures(report)[-1].caption


def test_rendering_needs_no_folder(report, copy):
    there = read_report(copy)
    shutil.rmtree(copy)
    rendered = render(there)
    assert rendered.html == page_of(report)
    assert rendered.markdown == (report.folder / "report.md").read_text()
    assert rendered.summary == (report.folder / "summary.json").read_text()


def test_damaged_files_are_named_and_the_report_is_made(report, copy):
    (copy / "speed.json").write_text('{"images_per_second": 3}')
    (copy / "tuning.json").write_text("{")
    run = next(run for run in report.study.runs() if run.arm == "locality")
    (StudyFolder(copy, report.study).of(run) / "best" / "model.safetensors").write_bytes(b"version https://")
    damaged = read_report(copy)
    assert damaged.findings.contrasts == report.findings.contrasts
    assert (damaged.tuning, damaged.kernels, damaged.speed_machine) == (None, (), "")
    for name, warning in zip(
        ("speed.json", "tuning.json", "model.safetensors"), damaged.warnings, strict=True
    ):
        assert name in warning
    write_report(damaged)
    assert "**Warning:** " in (copy / "report.md").read_text()


def test_bytes_that_are_no_text_are_named(report, copy):
    shutil.rmtree(copy / "runs")
    lines = (copy / "results.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff\xfe" + lines[1]
    lines[2] = b"[]\n"
    (copy / "results.jsonl").write_bytes(b"".join(lines))
    damaged = read_report(copy)
    assert len(damaged.records) == 2
    assert any("locality seed 0 is left out: line 2 of" in warning for warning in damaged.warnings)
    assert "2 of 4 runs are missing (locality seed 0; baseline seed 1)." in damaged.warnings[-1]


def test_a_report_that_cannot_be_written_is_one_line(report, copy):
    (copy / "report.md").unlink()
    (copy / "report.md").mkdir()
    with pytest.raises(WriteFailed, match=r"report\.md.* cannot be written"):
        write_report(dataclasses.replace(report, folder=copy))


def test_markup_in_names_stays_text(report):
    evil = "<img src=x onerror=alert(1)> & [/x] {{ 7 * 7 }} \x1b[31m\r\x00\u202e caf\udce9"
    data = dataclasses.replace(report.study.base.data, train=evil)
    study = dataclasses.replace(
        report.study,
        question=evil,
        base=dataclasses.replace(report.study.base, data=data),
        claim=Claim(text=evil, source=evil, expected={"locality": "better"}, reported={"baseline": 72.2}),
    )
    records = {run: dataclasses.replace(record, notes=[evil]) for run, record in report.records.items()}
    odd = dataclasses.replace(report, study=study, records=records, command=evil, warnings=(evil,))
    rendered = render(odd)
    page = Page(rendered.html)
    assert "img" not in page.tags
    assert all(target.startswith("#") for target in page.loaded)
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; [/x] {{ 7 * 7 }}" in rendered.html
    assert "&amp;lt;" not in rendered.html
    assert rendered.markdown.startswith("# \\<img src=x")
    console = Console(file=io.StringIO(), width=200)
    print_report(odd, console)
    "".join(rendered.files.values()).encode()
    for text in (*rendered.files.values(), console.file.getvalue()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
        assert r"\x1b[31m" in text or r"\u001b[31m" in text


def test_every_cell_names_its_column_for_narrow_screens(report):
    cells = re.findall(r"<td(.*?)>(.*?)</td>", page_of(report))
    assert len(cells) > 20
    for attributes, text in cells:
        head = re.fullmatch(r' data-head="([^"]+)"( class="none")?', attributes)
        assert head, attributes
        assert f'<th scope="col">{head[1]}</th>' in page_of(report)
        assert (head[2] is not None) == (text == "-")


def test_a_sentence_that_holds_for_several_arms_is_written_once():
    arms = {"a": SimpleNamespace(confounders=("x", "y")), "b": SimpleNamespace(confounders=("x", "z"))}
    grouped = confounders(SimpleNamespace(summary=SimpleNamespace(arms=arms)))
    assert grouped == {"a, b": ["x"], "a": ["y"], "b": ["z"]}


def test_lines_break_at_dots_and_underscores_only(report):
    text = page_of(report)
    assert "model.<wbr>locality" in text
    assert set(re.findall(r"(.)<wbr>", text)) <= {".", "_"}
    assert "overflow-wrap: anywhere" not in text
    assert "word-break" not in text


def test_figures_follow_dark_mode(report):
    page = page_of(report)
    drawn = "".join(figure.svg for figure in figures(report)[:-1])
    assert "currentColor" in drawn
    assert not set(COLOURS) & set(re.findall(r"#[0-9a-f]{6}", drawn))
    light, dark = page.split("prefers-color-scheme: dark")
    for name in set(re.findall(r"var\((--[\w-]+)\)", page)):
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name


def test_axes_have_units(report):
    for figure, label in zip(
        figures(report),
        ("(percentage points)", "validation split (%)", "test split (%)", "test split (%)", "(images/s)"),
        strict=False,
    ):
        assert label in figure.svg, figure.label


def test_each_seed_is_a_tick(report):
    svg = forest(report.findings, "accuracy")
    assert len(re.findall(r"<use [^>]*stroke-width: 1\.6", svg)) == len(report.study.seeds)


def test_equal_figures_are_equal_text(report):
    assert figures(report) == figures(report)


def test_empty_parts_are_left_out(tiny, tmp_path):
    study = dataclasses.replace(demo_study(tiny, 2, None), arms=demo_study(tiny, 2, None).arms[:1])
    with StudyFolder(tmp_path, study).claim():
        pass
    rendered = render(read_report(tmp_path))
    for heading in (
        "Result",
        "Figures",
        "The paper's claim",
        "Statistical power",
        "How the arms differ",
    ):
        assert f"## {heading}" not in rendered.markdown
        assert f"<h2>{heading}</h2>" not in rendered.html
    assert "<tbody>\n</tbody>" not in rendered.html


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

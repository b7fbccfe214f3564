"""docs/studies.md has every key of a question, and the question that `study new` writes runs."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from localvit.atomic import WriteFailed
from localvit.cli import main
from localvit.errors import ConfigError
from localvit.studies.design.question import Question, Scale, load_question, write_question
from localvit.studies.design.resources import Resources
from localvit.studies.design.study import Arm, Claim, Expectation
from localvit.studies.execution import run as run_module
from tests.studies.tiny import SETTINGS, make_images, worker_here

PAGE = (Path(__file__).parents[3] / "docs" / "studies.md").read_text()
UNTOLD = {"none": None, "required": dataclasses.MISSING}


def rows(section):
    """Key -> (type, default) of the table in a section."""
    (body,) = re.findall(rf"^### {section}\n(.*?)(?=^##)", PAGE, flags=re.S | re.M)
    return {
        key: (kind, default)
        for key, kind, default in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", body, re.M)
    }


def default_of(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize(
    ("section", "cls"), [("Question", Question), ("Scale", Scale), ("Claim", Claim), ("Resources", Resources)]
)
def test_every_key_is_documented_with_its_default(section, cls):
    documented = rows(section)
    fields = {field.name: default_of(field) for field in dataclasses.fields(cls)}
    assert documented.keys() == fields.keys()
    for name, (kind, text) in documented.items():
        if not text.startswith("`"):
            assert text in ("name of the file", "that of the shared scale") or UNTOLD[text] == fields[name], (
                name
            )
            continue
        shown = yaml.safe_load(text.strip("`"))
        assert (tuple(shown) if isinstance(shown, list) else shown) == fields[name], name
        if isinstance(shown, str) and kind != "text":
            assert f"`{shown}`" in kind, name


def test_the_keys_of_an_arm_that_are_no_fields_are_documented():
    assert rows("Arm").keys() == {"against", "resources"}
    assert {"control", "resources"} <= {field.name for field in dataclasses.fields(Arm)}  # against is control


def test_accepted_words_are_documented():
    words = {
        name: ", ".join(f"`{word}`" for word in get_args(hint))
        for name, hint in get_type_hints(Question).items()
        if get_origin(hint) is Literal
    }
    assert words.keys() == {"metric", "match", "budget"}
    for name, listed in words.items():
        assert rows("Question")[name][0] == listed
    assert rows("Claim")["expected"][0] == "arm -> " + ", ".join(f"`{w}`" for w in get_args(Expectation))


def test_the_example_of_the_page_is_a_question(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "mine.yaml").write_text(text)
    question = load_question(str(tmp_path / "mine.yaml"))
    study = question.study("digits", 2)
    assert [arm.name for arm in study.arms] == ["plain", "local", "no-gate", "long"]
    assert [study.config(arm, 0).epochs for arm in study.arms] == [10, 10, 10, 40]


def test_the_question_that_is_written_names_every_key(tmp_path):
    text = write_question(str(tmp_path / "mine")).read_text()
    keys = set(re.findall(r"^(?:# +)?(\w+):", text, flags=re.M))
    assert keys >= {field.name for field in dataclasses.fields(Question)} - {"name"}
    assert keys >= {field.name for field in dataclasses.fields(Claim)}
    claimed = text[: text.index("# claim:")] + re.sub(r"(?m)^# ?", "", text[text.index("# claim:") :])
    (tmp_path / "mine.yaml").write_text(claimed)
    claim = load_question(str(tmp_path / "mine.yaml")).study("digits", 2).claim
    assert (claim.expected, claim.reported) == ({"local": "better"}, {"plain": 72.2, "local": 74.84})


def test_the_question_that_is_written_runs_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "_worker", worker_here)
    (tmp_path / "images").mkdir()
    make_images(tmp_path / "images")
    assert main(["study", "new", "mine"]) == 0
    assert "localvit study run mine.yaml" in capsys.readouterr().out
    assert "#   localvit study run mine.yaml\n" in (tmp_path / "mine.yaml").read_text()
    shrunk = [word for setting in SETTINGS for word in ("--set", setting)]
    assert main(["study", "run", "mine.yaml", "--seeds", "2", "--data", "images", *shrunk]) == 0
    report = (tmp_path / "runs" / "mine-digits" / "report.md").read_text()
    assert report.startswith("# Does locality help a small vision transformer, and does it need its gate?\n")
    assert "runs are missing" not in report


def test_a_file_that_exists_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("mine")
    for name in ("mine", "mine.yaml"):
        assert main(["study", "new", name]) == 2
        assert "'mine.yaml' exists; choose another name" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert main(["study", "new", "nowhere/mine"]) == 1
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists"):
        write_question("mine.yaml")


def test_a_full_disk_leaves_no_question(tmp_path, full_disk):
    with full_disk(10), pytest.raises(WriteFailed, match=r"mine\.yaml' cannot be written: File too large"):
        write_question(str(tmp_path / "mine"))
    assert not list(tmp_path.iterdir())

"""Documents name what is there, and their code runs."""

import configparser
import doctest
import re
from pathlib import Path

import pytest

from localvit.cli import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES.remove(ROOT / "LOG.md")  # entries keep the names of their day
CONTINUED = ("adapters.md",)
"""Pages whose blocks continue each other; tests of their rooms run them."""


def code(language):
    """List each block of code with its page, and the output that the page gives for it."""
    found = []
    for page in PAGES:
        block = rf"```{language}\n(.*?)```(?:\s*```text\n(.*?)```)?"
        text = "" if language == "python" and page.name in CONTINUED else page.read_text()
        for number, match in enumerate(re.finditer(block, text, re.DOTALL)):
            found.append(pytest.param(*match.groups(), id=f"{page.name}-{number}"))
    return found


def anchors(page):
    """List the names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("block", "output"), code("python"))
def test_code_runs_and_prints_what_the_page_says(block, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "page", "exec"), {})
    if output is not None:
        got = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(output, got, doctest.ELLIPSIS), got


def test_commands_exist():
    text = "\n".join(block.values[0] for block in code("bash"))
    commands = re.findall(r"^localvit (\w+)", text, re.MULTILINE)
    assert len(commands) > 10
    assert set(commands) <= set(VERBS)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= set(targets)


def test_the_map_of_rooms_is_that_of_the_linter():
    linter = configparser.ConfigParser()
    linter.read(ROOT / ".importlinter")
    rooms = set(linter["importlinter:contract:rooms"]["layers"].split())
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(table)))
    assert named >= rooms - {"version"}
    assert named <= rooms | {"structure"}


def test_the_tests_that_the_list_of_kinds_names_are_there():
    sources, file = {}, None
    named = re.findall(
        r"`([\w/]+\.py)?(?:::(\w+?)(\.\.\.)?)?`", (ROOT / "docs" / "reliability.md").read_text()
    )
    assert len(named) > 50
    for path, test, begins in named:
        file = ROOT / "tests" / path if path else file
        source = sources.setdefault(file, file.read_text())
        assert not test or re.search(rf"def {test}{'' if begins else '[(]'}", source), (path, test)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_files_that_pages_and_sources_name_are_there():
    sources = [
        ROOT / "pyproject.toml",
        *(ROOT / "localvit").rglob("*.py"),
        *(ROOT / "localvit").rglob("*.yaml"),
    ]
    ours = [page for page in PAGES if page.name not in ("CHANGELOG.md", "timm-suite.md")]  # old, timm's
    for pattern, paths in (
        (r"docs/[\w/-]+\.md", sources),
        (r"`((?:localvit|tests|benchmarks|docs)/[\w/.]+)`", ours),
    ):
        named = {(name, path) for path in paths for name in re.findall(pattern, path.read_text())}
        assert named
        assert not [pair for pair in named if not (ROOT / pair[0]).exists()]

"""Documents name what is there."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_map_of_rooms_is_that_of_the_linter():
    linter = configparser.ConfigParser()
    linter.read(ROOT / ".importlinter")
    rooms = set(linter["importlinter:contract:rooms"]["layers"].split())
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(table)))
    assert named >= rooms - {"version"}
    assert named <= rooms | {"structure"}


def test_files_that_documents_name_are_there():
    for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / name).read_text()
        paths = re.findall(r"`((?:localvit|tests|benchmarks|docs)/[\w/.]+)`", text)
        paths += [
            target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target
        ]
        for path in filter(None, paths):
            assert (ROOT / path).exists() or ((ROOT / name).parent / path).exists(), f"{name} names {path}"

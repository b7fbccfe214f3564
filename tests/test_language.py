"""Language of docstrings, messages and recipes: the field's words, and three forms of an error message."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "localvit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FILES = sorted([*PACKAGE.glob("config/recipes/*.yaml"), *PACKAGE.glob("studies/design/**/*.yaml")])
BANNED = re.compile(
    r"\b(pictures?|lattices?|lest|update \d|\d updates|updates? (of|per|done|number)|an update|goes on|go on"
    r"|going on|comes? twice|is there twice|no finite number|is no number|without a word|for want of"
    r"|in the midst of|at hand|anew|in vain|(?<!there )(is|are) no (?!more|longer)|shares? of|beats?|somebody"
    r"|nobody|stands? back|brings? along|of one's own|this very|says? so)\b|(?<!`)``(?!`)"
)
NOUN_CLAUSE = re.compile(r"(What|Whether|Whose|How|Where|Why|Which|When|Who|Of|Those|That)\b")
PRINTERS = ("print", "warn", "note", "fail")
FORM = re.compile(r".+ is not accepted[^;]*; use .+|.+; .+", re.S)
RELAYED = re.compile(
    r"\{(str\(|one_line\()?(error|reason|at|text)\)?\}(\{hint\}|, or .+| \(.+\))?$|^\{before\}"
)
"""Messages that end in another one, which has the remedy."""
INNER = ("saved.py", "structure.py", "writer.py")
"""Files that raise errors without a remedy, which a caller adds."""
LATER = ("data", "surgery", "models", "baselines")
"""Rooms whose messages are not revised yet."""


def text_of(node):
    """The text of a literal, with `{expression}` for the values in it; `None` for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
        )
    return None


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and (text := text_of(node.value)):
            yield node.lineno, " ".join(text.split())


def messages(tree):
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2].lstrip("_")
        if called and (called in PRINTERS or called.endswith(("Error", "Failed", "Failure", "Interrupted"))):
            for argument in node.args:
                for part in ast.walk(argument) if called == "warn" else [argument]:
                    if text := text_of(part):
                        yield node.lineno, called, text


def parametrize(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(PACKAGE)))


@parametrize(SOURCES)
def test_sources_use_the_fields_words(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [*docstrings(tree), *((line, text) for line, _, text in messages(tree))]
    assert [(line, found[0]) for line, text in texts if (found := BANNED.search(text))] == []


@parametrize(FILES)
def test_recipes_and_questions_use_the_fields_words(path):
    assert BANNED.findall(path.read_text(encoding="utf-8")) == []


@parametrize(SOURCES)
def test_no_docstring_begins_with_a_noun_clause(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [text for _, text in docstrings(tree) if NOUN_CLAUSE.match(text)] == []


@parametrize([path for path in SOURCES if path.name not in INNER and path.parent.name not in LATER])
def test_errors_for_users_name_a_remedy(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ("ConfigError", "DataError", "UsageError", "Failure", "TrainingFailed", "ExportFailed")
    texts = [text for _, kind, text in messages(tree) if kind in kinds]
    assert [text for text in texts if not FORM.fullmatch(text) and not RELAYED.search(text)] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the pictures of a batch", "pictures"),
        ("a run goes on", "goes on"),
        ("the loss is no number", "no number"),
        ("371,400 updates", "0 updates"),
        ("update the status", None),
        ("there is no longer a file", None),
    ],
)
def test_banned_words_are_found(text, word):
    found = BANNED.search(text)
    assert (found[0].strip() if found else None) == word or (found and word in found[0])

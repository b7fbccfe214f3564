"""Language of docstrings, messages, recipes and questions: the field's words, and an error's three forms."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "localvit"
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
YAML = [*PACKAGE.glob("config/recipes/*.yaml"), *PACKAGE.glob("studies/design/**/*.yaml")]
BANNED = re.compile(
    r"\b(pictures?|lattices?|lest|update \d|\d updates|updates? (of|per|done|number)|an update|goes on|go on"
    r"|going on|comes? twice|is there twice|no finite number|is no number|without a word|for want of"
    r"|in the midst of|at hand|anew|in vain|(?<!there )(is|are) no(?= (?!more|longer))|shares? of|beats?"
    r"|somebody|nobody|stands? back|brings? along|of one's own|this very|says? so)\b|(?<!`)``(?!`)"
)
NOUN_CLAUSE = re.compile(r"(What|Whether|Whose|How|Where|Why|Which|When|Who|Of|Those|That)\b")
ERRORS = ("ConfigError", "DataError", "UsageError", "Failed", "TrainingFailed", "ExportFailed")
FORM = re.compile(r".+ is not accepted[^;]*; use .+|.+; .+", re.S)
RELAYED = re.compile(r"\{(\w+\()?(error|reason|at|text)\)?\}(\{hint\}|, or .+| \(.+\))?$|^\{before\}")
"""Messages that end in another one, which has the remedy."""
INNER = ("saved.py", "structure.py", "writer.py")
"""Files that raise errors without a remedy, which a caller adds."""


def text_of(node):
    """The text of a literal, with `{expression}` for the values in it; `None` for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (
            v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values
        )
        return "".join(parts)
    return None


def texts(kind, of=lambda node: node):
    """Every literal `of(node)` of the package, by file and line."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind) and (text := text_of(of(node))):
                yield path, node.lineno, " ".join(text.split())


def test_strings_use_the_fields_words():
    found = [(*at, BANNED.search(text)) for *at, text in texts((ast.Constant, ast.JoinedStr)) if " " in text]
    assert [each for each in found if each[-1]] == []


def test_recipes_and_questions_use_the_fields_words():
    assert [found[0] for path in YAML for found in BANNED.finditer(path.read_text("utf-8"))] == []


def test_no_docstring_begins_with_a_noun_clause():
    docstrings = texts(ast.Expr, lambda node: node.value)
    assert [(*at, text) for *at, text in docstrings if NOUN_CLAUSE.match(text)] == []


def test_errors_for_users_name_a_remedy():
    def message(call):
        return call.args[0] if call.args and ast.unparse(call.func) in ERRORS else None

    found = [(path, line, text) for path, line, text in texts(ast.Call, message) if path.name not in INNER]
    assert len(found) > 100
    assert [each for each in found if not FORM.fullmatch(each[-1]) and not RELAYED.search(each[-1])] == []


@pytest.mark.parametrize("text", ["the pictures", "it goes on", "x is no number", "9 updates", "a ``b``"])
def test_banned_words_are_found(text):
    assert BANNED.search(text)


@pytest.mark.parametrize(
    "text", ["update the status", "there is no file", "it is no longer", "```\ncode\n```"]
)
def test_other_words_are_accepted(text):
    assert not BANNED.search(text)

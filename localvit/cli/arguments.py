"""Parsing of arguments with tyro, help texts, and one-line errors. Imports nothing heavy.

An option whose help begins with `(rare)` is shown below the common ones; the paragraph `Example: ...` in the
docstring of options is shown at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import tyro

from localvit.atomic import DISK_IS_FULL
from localvit.errors import ConfigError, Failed, first_line, one_line

T = TypeVar("T")
_STUDY = {"scipy": "scipy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}

_REMEDIES = {
    **dict.fromkeys(DISK_IS_FULL, "make room and try again"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "get permission to use it, or choose another place"
    ),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), or use fewer workers"
    ),
}
"""Remedy for each error of the system."""

_NOT_ACCEPTED = r"\1 \2 is not accepted; use "
_REWORDED = {
    r"Error parsing (\S+): .*invalid literal for int\(\) with base 10: '(.*?)'": _NOT_ACCEPTED + "an integer",
    r"Error parsing (\S+): .*could not convert string to float: '(.*?)'": _NOT_ACCEPTED + "a number",
    r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?),?( 'None',?)?\)": (
        r"\2 \1 is not accepted; use \3"
    ),
    r"Unrecognized options: (.*?) Perhaps you meant: (--\S+)": r"unrecognized options: \1; did you mean \2?",
    r"Unrecognized options: ([^,\s]+).* Available subcommands: (.*?) For full": r"\1 is not accepted; use \2",
    r"Expected one of \{(.*?)\}": r"a subcommand is missing; use \1",
    r"Missing from [^:]*: (\S+) ": r"\1 is missing",
}
"""Messages of tyro -> ours."""


class UsageError(Exception):
    """Error of wrong use: one line, exit code 2, nothing was written."""


def parse(options: type[T], program: str, arguments: Sequence[str], about: str | None = None) -> T | None:
    """Parse the options in `arguments`; return `None` if they ask for help, which is printed.

    `about` describes a verb with subcommands. A `UsageError` has the first paragraph of tyro's explanation.
    """
    shown, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(options, prog=program, description=about, args=list(arguments))
    except SystemExit as end:
        if end.code in (0, None):
            print(_layout(shown.getvalue()))
            return None
        raise UsageError(f"{_gist(complaint.getvalue())}; see {program} --help") from None
    _check_integers(parsed)
    return parsed


def _check_integers(options: Any) -> None:
    """Refuse integers that PyTorch cannot hold."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            _check_integers(value)
        elif isinstance(value, int) and abs(value) > sys.maxsize:
            flag = "--" + field.name.replace("_", "-")
            raise UsageError(f"{flag} {value} is not accepted; use at most {sys.maxsize}")


def command_line(verbs: Sequence[str], options: Any) -> str:
    """Return the command with these options; flags at their defaults are left out.

    Args:
        verbs: Words after the program's name.
        options: Dataclass of options; fields without a default are positional.
    """
    words = ["localvit", *verbs]
    for field in dataclasses.fields(options):
        value, flag = getattr(options, field.name), "--" + field.name.replace("_", "-")
        if field.default is dataclasses.MISSING:
            words.insert(1 + len(verbs), str(value))
        elif value == field.default:
            continue
        elif value is True:
            words.append(flag)
        elif "UseAppendAction" in str(field.type):
            words += [word for setting in value for word in (flag, setting)]
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def model_arguments(settings: Sequence[str]) -> dict[str, Any]:
    """Parse constructor arguments of a model from `KEY=VALUE` words, with values as in YAML.

    Raises:
        ConfigError: for a word that is not of this form.
    """
    from localvit.config import merge, parse_setting

    arguments: dict[str, Any] = {}
    for setting in settings:
        arguments = merge(arguments, parse_setting(setting))
    return arguments


def given(**flags: Any) -> dict[str, Any]:
    """Return the flags that were given, which are those that are not `None`."""
    return {name: value for name, value in flags.items() if value is not None}


def data_section(options: Any) -> dict[str, Any]:
    """Return the fields of the data section that the flags of `train`, `plan` and `data check` give."""
    return given(
        train=options.data,
        test=options.val_data,
        root=options.data_root,
        allow_overlap=options.allow_overlap or None,
    )


def check_least(**flags: tuple[int, int]) -> None:
    """Refuse numbers that are too small: flag -> (value, least).

    Raises:
        UsageError: naming the first.
    """
    for name, (value, least) in flags.items():
        if value < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value} is not accepted; use at least {least}")


def check_extra(verb: str) -> None:
    """Refuse to start without the packages that studies need.

    Raises:
        UsageError: naming them and the command that installs them.
    """
    missing = [name for module, name in _STUDY.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"localvit {verb} needs {', '.join(missing)}; run pip install 'localvit[study]'")


def check_output(output: str | None) -> None:
    """Refuse an empty name, such as an unset shell variable gives; no name at all means a default.

    Raises:
        UsageError: if it is empty.
    """
    if output == "":
        raise UsageError("--output '' is not accepted; name a folder, or leave it out")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the library's errors for users into those of the command line."""
    from localvit.data import DataError

    try:
        yield
    except (ConfigError, DataError) as error:
        raise UsageError(str(error)) from error
    except (BrokenPipeError, Failed):
        raise  # the reader of the output ended; or already an error of the command line
    except OSError as error:
        raise Failed(disk_message(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise Failed(f"memory ran out: {one_line(error)}; use a smaller batch, image or model") from error


def _out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; PyTorch has a class for that on GPUs only."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "allocate memory" in str(error)


def disk_message(error: OSError) -> str:
    """Return what the system refused, for which file, and what to do."""
    file = repr(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else "the output"
    remedy = _REMEDIES.get(error.errno or 0, "check that it exists and that you may use it")
    return f"{file}: {error.strerror or first_line(error)}; {remedy}"


def _layout(text: str) -> str:
    """Return tyro's help in up to 100 columns: common options, rare ones, example."""
    width = min(100, shutil.get_terminal_size().columns)
    head, *frames = re.split(r"^ (\w.*\w) *\n -+ *$", text, flags=re.M)
    paragraphs = [" ".join(paragraph.split()) for paragraph in head.strip().split("\n\n")]
    sections: dict[str, list[str]] = {}
    for title, body in zip(frames[::2], frames[1::2], strict=True):
        for entry in re.split(r"^  (?=\w|-|  \S )", body.replace("{None,", "{"), flags=re.M)[1:]:
            name, words = re.split(r"\s{2,}", f"{entry.strip('• ')}  ", maxsplit=1)
            words = " ".join(words.split()).partition(" Example: ")[0]
            section = f"rare {title}" if words.startswith("(rare)") else title
            words = re.sub(r" ?\(default: (None|False|True|)\)$|^\(rare\) ", "", words)
            lines = textwrap.fill(words, width, initial_indent=f"  {name:<20}  ", subsequent_indent=" " * 24)
            sections.setdefault(section, []).append(lines)
    example = [paragraphs.pop()] if paragraphs[-1].startswith("Example: ") else []
    parts = [textwrap.fill(paragraph, width) for paragraph in paragraphs]
    return "\n\n".join(
        parts + ["\n".join((f"{name}:", *lines)) for name, lines in sections.items()] + example
    )


def _gist(boxed: str) -> str:
    """Say what is wrong in our words, else by the first paragraph inside tyro's frame, without its title."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in boxed.splitlines()[1:]]
    filled = groupby(lines, key=lambda line: bool(line.strip("-")))
    paragraphs = [" ".join(paragraph) for words, paragraph in filled if words]
    for theirs, ours in _REWORDED.items():
        if found := re.match(theirs, " ".join(paragraphs)):
            return found.expand(ours)
    return next(iter(paragraphs), "wrong arguments")

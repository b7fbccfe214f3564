"""Parsing of arguments with tyro, and one-line errors. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import io
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")
_STUDY = {"scipy": "scipy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, quota or file."""


class UsageError(Exception):
    """Error of wrong use: one line, exit code 2, nothing was written."""


class Failure(Exception):
    """Expected failure after the start: one line, exit code 1."""


def parse(options: type[T], program: str, arguments: Sequence[str]) -> T | None:
    """Parse the options in `arguments`; return `None` if they ask for help, which is printed.

    Raises:
        UsageError: with the first paragraph of tyro's explanation.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options, prog=program, args=list(arguments))
    except SystemExit as end:
        if end.code in (0, None):
            return None
        raise UsageError(f"{_gist(complaint.getvalue())}; see {program} --help") from None


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
        ConfigError: for another word.
    """
    from localvit.config import merge, parse_setting

    arguments: dict[str, Any] = {}
    for setting in settings:
        arguments = merge(arguments, parse_setting(setting))
    return arguments


def check_extra(verb: str) -> None:
    """Refuse to start without the packages that studies need.

    Raises:
        UsageError: naming them and the command that installs them.
    """
    missing = [name for module, name in _STUDY.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"localvit {verb} needs {', '.join(missing)}; run pip install 'localvit[study]'")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the library's errors for users into those of the command line."""
    from localvit.atomic import WriteFailed
    from localvit.data import DataError, UnreadableImage
    from localvit.errors import ConfigError, TrainingFailed
    from localvit.export import ExportFailed, ParityError

    try:
        yield
    except (ConfigError, DataError) as error:
        raise UsageError(str(error)) from error
    except (UnreadableImage, TrainingFailed, ExportFailed, ParityError, WriteFailed) as error:
        raise Failure(str(error)) from error
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        file = f"{error.filename!r}" if error.filename is not None else "a file"
        raise Failure(f"{file} cannot be written: {error.strerror}; make room and try again") from error


def _gist(boxed: str) -> str:
    """Return the first paragraph inside tyro's frame, without its title."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in boxed.splitlines()]
    body = lines[1:]
    while body and not body[0].strip("-"):
        body = body[1:]
    paragraph: list[str] = []
    for line in body:
        if not line.strip("-"):
            break
        paragraph.append(line)
    return " ".join(paragraph) or "wrong arguments"

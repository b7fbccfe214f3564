"""Errors that name a value and what is accepted."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A value that is not accepted; the message names the field, the value and what is accepted."""


def suggestion(value: object, accepted: Iterable[str]) -> str:
    """Return `did you mean 'NAME'?` for a near miss, else `accepted: NAME, NAME`."""
    names = list(accepted)
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(names)}"


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown name, with the nearest known ones.

    Args:
        what: Kind of thing that was looked for.
        name: The name, or the last part of a dotted one.
        known: Names that exist; dotted names are compared by their last part too.
    """
    whole = list(known)
    tails = {k.rpartition(".")[2]: k for k in reversed(whole)}
    near = difflib.get_close_matches(name, whole, n=3, cutoff=0.5)
    near = near or [tails[tail] for tail in difflib.get_close_matches(name, tails, n=3, cutoff=0.7)]
    hint = "check the spelling" if len(whole) > 20 else f"accepted: {', '.join(whole)}"
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else hint
    return ConfigError(f"{what}: {name!r} does not exist; {hint}")


def at_least(config: Any, prefix: str, low: float, *names: str) -> None:
    """Refuse fields of a configuration that are too small, NaN or infinite, by their dotted names."""
    check_at_least(low, **{f"{prefix}.{name}" if prefix else name: getattr(config, name) for name in names})


def check_at_least(least: float, **values: float) -> None:
    """Refuse numbers that are too small, NaN or infinite, and integers of more than 63 bits.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in values.items():
        if not least <= value < float("inf"):
            raise ConfigError(f"{name}={value!r} is not accepted; use at least {least:g}")
        if isinstance(value, int) and value > sys.maxsize:
            raise ConfigError(f"{name}={value} is not accepted; use {least:g} to {sys.maxsize}")


def one_line(error: BaseException) -> str:
    """Return the message of an error, or its kind, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of a message that may be pages long."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """Escape what would move the cursor or change colours; bytes that are not UTF-8 stay."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else ascii(c)[1:-1] for c in text)


class Failed(RuntimeError):
    """An expected failure after the start; the message names the thing and the remedy."""


class TrainingFailed(Failed):
    """Failure of a training run; the message says where it stopped and why.

    Attributes:
        images: Names of the images in the last batch, if they may be the reason.
    """

    def __init__(self, message: str, images: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.images = images


class TrainingInterrupted(Exception):
    """End of a run by a signal, after its state was saved; the message says how to resume."""


class UnsupportedModelError(ValueError):
    """Model that cannot be localized; the message says why."""

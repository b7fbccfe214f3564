"""Errors that name a value and what is accepted."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A value that is not accepted; the message names the field, the value and what is accepted."""


def suggestion(value: object, accepted: Iterable[str]) -> str:
    """Return `did you mean 'NAME'?` for a near miss, else `accepted: NAME, NAME`."""
    names = list(accepted)
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(names)}"

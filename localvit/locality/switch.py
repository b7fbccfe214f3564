"""Which forms compute: the fast ones where they apply, or the plain modules everywhere."""

import os

VARIABLE = "LOCALVIT_PLAIN"


def plain_forms() -> bool:
    """Whether the environment variable ``LOCALVIT_PLAIN`` is 1: plain modules everywhere, as a reference
    or to rule out a fast form. It is read at every call, so a program may set it while it runs.

    Raises:
        ValueError: for a value that is neither 0, 1 nor empty.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={value!r} is not accepted (accepted: 0, 1)")
    return value == "1"

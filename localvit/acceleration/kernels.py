"""Environment variable that turns off fast kernels."""

import os

from localvit.errors import ConfigError

VARIABLE = "LOCALVIT_KERNELS"


def plain_kernels() -> bool:
    """Return whether `LOCALVIT_KERNELS=plain` asks for plain modules, as a reference or to debug a fast form.

    The variable is read at every call, so a program may set it while it runs. Fused models ignore it.

    Raises:
        ConfigError: for a value that is neither `auto`, `plain` nor empty.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "auto", "plain"):
        raise ConfigError(f"{VARIABLE}={value!r} is not accepted; use auto or plain")
    return value == "plain"

"""Choice between the fast kernels and the plain modules."""

import os

from localvit.errors import ConfigError

VARIABLE = "LOCALVIT_KERNELS"


def plain_kernels() -> bool:
    """Return whether `LOCALVIT_KERNELS=plain` asks for plain modules: as a reference, or to rule out a fast
    form.

    The variable is read at every call, so a program may set it while it runs. A model that is fused already
    stays as it is.

    Raises:
        ConfigError: for a value that is neither `auto`, `plain` nor empty.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "auto", "plain"):
        raise ConfigError(f"{VARIABLE}={value!r} is not accepted; use auto or plain")
    return value == "plain"

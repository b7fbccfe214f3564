"""Description of the processor by the system."""

from contextlib import suppress
from pathlib import Path


def processor(field: str) -> str | None:
    """Return a field of `/proc/cpuinfo`, such as `vendor_id`; `None` without one."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None

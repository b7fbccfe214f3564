"""What something was run on: processor, threads, allocator, memory. Linux tells; elsewhere less is known."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from localvit.acceleration import processor

_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
_SETTINGS = re.compile(
    r"(OMP|MKL|KMP|GOMP|DNNL|ONEDNN|MALLOC|TCMALLOC|MIMALLOC|LOCALVIT)_\w+|_RJEM_MALLOC_CONF|GLIBC_TUNABLES"
)


def machine(threads: int) -> str:
    """Describe the processor, the number of threads used on it, and the GPU if there is one."""
    name = processor("model name") or platform.processor() or platform.machine()
    words = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def cpus() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocator() -> str:
    """Name the library that serves `malloc` in this process: a preloaded one, else the C library.

    Temporaries above 32 MB go back to the system at every `free` of glibc and must be mapped again, so
    times depend on it.
    """
    loaded = ""
    with suppress(OSError):
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = [name for name in _ALLOCATORS if re.search(rf"/lib{name}[^/\n]*\.so", loaded)]
    return ", ".join(found) or " ".join(filter(None, platform.libc_ver())) or "unknown"


def environment() -> dict[str, str]:
    """Return the environment variables that set threads, allocators and math libraries."""
    found = {name: value for name, value in sorted(os.environ.items()) if _SETTINGS.fullmatch(name)}
    preloaded = " ".join(Path(path).name for path in re.split(r"[ :]+", os.environ.get("LD_PRELOAD", "")))
    return found | ({"LD_PRELOAD": preloaded} if preloaded else {})


def memory_growth(work: Callable[[], object], device: torch.device) -> int | None:
    """Measure the bytes that a call of `work` holds at its peak beyond what was held before it.

    On a GPU these are torch's allocations; on a CPU the resident memory of the process, after the C library
    has returned its free memory. `None` if the system does not report it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    held = _status("VmRSS")
    work()
    peak = _status("VmHWM")
    return None if held is None or peak is None else max(0, peak - held)


def forget_peak_memory() -> None:
    """Reset the peak that `peak_memory` returns."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Return the peak in bytes: torch's allocations on a GPU, else the memory of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(field: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
    return None

"""Description of this machine and process: processor, threads, allocator, memory. Complete on Linux only."""

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
    """Describe the processor, the number of its threads, and the GPU if there is one."""
    name = processor("model name") or platform.processor() or platform.machine()
    words = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocator() -> str:
    """Return the library of `malloc` in this process: a preloaded one by name, else the C library's.

    glibc returns temporaries above 32 MB to the system at every `free`, so times depend on it.
    """
    loaded = ""
    with suppress(OSError):
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = [name for name in _ALLOCATORS if re.search(rf"/lib{name}[^/\n]*\.so", loaded)]
    return ", ".join(found) or " ".join(filter(None, platform.libc_ver())) or "unknown"


def environment() -> dict[str, str]:
    """Return the variables that control threads, allocators and numerical libraries."""
    found = {name: value for name, value in sorted(os.environ.items()) if _SETTINGS.fullmatch(name)}
    preloaded = " ".join(Path(path).name for path in re.split(r"[ :]+", os.environ.get("LD_PRELOAD", "")))
    return found | ({"LD_PRELOAD": preloaded} if preloaded else {})


def memory_growth(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of a call of `work` beyond that before it, in bytes.

    On a GPU this is torch's allocation; on a CPU the resident memory of the process, after the C library has
    released unused memory. `None` if the system does not report it.
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
    """Reset the peak of `peak_memory`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Return the peak of torch's GPU memory, if there is a GPU, else of this process's memory, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(field: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
    return None

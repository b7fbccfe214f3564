"""What a run was made with: processor, memory at its peak. Linux tells; elsewhere less is known."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch


def machine(threads: int) -> str:
    """The processor, the number of threads used on it, and the GPU if there is one, in words."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    words = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def forget_peak_memory() -> None:
    """Let `peak_memory` count from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Bytes that torch allocated on the GPU, where there is one; else of this process's memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return None

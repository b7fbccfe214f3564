"""Clean stop on SIGTERM and SIGINT: training stops after the current step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_requested = False


@contextmanager
def stop_on_signals(*others: int) -> Iterator[set[int]]:
    """Make `train` save a checkpoint and stop on SIGTERM or SIGINT; a second Ctrl-C stops it at once.

    This works in the main thread only. Without this context, Ctrl-C raises the usual `KeyboardInterrupt`, and
    the checkpoint is the last one saved.

    Args:
        others: Further signals that stop the training.

    Yields:
        The set of received signals, which grows as they arrive.
    """
    global _requested
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, *others)}
    received: set[int] = set()
    first = 0.0

    def request(number: int, _frame: FrameType | None) -> None:
        global _requested
        nonlocal first
        # A signal within a second may not be a second Ctrl-C: torchrun forwards signals to its processes.
        if _requested and number == signal.SIGINT and time.monotonic() - first > 1.0:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        received.add(number)
        _requested = True

    for number in before:
        signal.signal(number, request)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = False


def stop_requested() -> bool:
    """Return True if a signal has requested a stop."""
    return _requested

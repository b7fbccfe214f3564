"""A polite end: SIGTERM and SIGINT ask, training stops after the update under way."""

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
    """Within, SIGTERM or SIGINT makes `train` save its state and stop; a second Ctrl-C ends it at once.

    Only the main thread can do this. A library's caller who does not want it gets the usual
    `KeyboardInterrupt`, and the state is that of the last save.

    Args:
        others: Signals that ask too.

    Yields:
        Those that have come, as they come.
    """
    global _requested
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, *others)}
    received: set[int] = set()
    first = 0.0

    def request(number: int, _frame: FrameType | None) -> None:
        global _requested
        nonlocal first
        # Within a second it is not impatience: torchrun passes on what its processes got already.
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
    """Whether a signal has asked for the end."""
    return _requested

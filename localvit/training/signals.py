"""A polite end: SIGTERM and SIGINT ask, training stops after the update under way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_requested = False


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT makes `train` save its state and stop; a second one ends at once.

    Only the main thread can do this. A library's caller who does not want it gets the usual
    `KeyboardInterrupt`, and the state is that of the last save.
    """
    global _requested
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def request(_number: int, _frame: FrameType | None) -> None:
        global _requested
        _requested = True
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in _SIGNALS:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = False


def stop_requested() -> bool:
    """Whether a signal has asked for the end."""
    return _requested

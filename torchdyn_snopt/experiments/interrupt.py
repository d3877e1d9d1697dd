"""Ctrl-C and termination as a request that a training loop honours between two iterations."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody has asked the run to stop."""

    def __init__(self) -> None:
        """Nobody has yet."""
        self.asked = False

    def ask(self) -> None:
        """Ask the run to stop after the iteration that it is in."""
        self.asked = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) into a request; a second one interrupts at once.

    Outside the main thread, where Python delivers no signals, the request is only ever set by hand.

    Yields:
        The request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.ask()

    previous: dict[signal.Signals, Any] = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

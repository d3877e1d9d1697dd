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
def stop_on_signal(*, supervised: bool = False) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) into a request; a second one interrupts at once.

    Outside the main thread, where Python delivers no signals, the request is only ever set by hand.

    Args:
        supervised: Whether a launcher such as torchrun watches over this process: it repeats Ctrl-C
            to each, which then counts once, and a SIGTERM is its word that the job is over.

    Yields:
        The request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    signals = SIGNALS[:1] if supervised else SIGNALS

    def handle(number: int, frame: FrameType | None) -> None:
        if request.asked and not supervised:
            raise KeyboardInterrupt
        request.ask()

    previous: dict[signal.Signals, Any] = {each: signal.signal(each, handle) for each in signals}
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

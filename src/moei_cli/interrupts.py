"""Ctrl-C while a reply is being made: the first stops the reply, the second leaves."""

from __future__ import annotations

import contextlib
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Within the block, keys are kept for the next prompt but not shown: they would tear the streaming reply."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextlib.contextmanager
def stopping_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first SIGINT calls ``stop`` and the second raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        with _without_echo():
            yield
    finally:
        signal.signal(signal.SIGINT, previous)

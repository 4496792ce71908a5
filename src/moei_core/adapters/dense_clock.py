"""How long a processor computes the dense part of a model: linear layers, norms, attention, routers, embeddings.

What else a forward pass takes is the Python around them. Each thread has a clock of its own, since a device's stand-in
computes beside the engine's thread. Reading and setting one costs a tenth of a microsecond.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class _DenseClock(threading.local):
    seconds = 0.0


DENSE_CLOCK = _DenseClock()
"""Seconds of dense computing in this thread so far. Whoever computes something else in between sets it back."""


def timed(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """What ``function`` returns. Its time is dense computing, once, whatever it calls."""
    before, started = DENSE_CLOCK.seconds, time.perf_counter()
    result = function(*arguments, **named)
    DENSE_CLOCK.seconds = before + time.perf_counter() - started
    return result


class Timed:
    """A function that is ``timed``."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return timed(self._function, *arguments, **named)


def time_leaves(model: nn.Module, experts: Iterable[nn.Module]) -> None:
    """Time every module of ``model`` that has no others inside, but for what is part of ``experts``."""
    others = {id(module) for outer in experts for module in outer.modules()}
    for module in model.modules():
        if id(module) not in others and not any(True for _ in module.children()):
            module.forward = Timed(module.forward)

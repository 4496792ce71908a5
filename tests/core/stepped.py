"""A clock that only moves when a test moves it, and a device that does its work in the thread that waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moei_core.engine.devices import CpuDevice, Event, at_once


class SteppedClock:
    """In place of ``time.perf_counter`` while ``monkeypatch`` lasts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tick: float = 0.0) -> None:
        """tick: seconds that looking at the clock takes."""
        self.now, self._tick, self._patch = 1000.0, tick, monkeypatch
        monkeypatch.setattr(time, "perf_counter", self._look)

    def _look(self) -> float:
        self.now += self._tick
        return self.now

    def nap(self, seconds: float) -> None:
        self.now += seconds

    def slow(self, place: Any, name: str, seconds: float) -> list[int]:
        """Let ``place.name`` take ``seconds`` more. Returns the number of its calls so far, as it goes on."""
        original, calls = getattr(place, name), [0]

        def slowly(*arguments: object, **named: object) -> object:
            calls[0] += 1
            self.nap(seconds)
            return original(*arguments, **named)

        self._patch.setattr(place, name, slowly)
        return calls


class _Place:
    def __init__(self, queue: _Steps, number: int) -> None:
        self._queue, self._number = queue, number

    def done(self) -> bool:
        return self._queue.done >= self._number

    def wait(self) -> None:
        self._queue.run(self._number)


class _Steps:
    """Work in order, done when somebody waits for it."""

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self.done = 0

    def put(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def mark(self) -> _Place:
        return _Place(self, len(self._work))

    def run(self, number: int) -> None:
        with torch.inference_mode():
            while self.done < number:
                self._work[self.done]()
                self.done += 1


class SteppedDevice(CpuDevice):
    """Copies take ``copy_s`` and computing ``compute_s`` of a ``SteppedClock``, when the host waits for them.

    eager: copies are done as soon as they may be, still before anything is computed that does not have to be.
    """

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        super().close()
        self._eager = eager
        self.clock: SteppedClock | None = None
        self.copy_s = self.compute_s = 0.0
        self.copied = self.computed = 0
        self._copying, self._computing = _Steps(), _Steps()

    def _nap(self, seconds: float) -> None:
        if self.clock is not None:
            self.clock.nap(seconds)

    def copy_in(self, source: memoryview, target: torch.Tensor, after: Event | None) -> Event:
        def work() -> None:
            if after is not None:
                after.wait()
            self.copied += 1
            self._nap(self.copy_s)
            target.copy_(torch.frombuffer(source, dtype=torch.uint8))

        self._copying.put(work)
        end = self._copying.mark()
        if self._eager:
            end.wait()
        return end

    def compute(self, work: Callable[[], None]) -> None:
        def late() -> None:
            self.computed += 1
            self._nap(self.compute_s)
            work()

        self._computing.put(late)

    def compute_after(self, event: Event) -> None:
        self._computing.put(event.wait)

    def mark(self) -> Event:
        return self._computing.mark()

    def finish(self, before_waiting: Callable[[], None] = at_once) -> None:
        end = self.mark()
        before_waiting()
        end.wait()

    def close(self) -> None:
        """The threads have ended long ago."""

"""What the engine waits for when it waits for a device: a copy to it, or what it computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from moei_core.engine.devices import Event
from moei_core.engine.statistics import RuntimeStatistics

_Result = TypeVar("_Result")


class DeviceWaits:
    """Splits waiting for a device into ``link_s`` and ``device_wait_s`` of the statistics.

    A device computes in order, and stands still where a copy that it needs next is not there. So the host waits along
    the same way: until the device comes to such a place, which is computing, then for the copy, which is the link.
    """

    def __init__(self, statistics: RuntimeStatistics) -> None:
        self._statistics = statistics
        self._places: list[tuple[Event | None, Event]] = []

    def needs(self, before: Event | None, copy: Event) -> None:
        """What is computed from now on waits for ``copy``. before: where the device stands then; None: it is idle."""
        self._places.append((before, copy))

    def during(self, wait: Callable[[Callable[[], None]], _Result]) -> _Result:
        """What ``wait`` returns. It is given what it must call when it is about to wait, if it does."""
        spent, started = self._statistics, time.perf_counter()
        link = spent.link_s
        try:
            return wait(self._follow)
        finally:
            spent.device_wait_s += time.perf_counter() - started - (spent.link_s - link)

    def _follow(self) -> None:
        places, self._places = self._places, []
        # Copies are done in order: with the last one there, the host did not wait for any.
        if not places or places[-1][1].done():
            return
        for before, copy in places:
            if before is not None:
                before.wait()
            started = time.perf_counter()
            copy.wait()
            self._statistics.link_s += time.perf_counter() - started

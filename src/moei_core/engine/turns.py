"""The beginning and the end of a turn, as a runtime passes them on."""

from __future__ import annotations

import time
from collections.abc import Mapping

from moei_core.engine.statistics import RuntimeStatistics
from moei_core.scheduler import ExpertScheduler
from moei_core.trace.format import TraceEvent
from moei_core.trace.time_spent import PARTS


class Turns:
    """The part of an ``ExpertRuntime`` that turns begin and end with."""

    _scheduler: ExpertScheduler
    statistics: RuntimeStatistics

    def request_start(self) -> None:
        """A turn starts."""
        started = time.perf_counter()
        self._scheduler.request_start()
        self.statistics.turn_s += time.perf_counter() - started

    def request_end(self) -> None:
        """The turn is over, however it ended."""
        started = time.perf_counter()
        self._scheduler.request_end()
        self.statistics.turn_s += time.perf_counter() - started

    def note_times(self, split: Mapping[str, float]) -> None:
        """Keep the seconds of the turn that ended, by part, with what is recorded."""
        for part, seconds in split.items():
            self._note(TraceEvent.SPENT, PARTS.index(part), round(seconds * 1e9))

    def _note(self, kind: TraceEvent, a: int = 0, b: int = 0) -> None:
        raise NotImplementedError

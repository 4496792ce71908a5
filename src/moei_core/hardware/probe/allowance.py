"""The time that measuring may take.

How long a fixed number of samples takes depends on how slow a machine is and on who shares it. So every probe samples
until its part of the time is over, not until it has so many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Allowance:
    """Seconds that begin now. clock: seconds, as ``time.perf_counter``."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._started = clock()
        self._end = self._started + seconds

    @property
    def left(self) -> float:
        """Seconds until the end, never less than none."""
        return max(0.0, self._end - self.clock())

    @property
    def over(self) -> bool:
        return self.clock() >= self._end

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self._started

    def part(self, share: float, most: float = math.inf) -> Allowance:
        """A part that begins now: ``share`` of what is left, but no more than ``most`` seconds.

        Whoever takes too long takes it from all that come after.
        """
        return Allowance(min(most, share * self.left), self.clock)

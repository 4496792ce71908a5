"""``MemoryGovernor``: gives expert slots back before the system pages, and takes them again when it may.

A budget is made from the memory that is free at the start; other programs come and go. Experts that give way cost
reads, paging costs everything, so the pool shrinks at once and grows slowly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moei_core.hardware.system import MemoryFacts, Pressure, read_memory, read_pressure

_INTERVAL, _LONGEST_INTERVAL = 0.02, 0.1
"""Seconds between two looks. A look costs up to a millisecond where a model's weights keep the caches busy."""
_FASTEST = 3e9
"""Bytes that a program can take in a second: the next look comes before half of what may be taken is gone."""
_PRESSURE_INTERVAL = 0.1
"""Seconds over which faults are counted."""
_RESERVE_SHARE = 32
_LEAST_RESERVE = 256 << 20
_LARGEST_RESERVE = 1 << 30
_AHEAD = 4
"""Looks ahead: whoever takes memory goes on, and a layer that reads many experts delays the next look so much."""
_STALL = 0.10
"""Share of time lost to memory from which the system counts as short of it, whatever it says is available."""
_FAULTS = 50
"""Major faults of this process a second that mean the same: its own pages are being taken away."""
_PATIENCE = 5.0
"""Seconds without pressure before growing."""
_GROWTH = 8
"""Growing takes at most one part in so many of the whole pool at a time."""


@dataclass(frozen=True, slots=True)
class Resize:
    """One decision: from how many slots to how many, and why."""

    before: int
    after: int
    reason: str


@dataclass(slots=True)
class MemoryGovernor:
    """Decides how many slots a pool of ``slots`` may fill. Never fewer than ``working``.

    memory, pressure, clock: where facts come from; tests replace them. reserve: bytes to leave free, None: by the size
    of the memory. interval: least seconds between two looks. block: slots that growing takes at least. resizes: what
    was decided so far.
    """

    slots: int
    working: int
    slot_nbytes: int
    memory: Callable[[], MemoryFacts] = read_memory
    pressure: Callable[[], Pressure] = read_pressure
    clock: Callable[[], float] = time.monotonic
    reserve: int | None = None
    interval: float = _INTERVAL
    block: int = 1
    resizes: list[Resize] = field(default_factory=list)
    _current: int = field(init=False)
    _looked: float = field(init=False)
    _wait: float = field(init=False)
    _calm_since: float = field(init=False)
    _faults: int = field(init=False)
    _counted: float = field(init=False)
    _usable: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._current, self._wait = self.slots, self.interval
        self._looked = self._calm_since = self._counted = self.clock()
        self._faults = self.pressure().major_faults

    @property
    def current(self) -> int:
        """Slots that may be filled now."""
        return self._current

    def poll(self) -> int | None:
        """The new number of slots if it changed, None if not. Cheap: looks a few times a second at most."""
        now = self.clock()
        elapsed = now - self._looked
        if elapsed < self._wait:
            return None
        self._looked = now
        before = self._current
        reason = self._decide(now)
        if self._current == before:
            return None
        self.resizes.append(Resize(before, self._current, reason))
        return self._current

    def give_way(self, reason: str) -> int | None:
        """Memory was refused: the new number of slots, one growing step fewer; None if these are the least."""
        before = self._current
        self._current = max(self.working, before - max(1, self.slots // _GROWTH))
        self._calm_since = self.clock()
        if self._current == before:
            return None
        self.resizes.append(Resize(before, self._current, reason))
        return self._current

    def got(self, slots: int) -> None:
        """The growing that was decided last has been refused memory: there are only ``slots``."""
        if self.resizes and self.resizes[-1].after == self._current:
            decided = self.resizes.pop()
            if slots != decided.before:
                self.resizes.append(replace(decided, after=slots))
        self._current = slots
        self._calm_since = self.clock()

    def _decide(self, now: float) -> str:
        memory = self.memory()
        taken = 0 if self._usable is None else max(0, self._usable - memory.usable)
        self._usable = memory.usable
        reserve = self.reserve or min(max(memory.total // _RESERVE_SHARE, _LEAST_RESERVE), _LARGEST_RESERVE)
        if memory.cgroup is not None:
            # A limit of a few hundred megabytes cannot leave so much unused.
            reserve = min(reserve, memory.cgroup.limit // _RESERVE_SHARE)
        to_take = (memory.usable - reserve) / 2
        self._wait = max(self.interval, min(to_take / _FASTEST, _LONGEST_INTERVAL))
        short = reserve + min(_AHEAD * taken, reserve) - memory.usable
        reason = "other programs took memory"
        # PSI looks back ten seconds: with plenty free again it is the past, and the slots are not the cause.
        if short <= 0 and now - self._counted >= _PRESSURE_INTERVAL:
            pressure = self.pressure()
            faults = (pressure.major_faults - self._faults) / (now - self._counted)
            self._faults, self._counted = pressure.major_faults, now
            if memory.usable >= 4 * reserve:
                pass
            elif pressure.stall is not None and pressure.stall > _STALL:
                short, reason = reserve, "tasks wait for memory"
            elif faults > _FAULTS:
                short, reason = reserve, "pages of this process were taken away"
        if short > 0:
            self._calm_since = now
            self._current = max(self.working, self._current - -(-short // self.slot_nbytes))
            return reason
        spare = (memory.usable - 2 * reserve) // self.slot_nbytes
        if self._current < self.slots and spare >= self.block and now - self._calm_since >= _PATIENCE:
            step = max(self.block, self.slots // _GROWTH)
            self._current = min(self.slots, self._current + min(step, spare))
            self._calm_since = now - _PATIENCE + 1.0
            return "memory is free again"
        return ""

"""``CopiesAhead``: experts copied to a device before their router has asked for them.

A queue of copies cannot be overtaken. So no more is put into it at once than a demanded copy may wait for, and the rest
waits here: demanded copies go past it, and what a router has not chosen is forgotten without having moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable

from moei_core.engine.device_compute import DeviceExpert
from moei_core.engine.devices import Event
from moei_core.types import ExpertKey

AHEAD_S = 0.5e-3
"""Seconds that a demanded copy may wait for one that was put before it."""


class CopiesAhead:
    """What a ``DevicePlan`` prefetches: waiting in RAM, on its way, or there."""

    def __init__(
        self, copy: Callable[[ExpertKey], DeviceExpert], in_ram: Container[ExpertKey], at_once: int
    ) -> None:
        """copy: queues the copy of an expert that is complete ``in_ram``. at_once: copies on their way, at most."""
        self._copy, self._in_ram, self._at_once = copy, in_ram, at_once
        self._waiting: dict[ExpertKey, None] = {}
        self._copied: dict[ExpertKey, DeviceExpert] = {}
        self._under_way: deque[Event] = deque()

    def wish(self, keys: Iterable[ExpertKey]) -> None:
        """Copy these too, behind what is wished for already."""
        self._waiting.update(dict.fromkeys(keys))

    def advance(self) -> None:
        """Queue as many copies as may be on their way. To be called whenever there is a moment."""
        if not self._waiting:
            return
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft()
        for key in [key for key in self._waiting if key in self._in_ram]:
            if len(self._under_way) >= self._at_once:
                break
            self._begin(key)

    def take(self, key: ExpertKey) -> tuple[DeviceExpert, bool]:
        """(the expert that its router has chosen, whether it was there in time). One that waits is copied now."""
        in_time = key not in self._waiting
        if not in_time:
            self._begin(key)
        expert = self._copied.pop(key)
        return expert, in_time and expert.ready is not None and expert.ready.done()

    def cancel(self, key: ExpertKey) -> DeviceExpert | None:
        """Forget ``key``. Returns what has a device slot, None if it still waits.

        Its slot may be filled again at once: copies are done in order, so that a later one comes behind it.
        """
        if key in self._waiting:
            del self._waiting[key]
            return None
        return self._copied.pop(key, None)

    def leaving(self, key: ExpertKey) -> None:
        """RAM gives ``key`` up: if it waits, its copy is queued now, since the plan counts on it."""
        if key in self._waiting and key in self._in_ram:
            self._begin(key)

    def known(self, key: ExpertKey) -> bool:
        """Whether ``key`` is copied, or can be."""
        return key in self._copied or (key in self._waiting and key in self._in_ram)

    def keep_only(self, keys: Container[ExpertKey]) -> list[DeviceExpert]:
        """Forget all but ``keys``. Returns what has a device slot of the others."""
        gone = [key for key in (*self._waiting, *self._copied) if key not in keys]
        return [expert for key in gone if (expert := self.cancel(key)) is not None]

    def experts(self) -> list[DeviceExpert]:
        """Those that have a device slot."""
        return list(self._copied.values())

    def _begin(self, key: ExpertKey) -> None:
        del self._waiting[key]
        expert = self._copied[key] = self._copy(key)
        assert expert.ready is not None
        self._under_way.append(expert.ready)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._copied.clear()
        self._under_way.clear()

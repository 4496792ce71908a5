"""``TransferQueue``: experts on their way from the store to slots, while the model computes.

Demand loads come first, in the order they were asked for. Then what a long prompt streams: it is all but certain to be
demanded, so it keeps the link as busy as demand does. Prefetches use what demand leaves of the link: a chunk of theirs
is begun only while no demand waits for a reader and fewer than ``_PREFETCH_DEPTH`` chunks are being read, so a demand
load never waits for more than these (early preemption: ProMoE, arXiv 2410.22134, section 4). Readers do the work; what
the brain must know is handed over as events, in order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sized

from moei_core.config import CHUNK_NBYTES, READERS
from moei_core.engine.loads import Load, Step
from moei_core.engine.second_tries import complete, read_chunk
from moei_core.errors import ExpertReadError
from moei_core.store.base import ExpertStore, Extent, chunks
from moei_core.store.checksums import RunningChecksum
from moei_core.types import ExpertKey

PATIENCE_S = 60.0
"""Seconds without any progress after which a read counts as hanging."""

_CLOSING_S = 5.0
_PREFETCH_DEPTH = 2
"""Chunks under way, of demand too, below which a prefetch may begin one: a disk is not busy with a single one."""


class TransferQueue:
    """Two priorities over one store. For the engine's thread; only ``next_ready`` waits for the disk."""

    def __init__(
        self,
        store: ExpertStore,
        view: Callable[[int], memoryview],
        *,
        readers: int = READERS,
        chunk_nbytes: int = CHUNK_NBYTES,
        preempt: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """view: gives the bytes of a slot. chunk_nbytes, preempt: see ``Overlap``."""
        self._store, self._view = store, view
        self._chunk_nbytes, self._preempt, self._patience_s = chunk_nbytes, preempt, patience_s
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._active: set[Load] = set()
        self._demand: deque[Load] = deque()
        self._ready: deque[Load] = deque()
        self._wishes: deque[ExpertKey] = deque()
        self._spares: list[int] = []
        self._prefetches: dict[ExpertKey, Load] = {}
        self._current: Load | None = None
        self._stream: deque[ExpertKey] = deque()
        self._lent: list[int] = []
        self._streamed: Load | None = None
        self._events: deque[tuple[Step, Load]] = deque()
        self._returned: list[int] = []
        self._progress = 0.0
        self._reading = 0
        self._closing, self._serving = False, readers
        self._threads = [
            threading.Thread(target=self._serve, name=f"moei-reader-{i}", daemon=True) for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    def demand(self, key: ExpertKey, slot: int) -> None:
        """Bring ``key`` into ``slot``; ``next_ready`` hands it out."""
        with self._lock:
            load = self._new(key, slot, demand=True)
            self._demand.append(load)
            self._progress = time.monotonic()
            self._wake()

    def next_ready(self) -> Load:
        """The demand load that is complete (or has failed) first; waits for it.

        Raises: ExpertReadError when no read has made progress for a long time.
        """
        with self._lock:
            self._wait_for(self._ready)
            return self._ready.popleft()

    @property
    def has_ready(self) -> bool:
        """Whether ``next_ready`` would not wait."""
        return bool(self._ready)

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """Replace what is wished for: taken in this order while the link can take them and there is a spare slot."""
        with self._lock:
            self._wishes = deque(keys)
            self._wake()

    def stream(self, keys: Iterable[ExpertKey]) -> None:
        """Read these in this order into lent slots, as fast as the link is, while no demand waits for a reader."""
        with self._lock:
            self._stream = deque(keys)
            self._wake()

    def lend(self, slot: int) -> None:
        """Give the queue a free slot to stream into. ``end_stream`` returns it if it was not needed."""
        with self._lock:
            self._lent.append(slot)
            self._wake()

    def end_stream(self) -> None:
        """Begin no further streamed expert; slots that none has come back by ``take_returned``."""
        with self._lock:
            self._stream.clear()
            self._returned += self._lent
            self._lent.clear()

    def add_spare(self, slot: int) -> None:
        """Give the queue a slot to prefetch into."""
        with self._lock:
            self._spares.append(slot)
            self._wake()

    def end_prefetching(self) -> None:
        """Take back the slots to prefetch into, after every prefetch has been cancelled.

        They come by ``take_returned``, those of cancelled prefetches once no thread writes to them.
        """
        with self._lock:
            self._wishes.clear()
            self._returned += self._spares
            self._spares.clear()
            for load in self._active:
                if load.abandoned and not load.demand:
                    load.borrowed = True

    def take_events(self) -> list[tuple[Step, Load]]:
        """What became of prefetches since the last call. A finished load's slot is the caller's now.

        Also ends the wishes: the caller is about to decide anew, and nothing may begin behind its back.
        """
        with self._lock:
            self._wishes.clear()
            events = list(self._events)
            self._events.clear()
            for step, load in events:
                if step is not Step.STARTED:
                    del self._prefetches[load.key]
                if step is Step.FAILED:
                    self._spares.append(load.slot)
            return events

    def promote(self, key: ExpertKey) -> Load | None:
        """Make the prefetch of ``key``, unless there is none or a turn that failed began it, a demand load."""
        with self._lock:
            load = self._withdraw(key)
            if load is None:
                return None
            if load.excused:
                self._abandon(load)
                return None
            load.demand = True
            self._progress = time.monotonic()
            if load.settled:
                self._ready.append(load)
            elif load.waiting:
                self._demand.appendleft(load)
                self._wake()
            return load

    def cancel(self, key: ExpertKey) -> int:
        """Forget the prefetch of ``key``; its slot is free again once no thread writes to it. Returns the bytes
        that were begun in vain."""
        with self._lock:
            load = self._withdraw(key)
            if load is None:
                return 0
            begun = load.nbytes - sum(chunk.nbytes for chunk in load.waiting)
            self._abandon(load)
            return begun

    def abandon_demand(self) -> None:
        """Forget all demand loads and what is streamed, and wait, but not for a read that hangs, until no thread
        writes to their slots.

        ``take_returned`` gives the slots, also those that come back later. Prefetches that have begun go on, excused.
        """
        with self._lock:
            self._wishes.clear()
            for load in (*self._prefetches.values(), *(load for _, load in self._events)):
                load.excused = True
            self._demand.clear()
            self._returned += [load.slot for load in self._ready]
            self._ready.clear()
            self._returned += self._lent
            self._lent.clear()
            self._stream.clear()
            streamed = [key for key, load in self._prefetches.items() if load.borrowed]
            gone = [load for load in self._active if load.demand]
            for load in [*gone, *filter(None, map(self._withdraw, streamed))]:
                self._abandon(load)
            until = time.monotonic() + _CLOSING_S
            while any(load.abandoned for load in self._active) and time.monotonic() < until:
                self._news.wait(until - time.monotonic())

    def take_returned(self, wait: bool = False) -> list[int]:
        """The slots of abandoned demand loads and of ended streams that are free by now; wait: until there is one.
        Raises: ExpertReadError when no read has made progress for a long time.
        """
        with self._lock:
            if wait:
                self._progress = time.monotonic()
                self._wait_for(self._returned)
            slots, self._returned = self._returned, []
            return slots

    def close(self) -> None:
        """End the threads and the store. A read that hangs is left behind with its file, and ends with it."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        until = time.monotonic() + _CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not self._threads:
            self._store.close()

    def _wait_for(self, things: Sized) -> None:
        while not things:
            left = self._progress + self._patience_s - time.monotonic()
            if left <= 0:
                raise self._hanging()
            self._news.wait(left)

    def _new(self, key: ExpertKey, slot: int, demand: bool) -> Load:
        layout = self._store.layout(key)
        pieces = deque(chunks(layout, self._chunk_nbytes))
        running = RunningChecksum(pieces)
        load = Load(key, slot, self._view(slot), layout.nbytes, demand, pieces, len(pieces), running)
        self._active.add(load)
        return load

    def _withdraw(self, key: ExpertKey) -> Load | None:
        """Take a prefetch out of the events and the link's reach."""
        load = self._prefetches.pop(key, None)
        if load is not None and load.settled:
            self._events = deque(event for event in self._events if event[1] is not load)
        self._leave_link(load)
        return load

    def _leave_link(self, load: Load | None) -> None:
        if load is self._current:
            self._current = None
        if load is self._streamed:
            self._streamed = None

    def _abandon(self, load: Load) -> None:
        load.abandoned = True
        load.waiting.clear()
        if load.readers == 0:
            self._settle(load)

    def _settle(self, load: Load) -> None:
        """No thread writes to the slot any more, and none will."""
        load.settled = True
        self._active.discard(load)
        self._leave_link(load)
        if load.abandoned and (load.demand or load.borrowed):
            self._returned.append(load.slot)
        elif load.abandoned:
            self._spares.append(load.slot)
        elif load.demand:
            self._ready.append(load)
        elif not load.borrowed:
            self._events.append((Step.FINISHED if load.failure is None else Step.FAILED, load))
        self._wake()
        self._news.notify_all()

    def _hanging(self) -> ExpertReadError:
        names = sorted(str(load.key) for load in self._active if load.demand)
        files = sorted({str(e.file) for load in self._active for e in self._store.layout(load.key).extents})
        return ExpertReadError(
            f"Reading {', '.join(names[:3])} hangs.",
            f"{', '.join(files[:2])}: no answer for {self._patience_s:.0f} seconds.",
            "The conversation is as it was before this turn. Check the disk or the network it is on.",
        )

    def _serve(self) -> None:
        """The life of a reader thread. The last one closes the store."""
        while True:
            with self._lock:
                while not self._closing and (task := self._begin_chunk()) is None:
                    self._work.wait()
                if self._closing:
                    self._serving -= 1
                    last = not self._serving
                    break
            assert task is not None
            self._read(*task)
        if last:
            self._store.close()

    def _begin_chunk(self) -> tuple[Load, Extent] | None:
        """What is to be read now, which the caller must do; None: nothing."""
        load = self._demand[0] if self._demand else self._stream_task() or self._spare_link_task()
        if not self._preempt and self._current is not None and self._current.waiting:
            load = self._current
        if load is None:
            return None
        chunk = load.waiting.popleft()
        if load.demand and not load.waiting:
            self._demand.popleft()
        if not load.waiting and load is self._streamed:
            self._streamed = None
        load.readers += 1
        self._reading += 1
        return load, chunk

    def _wake(self) -> None:
        """Wake as many readers as there are chunks that one could begin now.

        One that is woken for nothing takes the interpreter's lock, and a processor, from whoever computes.
        """
        count = sum(len(load.waiting) for load in self._demand)
        if self._streamed is not None or (self._stream and self._lent):
            count = len(self._threads)
        elif not count and self._can_prefetch:
            count = _PREFETCH_DEPTH - self._reading
        if count > 0:
            self._work.notify(count)

    def _read(self, load: Load, chunk: Extent) -> None:
        failure = read_chunk(self._store, load.key, chunk, load.view)
        with self._lock:
            self._reading -= 1
            # Somebody else has the link while this thread computes.
            self._wake()
        if failure is None and not load.abandoned:
            load.running.arrived(chunk, load.view)
        with self._lock:
            load.missing -= 1
            if failure or load.failure or load.missing or load.readers > 1 or load.abandoned:
                self._leave(load, failure)
                return
        failure = complete(self._store, load.key, load.view, load.running)
        with self._lock:
            self._leave(load, failure)

    def _leave(self, load: Load, failure: Exception | None) -> None:
        """A reader is done with ``load``."""
        load.readers -= 1
        self._progress = time.monotonic()
        if failure is not None and load.failure is None:
            load.failure = failure
            load.waiting.clear()
            self._leave_link(load)
            if load in self._demand:
                self._demand.remove(load)
        if load.readers == 0 and not load.waiting:
            self._settle(load)

    def _stream_task(self) -> Load | None:
        """A streamed expert with a chunk left to read."""
        if self._streamed is None and self._stream and self._lent:
            load = self._new(self._stream.popleft(), self._lent.pop(), demand=False)
            load.borrowed = True
            self._streamed = self._prefetches[load.key] = load
        return self._streamed

    @property
    def _can_prefetch(self) -> bool:
        """Whether a prefetch has a chunk left to read, or another one can begin."""
        under_way = self._current is not None and bool(self._current.waiting)
        return under_way or bool(self._wishes and self._spares)

    def _spare_link_task(self) -> Load | None:
        """A prefetch with a chunk left to read, if the link can take one."""
        if self._reading >= _PREFETCH_DEPTH or not self._can_prefetch:
            return None
        if self._current is None or not self._current.waiting:
            load = self._new(self._wishes.popleft(), self._spares.pop(), demand=False)
            self._current = self._prefetches[load.key] = load
            self._events.append((Step.STARTED, load))
        return self._current

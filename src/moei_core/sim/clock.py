"""The cost model: carries plans out by advancing a clock over one compute lane and serial links.

It follows the engine: an absent expert is asked for as soon as a slot is free, whatever wave it is in; it is computed
as soon as it is there, and resident ones meanwhile; when all are asked for, a long prompt streams those of its next
layer into what becomes free, and prefetches use what the link has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from moei_core.scheduler import ExpertScheduler
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import Observer, PassAccesses
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase


@dataclass(slots=True)
class Costs:
    """What a replay took. Bytes by link; seconds of the compute lane, in use and waiting."""

    seconds: float = 0.0
    decode_seconds: float = 0.0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    demand_nbytes: int = 0
    prefetch_nbytes: int = 0
    disk_nbytes: int = 0
    link_nbytes: int = 0
    loads: int = 0
    ram_hits: int = 0
    tokens: int = 0
    decode_tokens: int = 0

    def perfect_overlap_seconds(self, hardware: Hardware) -> float:
        """The bound for these hits: the busiest of compute and links, everything else hidden behind it."""
        link = self.link_nbytes / hardware.link_bandwidth if hardware.has_gpu else 0.0
        return max(self.compute_seconds, self.disk_nbytes / hardware.disk_bandwidth, link)


@dataclass(slots=True)
class RamTier:
    """Experts that RAM holds beside VRAM, the least recently read going first."""

    capacity: int
    held: dict[Hashable, None] = field(default_factory=dict)

    def read(self, key: Hashable) -> bool:
        """Whether ``key`` was in RAM; afterwards it is."""
        found = key in self.held
        if found:
            del self.held[key]
        elif self.capacity and len(self.held) >= self.capacity:
            del self.held[next(iter(self.held))]
        if self.capacity:
            self.held[key] = None
        return found


@dataclass(slots=True)
class Links:
    """The serial links and when each is free again."""

    hardware: Hardware
    ram: RamTier
    costs: Costs
    disk_free: float = 0.0
    link_free: float = 0.0

    def load(self, nbytes: int, start: float, *, from_disk: bool, asked: float | None) -> float:
        """Move ``nbytes`` of one expert as soon as possible after ``start``; returns when they are there.

        From disk to VRAM the two links work as a pipeline, chunk by chunk. asked: when the load was asked for, if this
        is where it begins; None: the rest of one that has begun. The disk's latency counts from then on, so of several
        loads asked for together only the first one's shows.
        """
        machine, costs = self.hardware, self.costs
        arrived, begins = start, start
        chunk = min(nbytes, machine.chunk_nbytes)
        if from_disk:
            begins = max(start, self.disk_free, start if asked is None else asked + machine.disk_latency)
            self.disk_free = arrived = begins + nbytes / machine.disk_bandwidth
            begins += chunk / machine.disk_bandwidth
            costs.disk_nbytes += nbytes
        if machine.has_gpu:
            begins = max(begins, self.link_free) + (0.0 if asked is None else machine.link_latency)
            done = begins + nbytes / machine.link_bandwidth
            self.link_free = arrived = max(done, arrived + chunk / machine.link_bandwidth)
            costs.link_nbytes += nbytes
        return arrived

    @property
    def free(self) -> float:
        """When a prefetch may begin without delaying anything that has begun."""
        return max(self.disk_free, self.link_free)


class Clock(Observer):
    """Advances time for each plan."""

    def __init__(
        self, hardware: Hardware, expert_nbytes: Mapping[int, int], scheduler: ExpertScheduler
    ) -> None:
        """scheduler: told of prefetches that begin and end, and asked how many slots are free."""
        self.hardware, self._nbytes, self._scheduler = hardware, dict(expert_nbytes), scheduler
        self.costs = Costs()
        largest = max(self._nbytes.values())
        ram = RamTier(hardware.ram_nbytes // largest if hardware.has_gpu else 0)
        self.links = Links(hardware, ram, self.costs)
        self._now = 0.0
        # The prefetch in flight: its expert, the bytes still to move, whether they come from disk.
        self._flight: tuple[ExpertKey, int, bool] | None = None
        self._queue: list[ExpertKey] = []
        # When each streamed expert is there; a byte that has been asked for in vain was read all the same.
        self._streamed: dict[ExpertKey, float] = {}
        self._pass_start, self._pass_stall, self._tokens = 0.0, 0.0, 1
        self._phase = Phase.DECODE

    def begin_pass(self, one: PassAccesses) -> None:
        self._pass_start, self._pass_stall = self._now, self.costs.stall_seconds
        self._tokens, self._phase = one.tokens, one.phase
        self._dense()

    def _dense(self) -> None:
        seconds = self.hardware.dense_seconds * max(1.0, self._tokens / self.hardware.batch_tokens)
        self._now += seconds
        self.costs.compute_seconds += seconds

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        gate, nbytes = self._now, self._nbytes[access.layer]
        if self._flight is not None and self._flight[0] in plan.cancel:
            self._flight = None
        read_seconds, batch = nbytes / self.hardware.memory_bandwidth, self.hardware.batch_tokens
        counts = dict(zip(access.experts, access.token_counts, strict=True))
        seconds_of = {expert: read_seconds * max(1.0, count / batch) for expert, count in counts.items()}
        waiting = deque(key for wave in plan.waves for key in wave.load)
        leaving = {key for wave in plan.waves for key in wave.release}
        resident = deque(plan.waves[0].compute if plan.hits else ())
        # What stays has found its slot, emptied for it or empty before; the others pass through what is free.
        free = self._scheduler.free_slots + len(waiting) - len(leaving)
        ready: deque[tuple[float, ExpertKey]] = deque()
        for key in waiting:
            if key in self._streamed:
                ready.append((self._streamed[key], key))
                free -= 1
        waiting = deque(key for key in waiting if key not in self._streamed)
        self._streamed.clear()
        stream, may_load = deque(plan.stream), gate
        while ready or waiting or resident:
            while waiting and free > 0:
                key = waiting.popleft()
                ready.append((self._demand(key, nbytes, may_load), key))
                free -= 1
            if not waiting:
                free = self._read_ahead(stream, free, may_load)
            if ready and (ready[0][0] <= self._now or not resident):
                arrival, key = ready.popleft()
                self.costs.stall_seconds += max(0.0, arrival - self._now)
                self._now = max(self._now, arrival)
            else:
                key = resident.popleft()
            self._now += seconds_of[key.expert]
            self.costs.compute_seconds += seconds_of[key.expert]
            if key in leaving:
                free += 1
                may_load = self._now
        self._queue = list(plan.prefetch)
        if self._queue or self._flight is not None:
            self._prefetch(self._scheduler, gate, self._now + self.hardware.dense_seconds)
        self._dense()
        self._read_ahead(stream, free, may_load)

    def _read_ahead(self, stream: deque[ExpertKey], free: int, start: float) -> int:
        """Stream into ``free`` slots what has begun by now; how many are left."""
        while stream and free > 0 and max(self.links.free, start) < self._now:
            key = stream.popleft()
            self._streamed[key] = self._demand(key, self._nbytes[key.layer], start)
            free -= 1
        return free

    def _demand(self, key: ExpertKey, nbytes: int, start: float) -> float:
        self.costs.loads += 1
        if self._flight is not None and self._flight[0] == key:
            _, nbytes, from_disk = self._flight
            self._flight = None
            self.costs.demand_nbytes += nbytes
            if not nbytes:
                return max(start, self.links.free)
            return self.links.load(nbytes, start, from_disk=from_disk, asked=None)
        in_ram = self.links.ram.read(key) if self.hardware.has_gpu else False
        self.costs.ram_hits += in_ram
        self.costs.demand_nbytes += nbytes
        return self.links.load(nbytes, start, from_disk=not in_ram, asked=start)

    def _prefetch(self, scheduler: ExpertScheduler, gate: float, until: float) -> None:
        """Use what demand left of the link between two gates, a chunk at a time; the experts of the first are computed
        meanwhile."""
        links = self.links
        while max(links.free, gate) < until:
            if self._flight is None:
                if not self._queue:
                    return
                key = self._queue.pop(0)
                scheduler.start_load(key)
                in_ram = links.ram.read(key) if self.hardware.has_gpu else False
                self._flight = (key, self._nbytes[key.layer], not in_ram)
            key, left, from_disk = self._flight
            whole = self._nbytes[key.layer]
            chunk = min(left, self.hardware.chunk_nbytes)
            asked = gate if left == whole else None
            done = links.load(chunk, max(links.free, gate), from_disk=from_disk, asked=asked)
            self.costs.prefetch_nbytes += chunk
            left -= chunk
            self._flight = (key, left, from_disk)
            if not left and done <= until:
                self._flight = None
                scheduler.finish_load(key)
            elif not left:
                # Complete, but only after the gate has spoken: the next access settles it as late or wrong.
                return

    def end_pass(self) -> tuple[float, float]:
        costs = self.costs
        # Each layer's dense part was counted ahead of its gate; the last one is the next token's beginning.
        self._now -= self.hardware.dense_seconds * max(1.0, self._tokens / self.hardware.batch_tokens)
        costs.compute_seconds -= self.hardware.dense_seconds * max(
            1.0, self._tokens / self.hardware.batch_tokens
        )
        seconds = self._now - self._pass_start
        costs.seconds += seconds
        costs.tokens += self._tokens
        if self._phase is Phase.DECODE:
            costs.decode_seconds += seconds
            costs.decode_tokens += self._tokens
        return costs.stall_seconds - self._pass_stall, seconds

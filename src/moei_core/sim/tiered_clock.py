"""The cost model of the chain disk -> RAM -> GPU: carries out the plans of a ``TieredScheduler``.

Two compute lanes, the GPU's and the processor's, and two serial links. A layer ends when both lanes are done. As in the
engine there is one queue of copies, so a promotion that is under way delays the next copy, and an expert that is
still on its way when it is wanted is waited for. What is prefetched to the GPU moves while no other copy wants the
link; what is prefetched to RAM is read from the time a layer has all it needs until the next router speaks.
"""

from __future__ import annotations

from collections.abc import Mapping

from moei_core.scheduler import ExpertScheduler
from moei_core.sim.clock import Costs
from moei_core.sim.hardware import Hardware
from moei_core.sim.replay import Observer, PassAccesses
from moei_core.tiers import LinkCosts
from moei_core.types import ExpertKey, FetchPlan, LayerAccess, Phase


def link_costs(hardware: Hardware, ram_bandwidth: float) -> LinkCosts:
    """What the tier's rule is told about ``hardware``. ram_bandwidth: at which the processor computes experts."""
    return LinkCosts(hardware.link_bandwidth, hardware.link_latency, ram_bandwidth)


class TieredClock(Observer):
    """Advances time for each plan. late: prefetches to the GPU that were chosen before they were there."""

    def __init__(
        self,
        hardware: Hardware,
        ram_bandwidth: float,
        expert_nbytes: Mapping[int, int],
        scheduler: ExpertScheduler | None = None,
    ) -> None:
        """scheduler: told of prefetches to RAM that begin and end; None for plans without."""
        self.hardware, self._nbytes = hardware, dict(expert_nbytes)
        self._link = link_costs(hardware, ram_bandwidth)
        self.costs = Costs()
        self._now = self._disk_free = self._link_free = 0.0
        self._arrives: dict[ExpertKey, float] = {}
        self.late = 0
        self._scheduler = scheduler
        # Prefetches to the GPU whose copies have not begun, and since when they could; the prefetch to RAM in flight.
        self._ahead: dict[ExpertKey, float] = {}
        self._flight: tuple[ExpertKey, float] | None = None
        self._started, self._stalled = 0.0, 0.0
        self._phase, self._tokens = Phase.DECODE, 1

    def begin_pass(self, one: PassAccesses) -> None:
        self._started, self._stalled = self._now, self.costs.stall_seconds
        self._phase, self._tokens = one.phase, one.tokens

    def carry_out(self, access: LayerAccess, plan: FetchPlan) -> None:
        device = plan.device
        assert device is not None
        nbytes = self._nbytes[access.layer]
        counts = dict(zip(access.experts, access.token_counts, strict=True))
        self._now += self.hardware.dense_seconds * max(1.0, self._tokens / self.hardware.batch_tokens)
        gate = gpu = cpu = self._now
        self._copy_ahead(gate)
        for key in device.cancel:
            self._ahead.pop(key, None)
            self._arrives.pop(key, None)
        if self._flight is not None and self._flight[0] in plan.cancel:
            self._flight = None
        gpu_busy = cpu_busy = 0.0

        def on_gpu(key: ExpertKey) -> float:
            share = max(1.0, counts[key.expert] / self.hardware.batch_tokens)
            return nbytes / self.hardware.memory_bandwidth * share

        for key in device.hits:
            gpu = max(gpu, self._arrives.pop(key, 0.0)) + on_gpu(key)
            gpu_busy += on_gpu(key)
        for key in device.foreseen:
            there = self._arrives.pop(key, 0.0) if key not in self._ahead else self._copy(nbytes, gate)
            self._ahead.pop(key, None)
            self.late += there > gate
            gpu = max(gpu, there) + on_gpu(key)
            gpu_busy += on_gpu(key)
        may_load = gate
        for wave in plan.waves:
            ready = {key: self._demand(key, nbytes, may_load) for key in wave.load}
            for key in wave.compute:
                there = ready.get(key, gate)
                if key in device.copy:
                    gpu = max(gpu, self._copy(nbytes, there)) + on_gpu(key)
                    gpu_busy += on_gpu(key)
                    continue
                if key in device.promote:
                    self._arrives[key] = self._copy(nbytes, there)
                seconds = self._link.ram_seconds(nbytes, counts[key.expert])
                cpu = max(cpu, there) + seconds
                cpu_busy += seconds
            if wave.load:
                # The working set is full until these are computed.
                may_load = max(gpu, cpu)
        self._now = max(gpu, cpu)
        self.costs.stall_seconds += self._now - gate - max(gpu_busy, cpu_busy)
        self._ahead.update(dict.fromkeys(device.prefetch, gate))
        if plan.prefetch or self._flight is not None:
            self._read_ahead(plan, self._now + self.hardware.dense_seconds)

    def _copy_ahead(self, until: float) -> None:
        """Copies that begin while the link has nothing else to do, in the order of the plans."""
        for key, since in list(self._ahead.items()):
            if max(self._link_free, since) >= until:
                return
            del self._ahead[key]
            self._arrives[key] = self._copy(self._nbytes[key.layer], since)
            self.costs.prefetch_nbytes += self._nbytes[key.layer]

    def _read_ahead(self, plan: FetchPlan, until: float) -> None:
        """Prefetches to RAM that begin before the next router speaks."""
        scheduler = self._scheduler
        assert scheduler is not None, "this clock was made for plans that prefetch nothing to RAM"
        waiting = list(plan.prefetch)
        while True:
            if self._flight is not None:
                if self._flight[1] > until:
                    return
                scheduler.finish_load(self._flight[0])
                self._flight = None
            if not waiting or max(self._disk_free, self._now) >= until:
                return
            key = waiting.pop(0)
            scheduler.start_load(key)
            self._flight = key, self._read(self._nbytes[key.layer], self._now)

    def _demand(self, key: ExpertKey, nbytes: int, start: float) -> float:
        if self._flight is not None and self._flight[0] == key:
            (_, ready), self._flight = self._flight, None
            return ready
        return self._read(nbytes, start)

    def _read(self, nbytes: int, start: float) -> float:
        """When an expert is in RAM whose read may begin at ``start``."""
        machine = self.hardware
        # The disk's latency passes while others are read.
        begins = max(self._disk_free, start + machine.disk_latency)
        self._disk_free = begins + nbytes / machine.disk_bandwidth
        self.costs.disk_nbytes += nbytes
        self.costs.loads += 1
        return self._disk_free

    def _copy(self, nbytes: int, start: float) -> float:
        """When an expert is on the GPU that is in RAM at ``start``."""
        self._link_free = max(self._link_free, start) + self._link.copy_seconds(nbytes)
        self.costs.link_nbytes += nbytes
        return self._link_free

    def end_pass(self) -> tuple[float, float]:
        costs, seconds = self.costs, self._now - self._started
        costs.seconds += seconds
        costs.tokens += self._tokens
        if self._phase is Phase.DECODE:
            costs.decode_seconds += seconds
            costs.decode_tokens += self._tokens
        return costs.stall_seconds - self._stalled, seconds
